"""The analysis for any network: align, look at covariances, clip and resample a `torch.nn.Module` of your own.

>>> import torch, torchvision
>>> _ = torch.manual_seed(0)
>>> network = torchvision.models.resnet18(num_classes=10)
>>> loader = [(torch.randn(8, 3, 64, 64), torch.randint(10, (8,))) for _ in range(2)]
>>> rainbow = Rainbow.fit(network, loader, layers=["layer1.0.conv1", "layer1.0.conv2"])
>>> rainbow.covariances["layer1.0.conv2"].eigenvectors.shape  # D = 64 channels · 3 · 3, at most N = 64 directions
torch.Size([576, 64])
>>> round(max(rainbow.align(network).values()), 6)  # a network is at distance 0 from itself
0.0
>>> ranks, accuracies = rainbow.clip("layer1.0.conv2", "weight", ranks=[0, 64, 576])
>>> bool(accuracies[1] == accuracies[2])  # the weights lie in their first 64 principal directions
True
>>> print(rainbow.table().splitlines()[1])
layer1.0.conv1  64×576  rank 64  effective dimension 57.1  error 0.000  outside 0.0 %

Without `layers`, all linear layers and convolutions are taken in forward order, and `Rainbow.sample` gives a network
with random weights of the same covariances, of the same or of other widths, that computes nearly the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rainbow.alignment import Alignment, MeanNetwork, transport, warn_of_few_samples
from rainbow.clipping import clipped_accuracies, even_ranks
from rainbow.covariance import WeightCovariance, complete_basis, random_basis
from rainbow.errors import RainbowError
from rainbow.layers import Layer
from rainbow.moments import moments, prepare
from rainbow.network import find_name
from rainbow.random_matrix import bulk_test
from rainbow.running import as_batches, first_images
from rainbow.sampling import RainbowSample, RainbowSampler, warn_of_chance

BASES = ("weight", "kernel", "random")


@dataclass(frozen=True)
class LayerSummary:
    """One line of `Rainbow.table`: W_j is (neurons, dimension); error: of the last alignment, None before one; outside:
    share of the eigenvalues of the first network's Ĉ_j outside the Marchenko–Pastur bulk."""

    name: str
    neurons: int
    dimension: int
    rank: int
    effective_dimension: float
    error: float | None
    outside: float

    def cells(self) -> list[str]:
        """The line, cell by cell."""
        error = "not aligned" if self.error is None else f"error {self.error:.3f}"
        sizes = [self.name, f"{self.neurons}×{self.dimension}", f"rank {self.rank}"]
        effective = f"effective dimension {self.effective_dimension:.1f}"
        return [*sizes, effective, error, f"outside {100 * self.outside:.1f} %"]


class Covariances(Mapping):
    """Ĉ_j by layer name, each computed when it is first asked for."""

    def __init__(self, mean: MeanNetwork, names: list[str]):
        self.mean, self.names = mean, names

    def __getitem__(self, name: str) -> WeightCovariance:
        return self.mean.covariance(self.names.index(find_name(name, self.names)))

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


