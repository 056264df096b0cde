"""Rainbow sampling: drawn rows have the trained covariance; drawing the trained neurons gives the trained network."""

import copy

import pytest
import torch
from torch import nn

from rainbow import MeanNetwork, Norm, RainbowError, RainbowSampler, WeightCovariance, weight_layers
from rainbow.network import analyse
from rainbow.program import INPUT, Program
from rainbow.sampling import METHODS, draw_rows
from tests.rainbow.networks import batches, cnn, mlp, resnet, run, scatnet, skip
from tests.rounding import assert_values


class Untraceable(nn.Module):
    """A network whose operations depend on its input's values."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3))
        return self.last(x) if x.sum() != 0 else x[:, :3]


NETWORKS = {
    "real": scatnet,
    "without Std": lambda: scatnet("Fw Pr N"),
    "skip": skip,
    "complex": lambda: skip("Fw rho Std Pc N"),
    "affine classifier": lambda: skip("Fw rho Std Pc N", norm="affine"),
    "learned non-linearity": lambda: scatnet("Fw Std Pr", non_linearity="ms", non_linearity_learned=True),
    "mlp": mlp,
    "cnn": cnn,
    "resnet": resnet,
    "resnet, post": lambda: resnet(batch_norm="post"),
    "untraceable": lambda: Untraceable().eval(),
}


def data_for(name, **options):
    side = 32 if name.startswith("resnet") else 8
    return batches(shape=(2, side, side), **options)


def sample(networks, data, seed=0, **options):
    """A rainbow network of a network, or of several through their mean network."""
    networks = [networks] if isinstance(networks, nn.Module) else networks
    return RainbowSampler(MeanNetwork.fit(networks, data), data, **options).sample(seed)


def draw_trained(network, data, permute):
    """Draws the trained neurons themselves, in their order or in a random one."""
    layers, order = weight_layers(network, data), torch.Generator().manual_seed(0)

    def draw(k, neurons, generator):
        chosen = torch.randperm(neurons, generator=order) if permute else torch.arange(neurons)
        return layers[k].get()[chosen], chosen

    return draw


# ---- theorems


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_drawing_the_trained_neurons_in_any_order_gives_the_trained_network(name, permute):
    """The alignments find where each neuron went. (In a ResNet, shortcuts tie the neurons of several layers.)"""
    network, data = NETWORKS[name](), data_for(name)
    for parameter in network.parameters():  # every neuron has a bias, an affine map, a threshold of its own
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    permute = permute and not name.startswith("resnet")
    network = sample(network, data, method=draw_trained(network, data, False)).network  # the statistics of this data
    found = sample(network, data, method=draw_trained(network, data, permute), test=data)
    expected = run(network, data)
    torch.testing.assert_close(run(found.network, data), expected, atol=2e-3 * expected.abs().max().item(), rtol=0)
    assert max(a.acc1 for a in found.accuracies) - min(a.acc1 for a in found.accuracies) < 2
    assert found.accuracies[-1].layer == len(weight_layers(network, data)) - 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_covariance_of_drawn_rows_converges_like_one_over_the_root_of_their_number(dtype):
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(1, 0.1, 12, dtype=torch.float64)
    covariance = WeightCovariance.fit(torch.randn(30, 12, dtype=dtype, generator=generator) * scale)

    def error(rows):
        drawn = (WeightCovariance.fit(draw_rows(covariance, rows, "gaussian", generator)) for _ in range(20))
        return sum(found.relative_error(covariance, "frobenius") for found in drawn) / 20

    assert 3.2 < error(100) / error(1600) < 4.8  # √16
    assert error(100) < 0.6


def test_orthogonal_rows_have_the_covariance_exactly():
    generator, covariance = torch.Generator().manual_seed(0), WeightCovariance.fit(torch.randn(20, 8))
    rows = draw_rows(covariance, 24, "orthogonal", generator)
    torch.testing.assert_close(rows.T @ rows / 24, covariance.matrix())
    mean = sum(r.T @ r / 4 for r in (draw_rows(covariance, 4, "orthogonal", generator) for _ in range(3000))) / 3000
    torch.testing.assert_close(mean, covariance.matrix(), atol=0.1, rtol=0)


def test_white_rows_keep_only_the_trace():
    covariance = WeightCovariance.fit(torch.randn(20, 8) * torch.arange(1, 9))
    rows = draw_rows(covariance, 100_000, "white", torch.Generator().manual_seed(0))
    expected = covariance.trace / 8 * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(rows.T @ rows / len(rows), expected, atol=0.3, rtol=0)


@pytest.mark.parametrize("name", ["real", "complex", "cnn", "resnet"])
def test_sampled_normalisations_normalise_the_training_set(name):
    data, found = data_for(name), []
    sampled = sample(NETWORKS[name](), data).network

    def note(module, args, out):
        if getattr(module, "weight", None) is not None:
            out = (out - module.bias[:, None, None]) / module.weight[:, None, None]
        found.append(out.detach())

    for module in sampled.modules():
        if Norm.find(module):
            module.register_forward_hook(note)
    run(sampled, [(torch.cat([images for images, _ in data]), None)])
    for out in found[1 if name in ("real", "complex") else 0 :]:  # the first Std is the trained one
        power = out.abs().square().mean((0, 2, 3))
        live = power > 0.5  # a channel that hardly varies stays small, by ε
        assert out.mean((0, 2, 3))[live].abs().max() < 1e-2 and (power[live] - 1).abs().max() < 0.1


def test_a_set_of_networks_is_sampled_through_its_mean():
    """Three copies of one network, each with permuted neurons, are sampled as that network is, up to rounding."""
    data, networks = batches(), [mlp() for _ in range(3)]
    for network in networks:
        for layer, following in ((1, 3), (3, 5)):
            order = torch.randperm(len(network[layer].weight))
            network[layer].weight.data = network[layer].weight.data[order]
            network[layer].bias.data = network[layer].bias.data[order]
            network[following].weight.data = network[following].weight.data[:, order]
    torch.testing.assert_close(run(networks[1], data), run(networks[0], data))
    sampler, alone = (RainbowSampler(MeanNetwork.fit(nets, data), data, test=data) for nets in (networks, networks[:1]))
    for one, many in zip(alone.covariances, sampler.covariances):
        assert many.relative_error(one) < 0.05  # a neuron that is always 0 cannot be aligned
    assert len(sampler.sample().accuracies) == 3


@pytest.mark.parametrize("name", NETWORKS)
def test_steps_compute_what_the_network_does(name):
    network, (images, _) = NETWORKS[name](), data_for(name)[0]
    program, values = analyse(network, images).program, {INPUT: images}
    with torch.no_grad():
        for position in range(program.end):
            values = program.run(values, position, position + 1)
    assert_values(values[program.output], run(network, [(images, None)]), 512, steps=20)
    assert program.end == 1 if name == "untraceable" else program.end >= 5


# ---- how it runs


@pytest.mark.parametrize("name", ["real", "complex", "cnn", "resnet"])
def test_the_same_seed_gives_the_same_bits_whatever_the_memory(name):
    network, data = NETWORKS[name](), data_for(name)
    options = {"seed": 3, "test": data}, {"seed": 3, "test": data, "memory": 0}, {"seed": 4}
    known, again, other = (sample(network, data, **each) for each in options)
    states = [each.network.state_dict() for each in (known, again, other)]
    same = [all(torch.equal(value, state[key]) for key, value in states[0].items()) for state in states[1:]]
    assert same == [True, False] and known.accuracies == again.accuracies


def count_passes(network, data, **options):
    """How many times the wavelets of each block see all images, in the trained network and in the new one."""
    seen, images = {}, sum(len(labels) for _, labels in data)

    def count(module, args):
        seen[module] = seen.get(module, 0) + len(args[0])

    for block in network.blocks:
        block.fast = False
        block.body.Fw.register_forward_pre_hook(count)
    sampled = sample(network, data, **options).network
    assert max(count % images for count in seen.values()) <= 20  # dry runs of two images
    return [[seen[block.body.Fw] // images for block in each.blocks] for each in (network, sampled)]


@pytest.mark.parametrize(
    "fits, passes",
    [
        ("everything", [1, 2, 2, 2]),  # a block once, its wavelets once more before its weights are known: of 6 allowed
        ("nothing", [4, 4, 3, 2]),  # from the images: layer 2 needs 2 blocks, layer 3 needs 3, the rest all, 1 none
        ("the third block's input", [2, 2, 2, 2]),
    ],
)
def test_each_layer_continues_from_the_features_that_fit_the_memory(fits, passes):
    network, data = scatnet(widths=(6, 8, 8, 6)), batches()
    third = -(-2 * Program(network, data[0][0]).bytes_at(3) * 128 * 4 // 3) + 3
    memory = {"everything": None, "nothing": 0}.get(fits, third)
    assert count_passes(network, data, memory=memory) == [passes, passes]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_any_widths_can_be_sampled(name):
    network, data = NETWORKS[name](), data_for(name)
    layers = weight_layers(network, data)
    widths = [2 * layer.neurons for layer in layers[:-1]]
    if not name.startswith("resnet"):
        widths[0] = layers[0].neurons + 3
    before = copy.deepcopy(network.state_dict())
    found = sample(network, data, widths=widths, test=data)
    assert [layer.neurons for layer in weight_layers(found.network, data)] == [*widths, 3]
    assert torch.isfinite(run(found.network, data)).all()
    assert [a.layer for a in found.accuracies] == (list(range(len(layers))) if name != "untraceable" else [0, 2])
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("align_on_test", [False, True])
def test_every_method_samples(method, align_on_test):
    found = sample(scatnet(), batches(), method=method, align_on_test=align_on_test, test=batches(seed=1))
    assert len(found.accuracies) == 4 and torch.isfinite(run(found.network, batches())).all()


# ---- bad input


def left_out(network, data):
    names = [layer.name for layer in weight_layers(network, data)][:-2]
    return RainbowSampler(MeanNetwork.fit([network], data, layers=names), data)


def grouped():
    return nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(144, 3))


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda n, d: sample(n, d, widths=[4, 4]), "2 widths are given for 3 layers"),
        (lambda n, d: sample(n, d, widths=[4, 4, 0]), "positive integer, not 0"),
        (lambda n, d: sample(n, d, method="uniform"), "choose from gaussian, orthogonal, white"),
        (lambda n, d: sample(n, d, align_on_test=True), "needs a test set"),
        (lambda n, d: sample(nn.Linear(128, 3), [(x.flatten(1), y) for x, y in d]), "nothing to sample"),
        (left_out, "left out"),
        (lambda n, d: sample([n, scatnet(widths=(6, 8))], d), "different numbers of layers"),
        (lambda n, d: sample(resnet(), data_for("resnet"), widths=[8, 8, 9] + [8] * 17), "do not fit together"),
        (lambda n, d: sample(grouped(), d), "1 cannot be sampled: a convolution in 4"),
    ],
)
def test_what_cannot_be_sampled(act, message):
    with pytest.raises(RainbowError, match=message):
        act(scatnet(), batches())


@pytest.mark.filterwarnings("ignore:layer 5")
def test_too_few_samples_are_said_with_their_numbers():
    with pytest.warns(UserWarning, match="layer 3: 8 samples for 24 dimensions"):
        sample(mlp(), batches(count=1, size=8))
