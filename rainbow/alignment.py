"""Alignment of networks: orthogonal Procrustes, mean networks, alignment errors (paper, section 2).

With K = E[φ_a φ_b^H] (D_a, D_b) at a layer and K = U S V^H, A = U V^H is the (partial) isometry that brings a's
activations nearest to b's. Weights W_a (N, D_a·k²) go into b's space as W_a A, on the channel axis; activations with
rows as samples as φ_a Ā, which is φ_a A for real ones. Layers with real weights have real A, from the real part of K.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rainbow.covariance import Spectrum, WeightCovariance
from rainbow.errors import RainbowError
from rainbow.layers import Layer
from rainbow.moments import Moments, moments, position_of, prepare
from rainbow.network import Network
from rainbow.norms import Affine, normalized_product
from rainbow.polar import polar_factor
from rainbow.precision import accumulation_device, rounding, to_double
from rainbow.running import evaluating, first_images, stream_inputs
from rainbow.samples import ChannelSums, ProductSum, Samples

SAME = 1e-5  # least distance from 1 of a correlation that tells two channels apart


def align(K: Tensor, complex_values: bool = False, noise: float = 0.0) -> Tensor:
    """A = U V^H for K = U S V^H, in double precision; of the real part of K unless `complex_values`. # (D_a, D_b)

    Where D_a ≠ D_b, A is a partial isometry: its shorter side is orthonormal. noise: the relative rounding error of K;
    A is 0 in the directions that it may have made, of S up to 4 noise max S. Raises RainbowError if K is not finite.
    """
    K = to_double(K)
    if K.is_complex() and not complex_values:
        K = K.real
    if K.ndim != 2 or not torch.isfinite(K.abs()).all():
        raise RainbowError(f"cannot align: the cross-covariance of shape {tuple(K.shape)} is not a finite matrix")
    return polar_factor(K, 4 * noise)


def transport(weights: Tensor, A: Tensor) -> Tensor:
    """W A on the channel axis of weights (N, D_a·k²), channel first, for A (D_a, D_b). # (N, D_b·k²)

    Raises RainbowError if the shapes do not fit.
    """
    channels = A.shape[0]
    if weights.ndim != 2 or weights.shape[1] % channels:
        raise RainbowError(f"weights of shape {tuple(weights.shape)} do not fit an alignment of {channels} channels")
    weights, A = to_double(weights), to_double(A)
    dtype = torch.promote_types(weights.dtype, A.dtype)
    kernels = weights.to(dtype).unflatten(1, (channels, -1))  # (N, D_a, k²)
    return torch.einsum("nck,cd->ndk", kernels, A.to(device=kernels.device, dtype=dtype)).flatten(1)


def alignment_error(A: Tensor, K: Tensor, aa: float, bb: float, noise: float = 0.0) -> float:
    """2 (1 - ab / √(aa·bb)) with ab = Re E⟨φ_a A, φ_b⟩ = Re ⟨A, K⟩, aa = E‖φ_a‖², bb = E‖φ_b‖².

    0 for a perfect alignment, 2 for activations that have nothing in common. A factor 1/√D on activations cancels.
    noise: the relative rounding error of ab, aa and bb; an error that it may have made is 0: up to 4 noise, and 8 more
    for each direction in which `align` cut A.
    """
    if aa == 0 or bb == 0:
        return 0.0 if aa == bb else 2.0
    error = 2 * (1 - _inner(A, K) / math.sqrt(aa * bb))
    cut = min(A.shape) - A.abs().square().sum().item()
    return error if error > 4 * noise * (1 + 2 * max(round(cut), 0)) else 0.0


def is_same_input(found: Moments, i: int, j: int, layer: int) -> bool:
    """Whether each channel of network i is that of network j up to offset and scale: the alignment is the identity.

    So it is at the first layer of networks with the same wavelets, or of a network with itself.
    """
    means, variances = ([of(n, layer) for n in (i, j)] for of in (found.mean, found.var))
    if means[0].shape != means[1].shape:
        return False
    product = found.cross(i, j, layer).diagonal() - means[0] * means[1].conj()
    scale = (variances[0] * variances[1]).sqrt()
    tiny = torch.finfo(torch.float32).eps * scale.max()
    dead = (variances[0] <= tiny) & (variances[1] <= tiny)
    return bool((dead | (product.real >= (1 - SAME) * scale)).all())


def align_networks(found: Moments, i: int, j: int, layer: int) -> Tensor:
    """A from network i to network j at a layer: `align`, or the identity for the same fixed input. # (D_i, D_j)"""
    K = found.cross(i, j, layer)
    if is_same_input(found, i, j, layer):
        return torch.eye(len(K), dtype=torch.float64, device=K.device)
    return align(K, found.complex_weights[layer], rounding(found.count(i, layer)))


def warn_of_few_samples(layer: str, samples: int, dimension: int) -> None:
    """Warns if there are fewer samples than dimensions."""
    if samples < dimension:
        text = f"layer {layer}: {samples} samples for {dimension} dimensions do not determine the result"
        warnings.warn(f"{text}: give more images", stacklevel=3)


