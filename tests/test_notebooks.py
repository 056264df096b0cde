"""The notebooks: committed as run, run again, and the tutorial held to what its text says."""

import contextlib
import io
import re
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

from tests.conftest import ROOT
from utils.figures.catalogue import FIGURES


def read(name):
    return nbformat.read(ROOT / name, as_version=4)


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name, pictures", [("tutorial.ipynb", 10), ("paper_figs.ipynb", len(FIGURES))])
def test_notebooks_are_committed_as_run(name, pictures):
    path, book = ROOT / name, read(name)
    nbformat.validate(book)
    assert path.stat().st_size < 700_000
    assert book.metadata.kernelspec.name == "python3"
    cells = code_cells(book)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= pictures
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    text = re.sub(r'"image/png": "[^"]*"', "", path.read_text())
    assert not re.search(r"/(home|Users|root|tmp|work|usr|opt|var)/|[A-Z]:\\\\", text)


# the paper's figures


def test_the_figures_are_drawn_from_the_kept_numbers():
    book = read("paper_figs.ipynb")
    parameters = code_cells(book)[0].source
    assert 'SCALE = "laptop"' in parameters and "RECOMPUTE = False" in parameters
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    cells = [cell for cell in code_cells(book) if cell.source.startswith("gallery.show(")]
    assert [cell.source for cell in cells] == [f"gallery.show({number})" for number in FIGURES]
    for cell in cells:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), f"{cell.source} draws nothing"


# the tutorial


def run(sources, variables):
    """Run cells in one namespace. Returns what each of them printed."""
    printed, threads = [], torch.get_num_threads()
    for source in sources:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(source.replace("%matplotlib inline\n", ""), variables)
        printed.append(out.getvalue())
        plt.close("all")
    torch.set_num_threads(threads)
    return printed


