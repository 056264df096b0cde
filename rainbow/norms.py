"""Normalisations with running statistics: in evaluation they are affine maps of channels, so that products before and
after them are a matter of means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rainbow.precision import to_double
from rainbow.registry import Adapter, register


class Affine(NamedTuple):
    """x -> (x - mean) scale + shift for every channel, in double precision. # (D,) or numbers"""

    mean: Tensor | float = 0.0
    scale: Tensor | float = 1.0
    shift: Tensor | float = 0.0


@dataclass(frozen=True, eq=False)
class Norm(Adapter):
    """A normalisation by running statistics, as batch norm: x -> (x - mean) / √(var + ε) · gain + shift.

    mean_buffer, var_buffer: their names. The buffers may be None.
    """

    role: ClassVar[str] = "norm"
    mean_buffer: ClassVar[str] = "running_mean"
    var_buffer: ClassVar[str] = "running_var"

    module: Any

    @classmethod
    def of(cls, module: nn.Module) -> Norm:
        """The adapter of a module that has one."""
        adapter = cls.find(module)
        assert adapter is not None, module
        return adapter(module)

    @property
    def epsilon(self) -> float:
        """ε."""
        return self.module.eps

    @property
    def statistics(self) -> tuple[Tensor, ...]:
        """The running mean and variance themselves; none if it keeps none. # (D,) each"""
        mean, var = getattr(self.module, self.mean_buffer), getattr(self.module, self.var_buffer)
        return () if mean is None else (mean, var)

    def affine(self) -> Affine:
        """What it does in evaluation. It must have statistics."""
        mean, var = map(to_double, self.statistics)
        scale = (var + self.epsilon).rsqrt()
        gain, shift = getattr(self.module, "weight", None), getattr(self.module, "bias", None)
        if gain is not None:
            scale = scale * to_double(gain)
        return Affine(mean, scale, 0.0 if shift is None else to_double(shift))

    def set(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Puts the mean and the biased variance over so many samples into the buffers, the variance unbiased."""
        buffers = self.statistics
        buffers[0].copy_(mean)
        buffers[1].copy_(var * (count / max(count - 1, 1)))

    def samples(self, x: Tensor) -> Tensor:
        """Its input as samples by channels. # (n, D)"""
        return x.movedim(1, -1).flatten(0, -2)

    def resize(self, channels: int) -> None:
        """Gives the buffers another length, with mean 0 and variance 1."""
        self.module.num_features = channels
        for key, buffer in list(self.module.named_buffers(recurse=False)):
            if buffer.ndim and len(buffer) != channels:
                setattr(self.module, key, buffer.new_full((channels,), float(key == self.var_buffer)))


register(nn.modules.batchnorm._BatchNorm, Norm)


def normalized_product(K: Tensor, mean_a: Tensor, map_a: Affine, mean_b: Tensor, map_b: Affine) -> Tensor:
    """E[φ_a φ_b^H] after φ = (f - m) s + t, in the memory of K = E[f_a f_b^H] (its real part, or all). # (D_a, D_b)

    mean_a, mean_b: E[f].
    """
    zero_a, zero_b = torch.zeros_like(mean_a), torch.zeros_like(mean_b)
    m_a, m_b = zero_a + map_a.mean, zero_b + map_b.mean  # (D_a,), (D_b,)
    s_a, s_b = zero_a.real + map_a.scale, zero_b.real + map_b.scale
    t_a, t_b = zero_a.real + map_a.shift, zero_b.real + map_b.shift
    _add_outer(K, m_a, mean_b, -1)
    _add_outer(K, mean_a - m_a, m_b, -1)
    K.mul_(s_a[:, None]).mul_(s_b)
    mean_a, mean_b = (mean_a - m_a) * s_a, (mean_b - m_b) * s_b
    _add_outer(K, mean_a + t_a, t_b)
    return _add_outer(K, t_a, mean_b)


def _add_outer(K, a, b, sign=1):
    """K += sign · a b^H, or its real part where K is real, in place."""
    if K.is_complex():
        return K.addr_(a.to(K.dtype), b.conj().to(K.dtype), alpha=sign)
    K.addr_(a.real.to(K.dtype), b.real.to(K.dtype), alpha=sign)
    if a.is_complex() and b.is_complex():
        K.addr_(a.imag, b.imag, alpha=sign)
    return K
