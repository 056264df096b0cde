"""What a weight layer is, for any network: W_j as a matrix, and the samples of its input φ_{j-1}.

The weight layers of a network are its linear layers and convolutions, and what else was registered, in the order in
which a forward pass calls them. Each has a matrix of N neurons by D = C·k² entries, channel first and position in the
kernel second; φ_{j-1} has C channels, and every position of every image is one sample of it. A linear layer on a
flattened feature map (C, M, N) counts as a kernel of M×N positions.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from rainbow.errors import RainbowError
from rainbow.registry import Adapter, Architecture, register


class Skipped(NamedTuple):
    """Why a module is not analysed; harmless: a network can be sampled without it."""

    reason: str
    harmless: bool = False


@dataclass(frozen=True, eq=False)
class Layer(Adapter):
    """One weight layer of a network, whose inputs are (B, C, ...) and whose weight is (N, C, ...): the base of all.

    A subclass says what differs. name: its path in the network; module: the module itself, whose input is φ_{j-1};
    kernel: the positions that a row of W_j covers, e.g. (k, k). parameter: the name of the weight in the module;
    channel_axis: where the channels of inputs and outputs are.
    """

    role: ClassVar[str] = "layer"
    parameter: ClassVar[str] = "weight"
    channel_axis: ClassVar[int] = 1

    name: str
    module: nn.Module
    kernel: tuple[int, ...] = (1, 1)

    @classmethod
    def of(cls, name: str, module: nn.Module, flattened: tuple[int, ...] | None = None) -> Layer:
        """The layer of a module; flattened: the shape (C, M, N) whose flattening is its input, if any."""
        return cls(name, module)

    @classmethod
    def refusal(cls, module: nn.Module) -> Skipped | None:
        """Why this module cannot be analysed; None if it can."""
        return None

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight as W_j; a view will do. # (N, D)"""
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse, for any numbers of neurons and channels."""
        return matrix.reshape(len(matrix), -1, *self.weight.shape[2:])

    @property
    def weight(self) -> Tensor:
        """The module's weight as it is, detached."""
        return getattr(self.module, self.parameter).detach()

    @property
    def neurons(self) -> int:
        """N."""
        return self.to_matrix(self.weight).shape[0]

    @property
    def dimension(self) -> int:
        """D = C · (positions of the kernel)."""
        return self.to_matrix(self.weight).shape[1]

    @property
    def channels(self) -> int:
        """C."""
        return self.dimension // math.prod(self.kernel)

    @property
    def inputs(self) -> int:
        """The length of the channel axis of the layer's input."""
        return self.channels

    @property
    def is_complex(self) -> bool:
        """Whether the weights are complex."""
        return self.weight.is_complex()

    def get(self) -> Tensor:
        """A copy of W_j. # (N, D)"""
        return self.to_matrix(self.weight).clone()

    @torch.no_grad()
    def set(self, matrix: Tensor) -> None:
        """Puts W_j (N, D) into the network, in the layer's own precision and place.

        Raises RainbowError if the shape does not fit, or the weight is computed from other parameters.
        """
        if tuple(matrix.shape) != (self.neurons, self.dimension):
            raise RainbowError(
                f"layer {self.name}: weights of shape {tuple(matrix.shape)} do not fit: "
                f"({self.neurons}, {self.dimension}) is needed"
            )
        if self.parameter not in self.module._parameters:
            raise RainbowError(f"layer {self.name}: its {self.parameter} is computed from other parameters, not set")
        self.weight.copy_(self.from_matrix(matrix))

    def resize(self, neurons: int, inputs: int) -> None:
        """Gives the weight another shape, for inputs whose channel axis has another length, and random values."""
        columns = self.dimension // self.inputs * inputs
        set_shape(self.module, self.parameter, self.from_matrix(torch.empty(neurons, columns, device="meta")).shape)

    def samples(self, x: Tensor, patches: bool = False) -> Tensor:
        """The layer's input as samples by channels; with `patches` the D entries that a row of W_j meets. # (n, C)"""
        return x.movedim(self.channel_axis, -1).flatten(0, -2)

    def rotate(self, x: Tensor, rotation: Tensor) -> Tensor:
        """The layer's input x with its channels c replaced by Σ_c x_c R_{c,d}; R of shape (C, C')."""
        rotation = rotation.to(device=x.device, dtype=x.dtype)
        return torch.tensordot(x, rotation, dims=([self.channel_axis], [0])).movedim(-1, self.channel_axis)


