"""The numbers the paper's authors published with their figures: notebook_data/published.json, read without torch.

Taken from the figures, the authors' notebook and its precomputed data (Guth, Ménard, Rochette, Mallat, "A Rainbow in
Deep Network Black Boxes", JMLR 25 (2024), arXiv 2305.18512); CIFAR-10 unless the note says otherwise.
"""

from pathlib import Path

from utils.files import read_json

PATH = Path(__file__).parents[2] / "notebook_data" / "published.json"


def load_published():
    """{figure's name: {"source": figure of the paper, "note": what is listed, name: number or nested list}}.

    Names and shapes are those of our own numbers (utils/figures/numbers.py), for example

        resampling_width: widths, trained, retrained, rainbow    top-1 in percent, one number per width
        imagenet_spectra: scattering_acc5, resnet_acc5           top-5 in percent
        clipping: ranks, in 50ths of D; accuracy_weight_4, ...   top-1 in percent, layer 4, weight PCA; [-1]: full rank
        covariance_convergence: clip_accuracies                  top-1 in percent (counts, ranks); [0][-1]: full rank

    Raises UserError if the file is missing or damaged.
    """
    return read_json(PATH)
