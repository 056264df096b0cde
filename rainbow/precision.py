"""Where sums are in double precision."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_device(device: torch.device | str) -> torch.device:
    """The device itself, or the CPU for Apple's GPUs, which have no double precision."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def to_double(x: Tensor) -> Tensor:
    """x in float64 or complex128, on its accumulation device."""
    return x.to(accumulation_device(x.device)).to(torch.complex128 if x.is_complex() else torch.float64)
