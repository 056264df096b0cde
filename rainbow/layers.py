"""What a weight layer is, for any network: W_j as a matrix, and the samples of its input φ_{j-1}.

The weight layers of a network are its linear layers and convolutions, and what else was registered, in the order in
which a forward pass calls them. Each has a matrix of N neurons by D = C·k² entries, channel first and position in the
kernel second; φ_{j-1} has C channels, and every position of every image is one sample of it. A linear layer on a
flattened feature map, (C, M, N) or (M, N, C), counts as a kernel of M×N positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from rainbow.errors import RainbowError
from rainbow.registry import Adapter, register


class Skipped(NamedTuple):
    """Why a module is not analysed; harmless: a network can be sampled without it."""

    reason: str
    harmless: bool = False


@dataclass(frozen=True, eq=False)
class Layer(Adapter):
    """One weight layer of a network, whose inputs are (B, C, ...) and whose weight is (N, C, ...): the base of all.

    A subclass says what differs. name: its path in the network; module: the module itself, whose input is φ_{j-1};
    kernel: the positions that a row of W_j covers, e.g. (k, k). parameter: the name of the weight in the module;
    channel_axis: where the channels of inputs and outputs are; sizes: the names of N and of `inputs` in the module.
    """

    role: ClassVar[str] = "layer"
    parameter: ClassVar[str] = "weight"
    channel_axis: ClassVar[int] = 1
    sizes: ClassVar[tuple[str, ...]] = ()

    name: str
    module: Any
    kernel: tuple[int, ...] = (1, 1)

    @classmethod
    def of(cls, name: str, module: nn.Module, kernel: tuple[int, ...] = (1, 1), channels_last: bool = False) -> Layer:
        """The layer of a module; kernel, channels_last: of the map whose flattening is its input, for linear layers."""
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
        for key, size in zip(self.sizes, (neurons, inputs)):
            setattr(self.module, key, size)

    def samples(self, x: Tensor, patches: bool = False) -> Tensor:
        """The layer's input as samples by channels; with `patches` the D entries that a row of W_j meets. # (n, C)"""
        return x.movedim(self.channel_axis, -1).flatten(0, -2)

    def rotate(self, x: Tensor, rotation: Tensor) -> Tensor:
        """The layer's input x with its channels c replaced by Σ_c x_c R_{c,d}; R of shape (C, C')."""
        return rotate(x, rotation, self.channel_axis)


@dataclass(frozen=True, eq=False)
class LinearLayer(Layer):
    """A linear layer, inputs (B, ..., D); or, if its kernel is (M, N), maps (C, M, N) flattened to D, or (M, N, C) with
    `channels_last`."""

    channel_axis = -1
    sizes = "out_features", "in_features"

    channels_last: bool = False

    @classmethod
    def of(cls, name, module, kernel=(1, 1), channels_last=False):
        return cls(name, module, kernel, channels_last)

    @property
    def inputs(self):
        return self.dimension

    def to_matrix(self, weight):
        return self._by_channel(weight).flatten(1)

    def from_matrix(self, matrix):
        return self._flat(matrix.unflatten(1, (-1, math.prod(self.kernel))))

    def samples(self, x, patches=False):
        if self.channels == self.dimension:
            return x.flatten(0, -2)
        x = self._by_channel(x)  # (B, ..., C, M·N)
        return (x.flatten(-2) if patches else x.mT).flatten(0, -2)

    def rotate(self, x, rotation):
        if self.channels == self.dimension:
            return super().rotate(x, rotation)
        return self._flat(rotate(self._by_channel(x), rotation, -2))

    def _by_channel(self, x):
        """Entries along the last axis as (C, M·N)."""
        positions = math.prod(self.kernel)
        return x.unflatten(-1, (positions, -1)).mT if self.channels_last else x.unflatten(-1, (-1, positions))

    def _flat(self, x):
        return (x.mT if self.channels_last else x).flatten(-2)


class ConvLayer(Layer):
    """A convolution, inputs (B, C, M, N); patches are (B·M'·N', C·k²), of two-dimensional convolutions only."""

    sizes = "out_channels", "in_channels"

    @classmethod
    def of(cls, name, module, kernel=(1, 1), channels_last=False):
        return cls(name, module, tuple(module.weight.shape[2:]))

    @classmethod
    def refusal(cls, module):
        if isinstance(module, _ConvTransposeNd):
            return Skipped("a transposed convolution: its rows are not neurons")
        if module.groups > 1:
            return Skipped(f"a convolution in {module.groups} groups: its neurons do not see all channels")
        return None

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
        conv, windows = self.module, padded
        for axis in (0, 1):
            reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
            windows = windows.unfold(1 + axis, reach, conv.stride[axis])[..., :: conv.dilation[axis]]
        return windows.movedim(3, -1)

    def patch_order(self) -> Tensor:
        """For every entry of a row of W_j its place in a window: channel and position change places. # (D,) int64"""
        return torch.arange(self.dimension).view(-1, self.channels).T.flatten()


def rotate(x: Tensor, rotation: Tensor, axis: int) -> Tensor:
    """x with Σ_c x_c R_{c,d} for its channels c on an axis."""
    return torch.tensordot(x, rotation.to(device=x.device, dtype=x.dtype), dims=([axis], [0])).movedim(-1, axis)


register(nn.Linear, LinearLayer)
register(_ConvNd, ConvLayer)


def set_shape(module: nn.Module, key: str, shape: Sequence[int]) -> None:
    """Random numbers of a new shape for a parameter, of standard deviation 1/√D, until they are drawn."""
    old = getattr(module, key)
    if tuple(old.shape) != tuple(shape):
        generator = torch.Generator().manual_seed(0)
        value = torch.randn(shape, dtype=old.dtype, generator=generator) / math.sqrt(math.prod(shape[1:]))
        setattr(module, key, nn.Parameter(value.to(old.device), requires_grad=old.requires_grad))
