"""The polar factor by Newton's iteration is that of the singular value decomposition."""

import pytest
import torch

from rainbow import polar
from rainbow.polar import polar_factor

SHAPES = [(40, 40), (40, 25), (25, 40)]
types = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])


@pytest.fixture
def iterating(monkeypatch):
    monkeypatch.setattr(polar, "LARGEST_SVD", 0)


def isometry(rows, columns, dtype, seed):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=dtype, generator=torch.Generator().manual_seed(seed))).Q


def matrix(shape, singular_values, dtype):
    """U diag(S) V^H, and its polar factor without the directions of S = 0."""
    S = torch.as_tensor(singular_values, dtype=torch.float64)
    U, V = (isometry(size, len(S), dtype, seed) for seed, size in enumerate(shape))
    return (U * S) @ V.mH, U[:, S > 0] @ V[:, S > 0].mH


@types
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power", [0, 1, 3])
def test_the_iteration_finds_the_polar_factor(iterating, shape, power, dtype):
    S = torch.arange(1, min(shape) + 1) ** -float(power)
    K, expected = matrix(shape, S, dtype)
    assert (polar_factor(K) - expected).norm() < 1e-15 * min(shape) / S[-1]  # n u, times the condition number
    assert (polar_factor(1e9 * K) - polar_factor(K)).norm() < 1e-15 * min(shape) / S[-1]


@types
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 10])
def test_rank_deficient_matrices_have_partial_isometries(iterating, shape, rank, dtype):
    K, expected = matrix(shape, [1.0] * rank + [0.0] * (min(shape) - rank), dtype)
    K += 1e-15 * torch.randn(shape, dtype=dtype)
    assert (polar_factor(K, 1e-5 if rank else torch.inf) - expected).norm() < 1e-12
    assert (polar_factor(torch.zeros_like(K), 1e-5)).norm() == 0


@types
def test_both_ways_cut_the_same_directions(monkeypatch, dtype):
    K, _ = matrix((30, 30), 10.0 ** -torch.arange(0, 15, 0.5), dtype)
    decomposed = polar_factor(K, 2e-5)
    monkeypatch.setattr(polar, "LARGEST_SVD", 0)
    assert torch.linalg.matrix_rank(decomposed) == 10
    assert (polar_factor(K, 2e-5) - decomposed).norm() < 1e-15 * 30 / 2e-5**1.5


def test_matrices_of_a_large_layer_take_the_iteration():
    K = torch.randn(2050, 2050, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = polar_factor(K + 50 * torch.eye(2050))
    assert (A.mT @ A - torch.eye(2050)).norm() < 1e-11
    assert (A.mT @ (K + 50 * torch.eye(2050))).diagonal().sum() > K.diagonal().sum() + 50 * 2050 * 0.8
