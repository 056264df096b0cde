"""Weight covariances of a layer and what is derived from them (paper, section 3).

With the weights of one or several aligned networks as rows w_n of (N, D) matrices W,

    Ĉ = (1/N) Σ_n w_n^H w_n = (1/N) W^H W = V diag(λ) V^H,      so that E|w·f|² = f^H Ĉ f,

found in double precision from the eigenvalues of the smaller of W W^H and W^H W; or, where the smallest is too small
a part of the largest for that (CONDITION for eigenvectors made from those of W W^H, `_least` for others), from singular
values of W, which keep twice the digits and take several times as long. Never more than 2 D rows and one network's are
held at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rainbow.errors import RainbowError
from rainbow.precision import to_double

NORMS = ("spectral", "frobenius", "nuclear")


CONDITION = 1e-6  # the least ratio of eigenvalues at which a Gram matrix gives orthonormal eigenvectors to ten digits


class _Spectrum:
    """What eigenvalues alone tell of Ĉ."""

    eigenvalues: Tensor
    dimension: Any

    @property
    def trace(self) -> float:
        """tr Ĉ = E‖w‖²."""
        return self.eigenvalues.sum().item()

    @property
    def rank(self) -> int:
        """Number of eigenvalues that are not rounding errors of the first."""
        tolerance = self.eigenvalues[0] * self.dimension * torch.finfo(torch.float64).eps
        return int((self.eigenvalues > tolerance).sum())

    @property
    def effective_dimension(self) -> float:
        """(tr Ĉ)² / tr Ĉ²: D for white weights, 1 for weights along one direction, 0 for zero weights."""
        squares = (self.eigenvalues**2).sum().item()
        return self.trace**2 / squares if squares else 0.0


@dataclass(frozen=True)
class Spectrum(_Spectrum):
    """The eigenvalues of Ĉ: (R,) float64, decreasing, R = min(N, D); dimension: D; num_rows: N."""

    eigenvalues: Tensor
    dimension: int
    num_rows: int

    @classmethod
    def fit(cls, weights: Tensor | Iterable[Tensor]) -> Spectrum:
        """Of the rows of one (N, D) matrix or of several, as `WeightCovariance.fit`, in a third of its time or less."""
        rows, num_rows = _gathered(weights)
        eigenvalues = torch.linalg.eigvalsh(_gram(rows)).flip(0)
        if eigenvalues[-1] < _least(rows) * eigenvalues[0]:
            eigenvalues = torch.linalg.svdvals(rows).square()
        return cls(eigenvalues / num_rows, rows.shape[1], num_rows)


@dataclass(frozen=True)
class WeightCovariance(_Spectrum):
    """Ĉ = V diag(λ) V^H of a layer, kept as its non-trivial eigenvalues and eigenvectors.

    eigenvalues: (R,) float64, decreasing, R = min(N, D); eigenvectors: (D, R), columns e_r, float64 or
    complex128; num_rows: N, the number of weight vectors it was estimated from.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    num_rows: int

    @classmethod
    def fit(cls, weights: Tensor | Iterable[Tensor]) -> WeightCovariance:
        """Covariance of all rows of one (N, D) matrix, or of several (N_i, D), one for each aligned network.

        Raises RainbowError where there is no row, the dimensions D differ, or a value is not finite.
        """
        rows, num_rows = _gathered(weights)
        eigenvalues, vectors = (x.flip(-1) for x in torch.linalg.eigh(_gram(rows)))
        wide = len(rows) < rows.shape[1]
        if eigenvalues[-1] < (CONDITION if wide else _least(rows)) * eigenvalues[0]:
            _, singular_values, vectors = torch.linalg.svd(rows, full_matrices=False)
            eigenvalues, vectors = singular_values.square(), vectors.mH
        elif wide:
            vectors = rows.mH @ (vectors / eigenvalues.sqrt())
        return cls(eigenvalues / num_rows, vectors.contiguous(), num_rows)

    @classmethod
    def from_matrix(cls, matrix: Tensor, num_rows: int) -> WeightCovariance:
        """The same from a (D, D) Hermitian matrix, such as E[φ φ^H] over num_rows samples (kernel PCA)."""
        matrix = _checked_rows(matrix, None)
        if matrix.shape[0] != matrix.shape[1]:
            raise RainbowError(f"a covariance matrix is square, this one is {tuple(matrix.shape)}")
        eigenvalues, eigenvectors = torch.linalg.eigh((matrix + matrix.mH) / 2)
        return cls(eigenvalues.flip(0).clamp(min=0), eigenvectors.flip(1), num_rows)

    @property
    def dimension(self) -> int:
        """D, the number of input channels of the layer."""
        return self.eigenvectors.shape[0]

    def matrix(self) -> Tensor:
        """Ĉ itself. # (D, D)"""
        return (self.eigenvectors * self.eigenvalues) @ self.eigenvectors.mH

    def coordinates(self, weights: Tensor) -> Tensor:
        """Coordinates W e_r of weights (N, D) along the principal directions. # (N, R)"""
        weights, vectors = _same_type(_checked_rows(weights, self.dimension), self.eigenvectors)
        return weights @ vectors

    def direction_norms(self, weights: Tensor) -> Tensor:
        """‖W e_r‖ for weights (N, D). # (R,)"""
        return torch.linalg.vector_norm(self.coordinates(weights), dim=0)

    def whitened_coordinates(self, weights: Tensor) -> Tensor:
        """W e_r / √λ_r along the directions of positive variance: N(0, 1) for Gaussian W. # (N, rank)"""
        rank = self.rank
        return self.coordinates(weights)[:, :rank] / self.eigenvalues[:rank].sqrt()

    def whiten(self, weights: Tensor) -> Tensor:
        """W Ĉ^−1/2, the pseudo-inverse where Ĉ is singular, for weights (N, D) (paper: G_j). # (N, D)"""
        coordinates = self.whitened_coordinates(weights)
        return coordinates @ self.eigenvectors[:, : self.rank].mH.to(coordinates.dtype)

    def relative_error(self, reference: WeightCovariance, norm: str = "spectral") -> float:
        """‖Ĉ − C_ref‖ / ‖C_ref‖ in the Schatten norm ∞ ("spectral"), 2 ("frobenius") or 1 ("nuclear").

        Ĉ − C_ref = B diag(±1) B^H with B (D, R + R_ref) the scaled eigenvectors of both: with B = Q T its
        eigenvalues are those of T diag(±1) T^H, at most R + R_ref wide.
        """
        if reference.dimension != self.dimension:
            dimensions = f"{self.dimension} and {reference.dimension} dimensions"
            raise RainbowError(f"covariances of {dimensions} cannot be compared: align the networks first")
        halves = [c.eigenvectors * c.eigenvalues.sqrt() for c in (self, reference)]
        triangle = torch.linalg.qr(torch.cat(_same_type(*halves), dim=1), mode="r").R
        signs = torch.ones(triangle.shape[1], dtype=torch.float64, device=triangle.device)
        signs[len(self.eigenvalues) :] = -1
        difference = torch.linalg.eigvalsh((triangle * signs) @ triangle.mH)
        return (schatten(difference, norm) / schatten(reference.eigenvalues, norm)).item()


