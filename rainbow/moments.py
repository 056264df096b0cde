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

import torch
from torch import Tensor, nn

from rainbow.errors import RainbowError
from rainbow.layers import (
    ConvLayer,
    Layer,
    check_finite,
    device_of,
    evaluating,
    find_name,
    first_images,
    make_example,
    weight_layers,
)
from rainbow.norms import Affine, Norm, normalized_product
from rainbow.registry import Architecture
from rainbow.samples import ROWS_AT_ONCE, ChannelSums, ProductSum, Samples, Workspace

JOINED_BYTES = 16 << 20  # measured: of all inputs of a network's layers, for which a batch is large enough


class Moments:
    """Second moments of the layers of several networks; networks count from 0, layers go by position or name.

    Made by `moments`. Matrices and vectors are float64, or complex128 where the activations are complex.
    """

    def __init__(self, layers: Sequence[Sequence[Layer]]):
        self.names = [[layer.name for layer in each] for each in layers]
        self.complex_weights = [any(layer.is_complex for layer in place) for place in zip(*layers)]
        self.arrays: dict[str, Tensor] = {}

    def auto(self, network: int, layer: int | str) -> Tensor:
        """E[φ φ^H]. # (D, D)"""
        return self._get("auto", (network,), layer)

    def cross(self, i: int, j: int, layer: int | str) -> Tensor:
        """E[φ_i φ_j^H] of two networks; its real part at layers with real weights. # (D_i, D_j)"""
        if i == j and self._key("auto", (i,), layer) in self.arrays:
            return self.auto(i, layer) if self.complex_weights[self.position(layer)] else self.auto(i, layer).real
        if self._key("cross", (i, j), layer) not in self.arrays:
            return self._get("cross", (j, i), layer).mH
        return self._get("cross", (i, j), layer)

    def mean(self, network: int, layer: int | str) -> Tensor:
        """E[φ]. # (D,)"""
        return self._get("mean", (network,), layer)

    def var(self, network: int, layer: int | str) -> Tensor:
        """E|φ - E[φ]|² of every channel. # (D,)"""
        return self._get("var", (network,), layer)

    def energy(self, network: int, layer: int | str) -> float:
        """E‖φ‖²."""
        if self._key("var", (network,), layer) in self.arrays:
            return (self.var(network, layer) + self.mean(network, layer).abs().square()).sum().item()
        return self.auto(network, layer).diagonal().real.sum().item()

    def count(self, network: int, layer: int | str) -> int:
        """Number of samples: images times positions."""
        return int(self._get("count", (network,), layer))

    def position(self, layer: int | str) -> int:
        """The number of a layer, from 0, given its name in the first network (or its number)."""
        if isinstance(layer, int):
            return range(len(self.names[0]))[layer]
        return self.names[0].index(find_name(layer, self.names[0]))

    def _key(self, kind, networks, layer):
        return "_".join([kind, *map(str, networks), str(self.position(layer))])

    def _get(self, kind, networks, layer):
        key = self._key(kind, networks, layer)
        if key not in self.arrays:
            raise RainbowError(f"the {kind} moments of networks {networks} were not asked for when the data was read")
        return self.arrays[key]


