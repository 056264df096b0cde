"""The numbers of the paper's nine figures, from the networks of the registry's experiments.

One function per figure takes a `Source` and what is `Shown`, and returns arrays (or nested lists) by name, which
drawing.py draws. j is the weight layer, counted from 1, and φ_{j-1} its input.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from rainbow import Alignment, Layer, MeanNetwork, WeightCovariance, weight_layers
from rainbow.alignment import transport
from rainbow.clipping import clipped_accuracies, even_ranks
from rainbow.covariance import amplification, complete_basis, cosine_similarity, explained_variance, random_basis
from rainbow.moments import moments
from rainbow.random_matrix import bulk_test, fit_decay, normality_p_value, real_samples
from utils.experiments.registry import Experiment
from utils.figures.source import Source

Numbers = dict[str, ArrayLike]


@dataclass(frozen=True)
class Shown:
    """What the figures of a scale show.

    layers: j of figures 1, 2 and 8; ranks: r of figure 1; layer: j of figures 4 (one layer) and 9; counts: numbers of
    networks in figure 6; fit_ranks: ranks its exponentials are fitted to; errors: j of figure 6 d; far: the second
    rank of figure 9's planes; images: at most about so many for the spectra of figure 7.
    """

    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    counts: tuple[int, ...]
    fit_ranks: int
    far: int
    layer: int = 4
    errors: tuple[int, ...] = (2, 3)
    last_epoch: int = 20
    images: int = 50_000


SHOWN = {
    "paper": Shown(layers=(2, 4, 6), ranks=(1, 10, 100), counts=(1, 10, 50), fit_ranks=40, far=100),
    "laptop": Shown(layers=(2, 3, 4), ranks=(1, 10, 50), counts=(1, 5, 20), fit_ranks=20, far=12),
}
HISTOGRAM = np.linspace(-4, 4, 33)


def gaussian_histograms(source: Source, shown: Shown) -> Numbers:
    """Figure 1. edges: of the bins; density: (ranks, layers, bins); p_values: (ranks, layers), Kolmogorov–Smirnov
    against N(0, 1); ranks; layers; samples: (layers,), weight vectors of all networks together."""
    mean = source.mean_network(source.sets(1)["networks"], shown.layers)
    columns = [_whitened_directions(mean, k, shown.ranks) for k in range(len(shown.layers))]
    by_rank = list(zip(*columns))
    return {
        "edges": HISTOGRAM,
        "density": [[_density(column) for column in row] for row in by_rank],
        "p_values": [[normality_p_value(column) for column in row] for row in by_rank],
        "ranks": shown.ranks,
        "layers": shown.layers,
        "samples": [len(each[0]) for each in columns],
    }


def _density(samples: np.ndarray) -> np.ndarray:
    """Histogram as a density of all samples, those beyond its edges included."""
    return np.histogram(samples, HISTOGRAM)[0] / (len(samples) * np.diff(HISTOGRAM))


def _whitened_directions(mean: MeanNetwork, k: int, ranks: Sequence[int]) -> list[np.ndarray]:
    """Weights of all networks along principal directions of their common covariance, whitened; one array per rank."""
    covariance = WeightCovariance.fit(mean.aligned_weights(k))
    chosen = [min(rank, covariance.rank) - 1 for rank in ranks]
    coordinates = [covariance.whitened_coordinates(weights)[:, chosen] for weights in mean.aligned_weights(k)]
    return [real_samples(column) for column in torch.cat(coordinates).cpu().numpy().T]


def marchenko_pastur(source: Source, shown: Shown) -> Numbers:
    """Figure 2. coloured_j, white_j: eigenvalues (mean 1) for the first network; q: (layers,) D/N; outside_coloured,
    outside_white: (layers,) share of the eigenvalues outside the bulk; above_...: share above it alone."""
    mean = source.mean_network(source.sets(2)["networks"], shown.layers)
    numbers = {"layers": shown.layers, "q": []}
    for k, j in enumerate(shown.layers):
        covariance = WeightCovariance.fit(mean.aligned_weights(k))
        coloured = next(mean.aligned_weights(k))
        for name, weights in (("coloured", coloured), ("white", covariance.whiten(coloured))):
            test = bulk_test(_spectrum(weights), *weights.shape)
            numbers[f"{name}_{j}"] = test.eigenvalues
            numbers.setdefault(f"outside_{name}", []).append(test.outside)
            numbers.setdefault(f"above_{name}", []).append(test.above / len(test.eigenvalues))
        numbers["q"].append(test.q)
    return numbers


def resampling_width(source: Source, shown: Shown) -> Numbers:
    """Figure 3. widths; trained, retrained, white: accuracies in percent; rainbow, rainbow_std: mean and standard
    deviation over the networks sampled."""
    sets = source.sets(3)
    sampled = [source.sampled_accuracies(member) for member in sets["rainbow"]]
    return {
        "widths": [member.width for member in sets["trained"]],
        **{name: [source.accuracy(member) for member in sets[name]] for name in ("trained", "retrained", "white")},
        "rainbow": [accuracies.mean() for accuracies in sampled],
        "rainbow_std": [accuracies.std() for accuracies in sampled],
    }


def activation_spectra(source: Source, shown: Shown) -> Numbers:
    """Figure 4. layer: j of the first panel; widths; width_s: eigenvalues of E[φ_{j-1} φ_{j-1}ᵀ] for width s; layers,
    layer_j: the same at the layers 2 to J of the widest network."""
    members = source.sets(4)["widths"]
    numbers = {"widths": [member.width for member in members], "layer": shown.layer}
    for member in members:
        network = source.network(member)
        names = [layer.name for layer in source.layers(member, network)]
        js = range(2, len(names)) if member is members[-1] else [shown.layer]
        chosen, images = [names[j - 1] for j in js], source.train(member)
        found = moments([network], chosen, images, means=False, device=source.device)
        spectra = {j: _eigenvalues(found.auto(0, k)) for k, j in enumerate(js)}
        numbers[f"width_{member.width:g}"] = spectra[shown.layer]
    return {**numbers, "layers": js, **{f"layer_{j}": values for j, values in spectra.items()}}  # of the widest


def _eigenvalues(matrix: Tensor) -> np.ndarray:
    """Eigenvalues of a Hermitian matrix, decreasing, rounding errors set to 0."""
    return torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0).cpu().numpy()


def _spectrum(weights: Tensor | Iterable[Tensor]) -> np.ndarray:
    """Eigenvalues of a covariance of weights, decreasing."""
    return WeightCovariance.fit(weights).eigenvalues.cpu().numpy()


def alignment_convergence(source: Source, shown: Shown) -> Numbers:
    """Figure 5, for NAME scattering and resnet. NAME_widths; NAME_layers: j; NAME_errors: (layers, widths), error on
    the test set of the alignment to the first network of the largest width, mean over the others of a width."""
    numbers = {}
    for name, members in source.sets(5).items():
        reference = next(member for member in members if member.width == members[-1].width)
        others = [member for member in members if member is not reference]
        errors = np.array(_alignment_errors(source, reference, others, standardize=name == "resnet"))
        width_of = np.array([member.width for member in others])
        widths = np.unique(width_of)
        numbers[f"{name}_widths"] = widths
        numbers[f"{name}_layers"] = np.arange(2, 2 + errors.shape[1])
        numbers[f"{name}_errors"] = np.transpose([errors[width_of == width].mean(axis=0) for width in widths])
    return numbers


def _alignment_errors(source, reference, others, standardize):
    """For each network, errors on the test set at its layers 2 to J; the first layer's input is the same for all."""
    networks = source.networks([reference, *others])
    names = [layer.name for layer in source.layers(reference, networks[0])[1:-1]]
    train, test = (
        moments(networks, names, images, auto=False, cross=0, device=source.device)
        for images in (source.train(reference), source.test(reference))
    )
    alignments = [Alignment(standardize).fit_moments(train, i, 0) for i in range(1, len(networks))]
    return [alignment.score_moments(test, i, 0) for i, alignment in enumerate(alignments, 1)]


