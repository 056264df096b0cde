"""Any network: right, or refused. What holds for every kind of network, in `tests.rainbow.zoo`."""

import pytest
import torch

from rainbow import Rainbow, RainbowError, RainbowSampler
from tests.rainbow.networks import batches, run
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
