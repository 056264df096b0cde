"""Flags of the authors' program that are none of this one's: what each does there, and what to do here."""

from utils.errors import UserError

_UNUSED = "has no effect; here leave it out"
_MIXTURE = "belongs to a classifier of Gaussian mixtures, at which it stops; here the classifier is linear"
_FOURIER = "belongs to windowed Fourier and cosine blocks, at which it stops; here Fw is a wavelet transform"
_GROUPS = "splits projections into groups of channels; here a projection mixes all of its input's channels"
_FRAMES = "belongs to frames on groups of channels, at which it stops; here FrhoF has one frame"
_OLDER = "reads checkpoints of an older version of it; here --resume FILE --loose-resume takes what fits"

FOREIGN = {
    "--start-epoch": "counts epochs from another number than 0; here --resume FILE and the run itself know their epoch",
    "--checkpoint-frequency": "has no effect; there and here epochs 0, 1, 2, 5, 10, 20, 50, … are kept",
    "--tensor-blocks": "copies maps between blocks and changes no number; here leave it out",
    "--complex": "is given up there too; there and here Pr has real weights, Pc complex ones",
    "--L-kernel-size": "allows 1 alone; here projections are 1×1",
    "--load-proj": _OLDER,
    "--load-dict": _OLDER,
    "--diagonal-analysis": _FRAMES,
    "--analysis-preserve-groups": _FRAMES,
    **dict.fromkeys(("--separate-orders", "--diagonal-orders", "--separate-freqs"), _GROUPS),
    **dict.fromkeys(("--separate-angles", "--separate-packets", "--throw-packets"), _UNUSED),
    **dict.fromkeys(("--scattering-order2", "--scattering-J"), _UNUSED),
    **dict.fromkeys(("--classifier-type", "--gmm-lambda", "--gmm-std", "--gmm-alpha", "--lr-gmm-std"), _MIXTURE),
    **dict.fromkeys(("--stft-window", "--stft-size", "--stft-stride"), _FOURIER),
    **dict.fromkeys(("--dct-type", "--dct-ortho", "--dct-size", "--dct-stride"), _FOURIER),
}
_REVISED = ("tanh", "sigmoid", "pow", "powfixed")  # non-linearities that were other functions


def upgraded(stored):
    """Stored arguments as they are now. Raises UserError for those of an earlier version that differed in silence."""
    if "lambda_star" in stored:
        return stored
    name = stored.get("standard_non_linearity")
    for differs, what in (
        (name in _REVISED, f"--standard-non-linearity {name} was another function"),
        (stored.get("randomize_labels") is not None, "--randomize-labels drew other labels"),
    ):
        if differs:
            raise UserError(f"of an earlier version, in which {what}; train it anew (--overwrite)")
    has_frame = any("FrhoF" in value for value in stored.values() if isinstance(value, list))
    return {**stored, "lambda_star": [0.0] * stored.get("n_blocks", 1)} if has_frame else stored
