"""The paper's claims, checked against numbers: claim, published, this run, holds or not.

One function per figure, named like it, yields (claim, published, measured, holds) from the figure's numbers and the
published ones alone, so that the command, the notebook and the tests check the same claims.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NOISE = 0.1  # relative difference of errors between initialisations of the same width
PLOT, OURS = "plot only", "not in the paper"


@dataclass(frozen=True)
class Claim:
    """A claim of figure `figure`: in words, what was published, what this run measured, and whether it holds."""

    figure: int
    text: str
    published: str
    measured: str
    holds: bool


def gaussian_histograms(numbers, paper):
    def above(p):
        return f"{(p > 0.01).sum()} of {p.size} above 1 %"

    p = numbers["p_values"]
    claim = "whitened weights are Gaussian along principal directions: not all p-values (KS test) are below 1 %"
    yield claim, above(paper["p_values"]), f"{above(p)} (median {np.median(p):.3f})", (p > 0.01).any()


def marchenko_pastur(numbers, paper):
    def outside(n):
        words = (("coloured", "coloured"), ("white", "whitened"))
        return "; ".join(f"{_list(100 * n[f'outside_{name}'])} % {word}" for name, word in words)

    claim = "at every layer fewer eigenvalues of whitened than of coloured weights lie outside the bulk"
    holds = (numbers["outside_white"] < numbers["outside_coloured"]).all()
    yield claim, outside(paper), outside(numbers), holds


def resampling_width(numbers, paper):
    def approach(n):
        return f"{_ends(n['rainbow'])} %, {_ends(n['trained'] - n['rainbow'])} points below trained networks"

    rainbow, retrained, white = numbers["rainbow"], numbers["retrained"], numbers["white"]
    gap = numbers["trained"] - rainbow
    rises = rainbow[-1] > rainbow[0] and (np.diff(rainbow) > -2).all()
    claim = "the accuracy of rainbow networks rises with width towards that of trained networks"
    yield claim, approach(paper), approach(numbers), rises and gap[-1] < gap[0]
    claim = "training its classifier brings a rainbow network closer to the trained one"
    yield claim, f"{_ends(paper['retrained'])} %", f"{_ends(retrained)} %", (retrained >= rainbow - 1).all()
    claim = "rainbow networks with a trained classifier beat white random features (ours)"
    yield claim, OURS, f"by {_list(retrained - white)} points", (retrained > white).all()
    claim = "rainbow networks with a rotated classifier beat white random features with a trained one (ours)"
    yield claim, OURS, f"by {_list(rainbow - white)} points", (rainbow > white).all()


def activation_spectra(numbers, paper):
    decades = {j: _decades(numbers[f"layer_{j}"]) for j in numbers["layers"]}
    measured = ", ".join(f"{value:.1f} (j = {j})" for j, value in decades.items()) + " orders"
    yield "activation spectra decay by at least two orders of magnitude", PLOT, measured, min(decades.values()) >= 2


def alignment_convergence(numbers, paper):
    first, low, high = paper["scattering_errors"]
    ranges = " to ".join(f"{a:.2f}-{b:.2f}" for a, b in zip(low, high))
    published = f"first layer about {first[0]:.2f} to below {first[1]:.2f}, others {ranges}"
    for name, title, known in (("scattering", "scattering networks", published), ("resnet", "ResNet-18", PLOT)):
        errors = numbers[f"{name}_errors"]
        falls = [_falls(row) for row in errors]
        claim = f"the alignment error to the widest network falls with width in every layer, up to noise ({title})"
        yield claim, known, f"{sum(falls)} of {len(falls)} layers; mean {_ends(errors.mean(axis=0), 2)}", all(falls)


def covariance_convergence(numbers, paper):
    claim = "the distance of weight covariances to those of the widest networks falls with width, up to noise"
    measured = [f"{_ends(row, 2)} (j = {j})" for j, row in zip(numbers["error_layers"], numbers["errors"])]
    yield claim, PLOT, "; ".join(measured), all(map(_falls, numbers["errors"]))
    ranks, accuracies = paper["clip_ranks"], paper["clip_accuracies"][-1]
    eighth = nearest(ranks, ranks[-1] / 8)
    published = f"{accuracies[eighth]:.1f} of {accuracies[-1]:.1f} % at {ranks[eighth]} of {ranks[-1]} directions"
    ranks, accuracies = numbers["clip_ranks"], numbers["clip_accuracies"][-1]
    enough = ranks[np.argmax(accuracies >= accuracies[-1] - 1)]
    measured = f"within 1 point of {accuracies[-1]:.1f} % at {enough} of {ranks[-1]} directions"
    yield "a few principal directions carry all the accuracy", published, measured, enough <= ranks[-1] / 4


def imagenet_spectra(numbers, paper):
    def slowest(name):
        return min(_decades(numbers[f"{name}_activations_{j}"]) for j in numbers[f"{name}_layers"])

    scattering, resnet = slowest("scattering"), slowest("resnet")
    measured = f"at least {scattering:.1f} (scattering) and {resnet:.1f} (ResNet-18) orders"
    yield "activation spectra of large networks decay fast at every layer", PLOT, measured, min(scattering, resnet) >= 2


def clipping(numbers, paper):
    def at_a_tenth(n, j, ranks):
        place = nearest(ranks, ranks[-1] / 10)
        return [n[f"accuracy_{basis}_{j}"][place] for basis in ("weight", "kernel", "random")]

    tenth = {j: at_a_tenth(numbers, j, numbers[f"ranks_{j}"]) for j in numbers["layers"]}
    published = at_a_tenth(paper, 4, paper["ranks"])
    words = "{:.1f}, {:.1f} and {:.1f} %"
    for j, values in list(tenth.items())[:2]:
        claim = f"clipped to a tenth of the rank, weight and kernel PCA beat a random basis by 10 points (j = {j})"
        holds = min(values[:2]) >= values[2] + 10
        yield claim, words.format(*published) + " (j = 4)", words.format(*values), holds
    words = "{:.1f} and {:.1f} % (j = {})"
    claim = "weight PCA needs no more directions than kernel PCA: as accurate at a tenth of the rank"
    measured = "; ".join(words.format(*values[:2], j) for j, values in tenth.items())
    holds = all(weight >= kernel - 1 for weight, kernel, _ in tenth.values())
    yield claim, words.format(*published[:2], 4), measured, holds


def training_dynamics(numbers, paper):
    final, cosine = numbers["amplification"][-1], numbers["cosine"][-1]
    third = max(len(final) // 3, 1)
    head, tail = np.exp(np.log(final[:third]).mean()), np.exp(np.log(final[-third:]).mean())
    claim = "training amplifies the weights along the first principal directions, less with rank"
    measured = f"{final[0]:.1f} in the first direction; mean {head:.2f} in the first third, {tail:.2f} in the last"
    yield claim, PLOT, measured, final[0] > 1.5 and head > tail
    measured = f"cosine similarity: median {np.median(cosine):.2f}, first direction {cosine[0]:.2f}"
    yield "training amplifies the weights more than it rotates them", PLOT, measured, np.median(cosine) > 0.5


def nearest(values, target):
    """Position of the value closest to the target."""
    return int(np.argmin(np.abs(values - target)))


def _falls(errors):
    """Whether errors fall from first to last and no step rises by more than the noise."""
    return errors[-1] < errors[0] and (errors[1:] < (1 + NOISE) * errors[:-1]).all()


def _decades(eigenvalues):
    """Orders of magnitude between the first eigenvalue and the last that is not a rounding error."""
    positive = eigenvalues[eigenvalues > 1e-12 * eigenvalues[0]]
    return np.log10(positive[0] / positive[-1])


def _ends(values, digits=1):
    return f"{values[0]:.{digits}f} to {values[-1]:.{digits}f}"


def _list(values):
    return ", ".join(f"{value:.1f}" for value in values)
