"""One analysed network: found in one dry pass, handed on; its steps compute what it does; what is refused."""

import pytest
import torch
from torch import nn

from rainbow import MeanNetwork, Rainbow, RainbowError, RainbowSampler
from rainbow.moments import moments
from rainbow.network import analyse
from rainbow.program import INPUT


def batches(count=3, size=20):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 6, generator=generator), torch.randint(3, (size,))) for _ in range(count)]


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def test_an_analysis_takes_one_dry_pass_of_each_network():
    networks, lengths = [mlp() for _ in range(3)], []
    for network in networks:
        network.register_forward_pre_hook(lambda module, args: lengths.append(len(args[0])))
    Rainbow.fit(networks[0], batches()).align(networks[1])
    assert lengths.count(2) == 2
    lengths.clear()
    Rainbow.fit(networks, batches())
    assert lengths.count(2) == 3


class InPlace(nn.Module):
    """Overwrites values in ways that tracing shows as operations."""

    def __init__(self, overwrite):
        super().__init__()
        self.first, self.last, self.overwrite = nn.Linear(6, 5), nn.Linear(5, 3), overwrite

    def forward(self, x):
        return self.last(self.overwrite(self.first(x)))


def copied(x):
    y = torch.zeros_like(x)
    y.copy_(x)
    return y


IN_PLACE = {
    "relu_": lambda x: x.relu_(),
    "function": torch.relu_,
    "argument": lambda x: nn.functional.relu(x, inplace=True),
    "copy_": lambda x: torch.empty_like(x).copy_(x),
    "copied, then the former name": copied,
    "fill_": lambda x: x + torch.empty_like(x).fill_(2),
    "former name": lambda x: x + x.mul_(2),
    "+=": lambda x: x.__iadd__(1),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_networks_that_overwrite_values_are_sampled(name):
    torch.manual_seed(0)
    network, data = InPlace(IN_PLACE[name]).eval(), batches()
    program, images = analyse(network, data).program, data[0][0]
    with torch.no_grad():
        expected, before = network(images), images.clone()
        for cut in range(program.end):
            values = program.run({INPUT: images}, 0, cut)
            for _ in range(2):
                assert torch.equal(program.run(values, cut, program.end)[program.output], expected)
    assert torch.equal(images, before)
    assert Rainbow.fit(network, data).sample(widths=[7])(images).shape == (20, 3)


def test_a_layer_that_is_called_twice_is_not_sampled():
    shared = nn.Linear(6, 6)
    rainbow = Rainbow.fit(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(6, 3)), batches())
    assert "0  called 2 times, analysed at the first" in rainbow.table()
    with pytest.raises(RainbowError, match="0 cannot be sampled: it is called 2 times"):
        rainbow.sample()


def test_the_mean_of_one_network_needs_no_images():
    network = mlp()
    assert [layer.name for layer in MeanNetwork.fit([network]).layers[0]] == ["0", "2", "4"]
    with pytest.raises(RainbowError, match="without images"):
        RainbowSampler(MeanNetwork.fit([network]), batches())
    with pytest.raises(RainbowError, match="give a loader"):
        MeanNetwork.fit([network, mlp()])


def accuracy_without_test_set():
    return RainbowSampler(MeanNetwork.fit([mlp()], batches()), batches()).trained_accuracy


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda fitted: fitted.alignment.transform("typo", torch.ones(5, 6)), "no weight layer 'typo'"),
        (lambda fitted: fitted.alignment.transform(3, torch.ones(5, 6)), "no layer 3 among 3"),
        (lambda fitted: fitted.basis("typo", "weight"), "no weight layer 'typo'"),
        (lambda fitted: accuracy_without_test_set(), "need a test set"),
        (lambda fitted: moments([mlp()], ["0", "2", "0"], batches()), "layer 0 is asked for 2 times"),
        (lambda fitted: Rainbow.fit(lambda x: x, batches()), "a network is a torch.nn.Module, got a function"),
        (lambda fitted: moments([], None, batches()), "no network"),
    ],
)
def test_bad_input_is_an_error_of_one_kind(act, message):
    fitted = Rainbow.fit(mlp(), batches())
    fitted.align(mlp())
    with pytest.raises(RainbowError, match=message):
        act(fitted)
