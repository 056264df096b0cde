"""Any network: right, or refused. What holds for every kind of network, in `tests.rainbow.zoo`."""

import pytest
import torch
from torch.nn.utils import prune

from rainbow import Rainbow, RainbowError, RainbowSampler
from tests.rainbow.networks import accuracy, batches, run
from tests.rainbow.zoo import HIDDEN, NETWORKS, alone, network, permuted
from tests.rounding import assert_values

TIED = "drawn independently, they do not agree"
NOT_SAMPLED = {
    "squeeze and excitation": TIED,
    "gated": TIED,
    "mixer": "it mixes positions",
    "depthwise": "in 6 groups",
    "pixel shuffle": "differ from position to position",
    "two scales": "different numbers of positions",
    "transformer, one matrix": TIED,
    "transformer, class token": TIED,
    "transformer, products": TIED,
    "transformer, three matrices": TIED,
    "transformer, torch's": "used by a function",
    "transformer layer": "used by a function",
    "weight norm": "computed from other parameters",
}


def data():
    return batches(count=8, shape=(3, 8, 8))


@pytest.mark.filterwarnings("ignore:layer .* do not determine")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_with_permuted_neurons_computes_the_same_and_aligns_without_error(name):
    trained, images = network(name), data()
    copied = permuted(trained, HIDDEN[name])
    assert_values(run(copied, images), run(trained, images), 192, steps=8)
    rainbow = Rainbow.fit(trained, images)
    errors = rainbow.align(copied)
    assert {name: error for name, error in errors.items() if error > 0} == {}


def outputs_of_samples(trained, images, orders):
    """The outputs of samples of the trained neurons in several orders, each a function of a layer's name."""
    for order in orders:
        rainbow = Rainbow.fit(trained, images)
        sampler = RainbowSampler(rainbow.mean, images, method=drawing([*rainbow.layers.values()], order))
        trained = sampler.sample().network
        yield run(trained, images)


def drawing(layers, order):
    def draw(k, neurons, generator):
        chosen = order(layers[k].name, neurons)
        return layers[k].get()[chosen], chosen

    return draw


@pytest.mark.filterwarnings("ignore:layer .* do not determine")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_sample_that_only_permutes_trained_neurons_is_the_trained_network_or_is_refused(name):
    """Neurons that a shortcut ties to those of other layers stay where they are; the first order sets statistics."""
    free = set(alone(network(name), HIDDEN[name]))
    orders = (lambda name, n: torch.arange(n), lambda name, n: torch.randperm(n) if name in free else torch.arange(n))
    try:
        same, other = outputs_of_samples(network(name), data(), orders)
    except RainbowError as error:
        assert name in NOT_SAMPLED and NOT_SAMPLED[name] in str(error)
        return
    assert name not in NOT_SAMPLED
    torch.testing.assert_close(other, same, atol=2e-3 * same.abs().max().item(), rtol=0)


@pytest.mark.filterwarnings("ignore:layer .* do not determine")
@pytest.mark.parametrize("name", NETWORKS)
def test_clipping_to_all_directions_changes_nothing_or_is_refused(name):
    trained, images = network(name), data()[:2]
    rainbow = Rainbow.fit(trained, images)
    for layer in rainbow.layers.values():
        if isinstance(layer.module, (torch.nn.Conv1d, torch.nn.Conv3d)):
            with pytest.raises(RainbowError, match="two-dimensional convolutions only"):
                rainbow.clip(layer.name, ranks=[layer.dimension])
        else:
            found = rainbow.clip(layer.name, ranks=[0, layer.dimension])[1][1]
            assert found == pytest.approx(accuracy(trained, images), abs=2)


# ---- what people bring


class Output(dict):
    """An output of several values, one of them called logits."""


class Wrapped(torch.nn.Module):
    """The MLP, with outputs of another kind."""

    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = network("mlp"), wrap

    def forward(self, x):
        return self.wrap(self.inner(x))


