"""Theorems on weight covariances."""

import pytest
import torch

from rainbow.covariance import (
    WeightCovariance,
    amplification,
    complete_basis,
    cosine_similarity,
    explained_variance,
    random_basis,
)
from rainbow.errors import RainbowError


def rows(n, d, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, dtype=dtype, generator=generator)
    return torch.randn(n, d, dtype=dtype, generator=generator) @ mixing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("n, d", [(5, 20), (20, 20), (70, 20)])
def test_equals_the_matrix_in_memory(n, d, dtype):
    w = rows(n, d, dtype=dtype)
    covariance = WeightCovariance.fit(w)
    wide = w.to(covariance.eigenvectors.dtype)
    assert covariance.eigenvectors.shape == (d, min(n, d))
    torch.testing.assert_close(covariance.matrix(), wide.mH @ wide / n)
    assert covariance.spectrum().shape == (d,)
    assert covariance.trace == pytest.approx((wide.abs() ** 2).sum().item() / n)


def test_networks_one_by_one_equal_all_rows_at_once():
    blocks = [rows(n, 12, seed=n) for n in (3, 30, 7, 50, 1)]
    together = WeightCovariance.fit(torch.cat(blocks))
    streamed = WeightCovariance.fit(iter(blocks))
    assert streamed.num_rows == together.num_rows == 91
    torch.testing.assert_close(streamed.matrix(), together.matrix())


def test_quadratic_form_is_the_mean_squared_response():
    w, f = rows(9, 6, dtype=torch.complex128), rows(1, 6, 3, torch.complex128)[0]
    covariance = WeightCovariance.fit(w)
    response = ((w @ f).abs() ** 2).mean()
    torch.testing.assert_close((f.conj() @ covariance.matrix() @ f).real, response)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_whitening_gives_the_identity_and_colouring_undoes_it(dtype):
    w = rows(60, 15, dtype=dtype)
    covariance = WeightCovariance.fit(w)
    white = covariance.whiten(w)
    torch.testing.assert_close(white.mH @ white / 60, torch.eye(15, dtype=dtype))
    torch.testing.assert_close(covariance.colour(white), w)
    coordinates = covariance.whitened_coordinates(w)
    torch.testing.assert_close((coordinates.abs() ** 2).mean(0), torch.ones(15, dtype=torch.float64))


def test_whitening_leaves_out_directions_without_variance():
    w = rows(50, 8) @ torch.diag(torch.tensor([1.0] * 5 + [0.0] * 3, dtype=torch.float64))
    covariance = WeightCovariance.fit(w)
    assert covariance.rank == 5
    white = covariance.whiten(w)
    expected = torch.diag(torch.tensor([1.0] * 5 + [0.0] * 3, dtype=torch.float64))
    torch.testing.assert_close(white.mT @ white / 50, expected)


@pytest.mark.parametrize("n, d", [(6, 10), (30, 10)])
def test_projecting_on_all_directions_changes_nothing(n, d):
    w = rows(n, d)
    other = rows(4, d, seed=9)
    covariance = WeightCovariance.fit(w)
    torch.testing.assert_close(covariance.project(w, d), w)
    torch.testing.assert_close(covariance.project(other, d), other)
    assert covariance.project(w, 0).abs().max() == 0
    once = covariance.project(w, 3)
    torch.testing.assert_close(covariance.project(once, 3), once)
    kept = (torch.linalg.vector_norm(once) / torch.linalg.vector_norm(w)) ** 2
    torch.testing.assert_close(kept, covariance.explained()[3])


def test_coloured_rows_converge_to_the_covariance_like_one_over_root_n():
    covariance = WeightCovariance.fit(rows(40, 10))
    generator = torch.Generator().manual_seed(1)
    errors = []
    for n in (100, 10_000):
        white = [torch.randn(n, 10, generator=generator) for _ in range(8)]
        trials = [WeightCovariance.fit(covariance.colour(g)) for g in white]
        errors.append(sum(t.relative_error(covariance, "frobenius") for t in trials) / 8)
    assert 7 < errors[0] / errors[1] < 14  # √100 = 10


@pytest.mark.parametrize("norm, order", [("spectral", 2), ("frobenius", "fro"), ("nuclear", "nuc")])
@pytest.mark.parametrize("n", [4, 40])
def test_relative_error_is_that_of_the_matrices(norm, order, n):
    a, b = WeightCovariance.fit(rows(n, 11)), WeightCovariance.fit(rows(n, 11, 2, torch.complex128))
    difference = torch.linalg.norm(a.matrix() - b.matrix(), order)
    expected = (difference / torch.linalg.norm(b.matrix(), order)).item()
    assert a.relative_error(b, norm) == pytest.approx(expected)
    assert a.relative_error(a, norm) < 1e-12


def test_from_matrix_and_effective_dimension():
    covariance = WeightCovariance.from_matrix(torch.diag(torch.tensor([1.0, 4.0, 1.0])), 10)
    assert covariance.eigenvalues.tolist() == [4, 1, 1]
    assert covariance.effective_dimension == pytest.approx(36 / 18)
    assert WeightCovariance.fit(torch.eye(7)).effective_dimension == pytest.approx(7)
    assert WeightCovariance.fit(torch.ones(3, 7)).effective_dimension == pytest.approx(1)


def test_bases():
    w = rows(5, 9)
    covariance = WeightCovariance.fit(w)
    basis = complete_basis(covariance.eigenvectors)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(basis[:, :5], covariance.eigenvectors)
    share = explained_variance(w, basis)
    assert share.shape == (10,) and share[0] == 0 and share[-1] == pytest.approx(1)
    torch.testing.assert_close(share[:6], covariance.explained())
    chance = random_basis(9, torch.Generator().manual_seed(0))
    torch.testing.assert_close(chance.mT @ chance, torch.eye(9, dtype=torch.float64))
    assert (explained_variance(w, chance)[1:-1] < share[1:-1]).all()


def test_dynamics_of_one_direction():
    first = torch.eye(4, dtype=torch.float64)
    covariance = WeightCovariance.fit(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5])))
    later = torch.diag(torch.tensor([5.0, -1.0, 1.0, 1.0]))
    assert amplification(later, first, covariance).tolist() == pytest.approx([5, 1, 1, 1])
    assert cosine_similarity(later, first, covariance).tolist() == pytest.approx([1, -1, 1, 1])


@pytest.mark.parametrize(
    "weights, message",
    [
        (torch.zeros(0, 3), "matrix of neurons"),
        (torch.ones(3), "matrix of neurons"),
        (torch.tensor([[1.0, float("nan")]]), "not finite"),
        ([], "no weights"),
        ([torch.ones(2, 3), torch.ones(2, 4)], "align them first"),
    ],
)
def test_bad_weights_are_said(weights, message):
    with pytest.raises(RainbowError, match=message):
        WeightCovariance.fit(weights)