class Alignment:
    """Rotations A_j of network a's layers into b's: fitted on one data set, scored on another.

    standardize: activations are brought to mean 0 and variance 1 per channel (of the set fitted on) before.
    matrices: the A_j (D_a, D_b), float64, by the position of the layer; names: of a's layers.
    """

    def __init__(self, standardize: bool = False):
        self.standardize = standardize
        self.matrices: list[Tensor] = []
        self.names: list[str] = []

    def fit(self, a: nn.Module, b: nn.Module, loader: Iterable, layers=None, **options) -> Alignment:
        """Aligns a to b over images; layers and options as for `moments.moments`, and errors too."""
        return self.fit_moments(moments([a, b], layers, loader, auto=False, cross=[(0, 1)], **options), 0, 1)

    def fit_moments(self, found: Moments, i: int, j: int) -> Alignment:
        """The same for networks i and j of moments with means and the pair (i, j)."""
        self.names = found.names[i]
        layers = range(len(self.names))
        self._statistics = [[(found.mean(n, k), found.var(n, k)) for n in (i, j)] for k in layers]
        self.matrices = [
            align(self._products(found, i, j, k)[0], found.complex_weights[k], rounding(found.count(i, k)))
            if self.standardize and not is_same_input(found, i, j, k)
            else align_networks(found, i, j, k)
            for k in layers
        ]
        return self

    def transform(self, layer: int | str, weights: Tensor) -> Tensor:
        """W_a A in b's space, for weights (N, D_a·k²) of a layer. # (N, D_b·k²)"""
        if not self.matrices:
            raise RainbowError("this alignment was not fitted yet")
        return transport(weights, self.matrices[position_of(layer, self.names)])

    def score(self, a: nn.Module, b: nn.Module, loader: Iterable, layers=None, **options) -> list[float]:
        """The alignment error of every layer over other images (`alignment_error`)."""
        found = moments([a, b], layers or self.names, loader, auto=False, cross=[(0, 1)], **options)
        return self.score_moments(found, 0, 1)

    def score_moments(self, found: Moments, i: int, j: int) -> list[float]:
        """The same from moments of networks i and j."""
        if len(found.names[i]) != len(self.matrices):
            raise RainbowError(f"fitted on {len(self.matrices)} layers, asked to score {len(found.names[i])}")
        return [alignment_error(A, *self._products(found, i, j, k)) for k, A in enumerate(self.matrices)]

    def _products(self, found, i, j, k):
        """K, E‖φ_a‖² and E‖φ_b‖², of activations standardised with the statistics fitted on if asked, and the relative
        error of their rounding, which is that of energies around 0: standardising magnifies it."""
        K, error = found.cross(i, j, k), rounding(found.count(i, k))
        if not self.standardize:
            return K, found.energy(i, k), found.energy(j, k), error
        maps, energies, magnified = [], [], 1.0
        for n, (mean, var) in zip((i, j), self._statistics[k]):
            scale = torch.where(var > 0, var.rsqrt(), 0)
            around, around_0 = found.mean(n, k) - mean, found.mean(n, k)
            energy, raw = ((found.var(n, k) + m.abs().square()) @ scale.square() for m in (around, around_0))
            maps.append(Affine(mean, scale))
            energies.append(energy.item())
            magnified = max(magnified, (raw / energy).item())
        K = normalized_product(K.clone(), found.mean(i, k), maps[0], found.mean(j, k), maps[1])
        return K, *energies, magnified * error


