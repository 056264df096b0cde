"""Rank-restricted networks: all ranks in one pass are the networks with restricted weights."""

import numpy as np
import pytest
import torch
from torch import nn

from models import build
from models.block import BlockConfig
from models.scatnet import ScatNetConfig
from models.signal import Signal
from rainbow import weight_layers
from rainbow.clipping import clipped_accuracies, even_ranks
from rainbow.covariance import WeightCovariance, complete_basis, random_basis
from rainbow.errors import RainbowError


class Residual(nn.Module):
    """Two convolutions with a shortcut around the second, and a linear layer on the flattened map."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Linear(6 * 16, 5)

    def forward(self, x):
        x = self.first(x).relu()
        x = (x + self.second(x)).relu()
        return self.last(x.flatten(1))


def scattering(arch, psi=(), kind="Pr_size"):
    blocks = [BlockConfig(tuple(arch.split()), psi_arch=psi, kind=i % 2, **{kind: 6}) for i in range(2)]
    return build(ScatNetConfig(Signal(1, 8, 8), 5, tuple(blocks)))


def data(channels, size, count=48):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, channels, size, size, generator=generator)
    labels = torch.randint(5, (count,), generator=generator)
    return [(images[i : i + 20], labels[i : i + 20]) for i in range(0, count, 20)]


def expected(model, layer, basis, rank, batches):
    """Accuracy with the weights replaced by W Π_d, one network at a time."""
    weight = layer.get()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float64))
    vectors = basis[:, :rank].to(torch.promote_types(wide.dtype, basis.dtype))
    layer.set((wide.to(vectors.dtype) @ vectors @ vectors.mH).to(weight.dtype))
    model.eval()
    with torch.no_grad():
        hits = [(model(x).argmax(1) == y).float() for x, y in batches]
    layer.set(weight)
    return 100 * torch.cat(hits).mean().item()


CASES = {
    "mlp": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)), data(1, 4)),
    "residual": lambda: (Residual(), data(2, 4)),
    "modulus": lambda: (scattering("Fw Std Pr N", ("mod",)), data(1, 8)),
    "skip": lambda: (scattering("Fw rho Std Pr N"), data(1, 8)),
    "complex": lambda: (scattering("Fw rho Std Pc", kind="Pc_size"), data(1, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_one_pass_equals_restricted_networks_in_every_layer(case):
    torch.manual_seed(0)
    model, batches = CASES[case]()
    for layer in weight_layers(model, batches):
        dtype = torch.complex128 if layer.is_complex else torch.float64
        learned = complete_basis(WeightCovariance.fit(layer.get()).eigenvectors)
        chance = random_basis(layer.dimension, torch.Generator().manual_seed(0), dtype)
        ranks = sorted({0, 1, 3, layer.dimension // 2, layer.dimension})
        result = clipped_accuracies(model, layer, {"learned": learned, "chance": chance}, ranks, batches)
        for name, basis in (("learned", learned), ("chance", chance)):
            one_by_one = [expected(model, layer, basis, rank, batches) for rank in ranks]
            np.testing.assert_allclose(result[name], one_by_one, atol=1e-4, err_msg=f"{layer.name} {name}")
        assert result["learned"][-1] == pytest.approx(result["chance"][-1])


def test_a_basis_of_channels_restricts_every_position_of_the_kernel():
    torch.manual_seed(0)
    model, batches = Residual(), data(2, 4)
    layer = weight_layers(model, batches)[1]
    basis = random_basis(6, torch.Generator().manual_seed(3))
    full = torch.kron(basis, torch.eye(9, dtype=torch.float64))
    result = clipped_accuracies(model, layer, {"channels": basis}, [2, 6], batches)["channels"]
    again = clipped_accuracies(model, layer, {"patches": full}, [18, 54], batches)["patches"]
    np.testing.assert_allclose(result, again)


def test_one_pass_over_the_images():
    torch.manual_seed(0)
    model, batches = CASES["modulus"]()
    layer, calls = weight_layers(model)[1], []
    handle = model.blocks[0].register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    basis = random_basis(layer.dimension, torch.Generator().manual_seed(0))
    clipped_accuracies(model, layer, {"chance": basis}, even_ranks(layer.dimension), batches)
    handle.remove()
    first_probe = calls[:2]  # two images, to see whether another path leads around the layer
    assert first_probe == [2 * len(even_ranks(layer.dimension)), 2]
    assert sum(calls[2:]) == 48


def test_even_ranks():
    assert even_ranks(3) == [0, 1, 2, 3]
    assert len(even_ranks(320)) == 51 and even_ranks(320)[:3] == [0, 6, 13] and even_ranks(320)[-1] == 320


@pytest.mark.parametrize(
    "basis, ranks, message",
    [
        (torch.eye(7), [0, 1], "needs 16 or 1 rows"),
        (torch.eye(16)[:, :3], [0, 4], "has 3 directions"),
        (torch.eye(16), [1, 0], "increasing order"),
        (torch.eye(16), [], "increasing order"),
    ],
)
def test_bad_input_is_said(basis, ranks, message):
    model, batches = CASES["mlp"]()
    layer = weight_layers(model, batches)[0]
    with pytest.raises(RainbowError, match=message):
        clipped_accuracies(model, layer, {"b": basis}, ranks, batches)
    with pytest.raises(RainbowError, match="no images"):
        clipped_accuracies(model, layer, {"b": torch.eye(16)}, [0, 1], [])
