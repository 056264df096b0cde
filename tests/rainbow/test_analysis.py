"""The analysis of any network: an MLP and a CNN, a set of networks, and input that is wrong."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from rainbow import Rainbow, RainbowError
from tests.rainbow.networks import accuracy, batches, cnn, mlp


@pytest.fixture(scope="module")
def loader():
    return batches()


def test_a_permuted_network_aligns_and_a_foreign_one_does_not(loader):
    network, order = mlp(), torch.randperm(24)
    other = copy.deepcopy(network)
    other[1].weight.data, other[1].bias.data = network[1].weight.data[order], network[1].bias.data[order]
    other[3].weight.data = network[3].weight.data[:, order]
    rainbow = Rainbow.fit(network, loader)
    assert list(rainbow.align(other)) == ["1", "3", "5"]
    assert set(rainbow.errors.values()) == {0.0}
    back = rainbow.alignment.transform("3", other[3].weight)
    torch.testing.assert_close(back.float(), network[3].weight.detach(), atol=1e-4, rtol=1e-4)
    errors = rainbow.align(mlp(seed=5))
    assert errors["1"] == 0.0 and errors["3"] > 0.01  # the same images, then different features
    assert rainbow.align(mlp(seed=5), test=batches(1, seed=1))["3"] > 0.01


def test_networks_of_other_widths_and_names_align(loader):
    narrow = nn.Sequential(mlp(widths=(12, 9)), nn.Identity())
    errors = Rainbow.fit(mlp(), loader).align(narrow, layers=["0.1", "0.3", "0.5"])
    assert errors["1"] == 0.0 and all(0 <= error < 2 for error in errors.values())


@pytest.mark.parametrize("make", [mlp, cnn])
def test_clipping_to_all_directions_changes_nothing(loader, make):
    network = make()
    rainbow, whole = Rainbow.fit(network, loader), accuracy(network, loader)
    for name, layer in rainbow.layers.items():
        for basis in ("weight", "kernel", "random"):
            ranks, accuracies = rainbow.clip(name, basis, [0, 1, layer.dimension])
            assert ranks[-1] == layer.dimension and accuracies[-1] == pytest.approx(whole)
        assert rainbow.clip(name, "weight", [rainbow.covariances[name].rank])[1][0] == pytest.approx(whole)
    assert len(rainbow.clip(name)[0]) == min(51, layer.dimension + 1)


def test_a_sample_is_a_usable_network_of_any_width(loader):
    rainbow, images = Rainbow.fit(cnn(), loader), loader[0][0]
    before = copy.deepcopy(rainbow.network.state_dict())
    first, again, other = (rainbow.sample(seed=seed)(images) for seed in (1, 1, 2))
    assert first.shape == (32, 3) and torch.equal(first, again) and not torch.allclose(first, other)
    wide = rainbow.sample(widths=[20, 30])
    assert wide[0].weight.shape == (20, 2, 3, 3) and wide[3].weight.shape == (30, 20, 3, 3)
    assert all(torch.equal(value, before[name]) for name, value in rainbow.network.state_dict().items())


@pytest.mark.filterwarnings("ignore:layer .* do not determine")
def test_wide_samples_compute_what_the_network_computes(loader):
    network = mlp(bias=False)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9)
    for x, y in 30 * loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    rainbow = Rainbow.fit(network, loader)
    narrow, wide = (
        np.mean([accuracy(rainbow.sample([w, w], seed=seed), loader) for seed in range(3)]) for w in (4, 400)
    )
    assert accuracy(network, loader) > 95 and wide > narrow and wide > 70


def test_a_set_of_networks_has_one_covariance_of_all_its_weights(loader):
    networks = [mlp(seed) for seed in range(4)]
    rainbow = Rainbow.fit(networks, loader)
    assert rainbow.covariances["1"].num_rows == 4 * 24
    weights = torch.cat([network[1].weight.detach() for network in networks]).double()
    torch.testing.assert_close(rainbow.covariances["1"].matrix(), weights.T @ weights / 96)
    assert "4 network(s)" in rainbow.table()


def test_the_table_tells_of_every_layer_and_of_what_was_skipped(loader):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.unused = cnn(), nn.Linear(3, 3)

        def forward(self, x):
            return self.body(x)

    rainbow = Rainbow.fit(Model(), loader, layers=["body.3", "body.7"])
    rainbow.align(rainbow.network)
    table = rainbow.table()
    assert "body.3  10×72" in table and "body.7  3×160" in table and "error 0.000" in table
    assert "unused  skipped: not called" in table and "body.0  skipped: not asked for" in table
    summary = rainbow.summaries()[0]
    assert (summary.neurons, summary.dimension, summary.rank) == (10, 72, 10) and 1 < summary.effective_dimension <= 10


def test_no_covariance_is_computed_that_nobody_asks_for_and_none_twice(loader, monkeypatch):
    computed = []
    for name in ("svd", "svdvals", "eigh", "eigvalsh"):
        known = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda *a, known=known, **k: computed.append(len(a[0])) or known(*a, **k)
        )
    rainbow = Rainbow.fit(mlp(), loader)
    assert computed == []
    assert rainbow.table() == rainbow.table() and len(computed) == 3
    assert rainbow.covariances["3"] is rainbow.covariances["3"] and len(computed) == 4
    assert "7" not in rainbow.covariances and len(rainbow.covariances) == 3


def shuffled():
    images, labels = map(torch.cat, zip(*batches()))
    return torch.utils.data.DataLoader(list(zip(images, labels)), 40, shuffle=True)


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: Rainbow.fit(mlp(), batches(), layers=["layer9"]), "'layer9'"),
        (lambda: Rainbow.fit(mlp(), iter(batches())), "read only once"),
        (lambda: Rainbow.fit(mlp(), []), "data is empty"),
        (lambda: Rainbow.fit([], batches()), "no network"),
        (lambda: Rainbow.fit(mlp(), batches()).clip("7"), "no weight layer '7'"),
        (lambda: Rainbow.fit(mlp(), batches()).clip("3", "pca"), "unknown basis 'pca'"),
        (lambda: Rainbow.fit(mlp(), batches()).align(mlp(), layers=["1"]), "1 layers of the other network for 3"),
        (lambda: Rainbow.fit(mlp(), batches()).sample(widths=[3]), "give 2"),
        (lambda: Rainbow.fit(mlp(), batches()).sample(widths=2.0), "widths are a list of 2 numbers"),
        (lambda: Rainbow.fit(mlp(), batches()).alignment, "no network was aligned yet"),
        (lambda: Rainbow.fit(mlp(), batches()).covariances["4"], "no weight layer '4'"),
        (lambda: Rainbow.fit(mlp(), 7), "not a int"),
        (lambda: Rainbow.fit(mlp(), [{"a": 1, "b": 2}]), "a dictionary of a, b"),
        (lambda: Rainbow.fit(mlp(), shuffled()).sample(), "shuffle=False"),
    ],
)
def test_bad_input_is_refused(act, message):
    with pytest.raises(RainbowError, match=message):
        act()


@pytest.mark.filterwarnings("ignore:layer 5")
def test_too_few_samples_are_said_with_their_numbers():
    with pytest.warns(UserWarning, match="layer 3: 10 samples for 24 dimensions"):
        Rainbow.fit(mlp(), batches(1, 10)).align(mlp(seed=1))
