"""Second moments of activations: any layers of any number of networks, in one streamed pass over the data.

φ_{j-1} is the input of weight layer j (`rainbow.layers`); every position of every image is a sample of it. Moments are
uncentred, E[φ_a φ_b^H] of shape (D_a, D_b): products of single-precision batches, added up in double precision. A
network runs no further than the last layer wanted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rainbow.errors import RainbowError
from rainbow.layers import ConvLayer, Layer
from rainbow.network import Network, analyse, check_finite, check_module, find_name, first_images
from rainbow.norms import Affine, Norm, normalized_product
from rainbow.program import Architecture
from rainbow.running import device_of, evaluating, stream_inputs
from rainbow.samples import ROWS_AT_ONCE, ChannelSums, ProductSum, Samples, Workspace

JOINED_BYTES = 16 << 20  # measured: of all inputs of a network's layers, for which a batch is large enough


class Moments:
    """Second moments of the layers of several networks; networks count from 0, layers go by position or name.

    Made by `moments`. Matrices and vectors are float64, or complex128 where the activations are complex.
    """

    def __init__(self, layers: Sequence[Sequence[Layer]]):
        self.names = [[layer.name for layer in each] for each in layers]
        self.complex_weights = [any(layer.is_complex for layer in place) for place in zip(*layers)]
        self.arrays: dict[tuple, Tensor] = {}

    def auto(self, network: int, layer: int | str) -> Tensor:
        """E[φ φ^H]. # (D, D)"""
        return self._get("auto", (network,), layer)

    def cross(self, i: int, j: int, layer: int | str) -> Tensor:
        """E[φ_i φ_j^H] of two networks; its real part at layers with real weights. # (D_i, D_j)"""
        k = self.position(layer)
        if i == j and ("auto", (i,), k) in self.arrays:
            return self.auto(i, k) if self.complex_weights[k] else self.auto(i, k).real
        if ("cross", (i, j), k) not in self.arrays:
            return self._get("cross", (j, i), k).mH
        return self._get("cross", (i, j), k)

    def mean(self, network: int, layer: int | str) -> Tensor:
        """E[φ]. # (D,)"""
        return self._get("mean", (network,), layer)

    def var(self, network: int, layer: int | str) -> Tensor:
        """E|φ - E[φ]|² of every channel. # (D,)"""
        return self._get("var", (network,), layer)

    def energy(self, network: int, layer: int | str) -> float:
        """E‖φ‖²."""
        if ("var", (network,), self.position(layer)) in self.arrays:
            return (self.var(network, layer) + self.mean(network, layer).abs().square()).sum().item()
        return self.auto(network, layer).diagonal().real.sum().item()

    def count(self, network: int, layer: int | str) -> int:
        """Number of samples: images times positions."""
        return int(self._get("count", (network,), layer))

    def position(self, layer: int | str) -> int:
        """The number of a layer, from 0, given its name in the first network (or its number)."""
        return position_of(layer, self.names[0])

    def _get(self, kind, networks, layer):
        key = kind, networks, self.position(layer)
        if key not in self.arrays:
            raise RainbowError(f"the {kind} moments of networks {networks} were not asked for when the data was read")
        return self.arrays[key]


def position_of(layer: int | str, names: Sequence[str]) -> int:
    """The number of a layer, given its name or number. Raises RainbowError if there is none."""
    if not isinstance(layer, int):
        return names.index(find_name(layer, names))
    if not -len(names) <= layer < len(names):
        raise RainbowError(f"there is no layer {layer} among {len(names)}, which count from 0")
    return layer % len(names)


def moments(
    networks: Sequence[nn.Module | Network],
    layers: Any,
    loader: Iterable,
    *,
    auto: bool = True,
    cross: int | Sequence[tuple[int, int]] = (),
    patches: bool = False,
    means: bool = True,
    device: torch.device | None = None,
) -> Moments:
    """Second moments of the layers' inputs of several networks over the same data, in one pass.

    networks: any modules. layers: names (or `Layer`s) that all networks have, a list of lists of them, one for each
    network, or None for all weight layers; layer k of one network is compared with layer k of another. loader: yields
    (images, labels) or images, (B, C, M, N). auto: E[φ φ^H] of every network and layer. cross: pairs (i, j) of
    networks, or the number of one network to pair with every other. patches: samples are the D entries that a row of
    W_j meets, instead of its C channels (for convolutions, and linear layers on flattened maps). means: also means and
    variances of the channels. device: where to compute; the networks are moved there (default: where the first is).

    Raises RainbowError for layers that are not there, weights or activations that are not finite, no data, or networks
    that have different numbers of samples at a layer.
    """
    analysed, chosen, device = prepare(networks, layers, loader, device)
    modules = [network.module for network in analysed]
    stream = _Stream(modules, chosen, auto, _pairs(cross, len(modules)), patches, means)
    with evaluating(*modules):
        for images in _joined(loader, device, stream):
            stream.add(images)
    if not stream.images:
        raise RainbowError("the data is empty")
    return stream.finish()


