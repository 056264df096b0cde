"""Kernels: of wide random networks they are the known ones, and centred alignment is an angle between kernels."""

import math

import pytest
import torch
from torch import nn

from rainbow.errors import RainbowError
from rainbow.kernel import centred_kernel_alignment, kernel_convergence, layer_kernels
from tests.rounding import assert_values


def relu_network(width, seed, channels=6):
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(nn.Linear(channels, width, bias=False), nn.ReLU(), nn.Linear(width, 3))
    network[0].weight.data = torch.randn(width, channels, generator=generator)
    return network


def arc_cosine(x):
    """E[relu(w·x) relu(w·x')] for w ~ N(0, 1) (Cho and Saul, 2009)."""
    norms = torch.linalg.vector_norm(x, dim=1)
    cosine = (x @ x.T / torch.outer(norms, norms)).clamp(-1, 1)
    angle = cosine.acos()
    return torch.outer(norms, norms) / (2 * math.pi) * (angle.sin() + (math.pi - angle) * cosine)


def test_a_wide_random_layer_has_the_arc_cosine_kernel():
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    errors = []
    for width in (400, 40_000):
        kernel = layer_kernels(relu_network(width, 1), x, ["2"])[0]
        difference = torch.linalg.matrix_norm(kernel - arc_cosine(x.double()))
        errors.append((difference / torch.linalg.matrix_norm(kernel)).item())
    assert errors[1] < 0.02 and errors[0] > 4 * errors[1]


def test_kernels_of_wider_samples_spread_less_like_one_over_root_width():
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    trained = relu_network(20_000, seed=99)
    result = kernel_convergence(trained, lambda s, seed: relu_network(int(100 * s), seed), x, (1, 16), repeats=8)
    assert result.names == ("2",) and result.spread.shape == (2, 1)
    assert 2.5 < (result.spread[0] / result.spread[1]).item() < 6  # √16 = 4
    assert result.distance[1] < result.distance[0] and result.distance[1] < 0.01
    assert len(str(result).splitlines()) == 4


def test_kernels_of_feature_maps_count_channels_and_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3))
    images = torch.randn(7, 2, 4, 4)
    first, second = layer_kernels(network, images, batch=3)
    pixels = images.flatten(1).double()
    torch.testing.assert_close(first, pixels @ pixels.T / 2)
    features = network[:3](images).detach().double()
    assert_values(second, features @ features.T / 5, 20)


def test_centred_alignment_is_one_up_to_offset_and_scale_and_symmetric():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 4, generator=generator), torch.randn(30, 5, generator=generator)
    a, b = x @ x.T, y @ y.T
    assert centred_kernel_alignment(a, 3 * a + 2) == pytest.approx(1)
    assert centred_kernel_alignment(a, b) == pytest.approx(centred_kernel_alignment(b, a))
    assert centred_kernel_alignment(a, b) < 0.5
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    assert centred_kernel_alignment(a, (x @ rotation) @ (x @ rotation).T) == pytest.approx(1)


def test_bad_input_is_said():
    with pytest.raises(RainbowError, match="cannot be compared"):
        centred_kernel_alignment(torch.eye(3), torch.eye(4))
    with pytest.raises(RainbowError, match="nothing to compare"):
        centred_kernel_alignment(torch.ones(3, 3), torch.eye(3))
    with pytest.raises(RainbowError, match="at least 2"):
        kernel_convergence(relu_network(5, 0), relu_network, torch.randn(4, 6), (1,), repeats=1)
    with pytest.raises(RainbowError, match="did you mean|no weight layer"):
        layer_kernels(relu_network(5, 0), torch.randn(4, 6), ["7"])
