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

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rainbow.alignment import Alignment, MeanNetwork, transport
from rainbow.clipping import clipped_accuracies, even_ranks
from rainbow.covariance import WeightCovariance, complete_basis, random_basis
from rainbow.errors import RainbowError
from rainbow.layers import Layer, check_finite, find_name, inspect, make_example, weight_layers
from rainbow.moments import Moments, moments
from rainbow.random_matrix import bulk_test
from rainbow.sampling import RainbowSample, RainbowSampler

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
        error = "not aligned" if self.error is None else f"error {self.error:.3f}"
        return [
            self.name,
            f"{self.neurons}×{self.dimension}",
            f"rank {self.rank}",
            f"effective dimension {self.effective_dimension:.1f}",
            error,
            f"outside {100 * self.outside:.1f} %",
        ]


class Rainbow:
    """A network, or the mean network of several, with the covariances of its weights. Made by `fit`.

    covariances: Ĉ_j of all aligned weights, by layer name; errors: of the last alignment, by layer name; skipped: what
    of the network is not analysed, and why.
    """

    def __init__(self, mean: MeanNetwork, loader: Iterable, skipped: dict[str, str]):
        self.mean, self.loader, self.skipped = mean, loader, skipped
        self.network, self.layers = mean.networks[0], {layer.name: layer for layer in mean.layers[0]}
        self.covariances = {name: WeightCovariance.fit(mean.aligned_weights(k)) for k, name in enumerate(self.layers)}
        self.errors: dict[str, float] = {}
        self._moments: dict[str, Moments] = {}

    @classmethod
    def fit(
        cls,
        networks: nn.Module | Sequence[nn.Module],
        loader: Iterable,
        layers: Sequence[str] | None = None,
        num_iters: int = 2,
    ) -> Rainbow:
        """The analysis of a network, or of several of one architecture, aligned to their mean.

        loader: anything that can be gone through again and again and yields (images, labels), or images alone where no
        accuracy is asked for. layers: names (default: all linear layers and convolutions, in forward order).

        Raises RainbowError for a module without hooks or weight layers, a layer that is not there, weights that are not
        finite, or a loader that is empty or can be read only once.
        """
        networks = [networks] if isinstance(networks, nn.Module) else list(networks)
        if not networks:
            raise RainbowError("no network is given")
        if iter(loader) is loader:
            raise RainbowError("the data can be read only once: give a list of batches or a DataLoader")
        found = inspect(networks[0], make_example(networks[0], loader))
        known = [layer.name for layer in found.layers]
        chosen = known if layers is None else [find_name(name, known) for name in layers]
        for network in networks:
            check_finite(weight_layers(network, make_example(network, loader), chosen))
        skipped = {name: skipped.reason for name, skipped in found.skipped.items()}
        skipped |= {name: "it is not asked for" for name in known if name not in chosen}
        return cls(MeanNetwork.fit(networks, loader, layers=chosen, num_iters=num_iters), loader, skipped)

    def align(
        self, other: nn.Module, layers: Sequence[str] | None = None, test: Iterable | None = None
    ) -> dict[str, float]:
        """The relative error of aligning another network to the (first) one, by layer of this one (paper, section 2).

        layers: names of the other network's layers, in the order of this one's (default: the same names). test: data
        that the errors are measured on; default: what the alignment was fitted on. The rotations are in `.alignment`.
        """
        names = list(self.layers)
        others = names if layers is None else list(layers)
        if len(others) != len(names):
            raise RainbowError(f"{len(others)} layers of the other network for {len(names)} of this one")
        networks, chosen = [other, self.network], [others, names]
        found = moments(networks, chosen, self.loader, auto=False, cross=[(0, 1)])
        for k, name in enumerate(names):
            self._warn(name, found.count(0, k), max(found.cross(0, 1, k).shape))
        self.alignment = Alignment().fit_moments(found, 0, 1)
        scored = found if test is None else moments(networks, chosen, test, auto=False, cross=[(0, 1)])
        self.errors = dict(zip(names, self.alignment.score_moments(scored, 0, 1)))
        return self.errors

    def sample(
        self, widths: Sequence[int] | None = None, method: str = "gaussian", seed: int = 0, **options
    ) -> nn.Module:
        """A rainbow network (paper, section 4): random weights of the same covariances, layer by layer.

        widths: neurons of every layer but the last (default: its own). method: "gaussian", "orthogonal" or "white".
        options: of `RainbowSampler`; with test=loader, accuracies are measured. `sample_result` has them all.
        Raises RainbowError where layers were left out, or widths do not fit.
        """
        self._check_order()
        sampler = RainbowSampler(self.mean, self.loader, widths=widths, method=method, **options)
        self.sample_result: RainbowSample = sampler.sample(seed)
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
        chosen = self.layers[find_name(layer, self.layers)]
        vectors = basis if isinstance(basis, Tensor) else self.basis(chosen.name, basis)
        highest = min(chosen.dimension, vectors.shape[1] if vectors.shape[0] == chosen.dimension else chosen.channels)
        ranks = even_ranks(highest) if ranks is None else list(ranks)
        data = self.loader if test is None else test
        return ranks, clipped_accuracies(self.network, chosen, {"basis": vectors}, ranks, data)["basis"]

    def basis(self, layer: str, kind: str) -> Tensor:
        """Orthonormal directions of the (first) network's layer: "weight", "kernel" or "random". # (D, D)"""
        if kind not in BASES:
            raise RainbowError(f"unknown basis {kind!r}: choose from {', '.join(BASES)}, or give its vectors")
        chosen = self.layers[layer]
        if kind == "random":
            dtype = torch.complex128 if chosen.is_complex else torch.float64
            return random_basis(chosen.dimension, torch.Generator().manual_seed(0), dtype)
        if kind == "kernel":
            kernel = self._kernel(layer, chosen)
            return WeightCovariance.from_matrix(kernel if chosen.is_complex else kernel.real, 1).eigenvectors
        rotation = self.mean.alignments[0][list(self.layers).index(layer)]
        vectors = complete_basis(self.covariances[layer].eigenvectors)
        return transport(vectors.mH, rotation.mH.to(vectors.device)).mH

    def summaries(self) -> list[LayerSummary]:
        """What `table` prints, a line for each layer."""
        lines = []
        for k, (name, layer) in enumerate(self.layers.items()):
            covariance, own = self.covariances[name], WeightCovariance.fit(next(self.mean.aligned_weights(k)))
            outside = 0.0
            if own.trace:
                outside = bulk_test(own.eigenvalues.cpu().numpy(), layer.neurons, layer.dimension).outside
            lines.append(
                LayerSummary(
                    name,
                    layer.neurons,
                    layer.dimension,
                    covariance.rank,
                    covariance.effective_dimension,
                    self.errors.get(name),
                    outside,
                )
            )
        return lines

    def table(self) -> str:
        """A line for each layer, and one for everything that was skipped, with the reason."""
        rows = [summary.cells() for summary in self.summaries()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines += [f"{name}  skipped: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([f"{type(self.network).__name__}, {len(self.mean.networks)} network(s)", *lines])

    def _kernel(self, name: str, layer: Layer) -> Tensor:
        """E[φ φᴴ] of the D entries that a row of W_j meets, kept for the next time. # (D, D)"""
        if name not in self._moments:
            self._moments[name] = moments([self.network], [name], self.loader, patches=True, means=False)
        found = self._moments[name]
        self._warn(name, found.count(0, 0), layer.dimension)
        return found.auto(0, 0)

    def _check_order(self):
        """Raises RainbowError where the data comes in another order each time: sampling reads it several times."""
        first, again = (make_example(self.network, self.loader) for _ in range(2))
        if first.shape != again.shape or not torch.equal(first, again):
            raise RainbowError("the data comes in another order each time it is read: sampling needs shuffle=False")

    @staticmethod
    def _warn(name, samples, dimension):
        if samples < dimension:
            warnings.warn(
                f"layer {name}: {samples} samples for {dimension} dimensions do not determine the result: "
                "give more images",
                stacklevel=3,
            )