def test_batches_and_outputs_of_any_kind_give_the_same():
    pairs = data()
    images, labels = map(torch.cat, zip(*pairs))
    kinds = {
        "triples": [(x, y, torch.arange(len(x))) for x, y in pairs],
        "dictionaries": [{"labels": y, "pixel_values": x} for x, y in pairs],
        "columns of labels": [(x, y[:, None]) for x, y in pairs],
        "one batch": (images, labels),
        "a data set": torch.utils.data.TensorDataset(images, labels),
    }
    expected = Rainbow.fit(network("mlp"), pairs).clip("3", ranks=[1, 8])[1].tolist()
    for kind, each in kinds.items():
        assert Rainbow.fit(network("mlp"), each).clip("3", ranks=[1, 8])[1].tolist() == expected, kind
    for wrap in (lambda y: (y, y[:1]), lambda y: [y], lambda y: Output(loss=y.sum(), logits=y), lambda y: {"out": y}):
        rainbow = Rainbow.fit(Wrapped(wrap), pairs)
        assert rainbow.clip("inner.3", ranks=[1, 8])[1].tolist() == expected
        assert len(rainbow.sample(test=pairs)(images)) > 0 and rainbow.sample_result.accuracies[0].acc1 <= 100
    rainbow = Rainbow.fit(network("mlp"), images)
    assert rainbow.sample()(images).shape == (256, 3) and rainbow.align(network("mlp", 1))["3"] > 0


def segmenting():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 1))


def one_logit():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))


@pytest.mark.parametrize(
    "make, labels, message",
    [
        (segmenting, torch.zeros(32, 6, 6).long(), r"outputs \(32, 3, 6, 6\) and labels \(32, 6, 6\)"),
        (one_logit, torch.zeros(32).long(), r"outputs \(32, 1\) and labels \(32,\)"),
        (NETWORKS["mlp"], torch.zeros(32), "whole labels"),
        (NETWORKS["mlp"], torch.eye(3)[torch.zeros(32).long()], r"labels \(32, 3\)"),
        (NETWORKS["mlp"], None, "need data of"),
    ],
)
def test_accuracies_that_mean_nothing_are_refused(make, labels, message):
    images = [(torch.randn(32, 3, 8, 8), labels)]
    rainbow = Rainbow.fit(make(), images)
    for act in (lambda: rainbow.clip([*rainbow.layers][-1]), lambda: rainbow.sample(test=images)):
        with pytest.raises(RainbowError, match=message):
            act()


@pytest.mark.filterwarnings("ignore:layer .* do not determine")
def test_a_sample_near_chance_is_said_to_be():
    trained, images = network("mlp"), data()
    trained[5].bias.data -= run(trained, images).mean(0)  # or one class would be right for all
    labelled = [(x, run(trained, [(x, None)]).argmax(1)) for x, _ in images]
    with pytest.warns(UserWarning, match="near chance: .* %, the trained one 100.0 %"):
        Rainbow.fit(trained, labelled).sample(
            method=lambda k, n, g: (torch.zeros(n, 192 if k == 0 else 12), torch.arange(n))
        )


# ---- what is refused


def tied():
    shared = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 6), torch.nn.Linear(6, 3))
    shared[2].weight = shared[0].weight
    return shared


class Functional(torch.nn.Module):
    """A second layer that is a parameter, by F.linear or a product."""

    def __init__(self, product):
        super().__init__()
        self.first, self.last, self.product = torch.nn.Linear(6, 5), torch.nn.Linear(4, 3), product
        self.weight = torch.nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(x @ self.weight.T if self.product else torch.nn.functional.linear(x, self.weight))


def hooked(change):
    made = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    change(made[0])
    return made


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "make, message",
    [
        (tied, "2 cannot be sampled: its weight is that of 0"),
        (lambda: Functional(False), "weight cannot be sampled: used by a function"),
        (lambda: Functional(True), "weight cannot be sampled: used by a function"),
        (
            lambda: hooked(lambda layer: prune.l1_unstructured(layer, "weight", 3)),
            "0 .* computed from other parameters",
        ),
        (lambda: hooked(torch.nn.utils.weight_norm), "0 .* computed from other parameters"),
        (lambda: hooked(torch.nn.utils.spectral_norm), "0 .* computed from other parameters"),
    ],
)
def test_weights_that_cannot_be_set_alone_are_not_sampled(make, message):
    rainbow = Rainbow.fit(make(), batches(shape=(6,)))
    assert max(rainbow.align(rainbow.network).values()) == 0
    with pytest.raises(RainbowError, match=message):
        rainbow.sample()
