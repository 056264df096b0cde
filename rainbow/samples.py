"""Sums of products over samples of channels, streamed: single-precision products, added up in double precision.

A sample of D channels is a row φ of a real or complex matrix. What is summed is uncentred, Σ φ_a φ_b^H; normalisations
are affine maps of channels, so that products before and after them are a matter of means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rainbow.precision import ROWS_AT_ONCE, UNIT, accumulation_device, to_double

NUMBERS_AT_ONCE = 1 << 18  # samples in a piece are as many, or ROWS_AT_ONCE
CONSTANT = 8 * UNIT  # a channel that varies less, relative to its mean, is constant
FEW_CHANNELS = 64  # whose products are summed in double precision: it costs next to nothing, and kernels for few
# channels add one sample after another, where the roundings of equal values are all the same
SMALL_MATRIX = 256  # channels below which half a symmetric product saves nothing


def triangle(size: int, start: int = 0) -> Iterator[tuple[slice, slice]]:
    """Blocks (rows, columns) of a symmetric matrix that hold its diagonal and what is above: half the work."""
    if size <= SMALL_MATRIX:
        yield slice(start, start + size), slice(start, start + size)
        return
    middle, end = start + size // 2, start + size
    yield from triangle(middle - start, start)
    yield slice(start, middle), slice(middle, end)
    yield from triangle(end - middle, middle)


class Workspace:
    """Memory for intermediate results, used again and again: a fresh page costs more than the numbers written to it."""

    def __init__(self):
        self._buffers: dict[tuple, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of type and device of `like`; the one taken before under that name is overwritten."""
        key, count = (name, like.dtype, like.device), math.prod(shape)
        if key not in self._buffers or self._buffers[key].numel() < count:
            self._buffers[key] = like.new_empty(count)
        return self._buffers[key][:count].view(shape)


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

    @property
    def nbytes(self) -> int:
        """Bytes of both parts."""
        return self.real.nbytes + (0 if self.imaginary is None else self.imaginary.nbytes)

    def clone(self) -> Samples:
        """The same in memory of its own."""
        imaginary = None if self.imaginary is None else self.imaginary.clone()
        return replace(self, real=self.real.clone(), imaginary=imaginary)

    def pieces(self) -> Iterator[Samples]:
        """The same, ROWS_AT_ONCE samples at a time, or as many as make NUMBERS_AT_ONCE."""
        rows = max(ROWS_AT_ONCE, NUMBERS_AT_ONCE // self.real.shape[1])
        for start in range(0, len(self), rows):
            imaginary = None if self.imaginary is None else self.imaginary[start : start + rows]
            yield replace(self, real=self.real[start : start + rows], imaginary=imaginary)

    def parts(self) -> list[tuple[str, Tensor, Tensor | None]]:
        """(name, columns, order) of the real and, if there is one, of the imaginary part."""
        imaginary = [] if self.imaginary is None else [("i", self.imaginary, self.imaginary_order)]
        return [("r", self.real, self.real_order), *imaginary]


class ProductSum:
    """Σ φ_a φ_b^H over the samples of both that are added, in double precision; its real part if not `complex_values`.

    Single precision sums no more than ROWS_AT_ONCE samples, and none of FEW_CHANNELS. Of symmetric products half is
    computed.
    """

    def __init__(self, complex_values: bool = True, workspace: Workspace | None = None):
        self.complex_values = complex_values
        self._workspace = workspace or Workspace()
        self._sums: dict[str, Tensor] = {}
        self._orders: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        self._symmetric: set[str] = set()
        self._shape = (0, 0)

    def add(self, a: Samples, b: Samples | None = None) -> dict[str, Tensor]:
        """Samples of D_a and D_b channels; without b the symmetric product of a with itself.

        Returns Σ x² of the columns of each part of a symmetric product, its diagonal, for `ChannelSums`. # (D,) float64
        """
        before = {name: self._sums[name * 2].diagonal().clone() for name in "ri" if name * 2 in self._sums}
        other = a if b is None else b
        self._shape = a.real.shape[1], other.real.shape[1]
        for name, left, order in a.parts():
            for other_name, right, other_order in other.parts():
                if name != other_name and not self.complex_values or (b is None and (name, other_name) == ("r", "i")):
                    continue
                self._orders[name + other_name] = order, other_order
                self._add_product(name + other_name, left, right, b is None and name == other_name)
        if b is not None:
            return {}
        return {name: self._sums[name * 2].diagonal() - before.get(name, 0) for name, *_ in a.parts()}

    def _add_product(self, key, a, b, symmetric):
        if key not in self._sums:
            device = accumulation_device(a.device)
            self._sums[key] = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=device)
            if symmetric:
                self._symmetric.add(key)
        total, blocks = self._sums[key], [(slice(None), slice(None))]
        if max(total.shape) <= FEW_CHANNELS and total.device == a.device:
            total.addmm_(to_double(a).T, to_double(b))
            return
        if symmetric:
            blocks = list(triangle(a.shape[1]))
        for left, right in zip(a.split(ROWS_AT_ONCE), b.split(ROWS_AT_ONCE)):
            for rows, columns in blocks:
                target = total[rows, columns]
                product = self._workspace.take("product", target.shape, a)
                target.add_(torch.mm(left[:, rows].T, right[:, columns], out=product).to(total.device))

    def finish(self) -> Tensor:
        """The sum, once: it takes the memory of what was added. # (D_a, D_b) float64, or complex128 where samples and
        `complex_values` are"""
        is_complex = self.complex_values and len(self._sums) > 1
        if not is_complex and set(self._sums) == {"rr"} and not any(order is not None for order in self._orders["rr"]):
            return self._whole("rr")
        like = next(iter(self._sums.values()))
        result = like.new_zeros(self._shape, dtype=torch.complex128 if is_complex else torch.float64)
        real = result.real if is_complex else result
        with_itself = "ii" in self._sums and "ri" not in self._sums
        self._add_to(real, "rr")
        if "ii" in self._sums:
            self._add_to(real, "ii")
        if is_complex and "ir" in self._sums:
            skew = self._add_to(like.new_zeros(self._shape), "ir")
            result.imag.add_(skew)
            if with_itself:
                result.imag.sub_(skew.T)
        if is_complex and "ri" in self._sums:
            self._add_to(result.imag, "ri", -1)
        return result

    def _whole(self, key):
        """A sum, which is let go of; of a symmetric one the lower half is filled in."""
        total = self._sums.pop(key)
        if key in self._symmetric:
            for rows, columns in triangle(len(total)):
                if rows != columns:
                    total[columns, rows] = total[rows, columns].T
        return total

    def _add_to(self, result, key, sign=1):
        """Adds a sum in the order of the channels: those that have no such part come last."""
        total = self._whole(key)
        for axis, order in enumerate(self._orders[key]):
            total = total if order is None else total.index_select(axis, order.to(total.device))
        result[: total.shape[0], : total.shape[1]].add_(total, alpha=sign)
        return result