class LinearLayer(Layer):
    """A linear layer, inputs (B, ..., D); or (B, C·M·N), a flattened map, if its kernel is (M, N)."""

    channel_axis = -1

    @classmethod
    def of(cls, name, module, flattened=None):
        return cls(name, module) if flattened is None else cls(name, module, tuple(flattened[1:]))

    @property
    def inputs(self):
        return self.dimension

    def resize(self, neurons, inputs):
        super().resize(neurons, inputs)
        self.module.out_features, self.module.in_features = neurons, inputs

    def samples(self, x, patches=False):
        if self.channels == self.dimension or patches:
            return x.flatten(0, -2)
        return x.unflatten(1, (self.channels, -1)).movedim(1, -1).flatten(0, -2)

    def rotate(self, x, rotation):
        if self.channels == self.dimension:
            return super().rotate(x, rotation)
        rotation = rotation.to(device=x.device, dtype=x.dtype)
        return (x.unflatten(1, (self.channels, -1)).mT @ rotation).mT.flatten(1)


class ConvLayer(Layer):
    """A convolution, inputs (B, C, M, N); patches are (B·M'·N', C·k²), of two-dimensional convolutions only."""

    @classmethod
    def of(cls, name, module, flattened=None):
        return cls(name, module, tuple(module.weight.shape[2:]))

    @classmethod
    def refusal(cls, module):
        if isinstance(module, _ConvTransposeNd):
            return Skipped("a transposed convolution: its rows are not neurons")
        if module.groups > 1:
            return Skipped(f"a convolution in {module.groups} groups: its neurons do not see all channels")
        return None

    def resize(self, neurons, inputs):
        super().resize(neurons, inputs)
        self.module.out_channels, self.module.in_channels = neurons, inputs

    def samples(self, x, patches=False):
        if not patches:
            return super().samples(x)
        return self.patch_windows(self.padded(x)).movedim(-1, -3).reshape(-1, self.dimension)

    def padded(self, x: Tensor) -> Tensor:
        """The input x (B, C, M, N) with its padding, channels last. # (B, M + 2p, N + 2p, C)

        Raises RainbowError for other than two-dimensional convolutions.
        """
        conv = self.module
        if not isinstance(conv, nn.Conv2d):
            raise RainbowError(f"layer {self.name}: patches are taken of two-dimensional convolutions only")
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return F.pad(x, conv._reversed_padding_repeated_twice, mode=mode).movedim(1, -1).contiguous()

    def patch_windows(self, padded: Tensor) -> Tensor:
        """What the rows of W_j meet in the padded input, as a view. # (B, M', N', k, k, C)"""
        conv, axes = self.module, (0, 1)
        reach = [conv.dilation[axis] * (conv.kernel_size[axis] - 1) for axis in axes]
        grid = [(padded.shape[1 + axis] - reach[axis] - 1) // conv.stride[axis] + 1 for axis in axes]
        strides = [padded.stride(1 + axis) * conv.stride[axis] for axis in axes]
        steps = [padded.stride(1 + axis) * conv.dilation[axis] for axis in axes]
        shape = (len(padded), *grid, *conv.kernel_size, self.channels)
        return padded.as_strided(shape, (padded.stride(0), *strides, *steps, 1))

    def patch_order(self) -> Tensor:
        """For every entry of a row of W_j its place in a window: channel and position change places. # (D,) int64"""
        return torch.arange(self.dimension).view(-1, self.channels).T.flatten()


register(nn.Linear, LinearLayer)
register(_ConvNd, ConvLayer)


def set_shape(module: nn.Module, key: str, shape: Sequence[int]) -> None:
    """Random numbers of a new shape for a parameter, of standard deviation 1/√D, until they are drawn."""
    old = getattr(module, key)
    if tuple(old.shape) != tuple(shape):
        generator = torch.Generator().manual_seed(0)
        value = torch.randn(shape, dtype=old.dtype, generator=generator) / math.sqrt(math.prod(shape[1:]))
        setattr(module, key, nn.Parameter(value.to(old.device), requires_grad=old.requires_grad))


@dataclass
class Inspection:
    """What a network is made of: its weight `layers` in forward order, and what was `skipped`, by name, and why."""

    layers: list[Layer] = field(default_factory=list)
    skipped: dict[str, Skipped] = field(default_factory=dict)


def weight_layers(model: nn.Module, example_or_loader=None, names: Iterable[str] | None = None) -> list[Layer]:
    """The weight layers of a network in forward order, all of them or those named, in the order of `names`.

    `example_or_loader`: a batch of images, or anything that yields (images, labels): one forward pass of it, with
    hooks, finds the order of the layers and what is flattened in front of them. Without it, networks of a registered
    architecture make their own example, and others give their layers in the order in which they were defined.

    Raises RainbowError if the network has no weight layer, offers no hooks, or has no layer of a given name.
    """
    found = inspect(model, example_or_loader).layers
    if names is None:
        return found
    by_name = {layer.name: layer for layer in found}
    return [by_name[find_name(name, by_name)] for name in names]


def find_name(name: str, known: Iterable[str]) -> str:
    """The name itself if it is known; otherwise RainbowError with the nearest known ones."""
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(str(name), known, 3, 0.4)
    raise RainbowError(
        f"no weight layer {name!r} in this network"
        + (f"; did you mean {' or '.join(near)}?" if near else f"; it has {', '.join(known)}")
    )


def inspect(model: nn.Module, example_or_loader=None) -> Inspection:
    """The weight layers of a network and what was skipped; arguments and errors as for `weight_layers`."""
    _check_hooks(model)
    result = Inspection()
    candidates = {module: name for name, module in model.named_modules() if Layer.find(module)}
    example = make_example(model, example_or_loader)
    flat = {}
    order = list(candidates) if example is None else _forward_order(model, candidates, example, flat)
    for module, name in candidates.items():
        if module not in order:
            result.skipped[name] = Skipped("it is not called in a forward pass")
    for module in order:
        name, adapter = candidates[module], Layer.find(module)
        refusal = adapter.refusal(module)
        if refusal is not None:
            result.skipped[name] = refusal
        else:
            result.layers.append(adapter.of(name, module, flat.get(module)))
    _note_other_weights(model, candidates, result.skipped)
    if not result.layers:
        raise RainbowError(
            f"{type(model).__name__} has no linear layer or convolution that could be analysed"
            + "".join(f"; {name}: {skipped.reason}" for name, skipped in list(result.skipped.items())[:3])
        )
    return result


def check_finite(layers: Iterable[Layer]) -> None:
    """Raises RainbowError if a weight is not finite, naming the layer and how many there are."""
    for layer in layers:
        weight = layer.weight
        bad = int((~torch.isfinite(torch.view_as_real(weight) if weight.is_complex() else weight)).sum())
        if bad:
            raise RainbowError(
                f"layer {layer.name}: {bad} of its {weight.numel()} weights are not finite (NaN or "
                "infinite); the training has diverged, analyse an earlier epoch"
            )


def make_example(model: nn.Module, example_or_loader=None) -> Tensor | None:
    """Two images for a dry forward pass, on the network's device; None where nothing says what they look like."""
    if example_or_loader is None:
        example = Architecture.find(model)(model).example()
        if example is None:
            return None
    elif isinstance(example_or_loader, Tensor):
        example = example_or_loader
    else:
        example = first_images(next(iter(example_or_loader), None))
    return example[:2].to(device_of(model))


def first_images(batch) -> Tensor:
    """The images of a batch: (images, labels, ...) or the images alone. Raises RainbowError for anything else."""
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        raise RainbowError("the data holds no images: a loader yields (images, labels), or images alone, as tensors")
    return images


def device_of(model: nn.Module) -> torch.device:
    """Where the network's first parameter lives."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Within: no gradients, all modules in evaluation mode and none overwriting its input; afterwards as before."""
    modules = [module for model in models for module in model.modules()]
    training = [module.training for module in modules]
    in_place = [module for module in modules if getattr(module, "inplace", False) is True]
    for module in modules:
        module.training = False
    for module in in_place:
        module.inplace = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, training):
            module.training = mode
        for module in in_place:
            module.inplace = True


