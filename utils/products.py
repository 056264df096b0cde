"""Sums of products over samples of channels, streamed: single-precision products, added up in double precision.

A sample of D channels is a row φ of a real or complex matrix. What is summed is uncentred, Σ φ_a φ_b^H; normalisations
are affine maps of channels, so that products before and after them are a matter of means.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.standardization import EPSILON, Standardization

ROWS_AT_ONCE = 8192  # samples summed in single precision
SMALL_MATRIX = 256  # channels below which half a symmetric product saves nothing


def accumulation_device(device: torch.device) -> torch.device:
    """Where double precision lives: the device itself, or the CPU where it has none (Apple's GPUs)."""
    return torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)


def _double(x):
    dtype = torch.complex128 if x.is_complex() else torch.float64
    return x.to(accumulation_device(x.device)).to(dtype)


def gram(x: Tensor) -> Tensor:
    """XᵀX for real samples X (n, D), with half the work: the blocks below the diagonal are copied. # (D, D)"""
    size = x.shape[1]
    if size <= SMALL_MATRIX:
        return x.T @ x
    left, right = x[:, : size // 2], x[:, size // 2 :]
    corner = left.T @ right
    return torch.cat([torch.cat([gram(left), corner], 1), torch.cat([corner.T, gram(right)], 1)])


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples of D channels, rows of real matrices: real (n, D), and imaginary (n, D' ≤ D), that of the first D'
    channels, or None. Where an `order` is given, channel d is column order[d]: matrices need no reordering of samples.
    """

    real: Tensor
    imaginary: Tensor | None = None
    real_order: Tensor | None = None
    imaginary_order: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor) -> Samples:
        """Samples (n, D), real or complex."""
        return cls(x.real, x.imag) if x.is_complex() else cls(x)

    def __len__(self):
        return len(self.real)

    def clone(self) -> Samples:
        """The same in memory of its own."""
        imaginary = None if self.imaginary is None else self.imaginary.clone()
        return replace(self, real=self.real.clone(), imaginary=imaginary)

    def parts(self) -> list[tuple[str, Tensor, Tensor | None]]:
        """(name, columns, order) of the real and, if there is one, of the imaginary part."""
        imaginary = [] if self.imaginary is None else [("i", self.imaginary, self.imaginary_order)]
        return [("r", self.real, self.real_order), *imaginary]


class ProductSum:
    """Σ φ_a φ_b^H over the samples of both that are added, in double precision; its real part if not `complex_values`.

    In single precision it sums ROWS_AT_ONCE samples.
    """

    def __init__(self, complex_values: bool = True):
        self.complex_values = complex_values
        self._sums: dict[str, Tensor] = {}
        self._orders: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self._shape = None

    def add(self, a: Samples, b: Samples | None = None) -> None:
        """Samples of D_a and D_b channels; without b the symmetric product of a with itself."""
        self._shape = a.real.shape[1], (b or a).real.shape[1]
        for name, columns, order in a.parts():
            for other_name, other, other_order in (b or a).parts():
                if name != other_name and not self.complex_values or (b is None and (name, other_name) == ("r", "i")):
                    continue
                self._orders[name + other_name] = order, other_order
                self._add(name + other_name, columns, None if b is None and name == other_name else other)

    def _add(self, key, a, b):
        for start in range(0, len(a), ROWS_AT_ONCE):
            rows = a[start : start + ROWS_AT_ONCE]
            product = gram(rows) if b is None else rows.T @ b[start : start + ROWS_AT_ONCE]
            if key not in self._sums:
                device = accumulation_device(product.device)
                self._sums[key] = torch.zeros(product.shape, dtype=torch.float64, device=device)
            self._sums[key] += product.to(self._sums[key].device)

    def total(self) -> Tensor:
        """The sum. # (D_a, D_b) float64, or complex128 where samples and `complex_values` are"""
        real = self._full("rr")
        if "ii" in self._sums:
            real += self._full("ii")
        if not self.complex_values or len(self._sums) == 1:
            return real
        imaginary = self._full("ir") if "ir" in self._sums else torch.zeros_like(real)
        if "ri" in self._sums:
            imaginary -= self._full("ri")
        elif "ii" in self._sums:
            imaginary -= self._full("ir").T
        return torch.complex(real, imaginary)

    def _full(self, key):
        """A sum in the order of the channels, with zeros for those that have no such part."""
        total = self._sums[key]
        rows, columns = (None if order is None else order.to(total.device) for order in self._orders[key])
        total = total if rows is None else total[rows]
        total = total if columns is None else total[:, columns]
        full = total.new_zeros(self._shape)
        full[: total.shape[0], : total.shape[1]] = total
        return full


def _mean_and_squares(x):
    """Mean of every channel of real samples (n, D) and Σ (x - mean)², from Σ x² where that is not mostly the mean's."""
    mean = x.mean(0)
    power = _double(x.square().sum(0))
    squares = power - len(x) * _double(mean).square()
    if (power > 100 * squares).any():
        squares = _double((x - mean).square_().sum(0))
    return _double(mean), squares


class ChannelSums:
    """Mean and variance of every channel over the samples that are added, merged batch by batch in double precision."""

    def __init__(self):
        self.count = 0
        self._parts: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}  # mean, squares, order

    def add(self, samples: Samples) -> None:
        """Samples of D channels."""
        count = len(samples)
        for name, x, order in samples.parts():
            mean, squares = _mean_and_squares(x)
            if self.count:
                old, old_squares, _ = self._parts[name]
                shift = mean - old
                squares = old_squares + squares + shift.square() * (self.count * count / (self.count + count))
                mean = old + shift * (count / (self.count + count))
            self._parts[name] = mean, squares, order
        self.count += count

    @property
    def mean(self) -> Tensor:
        """E[φ]. # (D,) float64, or complex128"""
        real = self._full("r", 0)
        return torch.complex(real, self._full("i", 0)) if "i" in self._parts else real

    @property
    def var(self) -> Tensor:
        """E|φ - E[φ]|², biased. # (D,) float64"""
        squares = self._full("r", 1)
        return (squares + self._full("i", 1) if "i" in self._parts else squares) / self.count

    def _full(self, name, which):
        values, order = self._parts[name][which], self._parts[name][2]
        values = values if order is None else values[order.to(values.device)]
        return torch.cat([values, values.new_zeros(len(self._parts["r"][0]) - len(values))])


def affine_of(norm: nn.Module | None) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
    """Mean m, scale s and shift t of a normalisation x -> (x - m) s + t in evaluation, (D,) in double precision.

    (0, 1, 0) without one.
    """
    if norm is None:
        return 0.0, 1.0, 0.0
    if isinstance(norm, Standardization):
        mean, var, epsilon, gain, shift = norm.mean, norm.var, EPSILON, None, None
    else:
        mean, var, epsilon, gain, shift = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    mean, scale = _double(mean), (_double(var) + epsilon).rsqrt()
    if gain is not None:
        scale = scale * _double(gain)
    return mean, scale, 0.0 if shift is None else _double(shift)


def normalized_product(K: Tensor, mean_a: Tensor, norm_a: nn.Module | None, mean_b: Tensor, norm_b: nn.Module | None
                       ) -> Tensor:
    """E[φ_a φ_b^H] after normalisations φ = (f - m) s + t, from K = E[f_a f_b^H] (its real part, or all) and E[f]."""
    (m_a, s_a, t_a), (m_b, s_b, t_b) = affine_of(norm_a), affine_of(norm_b)
    zero_a, zero_b = torch.zeros_like(mean_a), torch.zeros_like(mean_b)
    m_a, m_b = zero_a + m_a, zero_b + m_b  # (D_a,), (D_b,)
    centred = K - _as(K, torch.outer(m_a, mean_b.conj()) + torch.outer(mean_a - m_a, m_b.conj()))
    t_a, t_b = zero_a.real + t_a, zero_b.real + t_b
    scaled = (centred * (zero_a.real + s_a)[:, None]) * s_b
    mean_a, mean_b = (mean_a - m_a) * s_a, (mean_b - m_b) * s_b
    shifts = _outer(mean_a + t_a, t_b) + _outer(t_a, mean_b.conj())
    return scaled + _as(K, shifts)


def _outer(a, b):
    return torch.outer(a, b.to(torch.promote_types(a.dtype, b.dtype)))


def _as(K, correction):
    return correction if K.is_complex() else correction.real
