"""Marchenko–Pastur, normality and decays against samples and published facts."""

import numpy as np
import pytest
from scipy import integrate

from rainbow.errors import RainbowError
from rainbow.random_matrix import bulk_edges, bulk_test, fit_decay, marchenko_pastur_density, normality_p_value


@pytest.mark.parametrize("q", [0.1, 0.5, 1.0, 2.5, 5.0])
def test_density_has_mass_one_and_mean_one(q):
    low, high = bulk_edges(q)

    def moment(order):
        # x = mid − r cos θ removes the square roots at the edges
        def integrand(theta):
            x = (low + high) / 2 - (high - low) / 2 * np.cos(theta)
            return x**order * marchenko_pastur_density(x, q) * (high - low) / 2 * np.sin(theta)

        return integrate.quad(integrand, 0, np.pi)[0]

    assert moment(0) == pytest.approx(min(1, 1 / q), abs=1e-6)
    assert moment(1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("q", [0.25, 1.0, 2.5])
def test_sampled_matrices_follow_it(q):
    rows = 400
    g = np.random.default_rng(0).standard_normal((rows, int(q * rows)))
    values = np.linalg.svd(g, compute_uv=False) ** 2 / rows
    test = bulk_test(values, rows, int(q * rows))
    assert test.q == pytest.approx(q) and test.outside < 0.02
    grid = np.linspace(0.05, test.high, 50)
    empirical = (test.eigenvalues[:, None] > grid).sum(0) / int(q * rows)
    above = [integrate.quad(marchenko_pastur_density, x, test.high, (q,), limit=200)[0] for x in grid]
    assert np.abs(empirical - above).max() < 0.02


def test_spikes_are_counted_among_the_eigenvalues_that_can_be_nonzero():
    spiked = np.concatenate([np.ones(90), np.full(10, 50.0)])
    test = bulk_test(spiked, num_rows=100, dimension=1000)
    assert len(test.eigenvalues) == 100 and test.eigenvalues.sum() == pytest.approx(1000)
    assert (test.above, test.below) == (10, 90) and test.outside == 1.0


def test_normality():
    rng = np.random.default_rng(0)
    assert normality_p_value(rng.standard_normal(500)) > 0.01
    assert normality_p_value(1.5 * rng.standard_normal(500)) < 1e-3
    z = (rng.standard_normal(400) + 1j * rng.standard_normal(400)) / np.sqrt(2)
    assert normality_p_value(z) > 0.01
    assert normality_p_value([0.0]) == pytest.approx(1.0)  # D_1 = 1/2: P(D_1 ≥ 1/2) = 1


@pytest.mark.parametrize("kind", ["exponential", "power"])
def test_decays_are_recovered(kind):
    r = np.arange(1, 61)
    values = 3 * np.exp(-0.2 * (np.log(r) if kind == "power" else r))
    values[40:] = 1e-3
    fit = fit_decay(values, kind, first=40)
    assert (fit.amplitude, fit.rate, fit.r_squared) == pytest.approx((3, 0.2, 1))
    np.testing.assert_allclose(fit(r[:40]), values[:40])
    assert fit_decay(values, kind, first=40, start=5).rate == pytest.approx(0.2)


def test_bad_input_is_said():
    with pytest.raises(RainbowError, match="positive"):
        bulk_edges(0)
    with pytest.raises(RainbowError, match="have 3 eigenvalues, got 2"):
        bulk_test([1, 2], 3, 5)
    with pytest.raises(RainbowError, match="all eigenvalues are zero"):
        bulk_test([0, 0], 2, 5)
    with pytest.raises(RainbowError, match="finite"):
        normality_p_value([float("nan")])
    with pytest.raises(RainbowError, match="unknown decay"):
        fit_decay([1, 2], "cubic")
    with pytest.raises(RainbowError, match="two positive"):
        fit_decay([1, 0, 0], "power")