def covariance_convergence(source: Source, shown: Shown) -> Numbers:
    """Figure 6, layer j = 2, where weights are those of φ/√D, whose covariances have a limit as the width D grows.

    Panels (a) and (c): counts of networks n; eigenvalues_n, initial_n: of Ĉ at the end and, scaled to the same tail, at
    the beginning; fit_networks: amplitude and rate of an exponential; clip_ranks; clip_accuracies: (counts, ranks).
    Panel (b): widths; eigenvalues_width_s; fit_widths. Panel (d): error_layers; errors: (layers, widths but the
    largest), ‖Ĉ − C‖ / ‖C‖ in the spectral norm, C that of the largest width."""
    sets, layer = source.sets(6), shown.errors[0]
    many, widths = _many_networks(source, sets["many"], layer, shown), _many_widths(source, sets["widths"], shown)
    return {"layer": layer, "fit_ranks": shown.fit_ranks, **many, **widths}


def _many_networks(source, members, layer, shown):
    """Covariances of more and more networks of one width, and the first of them clipped with their eigenvectors."""
    mean = source.mean_network(members, (layer,))
    clipped = mean.layers[0][0]
    scale = math.sqrt(clipped.dimension)
    final = [scale * rows for rows in mean.aligned_weights(0)]
    first = [_matrix(source.network(member, 0), layers[0].name) for member, layers in zip(members, mean.layers)]
    initial = [scale * transport(rows, A[0]) for rows, A in zip(first, mean.alignments)]
    counts = sorted({min(count, len(members)) for count in shown.counts})
    numbers, bases = {"counts": counts}, {}
    for count in counts:
        covariance, at_start = WeightCovariance.fit(final[:count]), _spectrum(initial[:count])
        eigenvalues = covariance.eigenvalues.cpu().numpy()
        tail = slice(-(-3 * len(eigenvalues) // 4), None)
        numbers[f"eigenvalues_{count}"] = eigenvalues
        numbers[f"initial_{count}"] = at_start * np.exp(np.mean(np.log(eigenvalues[tail]) - np.log(at_start[tail])))
        bases[str(count)] = _own_basis(covariance, mean.alignments[0][0])
    fit = fit_decay(eigenvalues, "exponential", shown.fit_ranks)
    ranks = sorted({*even_ranks(clipped.dimension), *[d for d in (1, 2, 3, 4, 5, 7, 10) if d < clipped.dimension]})
    accuracies = clipped_accuracies(mean.networks[0], clipped, bases, ranks, source.test(members[0]))
    numbers["fit_networks"] = [fit.amplitude, fit.rate]
    return {**numbers, "clip_ranks": ranks, "clip_accuracies": list(accuracies.values())}


def _matrix(network: nn.Module, name: str) -> Tensor:
    """The weights of a layer as a matrix, complex if they are. # (N, D)"""
    return network.get_submodule(name).weight.detach().flatten(1)


def _own_basis(covariance: WeightCovariance, A: Tensor) -> Tensor:
    """The principal directions, found in the space A aligns to, in the space of the network itself. # (D, D)"""
    return transport(complete_basis(covariance.eigenvectors).mH, A.mH.to(covariance.eigenvectors.device)).mH


def _many_widths(source, members, shown):
    """Covariances of the networks of each width, all aligned to the first network of the largest width."""
    reference = next(member for member in members if member.width == members[-1].width)
    target = source.network(reference)
    names = [each.name for each in source.layers(reference, target)]
    names = [names[j - 1] for j in shown.errors]
    weights = {}
    for width in sorted({member.width for member in members}):
        group = [member for member in members if member.width == width and member is not reference]
        weights[width] = _weights_aligned_to(source, target, group, names)
    widest = weights[reference.width]
    widest.append([math.sqrt(layer.dimension) * layer.get().double() for layer in weight_layers(target, names=names)])
    covariances = {width: [WeightCovariance.fit(rows) for rows in zip(*found)] for width, found in weights.items()}
    *narrower, limit = covariances.values()
    errors = [[found[k].relative_error(limit[k]) for found in narrower] for k in range(len(names))]
    spectra = {width: found[0].eigenvalues.cpu().numpy() for width, found in covariances.items()}
    fit = fit_decay(spectra[reference.width], "exponential", shown.fit_ranks)
    return {
        **{f"eigenvalues_width_{width:g}": spectrum for width, spectrum in spectra.items()},
        "widths": list(weights),
        "error_layers": shown.errors,
        "errors": errors,
        "fit_widths": [fit.amplitude, fit.rate],
    }


def _weights_aligned_to(source: Source, target: nn.Module, group: list[Experiment], names: list[str]):
    """For each network of a group, its weights √D_j W_j A_j in the target's space. # (N_j, D_j of the target) each"""
    if not group:
        return []
    networks = source.networks(group)
    found = moments([target, *networks], names, source.train(group[0]), auto=False, cross=0, device=source.device)
    weights = []
    for i, network in enumerate(networks, 1):
        alignment = Alignment().fit_moments(found, i, 0)
        own = weight_layers(network, names=names)
        weights.append([math.sqrt(layer.dimension) * alignment.transform(layer.name, layer.get()) for layer in own])
    return weights


def imagenet_spectra(source: Source, shown: Shown) -> Numbers:
    """Figure 7, for NAME scattering and resnet. NAME_layers: j; NAME_activations_j: eigenvalues of E[φ φᵀ] of the
    patches that W_j meets; NAME_weights_j: eigenvalues of Ĉ_j of the one network; NAME_acc5: top-5 accuracy in %."""
    numbers = {}
    for name, (member, *_) in source.sets(7).items():
        network = source.network(member)
        layers = source.layers(member, network)[:-1]
        images, names = source.train(member, shown.images), [layer.name for layer in layers]
        found = moments([network], names, images, patches=True, means=False, device=source.device)
        numbers[f"{name}_layers"] = np.arange(1, len(layers) + 1)
        numbers[f"{name}_acc5"] = source.accuracy(member, top=5)
        for j, layer in enumerate(layers, 1):
            numbers[f"{name}_activations_{j}"] = _eigenvalues(found.auto(0, j - 1))
            numbers[f"{name}_weights_{j}"] = _spectrum(layer.get())
    return numbers


def clipping(source: Source, shown: Shown) -> Numbers:
    """Figure 8, for BASIS weight, kernel and random. layers; ranks_j; explained_BASIS_j: share of the weights'
    variance; accuracy_BASIS_j: percent, of the first network with W_j clipped. The weight PCA is of all networks."""
    members = source.sets(8)["networks"]
    mean = source.mean_network(members, shown.layers)
    network, layers = mean.networks[0], mean.layers[0]
    kernels = moments([network], layers, source.train(members[0]), means=False, device=source.device)
    numbers = {"layers": shown.layers}
    for k, j in enumerate(shown.layers):
        bases = _three_bases(layers[k], mean, k, kernels.auto(0, k))
        ranks = numbers[f"ranks_{j}"] = even_ranks(layers[k].dimension)
        accuracies = clipped_accuracies(network, layers[k], bases, ranks, source.test(members[0]))
        for name, basis in bases.items():
            numbers[f"explained_{name}_{j}"] = explained_variance(layers[k].get(), basis).cpu().numpy()[ranks]
            numbers[f"accuracy_{name}_{j}"] = accuracies[name]
    return numbers


def _three_bases(layer: Layer, mean: MeanNetwork, k: int, kernel: Tensor) -> dict[str, Tensor]:
    """Bases (D, D) of the first network's layer: weight PCA, kernel PCA, and a random one, the same each time."""
    covariance = WeightCovariance.fit(mean.aligned_weights(k))
    weight = _own_basis(covariance, mean.alignments[0][k])
    kernel = kernel if layer.is_complex else kernel.real
    chance = random_basis(layer.dimension, torch.Generator().manual_seed(0), weight.dtype)
    return {"weight": weight, "kernel": WeightCovariance.from_matrix(kernel, 1).eigenvectors, "random": chance}


def training_dynamics(source: Source, shown: Shown) -> Numbers:
    """Figure 9. layer: j; epochs; amplification, cosine: (epochs, ranks); planes: (3, 2) ranks, from 1; trajectories:
    (3, neurons, epochs, 2), weights in these planes of principal directions at the end of training."""
    member, *_ = source.sets(9)["network"]
    trained = source.network(member)
    name = source.layers(member, trained)[shown.layer - 1].name
    epochs = [epoch for epoch in source.epochs(member) if epoch <= shown.last_epoch]
    weights = [_matrix(source.network(member, epoch), name) for epoch in epochs]
    covariance = WeightCovariance.fit(_matrix(trained, name))
    far = max(min(shown.far, len(covariance.eigenvalues) - 1), 2)
    planes = np.array([(1, 2), (1, far), (far, far + 1)])
    coordinates = torch.stack([covariance.coordinates(w) for w in weights], dim=1).real.cpu().numpy()
    return {
        "layer": shown.layer,
        "epochs": epochs,
        "planes": planes,
        "amplification": [amplification(w, weights[0], covariance).cpu().numpy() for w in weights],
        "cosine": [cosine_similarity(w, weights[0], covariance).cpu().numpy() for w in weights],
        "trajectories": [coordinates[:, :, plane - 1] for plane in planes],
    }