@dataclass(eq=False)
class MeanNetwork:
    """The average of n networks, each aligned to it layer by layer (generalised Procrustes); one network is its own.

    analysed: the networks; layers[i][k]: their `Layer`s; alignments[i][k]: (D_i, D), from network i into the common
    space, that of the first network, or None of a network alone: the identity; unexplained[t][k]: the share of
    the networks' variance at layer k that the target of iteration t (the first network, then the average before)
    leaves, Σ_i E‖φ_i A_i - target‖² / Σ_i E‖φ_i‖².
    """

    analysed: list[Network]
    layers: list[list[Layer]]
    alignments: list[list[Tensor | None]]
    unexplained: list[list[float]]
    _covariances: dict[int, WeightCovariance] = field(default_factory=dict)
    _spectra: dict[tuple[int, int], Spectrum] = field(default_factory=dict)

    @property
    def networks(self) -> list[nn.Module]:
        """The networks themselves."""
        return [network.module for network in self.analysed]

    @classmethod
    def fit(
        cls,
        networks: Sequence[nn.Module | Network],
        loader: Iterable | None = None,
        *,
        layers: Any = None,
        num_iters: int = 2,
        device: torch.device | None = None,
    ) -> MeanNetwork:
        """Aligns n networks to the first, then num_iters times to their average.

        Reads the loader 1 + num_iters times; one network needs none, if its layers are defined in forward order.
        Layers, device and errors as for `moments.moments`.
        """
        analysed, chosen, device = prepare(networks, layers, loader, device)
        where, places, others = accumulation_device(device), range(len(chosen[0])), range(1, len(analysed))
        if len(analysed) == 1:
            return cls(analysed, chosen, [[None] * len(places)], [[0.0] * len(places)])
        if loader is None:
            raise RainbowError("several networks are aligned on images: give a loader")
        first = moments(analysed, chosen, loader, auto=False, cross=0, device=device)
        energies = [[first.energy(i, k) for k in places] for i in range(len(analysed))]
        alignments: list[list[Tensor | None]] = [
            [torch.eye(layer.channels, dtype=torch.float64, device=where) for layer in chosen[0]]
        ]
        alignments += [[align_networks(first, i, 0, k) for k in places] for i in others]
        inner = [energies[0]] + [[_inner(alignments[i][k], first.cross(i, 0, k)) for k in places] for i in others]
        result = cls(analysed, chosen, alignments, [_unexplained(energies, energies[0], inner)])
        fixed = [all(is_same_input(first, i, 0, k) for i in others) for k in places]
        for _ in range(num_iters):
            result._iterate(loader, device, fixed, energies)
        return result

    def aligned_weights(self, layer: int) -> Iterator[Tensor]:
        """W_i A_i of every network at a layer, by position. # (N_i, D·k²) each, float64 or complex128"""
        for layers, alignments in zip(self.layers, self.alignments):
            A = alignments[layer]
            yield to_double(layers[layer].get()) if A is None else transport(layers[layer].get(), A)

    def covariance(self, layer: int) -> WeightCovariance:
        """Ĉ_j of all aligned weights of a layer, computed when it is first asked for."""
        if layer not in self._covariances:
            self._covariances[layer] = WeightCovariance.fit(self.aligned_weights(layer))
        return self._covariances[layer]

    def spectrum(self, layer: int, networks: int | None = None) -> Spectrum:
        """The eigenvalues of Ĉ_j of the first so many networks, or all, computed when they are first asked for."""
        key = layer, min(networks or len(self.networks), len(self.networks))
        if key not in self._spectra:
            self._spectra[key] = Spectrum.fit(itertools.islice(self.aligned_weights(layer), key[1]))
        return self._spectra[key]

    def average(self, layer: int, samples: Sequence[Tensor]) -> Tensor:
        """(1/n) Σ_i φ_i Ā_i of samples (m, D_i) of every network at a layer. # (m, D)"""
        if len(samples) == 1:
            return samples[0]
        total = torch.zeros_like(samples[0])
        for phi, alignments in zip(samples, self.alignments):
            A = alignments[layer]
            total.add_(phi if A is None else phi @ A.conj().to(phi))
        return total.div_(len(samples))

    def _iterate(self, loader, device, fixed, energies):
        """One more alignment of every network to the average, at the layers that are not fixed."""
        places = range(len(fixed))
        inner: list[list[float]] = []
        products = [[ProductSum(layer.is_complex) for layer in self.layers[0]] for _ in self.networks]
        averages = [ChannelSums() for _ in places]
        with evaluating(*self.networks):
            for batch in loader:
                for images in first_images(batch).to(device).chunk(len(self.networks)):
                    self._add(images, products, averages)
        for alignments, sums in zip(self.alignments, products):
            inner.append([])
            for k in places:
                K = sums[k].finish().div_(averages[k].count)
                if not fixed[k]:
                    alignments[k] = align(K, self.layers[0][k].is_complex, rounding(averages[k].count))
                inner[-1].append(_inner(alignments[k], K))
        target = [(sums.var + sums.mean.abs().square()).sum().item() for sums in averages]
        self.unexplained.append(_unexplained(energies, target, inner))

    def _add(self, images, products, averages):
        """Adds a chunk of images: as many networks at once take the memory of one on a whole batch."""
        held = [_samples(network, layers, images) for network, layers in zip(self.networks, self.layers)]
        for k, samples in enumerate(zip(*held)):
            average = Samples.of(self.average(k, samples))
            averages[k].add(average)
            for i, phi in enumerate(samples):
                products[i][k].add(Samples.of(phi), average)


def _unexplained(energies, target, inner):
    """Σ_i E‖φ_i A_i - t‖² / Σ_i E‖φ_i‖² at every layer, with E‖φ A - t‖² = E‖φ‖² + E‖t‖² - 2 Re⟨A, K⟩."""
    line = []
    for e, t, ab in zip(zip(*energies), target, zip(*inner)):
        left = sum(e) + len(e) * t - 2 * sum(ab)
        line.append(max(left, 0.0) / sum(e) if sum(e) else 0.0)
    return line


def _samples(network, layers, images):
    """Samples of the input of every layer."""
    held = {}

    def receive(k, x):
        held[k] = layers[k].samples(x).clone()

    stream_inputs(lambda: network(images), [layer.module for layer in layers], receive)
    return [held[k] for k in range(len(layers))]


def _inner(A, K):
    """Re ⟨A, K⟩, some rows at a time: a third matrix would be as large."""
    rows = zip(A.split(1024), K.split(1024))
    return sum((a.conj() * k).sum().real.item() for a, k in rows)
