"""What a weight layer is, for any network: W_j as a matrix, and the samples of its input φ_{j-1}.

The weight layers of a network are its projections `P` and its classifier (a learned scattering network), or its linear
layers and convolutions, in the order in which a forward pass calls them. Each has a matrix of N neurons by
D = C·k² entries, channel first and position in the kernel second; φ_{j-1} has C channels, and every position of every
image is one sample of it. A linear layer on a flattened feature map (C, M, N) counts as a kernel of M×N positions.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from models.projection import Projection
from models.scatnet import ScatNet
from utils.errors import UserError


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight layer of a network.

    name: its path in the network; module: the module itself, whose input is φ_{j-1}; kind: "projection", "linear" or
    "conv"; channels: C; kernel: the positions that a row of W_j covers, (1, 1) for a projection or a plain linear
    layer, (k, k) for a convolution, (M, N) for a linear layer on a flattened map; spatial: (C, M, N) in the last case.
    """

    name: str
    module: nn.Module
    kind: str
    channels: int
    kernel: tuple[int, ...] = (1, 1)
    spatial: tuple[int, ...] | None = None

    @property
    def neurons(self) -> int:
        """N."""
        return self.module.weight.shape[0]

    @property
    def dimension(self) -> int:
        """D = C · (positions of the kernel)."""
        return self.channels * math.prod(self.kernel)

    @property
    def is_complex(self) -> bool:
        """Whether the weights are complex (`Pc`)."""
        return self.module.weight.is_complex()

    def get(self) -> Tensor:
        """A copy of W_j. # (N, D)"""
        return self.module.weight.detach().flatten(1).clone()

    @torch.no_grad()
    def set(self, matrix: Tensor) -> None:
        """Put W_j (N, D) into the network, in the layer's own precision and place.

        Raises UserError if the shape does not fit.
        """
        weight = self.module.weight
        if tuple(matrix.shape) != (self.neurons, self.dimension):
            raise UserError(
                f"layer {self.name}: weights of shape {tuple(matrix.shape)} do not fit: "
                f"({self.neurons}, {self.dimension}) is needed"
            )
        weight.copy_(matrix.reshape(weight.shape))

    def samples(self, x: Tensor, patches: bool = False) -> Tensor:
        """The layer's input as samples by channels; with `patches` the D entries that a row of W_j meets.

        x: (B, C, ...) for a projection or convolution, (B, ..., D) for a linear layer. # (B·M·N, C) or (B·M'·N', D)
        """
        if self.kind == "conv" and patches:
            return self.patch_windows(self.padded(x)).movedim(-1, -3).reshape(-1, self.dimension)
        if self.kind != "linear":
            return x.movedim(1, -1).flatten(0, -2)
        if self.spatial is None or patches:
            return x.flatten(0, -2)
        return x.unflatten(1, (self.channels, -1)).movedim(1, -1).flatten(0, -2)

    def rotate(self, x: Tensor, rotation: Tensor) -> Tensor:
        """The layer's input x with its channels c replaced by Σ_c x_c R_{c,d}; R of shape (C, C')."""
        rotation = rotation.to(device=x.device, dtype=x.dtype)
        if self.kind != "linear":
            return torch.tensordot(x, rotation, dims=([1], [0])).movedim(-1, 1)
        if self.spatial is None:
            return x @ rotation
        return (x.unflatten(1, (self.channels, -1)).mT @ rotation).mT.flatten(1)

    def padded(self, x: Tensor) -> Tensor:
        """A convolution's input x (B, C, M, N) with its padding, channels last. # (B, M + 2p, N + 2p, C)

        Raises UserError for other than two-dimensional convolutions.
        """
        conv = self.module
        if not isinstance(conv, nn.Conv2d):
            raise UserError(f"layer {self.name}: patches are taken of two-dimensional convolutions only")
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return F.pad(x, conv._reversed_padding_repeated_twice, mode=mode).movedim(1, -1).contiguous()

    def patch_windows(self, padded: Tensor) -> Tensor:
        """What the rows of a convolution's W_j meet in its padded input, as a view. # (B, M', N', k, k, C)"""
        conv, axes = self.module, (0, 1)
        reach = [conv.dilation[axis] * (conv.kernel_size[axis] - 1) for axis in axes]
        grid = [(padded.shape[1 + axis] - reach[axis] - 1) // conv.stride[axis] + 1 for axis in axes]
        strides = [padded.stride(1 + axis) * conv.stride[axis] for axis in axes]
        steps = [padded.stride(1 + axis) * conv.dilation[axis] for axis in axes]
        return padded.as_strided(
            (len(padded), *grid, *conv.kernel_size, self.channels), (padded.stride(0), *strides, *steps, 1)
        )

    @cached_property
    def patch_order(self) -> Tensor:
        """For every entry of a row of W_j its place in a window: channel and position change places. # (D,) int64"""
        return torch.arange(self.dimension).view(-1, self.channels).T.flatten()


@dataclass
class Inspection:
    """What a network is made of: its weight `layers` in forward order, and what was `skipped`, by name, and why."""

    layers: list[Layer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def weight_layers(model: nn.Module, example_or_loader=None, names: Iterable[str] | None = None) -> list[Layer]:
    """The weight layers of a network in forward order, all of them or those named, in the order of `names`.

    `example_or_loader`: a batch of images, or anything that yields (images, labels): one forward pass of it, with
    hooks, finds the order of the layers and what is flattened in front of them. Without it, scattering networks make
    their own example, and others give their layers in the order they were made in.

    Raises UserError if the network has no weight layer, offers no hooks, or has no layer of a given name.
    """
    found = inspect(model, example_or_loader).layers
    if names is None:
        return found
    by_name = {layer.name: layer for layer in found}
    return [by_name[find_name(name, by_name)] for name in names]


def find_name(name: str, known: Iterable[str]) -> str:
    """The name itself if it is known; otherwise UserError with the nearest known ones."""
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(str(name), known, 3, 0.4)
    raise UserError(
        f"no weight layer {name!r} in this network"
        + (f"; did you mean {' or '.join(near)}?" if near else f"; it has {', '.join(known)}")
    )


def inspect(model: nn.Module, example_or_loader=None) -> Inspection:
    """The weight layers of a network and what was skipped; arguments and errors as for `weight_layers`."""
    _check_hooks(model)
    result = Inspection()
    candidates = {module: name for name, module in model.named_modules() if _kind(module)}
    example = make_example(model, example_or_loader)
    flat = {}
    order = list(candidates) if example is None else _forward_order(model, candidates, example, flat)
    for module, name in candidates.items():
        if module not in order:
            result.skipped[name] = "it is not called in a forward pass"
    for module in order:
        name = candidates[module]
        reason = _why_not(module)
        if reason:
            result.skipped[name] = reason
        else:
            result.layers.append(_layer(name, module, flat.get(module)))
    _note_other_weights(model, candidates, result.skipped)
    if not result.layers:
        raise UserError(
            f"{type(model).__name__} has no linear layer or convolution that could be analysed"
            + "".join(f"; {name}: {reason}" for name, reason in list(result.skipped.items())[:3])
        )
    return result


def check_finite(layers: Iterable[Layer]) -> None:
    """Raises UserError if a weight is not finite, naming the layer and how many there are."""
    for layer in layers:
        weight = layer.module.weight.detach()
        bad = int((~torch.isfinite(torch.view_as_real(weight) if weight.is_complex() else weight)).sum())
        if bad:
            raise UserError(
                f"layer {layer.name}: {bad} of its {weight.numel()} weights are not finite (NaN or "
                "infinite); the training has diverged, analyse an earlier epoch"
            )


def make_example(model: nn.Module, example_or_loader=None) -> Tensor | None:
    """Two images for a dry forward pass, on the network's device; None where nothing says what they look like."""
    if example_or_loader is None:
        if not isinstance(model, ScatNet):
            return None
        signal, generator = model.blocks[0].signal, torch.Generator().manual_seed(0)
        example = torch.rand(2, signal.channels, signal.height, signal.width, generator=generator)
    elif isinstance(example_or_loader, Tensor):
        example = example_or_loader
    else:
        example = first_images(next(iter(example_or_loader), None))
    return example[:2].to(device_of(model))


def first_images(batch) -> Tensor:
    """The images of a batch: (images, labels, ...) or the images alone. Raises UserError for anything else."""
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        raise UserError("the data holds no images: a loader yields (images, labels), or images alone, as tensors")
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


def _kind(module):
    if isinstance(module, Projection):
        return "projection"
    if isinstance(module, nn.Linear):
        return "linear"
    return "conv" if isinstance(module, _ConvNd) else None


def _why_not(module):
    """The reason why a module cannot be analysed as a weight layer; None if it can."""
    if isinstance(module, _ConvTransposeNd):
        return "a transposed convolution: its rows are not neurons"
    if isinstance(module, _ConvNd) and module.groups > 1:
        return f"a convolution in {module.groups} groups: its neurons do not see all channels"
    if isinstance(module, Projection):
        if module.basis is not None:
            return "its input goes through a fixed basis first"
        if not module.weight.requires_grad and _is_identity(module.weight.detach()):
            return "a fixed identity"
    return None


def _is_identity(weight):
    rows, columns = weight.shape
    return rows == columns and torch.equal(weight, torch.eye(rows, dtype=weight.dtype, device=weight.device))


def _layer(name, module, spatial):
    kind = _kind(module)
    if kind == "linear":
        spatial = getattr(module, "spatial", spatial)
        if spatial is None:
            return Layer(name, module, kind, module.in_features)
        return Layer(name, module, kind, spatial[0], tuple(spatial[1:]), tuple(spatial))
    kernel = tuple(module.weight.shape[2:]) or (1, 1)
    return Layer(name, module, kind, module.weight.shape[1], kernel)


def _check_hooks(model):
    if not isinstance(model, nn.Module):
        raise UserError(f"a network is a torch.nn.Module, got a {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise UserError(f"{type(model).__name__} is compiled and offers no hooks: give the module it was made from")


def _note_other_weights(model, candidates, skipped):
    """Matrices of parameters that belong to no linear layer or convolution, as in attention or embeddings."""
    for name, module in model.named_modules():
        if module in candidates:
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and min(parameter.shape[:2]) > 1:
                skipped[f"{name}.{key}".lstrip(".")] = f"a weight of {type(module).__name__}, not a linear layer"


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
        if isinstance(module, nn.Linear) and args[0].ndim == 2:
            shape = flattenings.shapes.pop(module.in_features, None)
            if shape is not None and math.prod(shape[1:]) > 1:
                flat[module] = shape

    hooks = [module.register_forward_pre_hook(before) for module in candidates]
    try:
        with evaluating(model), flattenings:
            model(example)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{type(model).__name__} cannot process images of shape {tuple(example.shape)}: {first_line}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return order
