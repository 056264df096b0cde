"""The analysis of any network: an MLP, a CNN and torchvision's ResNet, a set of networks, and input that is wrong."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from rainbow.analysis import Rainbow
from rainbow.errors import RainbowError


def mlp(seed=0, width=24, bias=True):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(36, width, bias=bias),
        nn.ReLU(),
        nn.Linear(width, width, bias=bias),
        nn.ReLU(),
        nn.Linear(width, 4),
    )


def cnn(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 4, 4),
    )


@pytest.fixture(scope="module")
def loader():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(120, 1, 6, 6, generator=generator)
    labels = (images.flatten(1)[:, :4]).argmax(1)
    return [(images[i : i + 40], labels[i : i + 40]) for i in range(0, 120, 40)]


def accuracy(network, loader):
    network.eval()
    return 100 * torch.cat([network(x).argmax(1) == y for x, y in loader]).float().mean().item()


def test_a_permuted_network_aligns_and_a_foreign_one_does_not(loader):
    network = mlp()
    other = copy.deepcopy(network)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        other[1].weight.copy_(network[1].weight[order])
        other[1].bias.copy_(network[1].bias[order])
        other[3].weight.copy_(network[3].weight[:, order])
    rainbow = Rainbow.fit(network, loader)
    assert list(rainbow.align(other)) == ["1", "3", "5"]
    assert max(rainbow.errors.values()) < 1e-5
    back = rainbow.alignment.transform("3", other[3].weight)
    torch.testing.assert_close(back.float(), network[3].weight.detach(), atol=1e-4, rtol=1e-4)
    errors = rainbow.align(mlp(seed=5))
    assert errors["1"] < 1e-5 and errors["3"] > 0.01  # the same images, then different features
    assert rainbow.align(mlp(seed=5), test=loader[:1])["3"] > 0.01


def test_networks_of_other_widths_and_names_align(loader):
    rainbow = Rainbow.fit(mlp(width=30), loader)
    narrow = nn.Sequential(mlp(width=12), nn.Identity())
    errors = rainbow.align(narrow, layers=["0.1", "0.3", "0.5"])
    assert errors["1"] < 1e-5 and all(0 <= error < 2 for error in errors.values())


def test_clipping_to_all_directions_changes_nothing(loader):
    for network in (mlp(), cnn()):
        whole = accuracy(network, loader)
        rainbow = Rainbow.fit(network, loader)
        for name, layer in rainbow.layers.items():
            for basis in ("weight", "kernel", "random"):
                ranks, accuracies = rainbow.clip(name, basis, [0, 1, layer.dimension])
                assert ranks[-1] == layer.dimension and accuracies[-1] == pytest.approx(whole)
            rank = rainbow.covariances[name].rank
            assert rainbow.clip(name, "weight", [rank])[1][0] == pytest.approx(whole)
        assert len(rainbow.clip(name)[0]) == min(51, layer.dimension + 1)


def test_a_sample_is_a_usable_network_of_any_width(loader):
    rainbow = Rainbow.fit(cnn(), loader)
    before = copy.deepcopy(rainbow.network.state_dict())
    sampled = rainbow.sample(seed=1)
    assert sampled(loader[0][0]).shape == (40, 4)
    again = rainbow.sample(seed=1)
    torch.testing.assert_close(sampled(loader[0][0]), again(loader[0][0]))
    assert not torch.allclose(sampled(loader[0][0]), rainbow.sample(seed=2)(loader[0][0]))
    wide = rainbow.sample(widths=[20, 30])
    assert wide[0].weight.shape == (20, 1, 3, 3) and wide[3].weight.shape == (30, 20, 3, 3)
    for name, value in rainbow.network.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.filterwarnings("ignore:layer .* do not determine")
def test_wide_samples_compute_what_the_network_computes(loader):
    network = mlp(bias=False)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9)
    for _ in range(60):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
    rainbow = Rainbow.fit(network, loader)
    narrow, wide = (
        np.mean([accuracy(rainbow.sample([w, w], seed=seed), loader) for seed in range(3)]) for w in (6, 400)
    )
    assert accuracy(network, loader) > 95 and wide > narrow and wide > 70


def test_a_set_of_networks_has_one_covariance_of_all_its_weights(loader):
    networks = [mlp(seed) for seed in range(4)]
    rainbow = Rainbow.fit(networks, loader)
    assert rainbow.covariances["1"].num_rows == 4 * 24
    weights = torch.cat([network[1].weight for network in networks]).double()
    torch.testing.assert_close(rainbow.covariances["1"].matrix(), (weights.T @ weights / 96).detach())
    assert "4 network(s)" in rainbow.table()


def test_the_table_tells_of_every_layer_and_of_what_was_skipped(loader):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.unused = cnn(), nn.Linear(3, 3)

        def forward(self, x):
            return self.body(x)

    rainbow = Rainbow.fit(Model(), loader, layers=["body.3", "body.6"])
    rainbow.align(rainbow.network)
    table = rainbow.table()
    assert "body.3  8×54" in table and "body.6  4×32" in table and "error 0.000" in table
    assert "unused  skipped: not called" in table and "body.0  skipped: not asked for" in table
    summary = rainbow.summaries()[0]
    assert (summary.neurons, summary.dimension, summary.rank) == (8, 54, 8) and 1 < summary.effective_dimension <= 8


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_bad_input_is_said(loader):
    with pytest.raises(RainbowError, match="'layer9'"):
        Rainbow.fit(mlp(), loader, layers=["layer9"])
    with pytest.raises(RainbowError, match="read only once"):
        Rainbow.fit(mlp(), iter(loader))
    with pytest.raises(RainbowError, match="no network"):
        Rainbow.fit([], loader)
    with pytest.raises(RainbowError, match="no linear layer"):
        Rainbow.fit(nn.Sequential(nn.Flatten()), loader)
    with pytest.raises(RainbowError, match="hooks"):
        Rainbow.fit(torch.jit.script(mlp()), loader)
    broken = mlp()
    broken[3].weight.data[2, 3] = float("nan")
    with pytest.raises(RainbowError, match="layer 3: 1 of its 576 weights are not finite"):
        Rainbow.fit(broken, loader)
    rainbow = Rainbow.fit(mlp(), loader)
    with pytest.raises(RainbowError, match="no weight layer '7'"):
        rainbow.clip("7")
    with pytest.raises(RainbowError, match="unknown basis 'pca'"):
        rainbow.clip("3", "pca")
    with pytest.raises(RainbowError, match="1 layers of the other network for 3"):
        rainbow.align(mlp(), layers=["1"])
    with pytest.raises(RainbowError, match="give 2"):
        rainbow.sample(widths=[3])
    shuffled = torch.utils.data.DataLoader(list(zip(*map(torch.cat, zip(*loader)))), 40, shuffle=True)
    with pytest.raises(RainbowError, match="shuffle=False"):
        Rainbow.fit(mlp(), shuffled).sample()


@pytest.mark.filterwarnings("ignore:layer 5")
def test_too_few_samples_are_said_with_their_numbers(loader):
    rainbow = Rainbow.fit(mlp(), [(loader[0][0][:10], loader[0][1][:10])])
    with pytest.warns(UserWarning, match="layer 3: 10 samples for 24 dimensions"):
        rainbow.align(mlp(seed=1))