class Rainbow:
    """A network, or the mean network of several, with the covariances of its weights. Made by `fit`.

    covariances: Ĉ_j of all aligned weights, by layer name; errors: of the last alignment, by layer name; skipped: what
    of the network is not analysed, and why; repeated: the modules that are called more than once, of which only the
    first call is analysed, and how often.
    """

    def __init__(self, mean: MeanNetwork, loader: Iterable):
        self.mean, self.loader, analysed = mean, loader, mean.analysed[0]
        self.network, self.layers = analysed.module, {layer.name: layer for layer in mean.layers[0]}
        self.skipped = {name: reason for name, (reason, _) in analysed.skipped.items()}
        self.skipped |= {each.name: "not asked for" for each in analysed.layers if each.name not in self.layers}
        self.repeated = {name: count for name, count in analysed.repeated.items() if name in self.layers}
        self.covariances = Covariances(mean, list(self.layers))
        self.errors: dict[str, float] = {}
        self._kernels: dict[str, Tensor] = {}
        self._alignment: Alignment | None = None

    @classmethod
    def fit(
        cls,
        networks: nn.Module | Sequence[nn.Module],
        loader: Iterable,
        layers: Sequence[str] | None = None,
        num_iters: int = 2,
    ) -> Rainbow:
        """The analysis of a network, or of several of one architecture, aligned to their mean.

        loader: anything that can be iterated over repeatedly and yields (images, labels), or images alone if no
        accuracy is asked for. layers: names (default: all weight layers, in forward order).

        Raises RainbowError for a module without hooks or weight layers, a layer that is not there, weights that are not
        finite, or a loader that is empty or can be read only once.
        """
        loader = as_batches(loader)
        several: Any = networks if isinstance(networks, (list, tuple)) else [networks]
        analysed, chosen, _ = prepare(several, layers, loader)
        return cls(MeanNetwork.fit(analysed, loader, layers=chosen, num_iters=num_iters), loader)

    def align(
        self, other: nn.Module, layers: Sequence[str] | None = None, test: Iterable | None = None
    ) -> dict[str, float]:
        """The relative error of aligning another network to the (first) one, by layer of this one (paper, section 2).

        layers: names of the other network's layers, in the order of this one's (default: the same names). test: data
        that the errors are measured on; default: what the alignment was fitted on. The rotations are in `.alignment`.
        """
        test = None if test is None else as_batches(test)
        names = list(self.layers)
        others = names if layers is None else list(layers)
        if len(others) != len(names):
            raise RainbowError(f"{len(others)} layers of the other network for {len(names)} of this one")
        networks, chosen, _ = prepare([other, self.mean.analysed[0]], [others, names], self.loader)
        found = moments(networks, chosen, self.loader, auto=False, cross=[(0, 1)])
        for k, name in enumerate(names):
            warn_of_few_samples(name, found.count(0, k), max(found.cross(0, 1, k).shape))
        self._alignment = Alignment().fit_moments(found, 0, 1)
        scored = found if test is None else moments(networks, chosen, test, auto=False, cross=[(0, 1)])
        self.errors = dict(zip(names, self._alignment.score_moments(scored, 0, 1)))
        return self.errors

    @property
    def alignment(self) -> Alignment:
        """The rotations of the last `align`. Raises RainbowError before one."""
        if self._alignment is None:
            raise RainbowError("no network was aligned yet: call align(other) first")
        return self._alignment

    def sample(
        self, widths: Sequence[int] | None = None, method: str = "gaussian", seed: int = 0, **options: Any
    ) -> nn.Module:
        """A rainbow network (paper, section 4): random weights of the same covariances, layer by layer.

        widths: neurons of every layer but the last (default: its own). method: "gaussian", "orthogonal" or "white".
        options: of `RainbowSampler`; with test=loader, accuracies are measured. `sample_result` has them all.
        Raises RainbowError if layers were left out, widths do not fit, or the data comes in another order each time.
        """
        first, again = (first_images(next(iter(self.loader))) for _ in range(2))
        if not torch.equal(first, again):
            raise RainbowError("the data comes in another order each time it is read: sampling needs shuffle=False")
        if options.get("test") is not None:
            options["test"] = as_batches(options["test"])
        sampler = RainbowSampler(self.mean, self.loader, widths=widths, method=method, **options)
        self.sample_result: RainbowSample = sampler.sample(seed)
        warn_of_chance(self.network, self.sample_result.network, options.get("test") or self.loader)
        return self.sample_result.network

    def clip(
        self,
        layer: str,
        basis: str | Tensor = "weight",
        ranks: Sequence[int] | None = None,
        test: Iterable | None = None,
    ) -> tuple[list[int], np.ndarray]:
        """Accuracy in percent of the (first) network with W_j restricted to the first d directions (paper, section 5).

        basis: "weight" (PCA of Ĉ_j), "kernel" (PCA of the layer's input), "random", or orthonormal columns (D, R).
        ranks: the values of d (default: 51 from 0 to D). test: (images, labels), default the data fitted on.
        """
        chosen = self._layer(layer)
        vectors = basis if isinstance(basis, Tensor) else self.basis(layer, basis)
        highest = min(chosen.dimension, vectors.shape[1] if vectors.shape[0] == chosen.dimension else chosen.channels)
        ranks = even_ranks(highest) if ranks is None else list(ranks)
        data = self.loader if test is None else as_batches(test)
        return ranks, clipped_accuracies(self.network, chosen, {"basis": vectors}, ranks, data)["basis"]

    def basis(self, layer: str, kind: str) -> Tensor:
        """Orthonormal directions of the (first) network's layer: "weight", "kernel" or "random". # (D, D)"""
        if kind not in BASES:
            raise RainbowError(f"unknown basis {kind!r}: choose from {', '.join(BASES)}, or give its vectors")
        chosen = self._layer(layer)
        if kind == "random":
            dtype = torch.complex128 if chosen.is_complex else torch.float64
            return random_basis(chosen.dimension, torch.Generator().manual_seed(0), dtype)
        if kind == "kernel":
            return WeightCovariance.from_matrix(self._kernel(chosen), 1).eigenvectors
        rotation = self.mean.alignments[0][list(self.layers).index(layer)]
        vectors = complete_basis(self.covariances[layer].eigenvectors)
        return vectors if rotation is None else transport(vectors.mH, rotation.mH.to(vectors.device)).mH

    def summaries(self) -> list[LayerSummary]:
        """What `table` prints, a line for each layer."""
        lines = []
        for k, (name, layer) in enumerate(self.layers.items()):
            C, own = self.mean.spectrum(k), self.mean.spectrum(k, 1)
            size, eigenvalues = (layer.neurons, layer.dimension), own.eigenvalues.cpu().numpy()
            outside = bulk_test(eigenvalues, *size).outside if own.trace else 0.0
            lines.append(LayerSummary(name, *size, C.rank, C.effective_dimension, self.errors.get(name), outside))
        return lines

    def table(self) -> str:
        """A line for each layer, and one for everything that was skipped, with the reason."""
        rows = [summary.cells() for summary in self.summaries()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines += [f"{name}  called {count} times, analysed at the first" for name, count in self.repeated.items()]
        lines += [f"{name}  skipped: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([f"{type(self.network).__name__}, {len(self.mean.networks)} network(s)", *lines])

    def _layer(self, name: str) -> Layer:
        return self.layers[find_name(name, self.layers)]

    def _kernel(self, layer: Layer) -> Tensor:
        """E[φ φᴴ] of the D entries that a row of W_j meets, kept for the next time. # (D, D)"""
        if layer.name not in self._kernels:
            found = moments(self.mean.analysed[:1], [layer.name], self.loader, patches=True, means=False)
            warn_of_few_samples(layer.name, found.count(0, 0), layer.dimension)
            self._kernels[layer.name] = found.cross(0, 0, 0)
        return self._kernels[layer.name]