def moments(
    networks: Sequence[nn.Module],
    layers,
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
    networks = list(networks)
    chosen, device = resolve_layers(networks, layers, loader, device)
    pairs = _pairs(cross, len(networks))
    for each in chosen:
        check_finite(each)
    stream = _Stream(networks, chosen, auto, pairs, patches, means)
    with evaluating(*networks):
        for images in _joined(loader, device, stream):
            stream.add(images)
    return stream.finish()


def stream_inputs(
    network: nn.Module, layers: Sequence[Layer], images: Tensor, receive: Callable[[int, Tensor], None]
) -> None:
    """Runs the network until the input of every layer has been given to `receive(k, input)`, and no further.

    Raises RainbowError if the forward pass ends before a layer was called.
    """
    waiting = dict.fromkeys(range(len(layers)))

    def hook(k):
        def before(module, args):
            if k in waiting:
                del waiting[k]
                receive(k, args[0])
                if not waiting:
                    raise _Enough

        return before

    handles = [layer.module.register_forward_pre_hook(hook(k)) for k, layer in enumerate(layers)]
    try:
        network(images)
    except _Enough:
        return
    finally:
        for handle in handles:
            handle.remove()
    if waiting:
        raise RainbowError(f"layer {layers[next(iter(waiting))].name} was not called in the forward pass")


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
    """The same as `receive(k, samples, norm, shared)`: samples of the input of layer k, or of that of the normalisation
    that leads to it, which stands for the layer's; `shared`: they lie in memory that may change.

    A registered architecture may give its own, without a copy.
    """
    if Architecture.find(network)(network).stream(layers, images, receive):
        return
    workspace = workspace or Workspace()

    def of_input(k, x):
        if patches and isinstance(layers[k], ConvLayer):
            return receive(k, Patches(layers[k], layers[k].padded(x), workspace), None, True)
        rows = layers[k].samples(x, patches)
        return receive(k, Samples.of(rows), None, rows.data_ptr() == x.data_ptr())

    stream_inputs(network, layers, images, of_input)


def input_of(module: nn.Module, call: Callable[[], object]) -> Tensor:
    """The input of a module that runs somewhere in `call()`, which goes no further."""
    found = []

    def before(_, args):
        found.append(args[0])
        raise _Enough

    handle = module.register_forward_pre_hook(before)
    try:
        call()
    except _Enough:
        pass
    finally:
        handle.remove()
    return found[0]


class _Enough(Exception):
    """Ends a forward pass whose last wanted layer has been reached."""


def digest(networks: Sequence[nn.Module], *texts: str) -> str:
    """A hexadecimal key of networks, their architecture and every parameter and buffer, and of any texts."""
    key = hashlib.blake2b(digest_size=32)
    for text in texts:
        key.update(f"{len(text)}:{text}".encode())
    for network in networks:
        key.update(repr(network).encode())
        for name, tensor in network.state_dict().items():
            key.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            tensor = tensor.detach().cpu().contiguous().resolve_conj()
            key.update(tensor.flatten().view(torch.uint8).numpy() if tensor.numel() else b"")
    return key.hexdigest()


def resolve_layers(
    networks: Sequence[nn.Module], layers, loader: Iterable, device: torch.device | None = None
) -> tuple[list[list[Layer]], torch.device]:
    """A list of `Layer`s for each network, the same number for all, and the device where the networks now are.

    Arguments and errors as for `moments`; one batch is read from the loader.
    """
    device = device_of(networks[0]) if device is None else torch.device(device)
    for network in networks:
        network.to(device)
    if isinstance(loader, Iterator):
        raise RainbowError("the data can be read only once: give a loader or a list of batches, not an iterator")
    first = next(iter(loader), None)
    if first is None:
        raise RainbowError("the data is empty: there is nothing to take moments of")
    example = make_example(networks[0], first_images(first))
    names = _names_for_each(layers, len(networks))
    chosen = [weight_layers(network, example, each) for network, each in zip(networks, names)]
    numbers = [len(each) for each in chosen]
    if not numbers[0]:
        raise RainbowError("no layer is asked for: name at least one")
    if len(set(numbers)) > 1:
        raise RainbowError(
            f"the networks have different numbers of layers ({', '.join(map(str, numbers))}): name those to compare"
        )
    for each in chosen:
        check_finite(each)
    return chosen, device


def _names_for_each(layers, count):
    if layers is None:
        return [None] * count
    layers = list(layers)
    nested = bool(layers) and isinstance(layers[0], (list, tuple))
    if nested and len(layers) != count:
        raise RainbowError(f"layers are given for {len(layers)} networks, but there are {count}")
    each = layers if nested else [layers] * count
    return [[getattr(layer, "name", layer) for layer in names] for names in each]


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

    def __init__(self, networks, layers, auto, pairs, patches, means):
        self.networks, self.layers, self.patches, self.means = networks, layers, patches, means
        numbers = range(len(layers[0]))
        everywhere = [(i, k) for i in range(len(networks)) for k in numbers]
        self.counts = dict.fromkeys(everywhere, 0)
        self.workspace = Workspace()
        self.auto = {place: ProductSum(workspace=self.workspace) for place in everywhere} if auto else {}
        self.channels = {place: ChannelSums() for place in everywhere}
        self.norms = {}
        self.cross = {
            (*pair, k): ProductSum(any(layers[i][k].is_complex for i in pair), self.workspace)
            for pair in pairs
            for k in numbers
        }
        self.partners = {i: [pair for pair in pairs if i == max(pair)] for i in range(len(networks))}
        self.last_use = {i: max([max(pair) for pair in pairs if i in pair], default=-1) for i in range(len(networks))}
        self.held = {}
        self.images = self.bytes = 0

    def add(self, images):
        self.images += len(images)
        for i, network in enumerate(self.networks):
            stream_samples(network, self.layers[i], images, self.patches, partial(self._receive, i), self.workspace)
            for place in [place for place in self.held if self.last_use[place[0]] <= i]:
                del self.held[place]

    def bytes_of_an_image(self):
        """What the inputs of a network's layers take, as far as is known; unlimited before the first batch."""
        return self.bytes / self.images / len(self.networks) if self.images else math.inf

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
            result.arrays[f"count_{i}_{k}"] = torch.tensor(count)
        for (i, k), total in self.auto.items():
            result.arrays[f"auto_{i}_{k}"] = self._normalized(total, i, i, k)
        for (i, j, k), total in self.cross.items():
            result.arrays[f"cross_{i}_{j}_{k}"] = self._normalized(total, i, j, k)
        if self.means:
            for (i, k), sums in self.channels.items():
                mean, scale, shift = self._map(i, k)
                result.arrays[f"mean_{i}_{k}"] = (sums.mean - mean) * scale + shift
                result.arrays[f"var_{i}_{k}"] = sums.var * scale**2
        self._check_finite(result)
        return result

    def _normalized(self, total, i, j, k):
        K = total.total().div_(self.counts[i, k])
        if self.norms[i, k] is self.norms[j, k] is None:
            return K
        (mean_a, map_a), (mean_b, map_b) = ((self.channels[n, k].mean, self._map(n, k)) for n in (i, j))
        return normalized_product(K, mean_a, map_a, mean_b, map_b)

    def _map(self, i, k):
        """What the normalisation does that leads to a layer, if samples are of its input."""
        return Affine() if self.norms[i, k] is None else self.norms[i, k].affine()

    def _check_finite(self, result):
        for i, layers in enumerate(self.layers):
            for k, layer in enumerate(layers):
                keys = [f"{kind}_{i}_{k}" for kind in ("auto", "mean", "var")]
                for array in [result.arrays[key] for key in keys if key in result.arrays]:
                    largest = array.diagonal() if array.ndim == 2 else array
                    if not torch.isfinite(largest).all():
                        raise RainbowError(f"activations at layer {layer.name} are not finite (NaN or infinite)")


def _joined(loader, device, stream):
    """Images batch by batch, small batches together: by themselves they would cost more calls than work."""
    waiting = []
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
