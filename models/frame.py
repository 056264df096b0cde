"""A learned frame around a non-linearity (`FrhoF`)."""

import math

import torch
from torch import nn

from models.names import FRAME_NON_LINEARITIES, check_choice
from models.projection import apply_weight


class Frame(nn.Module):
    """x ↦ Fᵀ ρ(F x) with a learned frame F (atoms, C) at every position; (B, C, M, N) real -> same.

    Raises ValueError for a complex input or an unknown non-linearity.
    """

    def __init__(self, signal, atoms, non_linearity="relu"):
        super().__init__()
        if signal.complex:
            raise ValueError(f"'FrhoF' needs a real input, but its input is complex ({signal}); put 'R' before it")
        check_choice("non-linearity", non_linearity, FRAME_NON_LINEARITIES)
        self.frame = nn.Parameter(torch.randn(atoms, signal.channels) / math.sqrt(atoms))
        self.rho = getattr(torch, non_linearity)
        self.out = signal

    def forward(self, x):
        return apply_weight(self.frame.T, self.rho(apply_weight(self.frame, x)))
