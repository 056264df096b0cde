"""What standard networks share: batch norm, its place, the initial convolutions, the images' order in memory."""

import itertools
from collections.abc import Callable

from torch import nn

from models.config import StandardConfig
from models.nonlinearity import StandardNonLinearity


def batch_norm(config: StandardConfig, channels: int) -> nn.Module:
    """The batch norm of `channels` channels, affine with `config.bias`; the identity with `config.batch_norm` none."""
    if config.batch_norm == "none":
        return nn.Identity()
    return nn.BatchNorm2d(channels, affine=config.bias)


def non_linearities(config: StandardConfig) -> Callable[[int], nn.Module]:
    """What makes the next non-linearity of a network, for so many channels."""
    names = itertools.cycle(config.non_linearities)
    return lambda channels: StandardNonLinearity(next(names), channels, config.init_gain, config.init_bias)


def in_order(config: StandardConfig, norm, non_linearity) -> tuple:
    """The two modules (or their names) as `config.batch_norm` orders them; without batch norm only the second."""
    orders = {"none": (non_linearity,), "pre": (norm, non_linearity), "post": (non_linearity, norm)}
    return orders[config.batch_norm]


def initialize_convolutions(network: nn.Module):
    """Kaiming-normal (fan-out, relu) weights and zero biases for every convolution of `network`."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def contiguous(network: nn.Module, inputs: tuple) -> tuple:
    """A hook before `network`: channels lie last in memory on CUDA only.

    On AVX-512 a 1×1 convolution of stride 2 with at most 8 such channels ends the process in its backward pass (torch
    2.14, a fault of oneDNN). Of one channel, both orders are contiguous: only the strides tell.
    """
    return tuple(x if x.is_cuda else x.contiguous().flatten().view(x.shape) for x in inputs)
