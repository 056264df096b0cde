"""A learned frame around a non-linearity (`FrhoF`)."""

import math

import torch
from torch import nn

from models.config import BlockConfig
from models.names import FRAME_NON_LINEARITIES, check_choice
from models.projection import apply_weight, default_weight


def _sigmoid_derivative(x, threshold, delta):
    s = torch.sigmoid((x - threshold) / delta)
    return s * (1 - s)


_FUNCTIONS = {  # of x, a threshold t and a width d
    "relu": lambda x, t, d: (x - t).relu(),
    "modulus": lambda x, t, d: x.abs(),
    "softshrink": lambda x, t, d: (x - t).relu() - (-x - t).relu(),
    "softmodulus": lambda x, t, d: (x - t).relu() + (-x - t).relu(),
    "hardshrink": lambda x, t, d: x * (x.abs() > t),
    "id": lambda x, t, d: x,
    "gate": lambda x, t, d: (x > t).to(x) - (x > t + d).to(x),
    "triang": lambda x, t, d: (1 - (x - t).abs() / d).relu(),
    "sigmo": lambda x, t, d: torch.sigmoid((x - t) / d),
    "sigmo_deriv": _sigmoid_derivative,
    "abs": lambda x, t, d: x.abs(),
    "tanh": lambda x, t, d: x.tanh(),
}


class Frame(nn.Module):
    """x ↦ Fᵀ ρ(F x) with a learned frame F (atoms, C) at every position; (B, C, M, N) real -> same.

    Norms of atoms lie within a factor `config.dictionary_norms` of one another, around √(min(C, atoms)/atoms); 0 leaves
    them free. Raises ValueError for a complex input, an unknown non-linearity or a factor between 0 and 1.
    """

    def __init__(self, signal, config: BlockConfig):
        super().__init__()
        if signal.complex:
            raise ValueError(f"'FrhoF' needs a real input, but its input is complex ({signal}); put 'R' before it")
        check_choice("non-linearity", config.dictionary_non_linearity, FRAME_NON_LINEARITIES)
        atoms, self.ratio = config.dictionary_size, config.dictionary_norms
        if self.ratio < 0 or 0 < self.ratio < 1:
            raise ValueError(f"--dict-norm {self.ratio:g}: a ratio of norms is at least 1; 0 leaves them free")
        self.mean_norm = math.sqrt(min(signal.channels, atoms) / atoms)
        self.frame = nn.Parameter(default_weight(atoms, signal.channels, torch.float, config.orthogonal))
        self.rho = _FUNCTIONS[config.dictionary_non_linearity]
        self.numbers = config.dictionary_threshold / math.sqrt(atoms), config.dictionary_delta
        self.out = signal
        self.normalize()

    def forward(self, x):
        return apply_weight(self.frame.T, self.rho(apply_weight(self.frame, x), *self.numbers))

    @torch.no_grad()
    def normalize(self):
        """Brings every atom's norm into its bounds, as after every step."""
        if self.ratio:
            norms = torch.linalg.vector_norm(self.frame, dim=1, keepdim=True)
            bounds = self.mean_norm / math.sqrt(self.ratio), self.mean_norm * math.sqrt(self.ratio)
            self.frame.mul_(norms.clamp(*bounds) / norms)
