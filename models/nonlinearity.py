"""Pointwise non-linearities, of a scattering block (`--scat-non-linearity`) and of the standard networks."""

import torch
from torch import nn

from models.names import NON_LINEARITIES, STANDARD_NON_LINEARITIES, check_choice

_TINY = 1e-6
_SMALLEST = 1e-18  # below it, powers have no gradient


def _power(r, b, g):
    """t/(1 + t) of t = e^b r^g."""
    return torch.sigmoid(b + g * r.clamp_min(_SMALLEST).log())


_MODULI = {  # |ρ(z)| of r = |z|, a bias b and a gain g
    "mc": lambda r, b, g: 1.0,
    "ms": lambda r, b, g: torch.sigmoid(g * r + b),
    "tanh": lambda r, b, g: torch.tanh(g * r),
    "pow": _power,
}
_STANDARD = {  # ρ(x) of a real x
    "relu": lambda x, b, g: x.relu(),
    "abs": lambda x, b, g: x.abs(),
    "absdead": lambda x, b, g: (x - b).relu() + (-x - b).relu(),  # with a dead zone
    "thresh": lambda x, b, g: (x - b).relu() - (-x - b).relu(),  # the soft threshold
    "tanh": lambda x, b, g: x.tanh(),
    "sigmoid": lambda x, b, g: torch.sigmoid(g * x.abs() + b) / (x.abs() + _TINY) * x,
    "pow": lambda x, b, g: _power(x.abs(), b, g.exp()) / (x.abs() + _TINY) * x,
    "powfixed": lambda x, b, g: x / (1 + x.abs()),
}


class NonLinearity(nn.Module):
    """Applies one of NON_LINEARITIES to (B, C, M, N); `mod` and `abs` give a real output, the others the input's type.

    All but `mod`, `abs` and `relu` keep the phase and change the modulus. Bias b and gain g are one number for all
    channels (`learned` false) or start there and are learned per channel.

    Raises ValueError for an unknown name, `mod` of a real input or `relu` of a complex one.
    """

    def __init__(self, name, signal, bias=None, gain=None, learned=False):
        super().__init__()
        check_choice("non-linearity", name, NON_LINEARITIES)
        if name == "mod" and not signal.complex:
            raise ValueError(f"'mod' is the modulus of complex numbers, but its input is real ({signal}); use 'abs'")
        if name == "relu" and signal.complex:
            raise ValueError(f"'relu' needs a real input, but its input is complex ({signal}); use 'cst'")
        if learned and not NON_LINEARITIES[name]:
            raise ValueError(f"the non-linearity {name!r} has nothing to learn")
        self.name = name
        self.out = signal.with_(complex=signal.complex and name not in ("mod", "abs"))
        self._set("bias", bias, 0.0, learned)
        self._set("gain", gain, 1.0, learned)

    def _set(self, what, value, default, learned):
        having = [name for name, numbers in NON_LINEARITIES.items() if what[0] in numbers]
        if value is not None and self.name not in having:
            raise ValueError(f"the non-linearity {self.name!r} has no {what} (those that have: {', '.join(having)})")
        start = torch.tensor(float(default if value is None else value))
        if self.name not in having:
            setattr(self, what, None)
        elif learned:
            setattr(self, what, nn.Parameter(start.repeat(self.out.channels, 1, 1)))
        else:
            self.register_buffer(what, start, persistent=False)

    def forward(self, z):
        if self.name in ("mod", "abs"):
            return z.abs()
        if self.name == "relu":
            return torch.relu(z - self.bias)
        modulus = z.abs()
        if self.name == "cst":
            return torch.relu(1 - self.bias / (modulus + _TINY)) * z
        return _MODULI[self.name](modulus, self.bias, self.gain) / (modulus + _TINY) * z

    def extra_repr(self):
        return self.name


class StandardNonLinearity(nn.Module):
    """One of STANDARD_NON_LINEARITIES on real (B, C, M, N) or (B, C), with the authors' formulas.

    The gain g and bias b start at the numbers given; those that STANDARD_NON_LINEARITIES names are learned per channel.
    Raises ValueError for an unknown name.
    """

    def __init__(self, name: str, channels: int, gain: float = 1.0, bias: float = 0.0):
        super().__init__()
        check_choice("non-linearity", name, STANDARD_NON_LINEARITIES)
        self.name = name
        for what, start in (("gain", gain), ("bias", bias)):
            number = torch.full((channels,), start)
            if what[0] in STANDARD_NON_LINEARITIES[name]:
                setattr(self, what, nn.Parameter(number))
            else:
                self.register_buffer(what, number, persistent=False)

    def forward(self, x):
        numbers = (n.view((-1,) + (1,) * (x.dim() - 2)) for n in (self.bias, self.gain))  # (C, 1, 1) or (C,)
        return _STANDARD[self.name](x, *numbers)

    def extra_repr(self):
        return self.name
