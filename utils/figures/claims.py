"""What the paper claims with each figure, put to the numbers of a run: claim, published, this run, holds or not.

Every claim is a function of one figure's numbers alone, so that the tests put the same ones to the saved data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from utils.figures.data import FigureData

NOISE = 0.1  # errors of equal widths differ by as much, relatively, from one initialisation to the next


@dataclass(frozen=True)
class Claim:
    """One claim of a figure. published, measured: for a reader; holds: None where this scale cannot tell; note: why."""

    figure: int
    text: str
    published: str
    measured: str
    holds: bool | None
    note: str = ""


def claims_of(figure: int, numbers: FigureData) -> list[Claim]:
    """The claims of a figure, put to its numbers."""
    return [Claim(figure, *claim) for claim in CLAIMS[figure](numbers)]


def _gaussian(numbers):
    p = numbers["p_values"]
    passed = (p > 0.01).mean()
    return [
        (
            "whitened weights are Gaussian along principal directions: not all p-values (KS test) are below 1 %",
            "8 of 9 above 1 %",
            f"{int((p > 0.01).sum())} of {p.size} above 1 % (median {np.median(p):.3f})",
            bool(passed > 0),
        )
    ]


def _bulk(numbers):
    coloured, white = numbers["outside_coloured"], numbers["outside_white"]
    return [
        (
            "at every layer fewer eigenvalues of whitened than of coloured weights lie outside the bulk",
            "21.1, 12.1, 26.8 % coloured; 1.6, 3.9, 8.4 % whitened",
            f"{_list(100 * coloured)} % coloured; {_list(100 * white)} % whitened",
            bool((white < coloured).all()),
        )
    ]


def _resampling(numbers):
    rainbow, trained, white = numbers["rainbow"], numbers["trained"], numbers["white"]
    gap = trained - rainbow
    return [
        (
            "the accuracy of rainbow networks rises with width towards that of trained ones",
            "54.8 to 84.7 %, 33.2 to 7.2 points below the trained",
            f"{rainbow[0]:.1f} to {rainbow[-1]:.1f} %, {gap[0]:.1f} to {gap[-1]:.1f} points below the trained",
            bool(_rises(rainbow, 2.0) and gap[-1] < gap[0]),
        ),
        (
            "training its classifier brings a rainbow network nearer to the trained one",
            "67.2 to 88.7 %",
            f"{numbers['retrained'][0]:.1f} to {numbers['retrained'][-1]:.1f} %",
            bool((numbers["retrained"] >= rainbow - 1).all()),
        ),
        (
            "rainbow networks with a trained classifier are above white random features (ours)",
            "not in the paper",
            f"by {_list(numbers['retrained'] - white)} points",
            bool((numbers["retrained"] > white).all()),
        ),
        (
            "rainbow networks with a rotated classifier beat white random features with a trained one (ours)",
            "not in the paper",
            f"by {_list(rainbow - white)} points",
            bool((rainbow > white).all()),
        ),
    ]


def _rises(values, noise):
    """Whether values rise from first to last, and no step falls by more than the noise."""
    return values[-1] > values[0] and (np.diff(values) > -noise).all()


def _falls(errors):
    """Whether errors fall from first to last, and no step rises by more than the noise."""
    return errors[-1] < errors[0] and (errors[1:] < (1 + NOISE) * errors[:-1]).all()


def _spectra(numbers):
    decades = {int(j): _decades(numbers[f"layer_{j}"]) for j in numbers["layers"]}
    return [
        (
            "activation spectra decay by at least two orders of magnitude",
            "plot only",
            ", ".join(f"{value:.1f} (j = {j})" for j, value in decades.items()) + " orders",
            bool(min(decades.values()) >= 2),
        )
    ]


def _decades(eigenvalues):
    positive = eigenvalues[eigenvalues > 1e-12 * eigenvalues[0]]
    return float(np.log10(positive[0] / positive[-1]))


def _alignment(numbers):
    claims = []
    published = {"scattering": "first layer about .35 to below .05, others .55-.67 to .16-.25", "resnet": "plot only"}
    for name, title in (("scattering", "scattering networks"), ("resnet", "ResNet-18")):
        errors = numbers[f"{name}_errors"]
        falls = [_falls(row) for row in errors]
        claims.append(
            (
                f"the alignment error to the widest network falls with width in every layer but noise ({title})",
                published[name],
                f"{sum(falls)} of {len(falls)} layers; mean {errors[:, 0].mean():.2f} to {errors[:, -1].mean():.2f}",
                bool(all(falls)),
            )
        )
    return claims


def _covariance(numbers):
    errors = numbers["errors"]
    full = numbers["clip_accuracies"][:, -1]
    ranks, accuracies = numbers["clip_ranks"], numbers["clip_accuracies"][-1]
    enough = int(ranks[np.argmax(accuracies >= full[-1] - 1)])
    return [
        (
            "the distance of weight covariances to those of the widest networks falls with width but noise",
            "plot only",
            "; ".join(f"{row[0]:.2f} to {row[-1]:.2f} (j = {j})" for j, row in zip(numbers["error_layers"], errors)),
            bool(all(_falls(row) for row in errors)),
        ),
        (
            "a few principal directions hold all the accuracy",
            "79.8 of 80.9 % at 40 of 320 directions",
            f"within 1 point of {full[-1]:.1f} % at {enough} of {ranks[-1]} directions",
            bool(enough <= ranks[-1] / 4),
        ),
    ]


def _imagenet(numbers):
    measured = []
    for name in ("scattering", "resnet"):
        decades = [_decades(numbers[f"{name}_activations_{j}"]) for j in numbers[f"{name}_layers"]]
        measured.append(min(decades))
    return [
        (
            "activation spectra of large networks decay fast at every layer",
            "plot only",
            f"at least {measured[0]:.1f} (scattering) and {measured[1]:.1f} (ResNet-18) orders",
            bool(min(measured) >= 2),
        )
    ]


def _clipping(numbers):
    claims, layers = [], numbers["layers"]
    tenth = {}
    for j in layers:
        ranks = numbers[f"ranks_{j}"]
        place = int(np.argmin(np.abs(ranks - ranks[-1] / 10)))
        tenth[int(j)] = [float(numbers[f"accuracy_{name}_{j}"][place]) for name in ("weight", "kernel", "random")]
    for j in layers[:2]:
        weight, kernel, chance = tenth[int(j)]
        claims.append(
            (
                f"clipped to a tenth of the rank, weight and kernel PCA are 10 points above random (j = {j})",
                "88.3, 87.8 and 58.1 % (j = 4)",
                f"{weight:.1f}, {kernel:.1f} and {chance:.1f} %",
                bool(min(weight, kernel) >= chance + 10),
            )
        )
    beside = "; ".join(f"{values[0]:.1f} and {values[1]:.1f} % (j = {j})" for j, values in tenth.items())
    claims.append(
        (
            "weight PCA needs no more directions than kernel PCA: as accurate at a tenth of the rank",
            "88.3 and 87.8 % (j = 4)",
            beside,
            bool(all(v[0] >= v[1] - 1 for v in tenth.values())),
        )
    )
    return claims


def _dynamics(numbers):
    final, cosine = numbers["amplification"][-1], numbers["cosine"][-1]
    third = max(len(final) // 3, 1)
    head, tail = np.exp(np.log(final[:third]).mean()), np.exp(np.log(final[-third:]).mean())
    return [
        (
            "training amplifies the weights along the first principal directions, less with rank",
            "plot only",
            f"{final[0]:.1f} in the first direction; mean {head:.2f} in the first third, {tail:.2f} in the last",
            bool(final[0] > 1.5 and head > tail),
        ),
        (
            "training amplifies the weights more than it turns them",
            "plot only",
            f"cosine similarity: median {np.median(cosine):.2f}, first direction {cosine[0]:.2f}",
            bool(np.median(cosine) > 0.5),
        ),
    ]


def _list(values):
    return ", ".join(f"{value:.1f}" for value in values)


CLAIMS: dict[int, Callable] = {
    1: _gaussian,
    2: _bulk,
    3: _resampling,
    4: _spectra,
    5: _alignment,
    6: _covariance,
    7: _imagenet,
    8: _clipping,
    9: _dynamics,
}


# --- Beside the paper: rows (what, published, this run) for the table under a figure of another scale --------------


def comparison(figure: int, numbers: FigureData, published: dict) -> list[tuple[str, str, str]]:
    """Rows (what, published, this run) of the numbers published for a figure; [] where none were."""
    rows = COMPARISONS.get(figure)
    return rows(numbers, published) if rows else []


def _compare_gaussian(numbers, published):
    rows = []
    for i, rank in enumerate(published["ranks"]):
        for k, layer in enumerate(published["layers"]):
            own = f"{numbers['p_values'][i, k]:.3f} (r = {numbers['ranks'][i]}, j = {numbers['layers'][k]})"
            rows.append((f"p-value, r = {rank}, j = {layer}", f"{published['p_values'][i][k]:.4g}", own))
    return rows


def _compare_bulk(numbers, published):
    return [
        (
            f"outside the bulk, {name}, j = {layer}",
            f"{100 * published[f'outside_{name}'][k]:.1f} %",
            f"{100 * numbers[f'outside_{name}'][k]:.1f} % (j = {numbers['layers'][k]})",
        )
        for name in ("coloured", "white")
        for k, layer in enumerate(published["layers"])
    ]


def _compare_resampling(numbers, published):
    rows = []
    for name, title in (("trained", "trained"), ("retrained", "rainbow + trained classifier"), ("rainbow", "rainbow")):
        own = dict(zip(numbers["widths"].tolist(), numbers[name].tolist()))
        rows += [
            (f"{title}, s = {width:g}", f"{value:.2f} %", f"{own[width]:.1f} %" if width in own else "")
            for width, value in zip(published["widths"], published[name])
        ]
    return rows


def _compare_alignment(numbers, published):
    errors, widths = numbers["scattering_errors"], numbers["scattering_widths"]
    rows = []
    for i, place in ((0, 0), (1, -1)):
        at = f"s = {published['widths'][i]:g}"
        here = f"(s = {widths[place]:g})"
        others = errors[1:, place]
        rows.append(
            (
                f"first layer, {at}",
                f"{'about' if i == 0 else 'below'} {published['first'][i]}",
                f"{errors[0, place]:.2f} {here}",
            )
        )
        rows.append(
            (
                f"other layers, {at}",
                f"{published['others_low'][i]} to {published['others_high'][i]}",
                f"{others.min():.2f} to {others.max():.2f} {here}" if len(others) else "",
            )
        )
    return rows


def _compare_covariance(numbers, published):
    ranks, accuracies = numbers["clip_ranks"], numbers["clip_accuracies"][-1]
    rows = []
    for rank, value in zip(published["ranks"], published["accuracies"]):
        place = int(np.argmin(np.abs(ranks - rank / published["ranks"][-1] * ranks[-1])))
        rows.append(
            (
                f"clipped to d = {rank} of {published['ranks'][-1]}",
                f"{value:.1f} %",
                f"{accuracies[place]:.1f} % (d = {ranks[place]} of {ranks[-1]})",
            )
        )
    return rows


def _compare_imagenet(numbers, published):
    return [
        (f"top-5 accuracy, {name}", f"{value} %", f"{numbers[f'{name}_acc5']:.1f} %")
        for name, value in published["acc5"].items()
    ]


def _compare_clipping(numbers, published):
    rows = []
    for (layer, bases), own in zip(published["layers"].items(), numbers["layers"]):
        ranks = numbers[f"ranks_{own}"]
        for name, values in bases.items():
            for step, value in list(zip(published["steps"], values))[1:7]:
                place = int(np.argmin(np.abs(ranks - step / published["of"] * ranks[-1])))
                rows.append(
                    (
                        f"{name} basis, j = {layer}, d = {2 * step} % of D",
                        f"{value:.1f} %",
                        f"{numbers[f'accuracy_{name}_{own}'][place]:.1f} % (j = {own})",
                    )
                )
    return rows


COMPARISONS = {
    1: _compare_gaussian,
    2: _compare_bulk,
    3: _compare_resampling,
    5: _compare_alignment,
    6: _compare_covariance,
    7: _compare_imagenet,
    8: _compare_clipping,
}
