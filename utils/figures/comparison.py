"""The published numbers beside those of another scale: the table under a figure.

One function per figure with published numbers, named like it, yields rows (what, published, this run).
"""

from __future__ import annotations

from utils.figures.claims import nearest


def gaussian_histograms(numbers, paper):
    for i, rank in enumerate(paper["ranks"]):
        for k, layer in enumerate(paper["layers"]):
            ours = f"{numbers['p_values'][i, k]:.3f} (r = {numbers['ranks'][i]}, j = {numbers['layers'][k]})"
            yield f"p-value, r = {rank}, j = {layer}", f"{paper['p_values'][i, k]:.4g}", ours


def marchenko_pastur(numbers, paper):
    for name in ("coloured", "white"):
        for k, layer in enumerate(paper["layers"]):
            published, ours = (f"{100 * n[f'outside_{name}'][k]:.1f} %" for n in (paper, numbers))
            yield f"outside the bulk, {name}, j = {layer}", published, f"{ours} (j = {numbers['layers'][k]})"


def resampling_width(numbers, paper):
    for name, title in (("trained", "trained"), ("retrained", "rainbow + trained classifier"), ("rainbow", "rainbow")):
        ours = dict(zip(numbers["widths"], numbers[name]))
        for width, value in zip(paper["widths"], paper[name]):
            yield f"{title}, s = {width:g}", f"{value:.2f} %", f"{ours[width]:.1f} %" if width in ours else ""


def alignment_convergence(numbers, paper):
    (first, low, high), widths = paper["scattering_errors"], numbers["scattering_widths"]
    for k, about in ((0, "about"), (-1, "below")):
        at, (own, *others) = f"s = {paper['scattering_widths'][k]:g}", numbers["scattering_errors"][:, k]
        here = f"(s = {widths[k]:g})"
        yield f"first layer, {at}", f"{about} {first[k]:.2f}", f"{own:.2f} {here}"
        ours = f"{min(others):.2f} to {max(others):.2f} {here}" if others else ""
        yield f"other layers, {at}", f"{low[k]:.2f} to {high[k]:.2f}", ours


def covariance_convergence(numbers, paper):
    ranks, accuracies, full = numbers["clip_ranks"], numbers["clip_accuracies"][-1], paper["clip_ranks"][-1]
    for rank, value in zip(paper["clip_ranks"], paper["clip_accuracies"][-1]):
        place = nearest(ranks, rank / full * ranks[-1])
        ours = f"{accuracies[place]:.1f} % (d = {ranks[place]} of {ranks[-1]})"
        yield f"clipped to d = {rank} of {full}", f"{value:.1f} %", ours


def imagenet_spectra(numbers, paper):
    for name in ("scattering", "resnet"):
        yield f"top-5 accuracy, {name}", f"{paper[f'{name}_acc5']} %", f"{numbers[f'{name}_acc5']:.1f} %"


def clipping(numbers, paper):
    shares = paper["ranks"] / paper["ranks"][-1]
    for layer, own in zip(paper["layers"], numbers["layers"]):
        ranks = numbers[f"ranks_{own}"]
        for basis in ("weight", "kernel", "random"):
            published = paper.get(f"accuracy_{basis}_{layer}", [])
            for share, value in list(zip(shares, published))[1:7]:  # up to D / 5
                ours = numbers[f"accuracy_{basis}_{own}"][nearest(ranks, share * ranks[-1])]
                what = f"{basis} basis, j = {layer}, d = {100 * share:.0f} % of D"
                yield what, f"{value:.1f} %", f"{ours:.1f} % (j = {own})"
