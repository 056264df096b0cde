"""The paper's nine figures drawn from their numbers: axes in, axes out.

Every function takes matplotlib axes by name, the numbers (numbers.py says what they hold) and the published ones if
they are to be drawn too. Style comes from a file of `STYLES`.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from scipy import stats

from rainbow.random_matrix import Decay, bulk_edges, marchenko_pastur_density
from utils.figures.data import FigureData

_PAPER = Path(__file__).with_name("paper.mplstyle")
STYLES = {"paper": [_PAPER], "poster": [_PAPER, _PAPER.with_name("poster.mplstyle")]}
BASES = {
    "weight": ("weight PCA", "tab:blue", "-"),
    "kernel": ("kernel PCA", "tab:green", "--"),
    "random": ("random basis", "tab:red", "-."),
}
NETWORKS = {"scattering": "scattering network", "resnet": "ResNet-18"}
ACCURACY = "test accuracy (top-1, %)"

Panels = dict[str, Axes]
Published = FigureData | None


def shades(name: str, count: int, first: float = 0.0, last: float = 0.8) -> list:
    """`count` colours of a colour map, evenly spaced over a part of it."""
    return [matplotlib.colormaps[name](value) for value in np.linspace(first, last, count)]


def width_label(width: float) -> str:
    """A width scaling as a power of two, for a legend."""
    exponent = np.log2(width)
    return f"$2^{{{exponent:g}}}$" if exponent % 1 == 0 else f"{width:g}"


def gaussian_histograms(axes: Panels, numbers: FigureData, published: Published = None) -> None:
    """Figure 1: whitened aligned weights along principal directions (rows), by layer, against N(0, 1)."""
    x = np.linspace(-4, 4, 201)
    for row, rank in enumerate(numbers["ranks"]):
        for column, layer in enumerate(numbers["layers"]):
            ax = axes[f"{row}_{column}"]
            ax.stairs(numbers["density"][row, column], numbers["edges"], fill=True, color="tab:blue", alpha=0.6)
            ax.plot(x, stats.norm.pdf(x), color="tab:red")
            ax.set(xlim=(-4, 4), ylim=(0, 0.5), title=f"$j = {layer}$, $r = {rank}$")
            text = f"$p = {numbers['p_values'][row, column]:.3f}$"
            if published is not None:
                text += f"\npublished ${published['p_values'][row, column]:.3f}$"
            _note(ax, text)
            if row == len(numbers["ranks"]) - 1:
                ax.set_xlabel(r"$\langle w,\, e_r\rangle\,/\,\sqrt{\lambda_r}$")
            if column == 0:
                ax.set_ylabel("density")


def marchenko_pastur(axes: Panels, numbers: FigureData, published: Published = None) -> None:
    """Figure 2: spectra of W_j (above) and of the whitened G_j (below) against Marchenko–Pastur."""
    for column, (layer, q) in enumerate(zip(numbers["layers"], numbers["q"])):
        for name, symbol, color in (("coloured", "W", "tab:purple"), ("white", "G", "tab:blue")):
            ax = axes[f"{name}_{column}"]
            _spectrum_against_bulk(ax, numbers[f"{name}_{layer}"], float(q), color)
            text = f"{100 * numbers[f'outside_{name}'][column]:.1f} % outside"
            if published is not None:
                text += f"\npublished {100 * published[f'outside_{name}'][column]:.1f} %"
            _note(ax, text)
            ax.set_title(f"${symbol}_{{{layer}}}$,  $D/N = {q:.3g}$")
            if name == "white":
                ax.set_xlabel(r"eigenvalue $\lambda$")
            if column == 0:
                ax.set_ylabel("density")


def _spectrum_against_bulk(ax, eigenvalues, q, color):
    """Histogram of the eigenvalues up to the end of the bulk, stems beyond it, and the law of those that are not 0."""
    low, high = bulk_edges(q)
    edges = np.linspace(0, 1.1 * high, int(np.clip(len(eigenvalues) // 3, 12, 36)))
    inside, beyond = eigenvalues[eigenvalues <= high], eigenvalues[eigenvalues > high]
    heights = np.histogram(inside, edges)[0] / (len(eigenvalues) * (edges[1] - edges[0]))
    ax.stairs(heights, edges, fill=True, color=color, alpha=0.6)
    x = low + (high - low) * (1 - np.cos(np.linspace(0, np.pi, 301)[1:-1])) / 2
    law = marchenko_pastur_density(x, q) * max(q, 1)
    ax.plot(x, law, color="tab:red")
    top = 1.25 * max(heights.max(), np.quantile(law, 0.98))
    if len(beyond):
        ax.vlines(beyond, 0, 0.12 * top, color=color, linewidth=1)
        ax.plot(beyond, np.full(len(beyond), 0.12 * top), ".", color=color, markersize=3.5)
    ax.set(ylim=(0, top), xlim=(-0.03 * max(eigenvalues.max(), high), 1.05 * max(eigenvalues.max(), edges[-1])))


def resampling_width(axes: Panels, numbers: FigureData, published: Published = None) -> None:
    """Figure 3: accuracy against width of trained networks, rainbow networks, and (ours) white random features."""
    ax, widths = axes["accuracy"], numbers["widths"]
    for name, label, color, style, marker in (
        ("trained", "trained", "tab:blue", "-", "o"),
        ("retrained", "rainbow + trained classifier", "tab:red", "-", "s"),
        ("rainbow", "rainbow", "tab:red", "--", "^"),
        ("white", "white features + trained classifier (ours)", "0.5", ":", "v"),
    ):
        spread = numbers["rainbow_std"] if name == "rainbow" else None
        ax.errorbar(widths, numbers[name], spread, color=color, linestyle=style, marker=marker, label=label, capsize=2)
        if published is not None and name in published:
            _circles(ax, published["widths"], published[name], color, "published" if name == "trained" else None)
    _width_axis(ax, widths)
    ax.set_ylabel(ACCURACY)
    ax.legend(loc="lower right")


def activation_spectra(axes: Panels, numbers: FigureData, published: Published = None) -> None:
    """Figure 4: eigenvalues of E[φφᵀ] at one layer for all widths, and at all layers of the widest network."""
    layers, widths = numbers["layers"], numbers["widths"]
    for width, color in zip(widths, shades("viridis", len(widths))):
        _spectrum(axes["widths"], numbers[f"width_{width:g}"], color, f"$s = $ {width_label(width)}")
    for j, color in zip(layers, shades("plasma", len(layers))):
        _spectrum(axes["layers"], numbers[f"layer_{j}"], color, f"$j = {j}$")
    axes["widths"].set_title(f"layer $j = {int(numbers['layer'])}$, all widths")
    axes["layers"].set_title(f"width $s = $ {width_label(widths[-1])}, all layers")
    for ax in axes.values():
        m = np.array([1.0, max(len(line.get_xdata()) for line in ax.lines)])
        ax.plot(m, 1 / m, color="black", linestyle="--", linewidth=1, label="$m^{-1}$")
        _rank_axes(ax, 1e-7)
        ax.legend(loc="lower left", ncols=2)
    axes["widths"].set_ylabel(r"eigenvalues $\lambda_m\,/\,\lambda_1$ of $E[\phi_{j-1}\phi_{j-1}^{\mathrm{T}}]$")


def alignment_convergence(axes: Panels, numbers: FigureData, published: Published = None) -> None:
    """Figure 5: test alignment error to the widest network against width, a line per layer."""
    for name, title in NETWORKS.items():
        ax, layers, widths = axes[name], numbers[f"{name}_layers"], numbers[f"{name}_widths"]
        for layer, errors, color in zip(layers, numbers[f"{name}_errors"], shades("plasma", len(layers))):
            ax.plot(widths, errors, color=color, marker="o", label=f"$j = {layer}$")
        if published is not None and name == "scattering":
            label = ["published (read off)", None, None]
            _circles(ax, published["scattering_widths"], published["scattering_errors"].T, "black", label)
        _width_axis(ax, widths)
        _plain_log_axis(ax)
        ax.set_title(title)
        _legend_outside(ax)
    axes["scattering"].set_ylabel("relative alignment error (test)")


def covariance_convergence(axes: Panels, numbers: FigureData, published: Published = None) -> None:
    """Figure 6: the covariance of a layer converges with the number of networks and with width."""
    layer, counts, widths = int(numbers["layer"]), numbers["counts"], numbers["widths"]
    ax, colors = axes["networks"], shades("cool", len(counts), last=1.0)
    for count, color in zip(counts, colors):
        _eigenvalues(ax, numbers[f"eigenvalues_{count}"], color, f"{count} network{'s' if count > 1 else ''}")
        _eigenvalues(ax, numbers[f"initial_{count}"], color, None, linestyle=":")
    ax.plot([], [], color="0.4", linestyle=":", label="at initialisation")
    _fitted(ax, numbers["fit_networks"], int(numbers["fit_ranks"]))
    ax.set_title(rf"$\hat{{C}}_{{{layer}}}$ of several networks")
    ax.legend(loc="upper right")
    ax = axes["widths"]
    for width, color in zip(widths, shades("viridis", len(widths))):
        _eigenvalues(ax, numbers[f"eigenvalues_width_{width:g}"], color, f"$s = $ {width_label(width)}")
    _fitted(ax, numbers["fit_widths"], len(numbers[f"eigenvalues_width_{widths[-1]:g}"]))
    ax.set_title(rf"$\hat{{C}}_{{{layer}}}$, all widths")
    ax.legend(ncols=2)
    for ax in (axes["networks"], axes["widths"]):
        ax.set(yscale="log", xlabel="rank $r$", ylabel=r"eigenvalue $D\,\lambda_r$")
    _clipped_by_count(axes["clipped"], numbers, published, colors)
    ax, layers = axes["errors"], numbers["error_layers"]
    for j, errors, color in zip(layers, numbers["errors"], shades("plasma", len(layers), last=0.5)):
        ax.plot(widths[:-1], errors, color=color, marker="o", label=f"$j = {j}$")
    _width_axis(ax, widths[:-1])
    _plain_log_axis(ax)
    ax.set(title="distance to the widest", ylabel=r"$\|D\hat{C}_j - C_j\|_\infty\,/\,\|C_j\|_\infty$")
    ax.legend()


def _clipped_by_count(ax, numbers, published, colors):
    """Accuracy of networks clipped with the covariances of more and more networks; curves are offset."""
    offsets = np.linspace(-5, 5, len(colors)) if len(colors) > 1 else [0]
    for count, accuracies, offset, color in zip(numbers["counts"], numbers["clip_accuracies"], offsets, colors):
        label = f"{count}" + (f" ({offset:+g} %)" if offset else "")
        ax.plot(numbers["clip_ranks"], accuracies + offset, color=color, label=label)
    if published is not None:
        label = f"published, {published['counts'][-1]}"
        _circles(ax, published["clip_ranks"], published["clip_accuracies"][-1] + offsets[-1], "black", label)
    ax.set(xlabel="rank $d$", ylabel=ACCURACY, title=f"clipped layer $j = {int(numbers['layer'])}$")
    ax.legend(title="networks (offset)", loc="lower right")


def _fitted(ax, fit, last):
    """An exponential decay, given by its amplitude and rate, down to the smallest eigenvalue drawn."""
    ranks = np.arange(1, last + 1)
    values = Decay("exponential", *fit, 1.0)(ranks)
    shown = values > 0.5 * min(line.get_ydata().min() for line in ax.lines if len(line.get_ydata()))
    label = rf"$\propto e^{{-r/{1 / fit[1]:.2g}}}$"
    ax.plot(ranks[shown], values[shown], color="black", linestyle="--", linewidth=1, label=label)


def imagenet_spectra(axes: Panels, numbers: FigureData, published: Published = None) -> None:
    """Figure 7: spectra of activations (spread out by layer) and of weights, of both large networks."""
    for name, title in NETWORKS.items():
        layers = numbers[f"{name}_layers"]
        activations, weights = axes[f"{name}_activations"], axes[f"{name}_weights"]
        for row, (layer, color) in enumerate(zip(layers, shades("plasma", len(layers)))):
            offset = 10 ** (3 * row / max(len(layers) - 1, 1))
            _spectrum(activations, numbers[f"{name}_activations_{layer}"], color, f"$j = {layer}$", offset)
            values = numbers[f"{name}_weights_{layer}"]
            weights.plot(np.arange(1, len(values) + 1), values / values.mean(), color=color, label=f"$j = {layer}$")
        activations.set_title(f"{title}: activations (spread by up to $10^3$)")
        weights.set_title(f"{title}: weights")
        for ax in (activations, weights):
            _rank_axes(ax, 1e-6)
        activations.set_ylabel(r"eigenvalues of $E[\phi_{j-1}\phi_{j-1}^{\mathrm{T}}]$")
        weights.set_ylabel(r"eigenvalues of $\hat{C}_j$ (mean 1)")
        _legend_outside(weights)


def clipping(axes: Panels, numbers: FigureData, published: Published = None) -> None:
    """Figure 8: explained variance of the weights (above) and accuracy (below) against rank in three bases."""
    for column, layer in enumerate(numbers["layers"]):
        variance, accuracy = axes[f"variance_{column}"], axes[f"accuracy_{column}"]
        ranks = numbers[f"ranks_{layer}"]
        for name, (label, color, style) in BASES.items():
            variance.plot(ranks, 100 * numbers[f"explained_{name}_{layer}"], color=color, linestyle=style, label=label)
            accuracy.plot(ranks, numbers[f"accuracy_{name}_{layer}"], color=color, linestyle=style, label=label)
            if published is not None and f"accuracy_{name}_{layer}" in published:
                values = published[f"accuracy_{name}_{layer}"]
                shares = published["ranks"] / published["ranks"][-1]
                _circles(accuracy, shares[: len(values)] * ranks[-1], values, color)
        variance.set(title=f"$j = {layer}$", ylim=(0, 103), xlim=(0, ranks[-1]))
        accuracy.set(xlabel="rank $d$", ylim=(0, 103), xlim=(0, ranks[-1]))
    axes["variance_0"].set_ylabel("explained variance (%)")
    axes["accuracy_0"].set_ylabel(ACCURACY)
    axes["variance_0"].legend(loc="lower right")
    if published is not None:
        _circles(axes["accuracy_0"], [], [], "black", "published")
        axes["accuracy_0"].legend(loc="lower right")


def training_dynamics(axes: Panels, numbers: FigureData, published: Published = None) -> None:
    """Figure 9: amplification and rotation of the weights along the principal directions during training."""
    colors = shades("summer_r", len(numbers["epochs"]), 0.1, 1.0)
    for name, smoothed in (("amplification", _smoothed_logarithm), ("cosine", _smoothed)):
        ax, rank = axes[name], np.arange(1, numbers[name].shape[1] + 1)
        for epoch, values, color in zip(numbers["epochs"], numbers[name], colors):
            ax.plot(rank, values, ".", color=color, markersize=2.5, alpha=0.6)
            ax.plot(rank, smoothed(values), color=color, label=f"epoch {epoch}")
        ax.set(xscale="log", xlabel="PCA rank $r$", title=f"layer $j = {int(numbers['layer'])}$")
    axes["amplification"].set_ylabel(r"amplification $a_r(t)$")
    _plain_log_axis(axes["amplification"])
    axes["cosine"].set(ylim=(-0.05, 1.05), ylabel="cosine similarity $c_r(t)$")
    axes["cosine"].legend(loc="lower left", ncols=2)
    for panel, (ranks, points) in enumerate(zip(numbers["planes"], numbers["trajectories"])):
        _trajectories(axes[f"plane_{panel}"], points, colors)
        x, y = (rf"$\langle w, e_{{{rank}}}\rangle$" for rank in ranks)
        axes[f"plane_{panel}"].set(xlabel=x, ylabel=y)


def _smoothed(values):
    """A running mean over about a fifth of the ranks so far, narrow at first: the axis of ranks is logarithmic."""
    ends = np.arange(len(values))
    half = np.maximum(np.minimum(ends // 4, len(values) - 1 - ends), 0)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[ends + half + 1] - sums[ends - half]) / (2 * half + 1)


def _smoothed_logarithm(values):
    return np.exp(_smoothed(np.log(values)))


def _trajectories(ax, points, colors):
    """points: (neurons, epochs, 2), the weights in a plane; a grey path and coloured positions for each neuron."""
    for path in points:
        ax.plot(path[:, 0], path[:, 1], color="0.8", linewidth=0.5, zorder=1)
    for epoch, color in enumerate(colors):
        ax.scatter(points[:, epoch, 0], points[:, epoch, 1], s=5, color=color, zorder=2)
    radius = 1.05 * np.abs(points).max()
    ax.set(xlim=(-radius, radius), ylim=(-radius, radius), box_aspect=1)


# --- Shared parts ------------------------------------------------------------------------------------------------


def _spectrum(ax, eigenvalues, color, label, scale=1.0):
    """Positive eigenvalues relative to the first, times `scale`."""
    positive = eigenvalues[eigenvalues > 0]
    ax.plot(np.arange(1, len(positive) + 1), scale * positive / positive[0], color=color, label=label)


def _eigenvalues(ax, eigenvalues, color, label, linestyle="-"):
    """Eigenvalues that are not rounding errors of the first."""
    positive = eigenvalues[eigenvalues > 1e-10 * eigenvalues[0]]
    ax.plot(np.arange(1, len(positive) + 1), positive, color=color, label=label, linestyle=linestyle)


def _circles(ax, x, y, color, label=None):
    """Published numbers."""
    ax.plot(x, y, "o", markerfacecolor="none", markersize=8, color=color, label=label)


def _note(ax, text):
    ax.text(0.97, 0.95, text, transform=ax.transAxes, ha="right", va="top", fontsize=7.5)


def _width_axis(ax, widths):
    ax.set_xscale("log", base=2)
    ax.set(xlabel="width scaling $s$", xticks=widths)


def _rank_axes(ax, lowest):
    """Logarithmic axes fitted to the lines, cut at `lowest`, below which eigenvalues are rounding errors."""
    values = np.concatenate([line.get_ydata() for line in ax.lines])
    ax.set(xscale="log", yscale="log", xlabel="rank $m$", ylim=(max(0.5 * values.min(), lowest), 2 * values.max()))


def _plain_log_axis(ax):
    """A logarithmic y axis with plain numbers at 1, 2 and 5 of each decade."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def _legend_outside(ax):
    """A legend to the right of the axes, smaller if it is long."""
    long = len(ax.get_legend_handles_labels()[0]) > 8
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=6.5 if long else None)
