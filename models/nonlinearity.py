"""Pointwise non-linearities of a scattering block (`--scat-non-linearity`)."""

import torch
from torch import nn

NON_LINEARITIES = ("mod", "abs", "relu", "cst", "mc", "ms", "tanh", "pow")
_TINY = 1e-6
_WITH_BIAS = ("relu", "cst", "ms", "pow")
_WITH_GAIN = ("ms", "tanh", "pow")


class NonLinearity(nn.Module):
    """Applies one of NON_LINEARITIES to (B, C, M, N); `mod` and `abs` give a real output, the others the input's type.

    All but `mod`, `abs` and `relu` keep the phase and change the modulus. Bias b and gain g are one number for all
    channels (`learned` false) or start there and are learned per channel.

    Raises ValueError for an unknown name, `mod` of a real input or `relu` of a complex one.
    """

    def __init__(self, name, signal, bias=None, gain=None, learned=False):
        super().__init__()
        if name not in NON_LINEARITIES:
            raise ValueError(f"unknown non-linearity {name!r}: choose among {', '.join(NON_LINEARITIES)}")
        if name == "mod" and not signal.complex:
            raise ValueError(f"'mod' is the modulus of complex numbers, but its input is real ({signal}); use 'abs'")
        if name == "relu" and signal.complex:
            raise ValueError(f"'relu' needs a real input, but its input is complex ({signal}); use 'cst'")
        for value, what, names in ((bias, "bias", _WITH_BIAS), (gain, "gain", _WITH_GAIN)):
            if value is not None and name not in names:
                raise ValueError(f"the non-linearity {name!r} has no {what} (those that have: {', '.join(names)})")
        if learned and name not in _WITH_BIAS + _WITH_GAIN:
            raise ValueError(f"the non-linearity {name!r} has nothing to learn")
        self.name = name
        self.out = signal.with_(complex=signal.complex and name not in ("mod", "abs"))
        self._set("bias", name in _WITH_BIAS, 0.0 if bias is None else bias, learned, signal.channels)
        self._set("gain", name in _WITH_GAIN, 1.0 if gain is None else gain, learned, signal.channels)

    def _set(self, what, used, value, learned, channels):
        if not used:
            setattr(self, what, None)
        elif learned:
            setattr(self, what, nn.Parameter(torch.full((channels, 1, 1), float(value))))
        else:
            self.register_buffer(what, torch.tensor(float(value)), persistent=False)

    def forward(self, z):
        if self.name in ("mod", "abs"):
            return z.abs()
        if self.name == "relu":
            return torch.relu(z - self.bias)
        modulus = z.abs()
        if self.name == "cst":
            return torch.relu(1 - self.bias / (modulus + _TINY)) * z
        if self.name == "mc":
            new_modulus = 1.0
        elif self.name == "ms":
            new_modulus = torch.sigmoid(self.gain * modulus + self.bias)
        elif self.name == "tanh":
            new_modulus = torch.tanh(self.gain * modulus)
        else:
            power = torch.exp(self.bias) * modulus**self.gain
            new_modulus = power / (1 + power)
        return new_modulus / (modulus + _TINY) * z

    def extra_repr(self):
        return self.name