def _gathered(weights):
    """All rows, or as many as are needed for the same W^H W, and how many there were. # (n, D) double"""
    rows, num_rows = None, 0
    for block in [weights] if isinstance(weights, Tensor) else weights:
        block = _checked_rows(block, None if rows is None else rows.shape[1])
        num_rows += len(block)
        rows = block if rows is None else torch.cat(_same_type(rows, block))
        if len(rows) > 2 * rows.shape[1]:
            rows = torch.linalg.qr(rows, mode="r").R  # (D, D)
    if rows is None:
        raise RainbowError("the covariance of no weights is not defined: give at least one row")
    return rows, num_rows


def _gram(rows):
    """The smaller of W W^H and W^H W."""
    return rows @ rows.mH if len(rows) < rows.shape[1] else rows.mH @ rows


def _least(rows):
    """The least ratio of eigenvalues at which those of a Gram matrix have two digits or more."""
    return 100 * min(rows.shape) * torch.finfo(torch.float64).eps


def schatten(eigenvalues: Tensor, norm: str) -> Tensor:
    """Schatten norm of a Hermitian matrix of these eigenvalues: "spectral" ∞, "frobenius" 2, "nuclear" 1."""
    if norm not in NORMS:
        raise RainbowError(f"unknown norm {norm!r}: choose from {', '.join(NORMS)}")
    order = {"spectral": float("inf"), "frobenius": 2.0, "nuclear": 1.0}[norm]
    return torch.linalg.vector_norm(eigenvalues, order)


