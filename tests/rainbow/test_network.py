"""One analysed network: its layers, found in one dry pass and handed on; its steps; what is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.rainbow_layers import ProjectionLayer
from rainbow import MeanNetwork, Rainbow, RainbowError, RainbowSampler, weight_layers
from rainbow.layers import ConvLayer, LinearLayer
from rainbow.network import analyse
from rainbow.program import INPUT
from tests.rainbow.networks import batches, cnn, double, mlp, run, scatnet, skip
from tests.rounding import assert_values

# ---- layers


def test_layers_of_a_cnn_in_forward_order():
    layers = weight_layers(cnn(), batches())
    assert [(layer.name, type(layer), layer.channels, layer.kernel) for layer in layers] == [
        ("0", ConvLayer, 2, (3, 3)),
        ("3", ConvLayer, 8, (3, 3)),
        ("7", LinearLayer, 10, (4, 4)),
    ]
    assert [layer.get().shape for layer in layers] == [(layer.neurons, layer.dimension) for layer in layers]


def test_layers_follow_the_calls_not_the_definitions():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first, self.unused = nn.Linear(4, 2), nn.Linear(6, 4), nn.Linear(1, 1)

        def forward(self, x):
            return self.last(F.relu(self.first(x)))

    found = analyse(Reversed(), torch.randn(2, 6))
    assert [layer.name for layer in found.layers] == ["first", "last"]
    assert found.skipped == {"unused": ("not called in a forward pass", False)}


def test_layers_of_a_scattering_network_need_no_example():
    layers = weight_layers(scatnet())
    assert [(type(layer), layer.channels, layer.neurons) for layer in layers] == [
        *((ProjectionLayer, 10, 6), (ProjectionLayer, 30, 8), (ProjectionLayer, 40, 10)),
        (LinearLayer, 10, 3),
    ]


@pytest.mark.parametrize("make", [cnn, lambda: skip("Fw rho Std Pc N")])
def test_setting_a_layer_to_its_own_matrix_changes_nothing(make):
    network, data = make(), batches(1)
    expected = run(network, data)
    for layer in weight_layers(network, data):
        layer.set(double(layer.get()))
    assert torch.equal(run(network, data), expected)


def test_rotating_an_input_is_rotating_weights():
    network = cnn()
    inputs = torch.randn(2, 2, 8, 8), torch.randn(2, 8, 8, 8), torch.randn(2, 160)
    for layer, x in zip(weight_layers(network, batches()), inputs):
        rotation = torch.linalg.qr(torch.randn(layer.channels, layer.channels)).Q
        with torch.no_grad():
            expected = layer.module(layer.rotate(x, rotation))
            kernels = layer.get().unflatten(1, (layer.channels, -1))
            layer.set(torch.einsum("nck,dc->ndk", kernels, rotation).flatten(1))
            assert_values(layer.module(x), expected, layer.dimension, steps=2)


def partly():
    return nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 2, 2))


def test_what_is_skipped_and_why():
    skipped = analyse(partly(), torch.randn(1, 2, 8, 8)).skipped
    assert "4 groups" in skipped["1"].reason and "transposed" in skipped["2"].reason


def test_layers_are_chosen_by_name_pattern_type_or_function():
    choices = "3", ["[07]"], ["7", "*"], nn.Conv2d, lambda layer: layer.neurons > 8
    found = [list(Rainbow.fit(cnn(), batches(1), layers=each).layers) for each in choices]
    assert found == [["3"], ["0", "7"], ["7", "0", "3"], ["0", "3"], ["3"]]


# ---- one pass, and steps


def test_an_analysis_takes_one_dry_pass_of_each_network():
    networks, data, lengths = [mlp(seed) for seed in range(3)], batches(), []
    for network in networks:
        network.register_forward_pre_hook(lambda module, args: lengths.append(len(args[0])))
    Rainbow.fit(networks[0], data).align(networks[1])
    assert lengths.count(2) == 2
    lengths.clear()
    Rainbow.fit(networks, data)
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
    "argument": lambda x: F.relu(x, inplace=True),
    "copy_": lambda x: torch.empty_like(x).copy_(x),
    "copied, then the former name": copied,
    "fill_": lambda x: x + torch.empty_like(x).fill_(2),
    "former name": lambda x: x + x.mul_(2),
    "+=": lambda x: x.__iadd__(1),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_networks_that_overwrite_values_can_be_continued_and_sampled(name):
    network, data = InPlace(IN_PLACE[name]).eval(), batches(shape=(6,))
    program, images = analyse(network, data).program, data[0][0]
    expected, before = run(network, data[:1]), images.clone()
    for cut in range(program.end):
        with torch.no_grad():
            values = program.run({INPUT: images}, 0, cut)
            for _ in range(2):
                assert torch.equal(program.run(values, cut, program.end)[program.output], expected)
    assert torch.equal(images, before)
    assert Rainbow.fit(network, data).sample(widths=[7])(images).shape == (32, 3)


# ---- what is refused


def test_a_layer_that_is_called_twice_is_not_sampled():
    shared, data = nn.Linear(6, 6), batches(shape=(6,))
    rainbow = Rainbow.fit(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(6, 3)), data)
    assert "0  called 2 times, analysed at the first" in rainbow.table()
    with pytest.raises(RainbowError, match="0 cannot be sampled: it is called 2 times"):
        rainbow.sample()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: lambda x: x, "torch.nn.Module, got a function"),
        (nn.ReLU, "no linear layer"),
        (lambda: torch.jit.script(mlp()), "offers no hooks"),
        (lambda: torch.compile(mlp()), "offers no hooks"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1)), r"cannot process images of shape \(2, 2, 8, 8\)"),
    ],
)
def test_what_cannot_be_analysed(model, message):
    with pytest.raises(RainbowError, match=message):
        Rainbow.fit(model(), batches())


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda fitted: fitted.alignment.transform("typo", torch.ones(5, 6)), "no weight layer 'typo'"),
        (lambda fitted: Rainbow.fit(mlp(), batches(), layers="11"), "no weight layer '11'"),
        (lambda fitted: Rainbow.fit(mlp(), batches(), layers=nn.Conv2d), "no weight layer of Sequential is a Conv2d"),
        (lambda fitted: Rainbow.fit(partly(), batches(), layers=["1"]), "1 is not analysed: a convolution in 4 groups"),
        (lambda fitted: fitted.alignment.transform(3, torch.ones(5, 6)), "no layer 3 among 3"),
        (lambda fitted: fitted.basis("typo", "weight"), "no weight layer 'typo'"),
        (lambda fitted: RainbowSampler(fitted.mean, batches()).trained_accuracy, "need a test set"),
        (lambda fitted: RainbowSampler(MeanNetwork.fit([mlp()]), batches()), "without images"),
        (lambda fitted: weight_layers(scatnet(), names=["blocks.1.Pr"]), "did you mean blocks.1.body.Pr"),
    ],
)
def test_bad_input_is_an_error_of_one_kind(act, message):
    fitted = Rainbow.fit(mlp(), batches())
    fitted.align(mlp())
    with pytest.raises(RainbowError, match=message):
        act(fitted)