def _check_hooks(model):
    if not isinstance(model, nn.Module):
        raise RainbowError(f"a network is a torch.nn.Module, got a {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise RainbowError(f"{type(model).__name__} is compiled and offers no hooks: give the module it was made from")


def _note_other_weights(model, candidates, skipped):
    """Matrices of parameters that belong to no linear layer or convolution, as in attention or embeddings."""
    for name, module in model.named_modules():
        if module in candidates:
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and min(parameter.shape[:2]) > 1:
                skipped[f"{name}.{key}".lstrip(".")] = Skipped(
                    f"a weight of {type(module).__name__}, not a linear layer"
                )


class _Flattenings(TorchFunctionMode):
    """Remembers the shape (C, M, N) of every feature map that is flattened to (B, C·M·N), by C·M·N: the last one."""

    def __init__(self):
        super().__init__()
        self.shapes = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if (
            isinstance(out, Tensor)
            and isinstance(source, Tensor)
            and out.ndim == 2
            and source.ndim > 2
            and out.shape[0] == source.shape[0]
            and out.numel() == source.numel()
        ):
            self.shapes[out.shape[1]] = tuple(source.shape[1:])
        return out


def _forward_order(model, candidates, example, flat):
    """The candidates in the order of their first calls; fills `flat` with the shapes flattened before linear ones."""
    order, flattenings = [], _Flattenings()

    def before(module, args):
        if module in order:
            return
        order.append(module)
        if issubclass(Layer.find(module), LinearLayer) and args[0].ndim == 2:
            shape = flattenings.shapes.pop(args[0].shape[1], None)
            if shape is not None and math.prod(shape[1:]) > 1:
                flat[module] = shape

    hooks = [module.register_forward_pre_hook(before) for module in candidates]
    try:
        with evaluating(model), flattenings:
            model(example)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise RainbowError(
            f"{type(model).__name__} cannot process images of shape {tuple(example.shape)}: {first_line}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return order