@dataclass(frozen=True, eq=False)
class Patches:
    """Samples that a convolution meets in its padded input, k² times as many numbers as that has: made in pieces."""

    layer: ConvLayer
    padded: Tensor
    workspace: Workspace

    def __len__(self):
        return math.prod(self._windows.shape[:3])

    @property
    def nbytes(self) -> int:
        """Bytes of what they are made from."""
        return self.padded.nbytes

    def clone(self) -> Samples:
        """All of them, in memory of their own."""
        return Samples(torch.cat([piece.real.clone() for piece in self.pieces()]), real_order=self.layer.patch_order())

    def pieces(self) -> Iterator[Samples]:
        """Some images' at a time, about ROWS_AT_ONCE samples; the next piece overwrites the one before."""
        for part in self._windows.split(max(1, ROWS_AT_ONCE * len(self.padded) // len(self))):
            columns = self.workspace.take("patches", part.shape, part).copy_(part)
            yield Samples(columns.view(-1, self.layer.dimension), real_order=self.layer.patch_order())

    @property
    def _windows(self):
        return self.layer.patch_windows(self.padded)


def stream_samples(
    network: nn.Module,
    layers: Sequence[Layer],
    images: Tensor,
    patches: bool,
    receive: Callable[[int, Samples | Patches, Norm | None, bool], None],
    workspace: Workspace | None = None,
) -> None:
    """Calls `receive(k, samples, norm, shared)` for every layer k and runs the network no further.

    The samples are of the layer's input, or of that of the normalisation that leads to it, which stands for the
    layer's; `shared`: they lie in memory that may change. A registered architecture may give its own, without a copy.
    """
    if Architecture.of(network).stream(layers, images, patches, receive):
        return
    space = workspace or Workspace()

    def of_input(k, x):
        layer = layers[k]
        if patches and isinstance(layer, ConvLayer):
            return receive(k, Patches(layer, layer.padded(x), space), None, True)
        rows = layer.samples(x, patches)
        return receive(k, Samples.of(rows), None, rows.data_ptr() == x.data_ptr())

    stream_inputs(lambda: network(images), [layer.module for layer in layers], of_input)


def digest(networks: Sequence[nn.Module]) -> str:
    """A hexadecimal key of networks: their architecture and every parameter and buffer."""
    key = hashlib.blake2b(digest_size=32)
    for network in networks:
        key.update(repr(network).encode())
        for name, tensor in network.state_dict().items():
            key.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            tensor = tensor.detach().cpu().contiguous().resolve_conj()
            key.update(tensor.flatten().view(torch.uint8).numpy() if tensor.numel() else b"")
    return key.hexdigest()


def prepare(
    networks: Sequence[nn.Module | Network], layers: Any, loader: Iterable | None, device: torch.device | None = None
) -> tuple[list[Network], list[list[Layer]], torch.device]:
    """The analysed networks, the layers asked for of each, the same number of all, and where they now are.

    Arguments and errors as for `moments`. One batch is read from the loader, if there is one, unless all networks were
    analysed before.
    """
    modules = [network.module if isinstance(network, Network) else network for network in networks]
    if not modules:
        raise RainbowError("no network is given")
    for module in modules:
        check_module(module)
    device = device_of(modules[0]) if device is None else torch.device(device)
    for module in modules:
        module.to(device)
    if isinstance(loader, Iterator):
        raise RainbowError("the data can be read only once: give a list of batches or a DataLoader")
    first = None
    if loader is not None and not all(isinstance(network, Network) for network in networks):
        first = next(iter(loader), None)
        if first is None:
            raise RainbowError("the data is empty")
    example = None if first is None else first_images(first)
    analysed = [analyse(network, example) for network in networks]
    names = _names_for_each(layers, len(analysed))
    chosen = [network.select(each) for network, each in zip(analysed, names)]
    numbers = [len(each) for each in chosen]
    if not numbers[0]:
        raise RainbowError("no layer is asked for: name at least one")
    if len(set(numbers)) > 1:
        listed = ", ".join(map(str, numbers))
        raise RainbowError(f"the networks have different numbers of layers ({listed}): name those to compare")
    for each in chosen:
        check_finite(each)
    return analysed, chosen, device


def _names_for_each(layers, count):
    if layers is None or isinstance(layers, (str, type)) or callable(layers):
        return [layers] * count
    layers = list(layers)
    nested = bool(layers) and isinstance(layers[0], (list, tuple))
    if nested and len(layers) != count:
        raise RainbowError(f"layers are given for {len(layers)} networks, but there are {count}")
    return [[getattr(layer, "name", layer) for layer in each] for each in (layers if nested else [layers] * count)]


def _pairs(cross, count):
    if isinstance(cross, int):
        cross = [(cross, other) for other in range(count) if other != cross]
    pairs = [tuple(pair) for pair in cross]
    for pair in pairs:
        if not all(0 <= network < count for network in pair):
            raise RainbowError(f"there is no pair {pair} among {count} networks, which count from 0")
    return pairs


class _Stream:
    """The sums of one pass; each batch goes through the networks in turn, and a pair is done with its second one."""

    def __init__(self, modules, layers, auto, pairs, patches, means):
        self.modules, self.layers, self.patches, self.means = modules, layers, patches, means
        places = [(i, k) for i in range(len(modules)) for k in range(len(layers[0]))]
        self.workspace = Workspace()
        self.counts = dict.fromkeys(places, 0)
        self.norms: dict[tuple[int, int], Norm | None] = {}
        self.auto = {place: ProductSum(workspace=self.workspace) for place in places} if auto else {}
        self.channels = {place: ChannelSums() for place in places}
        self.cross = {
            (i, j, k): ProductSum(layers[i][k].is_complex or layers[j][k].is_complex, self.workspace)
            for i, j in pairs
            for k in range(len(layers[0]))
        }
        self.partners = [[pair for pair in pairs if i == max(pair)] for i in range(len(modules))]
        self.last_use = [max([max(pair) for pair in pairs if i in pair], default=-1) for i in range(len(modules))]
        self.held = {}
        self.images = self.bytes = 0

    def add(self, images):
        self.images += len(images)
        for i, module in enumerate(self.modules):
            stream_samples(module, self.layers[i], images, self.patches, partial(self._receive, i), self.workspace)
            for place in [place for place in self.held if self.last_use[place[0]] <= i]:
                del self.held[place]

    def bytes_of_an_image(self):
        """What the inputs of a network's layers take, as far as is known; unlimited before the first batch."""
        return self.bytes / self.images / len(self.modules) if self.images else math.inf

    def _receive(self, i, k, samples, norm, shared):
        self.bytes += samples.nbytes
        self.counts[i, k] += len(samples)
        self.norms[i, k] = norm
        for piece in samples.pieces():
            squares = self.auto[i, k].add(piece) if self.auto else None
            if self.means or norm is not None:
                self.channels[i, k].add(piece, squares)
        if self.last_use[i] >= i:
            self.held[i, k] = samples.clone() if shared else samples
        for pair in self.partners[i]:
            a, b = self.held[pair[0], k], self.held[pair[1], k]
            if len(a) != len(b):
                names = [self.layers[n][k].name for n in pair]
                raise RainbowError(
                    f"networks {pair[0]} and {pair[1]} have {len(a)} and {len(b)} samples of the same "
                    f"images at their layers {names[0]} and {names[1]}: their feature maps differ in size"
                )
            self.cross[(*pair, k)].add(a, b)

    def finish(self):
        result = Moments(self.layers)
        for (i, k), count in self.counts.items():
            result.arrays["count", (i,), k] = torch.tensor(count)
            if self.auto:
                result.arrays["auto", (i,), k] = self._normalized(self.auto[i, k], i, i, k)
            if self.means:
                sums, (mean, scale, shift) = self.channels[i, k], self._map(i, k)
                result.arrays["mean", (i,), k] = (sums.mean - mean) * scale + shift
                result.arrays["var", (i,), k] = sums.var * scale**2
        for (kind, (i,), k), array in result.arrays.items():
            if kind != "count" and not torch.isfinite(array.diagonal() if array.ndim == 2 else array).all():
                name = self.layers[i][k].name
                raise RainbowError(f"activations at layer {name} are not finite (NaN or infinite)")
        for (i, j, k), total in self.cross.items():
            result.arrays["cross", (i, j), k] = self._normalized(total, i, j, k)
        return result

    def _normalized(self, total, i, j, k):
        K = total.finish().div_(self.counts[i, k])
        if self.norms[i, k] is self.norms[j, k] is None:
            return K
        (mean_a, map_a), (mean_b, map_b) = ((self.channels[n, k].mean, self._map(n, k)) for n in (i, j))
        return normalized_product(K, mean_a, map_a, mean_b, map_b)

    def _map(self, i, k):
        """What the normalisation does that leads to a layer, if samples are of its input."""
        norm = self.norms[i, k]
        return Affine() if norm is None else norm.affine()


def _joined(loader, device, stream):
    """Images batch by batch, small batches together: by themselves they would cost more calls than work."""
    waiting: list[Tensor] = []
    for batch in loader:
        images = first_images(batch).to(device, non_blocking=True)
        if waiting and images.shape[1:] != waiting[0].shape[1:]:
            yield _cat(waiting)
            waiting = []
        waiting.append(images)
        if sum(map(len, waiting)) * stream.bytes_of_an_image() >= JOINED_BYTES:
            yield _cat(waiting)
            waiting = []
    if waiting:
        yield _cat(waiting)


def _cat(batches):
    return batches[0] if len(batches) == 1 else torch.cat(batches)
