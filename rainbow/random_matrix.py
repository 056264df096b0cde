"""What random matrices predict and tests against it (paper, section 3): Marchenko–Pastur, normality, decays.

All in numpy float64. The aspect ratio is q = D / N for N rows of D white coordinates; eigenvalues are those
of (1/N) G^T G, of mean 1 over all D.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rainbow.errors import RainbowError


def bulk_edges(q: float) -> tuple[float, float]:
    """q± = (1 ± √q)², the ends of the Marchenko–Pastur bulk, as (q₋, q₊)."""
    if not (np.isfinite(q) and q > 0):
        raise RainbowError(f"the ratio q = D / N of dimensions to rows is positive, got {q}")
    return (1 - np.sqrt(q)) ** 2, (1 + np.sqrt(q)) ** 2


def marchenko_pastur_density(x: ArrayLike, q: float) -> np.ndarray:
    """√((q₊−x)(x−q₋)) / (2π q x) on the bulk, 0 outside: mass 1 for q ≤ 1, and 1/q for q > 1, where an atom
    at 0 has the rest. Same shape as x."""
    low, high = bulk_edges(q)
    x = np.asarray(x, dtype=np.float64)
    inside = (x > low) & (x < high)
    safe = np.where(inside, x, 1.0)
    return np.where(inside, np.sqrt(np.abs((high - safe) * (safe - low))) / (2 * np.pi * q * safe), 0.0)


@dataclass(frozen=True)
class BulkTest:
    """Eigenvalues laid against the Marchenko–Pastur law of ratio q.

    eigenvalues: (min(N, D),) float64, decreasing, scaled so that all D have mean 1; q: D / N; low, high: the
    edges; above, below: how many lie beyond them; outside: their share of the min(N, D).
    """

    eigenvalues: np.ndarray
    q: float
    low: float
    high: float
    above: int
    below: int

    @property
    def outside(self) -> float:
        return (self.above + self.below) / len(self.eigenvalues)


def bulk_test(eigenvalues: ArrayLike, num_rows: int, dimension: int) -> BulkTest:
    """Normalise the eigenvalues of the covariance of num_rows weights of `dimension` channels and count those
    outside the Marchenko–Pastur bulk, among the first min(N, D): the others are zero whatever the weights.

    Raises RainbowError where there are fewer than min(N, D) eigenvalues or they are all zero.
    """
    rank = min(num_rows, dimension)
    values = np.sort(np.asarray(eigenvalues, dtype=np.float64))[::-1][:rank]
    if len(values) < rank:
        raise RainbowError(f"{num_rows} rows of {dimension} channels have {rank} eigenvalues, got {len(values)}")
    if not values.sum() > 0:
        raise RainbowError("all eigenvalues are zero: there is no spectrum to compare")
    values = values * dimension / values.sum()
    q = dimension / num_rows
    low, high = bulk_edges(q)
    return BulkTest(values, q, low, high, int((values > high).sum()), int((values < low).sum()))


def normality_p_value(samples: ArrayLike) -> float:
    """Exact two-sided Kolmogorov–Smirnov p-value of samples against N(0, 1); complex ones through their real
    and imaginary parts times √2."""
    from scipy.stats import kstest  # a second to import

    values = real_samples(samples)
    return float(kstest(values, "norm", alternative="two-sided", method="exact").pvalue)


def real_samples(samples: ArrayLike) -> np.ndarray:
    """Samples as real ones of the same variance: complex z becomes √2 Re z, √2 Im z. # (n,) or (2n,)"""
    values = np.asarray(samples).ravel()
    if np.iscomplexobj(values):
        values = np.sqrt(2) * np.concatenate([values.real, values.imag])
    if len(values) == 0 or not np.isfinite(values).all():
        raise RainbowError("a test of normality needs finite samples, at least one")
    return values.astype(np.float64)


@dataclass(frozen=True)
class Decay:
    """λ_r ≈ amplitude · exp(−rate · r) ("exponential") or amplitude · r^−rate ("power"), r = 1, 2, …

    r_squared: share of the variance of log λ that the fit explains.
    """

    kind: str
    amplitude: float
    rate: float
    r_squared: float

    def __call__(self, ranks: ArrayLike) -> np.ndarray:
        ranks = np.asarray(ranks, dtype=np.float64)
        return self.amplitude * np.exp(-self.rate * _abscissa(self.kind, ranks))


def fit_decay(eigenvalues: ArrayLike, kind: str, first: int | None = None, start: int = 1) -> Decay:
    """Least squares on log λ_r over the ranks start..first (default: all), counted from 1, zeros left out.

    Raises RainbowError for an unknown kind or fewer than two positive eigenvalues.
    """
    if kind not in ("exponential", "power"):
        raise RainbowError(f"unknown decay {kind!r}: choose exponential or power")
    values = np.asarray(eigenvalues, dtype=np.float64)[start - 1 : first]
    ranks = np.arange(start, start + len(values))[values > 0]
    values = values[values > 0]
    if len(values) < 2:
        raise RainbowError("a decay needs at least two positive eigenvalues")
    abscissa, ordinate = _abscissa(kind, ranks), np.log(values)
    slope, intercept = np.polyfit(abscissa, ordinate, 1)
    spread = np.sum((ordinate - ordinate.mean()) ** 2)
    residual = np.sum((ordinate - slope * abscissa - intercept) ** 2)
    r_squared = 1 - residual / spread if spread else 1.0
    return Decay(kind, float(np.exp(intercept)), float(-slope), float(r_squared))


def _abscissa(kind: str, ranks: np.ndarray) -> np.ndarray:
    return np.log(ranks) if kind == "power" else np.asarray(ranks, dtype=np.float64)
