"""Rank-restricted networks: all ranks in one pass are the networks with restricted weights."""

import numpy as np
import pytest
import torch
from torch import nn

from rainbow import RainbowError, WeightCovariance, weight_layers
from rainbow.clipping import clipped_accuracies, even_ranks
from rainbow.covariance import complete_basis, random_basis
from tests.rainbow.networks import accuracy, batches, double, mlp, scatnet, skip


class Residual(nn.Module):
    """Two convolutions with a shortcut around the second, and a linear layer on the flattened map."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Linear(6 * 64, 3)

    def forward(self, x):
        x = self.first(x).relu()
        x = (x + self.second(x)).relu()
        return self.last(x.flatten(1))


CASES = {
    "mlp": mlp,
    "residual": Residual,
    "modulus": lambda: scatnet(widths=(6, 6)),
    "skip": lambda: skip(widths=(6, 6)),
    "complex": lambda: skip("Fw rho Std Pc", widths=(6, 6)),
}


def restricted_accuracy(model, layer, basis, rank, data):
    """Accuracy with the weights replaced by W Π_d, one network at a time."""
    weight = layer.get()
    vectors = basis[:, :rank].to(torch.promote_types(double(weight).dtype, basis.dtype))
    layer.set((double(weight).to(vectors.dtype) @ vectors @ vectors.mH).to(weight.dtype))
    found = accuracy(model, data)
    layer.set(weight)
    return found


@pytest.mark.parametrize("case", CASES)
def test_one_pass_equals_restricted_networks_in_every_layer(case):
    model, data = CASES[case](), batches(3, 20)
    for layer in weight_layers(model, data):
        dtype = torch.complex128 if layer.is_complex else torch.float64
        learned = complete_basis(WeightCovariance.fit(layer.get()).eigenvectors)
        bases = {"learned": learned, "chance": random_basis(layer.dimension, torch.Generator().manual_seed(0), dtype)}
        ranks = sorted({0, 1, 3, layer.dimension // 2, layer.dimension})
        result = clipped_accuracies(model, layer, bases, ranks, data)
        for name, basis in bases.items():
            one_by_one = [restricted_accuracy(model, layer, basis, rank, data) for rank in ranks]
            np.testing.assert_allclose(result[name], one_by_one, atol=1e-4, err_msg=f"{layer.name} {name}")
        assert result["learned"][-1] == pytest.approx(result["chance"][-1])


def test_a_basis_of_channels_restricts_every_position_of_the_kernel():
    model, data, basis = Residual(), batches(3, 20), random_basis(6, torch.Generator().manual_seed(3))
    layer, full = weight_layers(model, data)[1], torch.kron(basis, torch.eye(9, dtype=torch.float64))
    result = clipped_accuracies(model, layer, {"channels": basis}, [2, 6], data)["channels"]
    again = clipped_accuracies(model, layer, {"patches": full}, [18, 54], data)["patches"]
    np.testing.assert_allclose(result, again)


def test_one_pass_over_the_images():
    model, data, calls = scatnet(widths=(6, 6)), batches(3, 20), []
    layer = weight_layers(model)[1]
    model.blocks[0].register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    basis, ranks = random_basis(layer.dimension, torch.Generator().manual_seed(0)), even_ranks(layer.dimension)
    clipped_accuracies(model, layer, {"chance": basis}, ranks, data)
    assert calls[:2] == [2 * len(ranks), 2]  # two images, to see whether another path leads around the layer
    assert sum(calls[2:]) == 60


def test_even_ranks():
    assert even_ranks(3) == [0, 1, 2, 3]
    assert len(even_ranks(320)) == 51 and even_ranks(320)[:3] == [0, 6, 13] and even_ranks(320)[-1] == 320


@pytest.mark.parametrize(
    "basis, ranks, message",
    [
        (torch.eye(7), [0, 1], "needs 128 or 2 rows"),
        (torch.eye(128)[:, :3], [0, 4], "has 3 directions"),
        (torch.eye(128), [1, 0], "increasing order"),
        (torch.eye(128), [], "increasing order"),
        (torch.eye(128), [0, 1], "no images"),
    ],
)
def test_bad_input_is_refused(basis, ranks, message):
    model = mlp()
    layer = weight_layers(model, batches())[0]
    with pytest.raises(RainbowError, match=message):
        clipped_accuracies(model, layer, {"b": basis}, ranks, [] if message == "no images" else batches())
