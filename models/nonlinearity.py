"""Pointwise non-linearities, of a scattering block (`--scat-non-linearity`) and of the standard networks."""

import torch
from torch import nn

from models.names import NON_LINEARITIES, STANDARD_NON_LINEARITIES, check_choice

_TINY = 1e-6


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
        return self._new_modulus(modulus) / (modulus + _TINY) * z

    def _new_modulus(self, modulus):
        if self.name == "mc":
            return 1.0
        if self.name == "ms":
            return torch.sigmoid(self.gain * modulus + self.bias)
        if self.name == "tanh":
            return torch.tanh(self.gain * modulus)
        power = torch.exp(self.bias) * modulus**self.gain
        return power / (1 + power)

    def extra_repr(self):
        return self.name


class StandardNonLinearity(nn.Module):
    """Pointwise function of real (B, C, M, N) or (B, C), with the gain g and bias b it has, learned per channel.

    relu: max(x, 0); abs: |x|; absdead: max(|x| − b, 0), abs with a dead zone; thresh: sign(x) max(|x| − b, 0), the
    soft threshold; tanh: tanh(g x + b); sigmoid: 1 / (1 + exp(−g x − b)); pow: sign(x) t / (1 + t) with
    t = e^b |x|^g; powfixed: pow with g = 1. They start at g = 1, b = 0. Raises ValueError for an unknown name.
    """

    def __init__(self, name: str, channels: int):
        super().__init__()
        check_choice("non-linearity", name, STANDARD_NON_LINEARITIES)
        self.name = name
        self.gain = nn.Parameter(torch.ones(channels)) if "g" in STANDARD_NON_LINEARITIES[name] else None
        self.bias = nn.Parameter(torch.zeros(channels)) if "b" in STANDARD_NON_LINEARITIES[name] else None

    def forward(self, x):
        if self.name == "relu":
            return x.relu()
        if self.name == "abs":
            return x.abs()
        shape = (-1,) + (1,) * (x.dim() - 2)
        bias = self.bias.view(shape)  # (C, 1, 1) or (C,)
        gain = 1.0 if self.gain is None else self.gain.view(shape)
        if self.name == "absdead":
            return (x.abs() - bias).relu()
        if self.name == "thresh":
            return x.sign() * (x.abs() - bias).relu()
        if self.name == "tanh":
            return torch.tanh(gain * x + bias)
        if self.name == "sigmoid":
            return torch.sigmoid(gain * x + bias)
        power = bias.exp() * (x.abs() + _TINY) ** gain
        return x.sign() * power / (1 + power)

    def extra_repr(self):
        return self.name
