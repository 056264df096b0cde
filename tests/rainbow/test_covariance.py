"""Theorems on weight covariances."""

import pytest
import torch

from rainbow import RainbowError, WeightCovariance
from rainbow.covariance import (
    Spectrum,
    amplification,
    complete_basis,
    cosine_similarity,
    explained_variance,
    random_basis,
)
from tests.rainbow.networks import double


def rows(n, d, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, dtype=dtype, generator=generator)
    return torch.randn(n, d, dtype=dtype, generator=generator) @ mixing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("n, d", [(5, 20), (20, 20), (70, 20)])
def test_equals_the_matrix_in_memory(n, d, dtype):
    w, f = rows(n, d, dtype=dtype), double(rows(1, d, 3, dtype)[0])
    covariance, wide = WeightCovariance.fit(w), double(w)
    assert covariance.eigenvectors.shape == (d, min(n, d))
    torch.testing.assert_close(covariance.matrix(), wide.mH @ wide / n)
    assert covariance.trace == pytest.approx((wide.abs() ** 2).sum().item() / n)
    response = (wide @ f).abs().square().mean()
    torch.testing.assert_close((f.conj() @ covariance.matrix() @ f).real, response)


def test_networks_one_by_one_equal_all_rows_at_once():
    blocks = [rows(n, 12, seed=n) for n in (3, 30, 7, 50, 1)]
    together, streamed = WeightCovariance.fit(torch.cat(blocks)), WeightCovariance.fit(iter(blocks))
    assert streamed.num_rows == together.num_rows == 91
    torch.testing.assert_close(streamed.matrix(), together.matrix())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("directions", [8, 5])
def test_whitening_gives_the_identity_on_the_directions_that_have_variance(dtype, directions):
    expected = torch.diag((torch.arange(8) < directions).to(dtype))
    w = rows(50, 8, dtype=dtype) @ expected
    covariance = WeightCovariance.fit(w)
    white, coordinates = covariance.whiten(w), covariance.whitened_coordinates(w)
    assert covariance.rank == directions
    torch.testing.assert_close(white.mH @ white / 50, expected)
    torch.testing.assert_close(coordinates.abs().square().mean(0), torch.ones(directions, dtype=torch.float64))


@pytest.mark.parametrize("norm, order", [("spectral", 2), ("frobenius", "fro"), ("nuclear", "nuc")])
@pytest.mark.parametrize("n", [4, 40])
def test_relative_error_is_that_of_the_matrices(norm, order, n):
    a, b = WeightCovariance.fit(rows(n, 11)), WeightCovariance.fit(rows(n, 11, 2, torch.complex128))
    expected = torch.linalg.norm(a.matrix() - b.matrix(), order) / torch.linalg.norm(b.matrix(), order)
    assert a.relative_error(b, norm) == pytest.approx(expected.item())
    assert a.relative_error(a, norm) < 1e-12


def test_from_matrix_and_effective_dimension():
    covariance = WeightCovariance.from_matrix(torch.diag(torch.tensor([1.0, 4.0, 1.0])), 10)
    assert covariance.eigenvalues.tolist() == [4, 1, 1]
    assert covariance.effective_dimension == pytest.approx(36 / 18)
    assert WeightCovariance.fit(torch.eye(7)).effective_dimension == pytest.approx(7)
    assert WeightCovariance.fit(torch.ones(3, 7)).effective_dimension == pytest.approx(1)


def test_bases_explain_the_variance_of_the_weights():
    w, chance = rows(5, 9), random_basis(9, torch.Generator().manual_seed(0))
    covariance = WeightCovariance.fit(w)
    basis = complete_basis(covariance.eigenvectors)
    torch.testing.assert_close(basis[:, :5], covariance.eigenvectors)
    for each in (basis, chance):
        torch.testing.assert_close(each.mT @ each, torch.eye(9, dtype=torch.float64))
    share = explained_variance(w, basis)
    assert share.shape == (10,) and share[0] == 0 and share[-1] == pytest.approx(1)
    torch.testing.assert_close(share[1:6], covariance.eigenvalues.cumsum(0) / covariance.trace)
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
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(RainbowError, match=message):
        WeightCovariance.fit(weights)


@pytest.mark.parametrize("n, d", [(6, 30), (30, 6), (100, 6)])
@pytest.mark.parametrize("decay", [0.5, 1e-3])
def test_small_eigenvalues_keep_their_digits(n, d, decay):
    """Those that a Gram matrix loses come from singular values; the spectrum alone is the same."""
    scale = decay ** torch.arange(6.0, dtype=torch.float64)
    u, v = (torch.linalg.qr(rows(size, size, seed)).Q[:, :6] for seed, size in enumerate((n, d)))
    covariance, spectrum = (kind.fit((u * scale) @ v.T) for kind in (WeightCovariance, Spectrum))
    for found in (covariance, spectrum):
        torch.testing.assert_close(found.eigenvalues[:6].sqrt(), scale / n**0.5, rtol=1e-6 / decay, atol=1e-15)
        assert (found.dimension, found.num_rows, len(found.eigenvalues)) == (d, n, min(n, d))
    torch.testing.assert_close(covariance.eigenvectors.T @ covariance.eigenvectors, torch.eye(6, dtype=torch.float64))
