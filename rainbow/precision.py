"""What is summed in single precision, what in double, and how exact that is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROWS_AT_ONCE = 8192  # samples summed in single precision
UNIT = torch.finfo(torch.float32).eps / 2  # the largest relative error of a rounding


def rounding(samples: int) -> float:
    """Relative error of a sum of squares over so many samples, ROWS_AT_ONCE of them at a time in single precision.

    √n u for n additions: three standard deviations even if they are made one after another.
    """
    return math.sqrt(min(samples, ROWS_AT_ONCE)) * UNIT


def accumulation_device(device: torch.device | str) -> torch.device:
    """The device itself, or the CPU for Apple's GPUs, which have no double precision."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def to_double(x: Tensor) -> Tensor:
    """x in float64 or complex128, on its accumulation device."""
    return x.to(accumulation_device(x.device)).to(torch.complex128 if x.is_complex() else torch.float64)
