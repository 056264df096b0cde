"""What benchmarks/analysis.py takes for the least cost of second moments is what they are made of."""

import pytest
import torch

from benchmarks import analysis
from rainbow.samples import Samples, triangle


def test_the_products_alone_are_those_of_the_moments():
    phi = torch.randn(50, 600, dtype=torch.complex64)
    (real, imaginary, mixed) = (analysis.multiply(pair) for pair in analysis.real_matrices(Samples.of(phi)))
    moments = phi.T @ phi.conj()
    torch.testing.assert_close(mixed - mixed.T, moments.imag, atol=1e-3, rtol=1e-4)
    for (rows, columns), of_real, of_imaginary in zip(triangle(600), real, imaginary, strict=True):
        torch.testing.assert_close(of_real + of_imaginary, moments.real[rows, columns], atol=1e-3, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*do not determine the result")
def test_ratios_are_measured_of_any_network():
    data = analysis.random_images(8, 4)
    networks = [analysis.resnet(0.03, seed) for seed in range(2)]
    assert all(analysis.moments_ratio(networks, data, 1, patches) > 0 for patches in (False, True))
    kept, none = analysis.resampling_ratios(networks[0], data, 1)
    assert none > kept > 1


def test_the_peak_of_memory_is_that_of_what_was_allocated():
    with analysis.on_device("cpu") as peak:
        torch.ones(1 << 24)
        assert torch.ones(1 << 22).sum() == 1 << 22
    assert 0.9 < peak() / (1 << 26) < 1.5
