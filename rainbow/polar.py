"""The isometry nearest to a matrix: its polar factor, by singular values or by Newton's iteration."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import eigh, inv, matrix_norm, qr, svd, vector_norm

LARGEST_SVD = 2048  # measured on two cores: up to here it takes half the time of the iteration, but twice its memory
MOST_STEPS = 60


def polar_factor(K: Tensor, cut: float = 0.0) -> Tensor:
    """U V^H for K = U S V^H, without the singular vectors of S < cut max S; K is float64 or complex128. # as K

    Small matrices on a CPU are decomposed. Others take Newton's iteration, which is all products and inverses: fast on
    GPUs, where singular values are not, in a little more memory than three matrices. If K is so ill-conditioned that
    directions may have to be cut, they are found from the eigenvectors of K^H K, those of S < 1e-7 max S among them.
    """
    if K.shape[0] < K.shape[1]:
        return polar_factor(K.mH, cut).mH
    if K.device.type == "cpu" and K.shape[1] <= LARGEST_SVD:
        U, S, Vh = svd(K, full_matrices=False)
        kept = cut * S.max() <= S
        return U[:, kept] @ Vh[kept]
    if K.shape[0] > K.shape[1]:
        Q, R = qr(K)
        return Q @ polar_factor(R, cut)
    inverse, info = torch.linalg.inv_ex(K)
    size = vector_norm(K) * vector_norm(inverse)  # at least the condition number
    if info == 0 and size.isfinite() and size * max(cut, 1e-7) <= 1:
        return _newton(K, inverse)
    return _cut(K, max(cut, 1e-7))


def _cut(K, cut):
    """The polar factor of what K does along its larger right singular vectors."""
    squares, V = eigh(K.mH @ K)
    V = V[:, squares >= cut**2 * squares[-1].clamp(min=torch.finfo(torch.float64).tiny)]
    V = qr(K.mH @ qr(K @ V).Q).Q  # one step of orthogonal iteration: K^H K has lost half of K's digits
    Q, R = qr(K @ V)
    return Q @ _newton(R, inv(R)) @ V.mH if V.shape[1] else torch.zeros_like(K)


def _newton(X, inverse):
    """The polar factor of an invertible matrix X: X ← (γ X + X^-H / γ) / 2 with Higham's scaling γ."""
    for _ in range(MOST_STEPS):
        scale = ((matrix_norm(inverse, 1) * matrix_norm(inverse, torch.inf))
                 / (matrix_norm(X, 1) * matrix_norm(X, torch.inf))) ** 0.25  # fmt: skip
        new = inverse.mH / scale
        new.add_(X, alpha=scale.item()).div_(2)
        change = vector_norm(new - X) / vector_norm(new)
        X = new
        del new
        inverse = inv(X)
        if change < 1e-6:  # quadratic convergence: one more step, not scaled, reaches the rounding
            break
    return (X + inverse.mH) / 2