def explained_variance(weights: Tensor, basis: Tensor) -> Tensor:
    """Share of ‖W‖² that lies in the first d columns of an orthonormal basis (D, R), d = 0..R. # (R + 1,)"""
    weights = _checked_rows(weights, basis.shape[0])
    weights, basis = _same_type(weights, to_double(basis).to(weights.device))
    norms = torch.linalg.vector_norm(weights @ basis, dim=0) ** 2
    total = torch.linalg.vector_norm(weights) ** 2
    return torch.cat([norms.new_zeros(1), norms.cumsum(0)]) / total


def complete_basis(vectors: Tensor) -> Tensor:
    """An orthonormal basis (D, D) whose first columns are the given orthonormal ones (D, R ≤ D)."""
    vectors = to_double(vectors)
    size = vectors.shape[1]
    complement = torch.linalg.qr(vectors, mode="complete").Q[:, size:]
    return torch.cat([vectors, complement], dim=1)


def random_basis(dimension: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Eigenvectors of the covariance of a Gaussian (D, D) matrix: a uniformly random basis. # (D, D)"""
    rows = torch.randn(dimension, dimension, dtype=dtype, generator=generator)
    return WeightCovariance.fit(rows).eigenvectors


def amplification(later: Tensor, first: Tensor, covariance: WeightCovariance) -> Tensor:
    """a_r(t) = ‖W(t) e_r‖ / ‖W(0) e_r‖ along the principal directions (paper, section 6). # (R,)"""
    return covariance.direction_norms(later) / covariance.direction_norms(first)


def cosine_similarity(later: Tensor, first: Tensor, covariance: WeightCovariance) -> Tensor:
    """c_r(t) = Re⟨W(t) e_r, W(0) e_r⟩ / (‖W(t) e_r‖ ‖W(0) e_r‖) (paper, section 6). # (R,)"""
    a, b = covariance.coordinates(later), covariance.coordinates(first)
    products = (a.conj() * b).sum(0).real
    return products / (torch.linalg.vector_norm(a, dim=0) * torch.linalg.vector_norm(b, dim=0))


def _same_type(*tensors: Tensor) -> list[Tensor]:
    """The tensors, all complex where one of them is."""
    dtype = torch.complex128 if any(t.is_complex() for t in tensors) else torch.float64
    return [t.to(dtype) for t in tensors]


def _checked_rows(weights: Tensor, dimension: int | None) -> Tensor:
    if weights.ndim != 2 or 0 in weights.shape:
        raise RainbowError(f"weights are a matrix of neurons by channels, got the shape {tuple(weights.shape)}")
    if dimension is not None and weights.shape[1] != dimension:
        raise RainbowError(f"weights of {weights.shape[1]} channels where {dimension} are due: align them first")
    if not torch.isfinite(torch.view_as_real(weights) if weights.is_complex() else weights).all():
        raise RainbowError(f"the weights of shape {tuple(weights.shape)} hold values that are not finite")
    return to_double(weights)