class ChannelSums:
    """Mean and variance of every channel over the samples that are added, in double precision."""

    def __init__(self):
        self.count = 0
        self._parts: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}  # Σ x, Σ x², order

    def add(self, samples: Samples, squares: dict[str, Tensor] | None = None) -> None:
        """Samples of D channels; squares: what `ProductSum.add` returned for them, if it was called."""
        for name, x, order in samples.parts():
            total, power = _sum_and_squares(x, None if squares is None else squares[name])
            if self.count:
                total += self._parts[name][0]
                power += self._parts[name][1]
            self._parts[name] = total, power, order
        self.count += len(samples)

    @property
    def mean(self) -> Tensor:
        """E[φ]. # (D,) float64, or complex128"""
        real = self._mean("r")
        return torch.complex(real, self._mean("i")) if "i" in self._parts else real

    @property
    def var(self) -> Tensor:
        """E|φ - E[φ]|², biased; exactly 0 for a channel that is constant but for rounding. # (D,) float64"""
        return self._var("r") + self._var("i") if "i" in self._parts else self._var("r")

    def _mean(self, name):
        return self._full(name, self._parts[name][0] / self.count)

    def _var(self, name):
        total, power, _ = self._parts[name]
        square_of_mean = (total / self.count).square()
        var = power / self.count - square_of_mean
        constant = var <= CONSTANT**2 * square_of_mean
        return self._full(name, var.masked_fill(constant, 0))

    def _full(self, name, values):
        order = self._parts[name][2]
        values = values if order is None else values[order.to(values.device)]
        return torch.cat([values, values.new_zeros(len(self._parts["r"][0]) - len(values))])


def _sum_and_squares(x, power):
    """Σ x and Σ x² (`power`, if known) of every channel of real samples (n, D), in double precision, such that the
    variance keeps its digits: where Σ (x - mean)² is a small part of Σ x², it is summed, and the mean's part added."""
    total = to_double(x.sum(0))
    power = to_double(x.square().sum(0)) if power is None else power
    mean = total / len(x)
    of_mean = total * mean
    if (of_mean > 0.99 * power).any():
        power = to_double((x - mean.to(x)).square_().sum(0)) + of_mean
    return total, power