def test_the_tutorial_explains_before_and_after():
    text = "\n".join(cell.source for cell in read("tutorial.ipynb").cells if cell.cell_type == "markdown")
    assert text.count("**Expect**") >= 8 and text.count("**Seen:**") >= 10
    assert text.count("<details>") == text.count("</details>") == len(re.findall(r"\*\*Exercise \d\.", text)) == 3
    for published in ("42.4 %", "30.6 %", "57.4 %", "40.3 %", "92.3 %", "87.9 %"):
        assert published in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_the_tutorial_runs_and_its_text_holds():
    """One test, so that one process runs the notebook once."""

    def words(text):
        return re.sub(r"\s+", " ", re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", text))

    book, variables = read("tutorial.ipynb"), {}
    printed = run([cell.source for cell in code_cells(book)], variables)
    for cell, fresh in zip(code_cells(book), printed):
        committed = "".join(output.text for output in cell.outputs if output.output_type == "stream")
        assert words(committed) == words(fresh)  # only digits may differ
    solutions = [code for cell in book.cells for code in re.findall(r"```python\n(.*?)```", cell.source, re.DOTALL)]
    assert len(solutions) == 3
    run(solutions, variables)
    n = SimpleNamespace(**variables)
    few_directions_matter(n)
    training_lifts_few_eigenvalues(n)
    networks_agree_once_aligned(n)
    rainbow_networks_come_close(n)
    the_cnn_shows_the_same(n)
    the_exercises_have_their_solutions(n)


def few_directions_matter(n):
    assert 97 < n.accuracy_a < 100 and 97 < n.accuracy_b < 100 and n.accuracy_initial < 20
    assert all(n.phi_share[j][1] > 40 and n.phi_share[j][10] > least for j, least in ((1, 80), (2, 95)))
    assert all(curve[1] < 12 and curve[15] > n.accuracy_a - 3 for curve in n.clip_phi.values())


def training_lifts_few_eigenvalues(n):
    assert all(7 <= counts["above the first initial one"] <= 13 for counts in n.learned.values())
    assert 1.7 < n.learned[1]["trained/initial"] < 2.6 and 6 < n.learned[2]["trained/initial"] < 9
    for curves in n.clip_weights.values():
        weights, activations, chance = (curves[basis][9] for basis in ("weights", "activations", "random basis"))
        assert n.accuracy_a - 2.7 < weights > activations > chance + 20 and chance < n.accuracy_a / 2 + 12


def networks_agree_once_aligned(n):
    explained = n.explained
    assert all(difference < 25 for difference in n.spectrum_difference.values())
    assert n.overlap_before[1] > 4 * n.chance[1] and n.overlap_before[2] < 2 * n.chance[2] and n.overlap_after > 0.7
    for j in (1, 2):
        assert explained["a to b"][j] > 0.93 and explained["a to b, on the training pictures"][j] > 0.93
        assert explained["a to b, not aligned"][j] < 0 < explained["untrained a to untrained b"][j] - 0.8
        assert n.phi_overlap[j]["before"] < 0.1 and n.phi_overlap[j]["after"] > 0.9
    mixed = explained["untrained a to trained b"]
    assert 0.8 < mixed[1] < 0.92 and 0.2 < mixed[2] < 0.35
    assert abs(n.cosines["before"]) < 0.1 and n.cosines["after"] > 0.85


def rainbow_networks_come_close(n):
    rainbow, white = n.resampled["rainbow"], n.resampled["white"]
    assert n.accuracy_a - 4 < n.accuracy_rainbow < n.accuracy_a and n.accuracy_forgetful < 20
    assert rainbow.min() > white.max() and 100 - white.mean() > 2 * (100 - rainbow.mean())


def the_cnn_shows_the_same(n):
    explained, overlap = n.explained_cnn, n.overlap_cnn
    assert 0.63 < explained["f to g"][1] < 0.77 and 0.68 < explained["f to g"][2] < 0.82
    assert max(explained["f to g, not aligned"][1:]) < 0 and explained["untrained f to trained g"][2] < 0.25
    assert overlap["before"] < 4 * overlap["chance"] and overlap["after"] > 10 * overlap["chance"]
    assert n.clip_cnn["weights"][9] > max(n.accuracy_f - 4, n.clip_cnn["random basis"][9] + 20)
    rainbow, white = (n.resampled_cnn[kind].mean() for kind in ("rainbow", "white"))
    assert 2 < n.accuracy_f - rainbow < 7.5 and 6 < rainbow - white < 16


def the_exercises_have_their_solutions(n):
    assert abs(n.accuracy_permuted - n.accuracy_a) < 0.5 and n.permuted_share[1] > 0.9999 and n.found > 0.99
    assert n.change["permuted"] < 1e-3 and n.change["rotated"] > 0.27
    assert n.accuracy_a - 8 < n.accuracy_rotated < n.accuracy_a
    assert n.by_width[1 / 8] < min(92.5, n.by_width[1 / 2]) and n.by_width[1 / 2] < n.by_width[4] > n.accuracy_a - 2
    own = n.by_kind["its own covariances"]
    assert n.by_kind["layer 2: random eigenvectors"] < n.by_kind["layer 2: white"] < own - 1
    assert abs(n.by_kind["covariances of b"] - own) < 1.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_the_tutorial_runs_on_gray_standardised_photographs(monkeypatch):
    def photographs(root, train, download):
        targets = np.arange(400 if train else 100) % 10
        images = np.random.RandomState(int(train)).randint(0, 128, (len(targets), 32, 32, 3))
        images[np.arange(len(targets)), 3 * targets] += 127  # a bright line says the class
        return SimpleNamespace(data=images.astype("uint8"), targets=targets.tolist())

    monkeypatch.setattr("torchvision.datasets.CIFAR10", photographs)
    sources = [cell.source for cell in code_cells(read("tutorial.ipynb"))]
    for before, after in (('DATA = "digits"', 'DATA = "cifar10"'), ("DRAWS = 5", "DRAWS = 1")):
        assert before in sources[0]
        sources[0] = sources[0].replace(before, after)
    variables = {}
    run(["import torch\ntorch.set_num_threads(1)", *sources], variables)
    data = variables["data"]
    assert (len(data.x_train), len(data.x_test), data.shape) == (400, 100, (1, 32, 32))
    assert abs(data.x_train.mean()) < 1e-5 and abs(data.x_train.std() - 1) < 1e-5
    gray = photographs(None, False, True).data.mean(3)
    assert np.corrcoef(gray.ravel(), data.x_test.cpu().numpy().ravel())[0, 1] > 1 - 1e-6
    assert variables["C_phi"][0].shape == (1024, 1024)
