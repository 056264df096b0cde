"""Rainbow sampling: drawn rows have the trained covariance; drawing the trained neurons gives the trained network."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.block import BlockConfig
from models.scatnet import ScatNet, ScatNetConfig
from models.signal import Signal
from models.standard import StandardConfig, build_standard
from rainbow import weight_layers
from rainbow.alignment import MeanNetwork
from rainbow.covariance import WeightCovariance
from rainbow.errors import RainbowError
from rainbow.norms import Norm
from rainbow.program import INPUT, Program
from rainbow.sampling import METHODS, RainbowSampler, draw_rows


def batches(channels=2, side=8, count=4, size=32, seed=0):
    """Smooth random images of 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count * size, channels, side // 2, side // 2, generator=generator)
    images = F.interpolate(images, size=(side, side), mode="bilinear")
    labels = images[:, 0].mean((1, 2)).argsort().argsort() * 3 // len(images)
    return list(zip(images.split(size), labels.split(size)))


def scatnet(arch="Fw Std Pr N", psi="mod", seed=0, widths=(6, 8, 10), norm="std", **fields):
    torch.manual_seed(seed)
    blocks = tuple(
        BlockConfig(tuple(arch.split()), psi_arch=tuple(psi.split()), kind=i % 2, Pr_size=n, Pc_size=n, **fields)
        for i, n in enumerate(widths)
    )
    return ScatNet(ScatNetConfig(Signal(2, 8, 8), 3, blocks, norm, False)).eval()


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 3))


def cnn(seed=0, affine=True):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8, affine=affine),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 10, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(10, affine=affine),
        nn.Flatten(),
        nn.Linear(160, 3),
    ).eval()


def resnet(seed=0, batch_norm="pre"):
    torch.manual_seed(seed)
    config = StandardConfig("resnet18-custom", 3, Signal(2, 32, 32), width=0.125, batch_norm=batch_norm)
    return build_standard(config).eval()


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
    "real": lambda: (scatnet(), batches()),
    "without Std": lambda: (scatnet("Fw Pr N"), batches()),
    "skip": lambda: (scatnet("Fw rho Std Pr N", ""), batches()),
    "complex": lambda: (scatnet("Fw rho Std Pc N", ""), batches()),
    "affine classifier": lambda: (scatnet("Fw rho Std Pc N", "", norm="affine"), batches()),
    "learned non-linearity": lambda: (scatnet("Fw Std Pr", non_linearity="ms", non_linearity_learned=True), batches()),
    "mlp": lambda: (mlp(), batches()),
    "cnn": lambda: (cnn(), batches()),
    "resnet": lambda: (resnet(), batches(side=32)),
    "resnet, post": lambda: (resnet(batch_norm="post"), batches(side=32)),
    "untraceable": lambda: (Untraceable().eval(), batches()),
}


def randomize(network, seed=0):
    """Random biases, affine maps and thresholds, so that each neuron has its own."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def scores(network, data):
    with torch.no_grad():
        return torch.cat([network(images) for images, _ in data])


def draw_trained(network, data, permute):
    """Draws the trained neurons themselves, in their order or in a random one."""
    layers, order = weight_layers(network, data), torch.Generator().manual_seed(0)

    def draw(k, neurons, generator):
        chosen = torch.randperm(neurons, generator=order) if permute else torch.arange(neurons)
        return layers[k].get()[chosen], chosen

    return draw


def sample_network(networks, data, seed=0, **options):
    """A rainbow network of a network, or of several through their mean network."""
    networks = [networks] if isinstance(networks, nn.Module) else networks
    return RainbowSampler(MeanNetwork.fit(networks, data), data, **options).sample(seed)


# ---- theorems


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_drawing_the_trained_neurons_in_any_order_gives_the_trained_network(name, permute):
    """The alignments find where each neuron went. (In a ResNet, shortcuts tie the neurons of several layers.)"""
    network, data = NETWORKS[name]()
    permute = permute and not name.startswith("resnet")
    randomize(network)
    network = sample_network(network, data, method=draw_trained(network, data, False)).network  # the statistics of data
    sample = sample_network(network, data, method=draw_trained(network, data, permute), test=data)
    expected = scores(network, data)
    torch.testing.assert_close(scores(sample.network, data), expected, atol=2e-3 * expected.abs().max().item(), rtol=0)
    assert max(a.acc1 for a in sample.accuracies) - min(a.acc1 for a in sample.accuracies) < 2
    assert sample.accuracies[-1].layer == len(weight_layers(network, data)) - 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_covariance_of_drawn_rows_converges_like_one_over_the_root_of_their_number(dtype):
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(1, 0.1, 12, dtype=torch.float64)
    covariance = WeightCovariance.fit(torch.randn(30, 12, dtype=dtype, generator=generator) * scale)

    def error(rows):
        drawn = (WeightCovariance.fit(draw_rows(covariance, rows, "gaussian", generator)) for _ in range(20))
        return sum(found.relative_error(covariance, "frobenius") for found in drawn) / 20

    ratio = error(100) / error(1600)
    assert 3.2 < ratio < 4.8
    assert error(100) < 0.6


def test_orthogonal_rows_have_the_covariance_exactly():
    generator = torch.Generator().manual_seed(0)
    covariance = WeightCovariance.fit(torch.randn(20, 8, generator=generator))
    rows = draw_rows(covariance, 24, "orthogonal", generator)
    torch.testing.assert_close(rows.T @ rows / 24, covariance.matrix())
    mean = sum(r.T @ r / 4 for r in (draw_rows(covariance, 4, "orthogonal", generator) for _ in range(3000))) / 3000
    torch.testing.assert_close(mean, covariance.matrix(), atol=0.1, rtol=0)


def test_white_rows_keep_only_the_trace():
    generator = torch.Generator().manual_seed(0)
    covariance = WeightCovariance.fit(torch.randn(20, 8, generator=generator) * torch.arange(1, 9))
    rows = draw_rows(covariance, 100_000, "white", generator)
    torch.testing.assert_close(
        rows.T @ rows / len(rows), covariance.trace / 8 * torch.eye(8, dtype=torch.float64), atol=0.3, rtol=0
    )


@pytest.mark.parametrize("name", ["real", "complex", "cnn", "resnet"])
def test_sampled_normalisations_normalise_the_training_set(name):
    network, data = NETWORKS[name]()
    sampled, found = sample_network(network, data).network, []

    def note(module, args, out):
        if getattr(module, "weight", None) is not None:
            out = (out - module.bias[:, None, None]) / module.weight[:, None, None]
        found.append(out.detach())

    for module in sampled.modules():
        if Norm.find(module):
            module.register_forward_hook(note)
    scores(sampled, [(torch.cat([images for images, _ in data]), None)])
    for out in found[1 if name in ("real", "complex") else 0 :]:  # the first Std is the trained one
        power = out.abs().square().mean((0, 2, 3))
        live = power > 0.5  # a channel that hardly varies stays small, by ε
        assert out.mean((0, 2, 3))[live].abs().max() < 1e-2 and (power[live] - 1).abs().max() < 0.1


# ---- how it runs


@pytest.mark.parametrize("name", ["real", "complex", "cnn", "resnet"])
def test_the_same_seed_gives_the_same_bits_whatever_the_memory(name):
    network, data = NETWORKS[name]()
    known = sample_network(network, data, seed=3, test=data)
    again = sample_network(network, data, seed=3, test=data, memory=0)
    other = sample_network(network, data, seed=4)
    weights = [sample.network.state_dict() for sample in (known, again, other)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert known.accuracies == again.accuracies
    assert not all(torch.equal(value, weights[2][key]) for key, value in weights[0].items())


def count_passes(network, data, **options):
    """How many times the wavelets of each block see all images, in the trained network and in the new one."""
    seen, images = {}, sum(len(labels) for _, labels in data)

    def count(module, args):
        seen[module] = seen.get(module, 0) + len(args[0])

    for block in network.blocks:
        block.fast = False
        block.body.Fw.register_forward_pre_hook(count)
    sampled = sample_network(network, data, **options).network
    rest = {block: count % images for block, count in seen.items()}
    assert max(rest.values()) <= 20  # dry runs of two images
    return [[seen[block.body.Fw] // images for block in each.blocks] for each in (network, sampled)]


def test_each_layer_continues_from_the_features_before_it():
    """Each block runs once, and its wavelets once more before its weights are known: 3.5 passes of 6 allowed."""
    trained, new = count_passes(scatnet(widths=(6, 8, 8, 6)), batches())
    assert trained == new == [1, 2, 2, 2]


def test_without_memory_each_layer_takes_partial_passes_from_the_images():
    """Layer 2 needs 2 blocks, layer 3 needs 3, layer 4 and the classifier all 4; the first needs none."""
    trained, new = count_passes(scatnet(widths=(6, 8, 8, 6)), batches(), memory=0)
    assert trained == new == [4, 4, 3, 2]


def test_a_part_of_the_memory_saves_a_part_of_the_passes():
    network, data = scatnet(widths=(6, 8, 8, 6)), batches()
    images = sum(len(labels) for _, labels in data)
    third = Program(network, data[0][0]).bytes_at(3)  # what goes into the third block, smaller than what came before
    trained, new = count_passes(network, data, memory=-(-2 * third * images * 4 // 3) + 3)
    assert trained == new == [2, 2, 2, 2]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_any_widths_can_be_sampled(name):
    network, data = NETWORKS[name]()
    layers = weight_layers(network, data)
    widths = [2 * layer.neurons for layer in layers[:-1]]
    if not name.startswith("resnet"):
        widths[0] = layers[0].neurons + 3
    before = copy.deepcopy(network.state_dict())
    sample = sample_network(network, data, widths=widths, test=data)
    assert [layer.neurons for layer in weight_layers(sample.network, data)] == [*widths, 3]
    assert torch.isfinite(scores(sample.network, data)).all()
    assert [a.layer for a in sample.accuracies] == (list(range(len(layers))) if name != "untraceable" else [0, 2])
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("align_on_test", [False, True])
def test_every_method_samples(method, align_on_test):
    network, data = NETWORKS["real"]()
    sample = sample_network(network, data, method=method, align_on_test=align_on_test, test=batches(seed=1))
    assert len(sample.accuracies) == 4 and torch.isfinite(scores(sample.network, data)).all()


def test_a_set_of_networks_is_sampled_through_its_mean():
    """Three copies of one network, each with permuted neurons, are sampled as that network is, up to rounding."""
    data, networks = batches(), [mlp() for _ in range(3)]
    for seed, network in enumerate(networks):
        orders = [torch.randperm(n, generator=torch.Generator().manual_seed(seed)) for n in (24, 12)]
        with torch.no_grad():
            for layer, following, order in ((1, 3, orders[0]), (3, 5, orders[1])):
                network[layer].weight.copy_(network[layer].weight[order])
                network[layer].bias.copy_(network[layer].bias[order])
                network[following].weight.copy_(network[following].weight[:, order])
    torch.testing.assert_close(scores(networks[1], data), scores(networks[0], data))
    mean = MeanNetwork.fit(networks, data)
    sampler = RainbowSampler(mean, data, test=data)
    alone = RainbowSampler(MeanNetwork.fit(networks[:1], data), data)
    for one, many in zip(alone.covariances, sampler.covariances):
        assert many.relative_error(one) < 0.05  # a neuron that is always 0 cannot be aligned
    assert len(sampler.sample().accuracies) == 3


def test_steps_compute_what_the_network_does():
    for name, make in NETWORKS.items():
        network, data = make()
        program = Program(network, data[0][0])
        env = {INPUT: data[0][0]}
        with torch.no_grad():
            for position in range(program.end):
                env = program.run(env, position, position + 1)
            torch.testing.assert_close(env[program.output], network(data[0][0]), atol=1e-4, rtol=1e-3)
        assert program.end == 1 if name == "untraceable" else program.end >= 5


# ---- bad input


def left_out(network, data):
    names = [layer.name for layer in weight_layers(network, data)][:-2]
    return RainbowSampler(MeanNetwork.fit([network], data, layers=names), data)


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda n, d: sample_network(n, d, widths=[4, 4]), "2 widths are given for 3 layers"),
        (lambda n, d: sample_network(n, d, widths=[4, 4, 0]), "positive integer, not 0"),
        (lambda n, d: sample_network(n, d, method="uniform"), "choose from gaussian, orthogonal, white"),
        (lambda n, d: sample_network(n, d, align_on_test=True), "needs a test set"),
        (lambda n, d: sample_network(nn.Linear(128, 3), [(x.flatten(1), y) for x, y in d]), "nothing to sample"),
        (left_out, "left out"),
        (lambda n, d: sample_network([n, scatnet(widths=(6, 8))], d), "different numbers of layers"),
        (lambda n, d: sample_network(resnet(), batches(side=32), widths=[8, 8, 9] + [8] * 17), "do not fit together"),
        (
            lambda n, d: sample_network(
                nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(144, 3)), d
            ),
            "1 cannot be sampled: a convolution in 4",
        ),
    ],
)
def test_what_cannot_be_sampled(act, message):
    with pytest.raises(RainbowError, match=message):
        act(scatnet(), batches())


def test_too_few_samples_are_said_with_their_numbers():
    with pytest.warns(UserWarning, match="layer 3: 8 samples for 24 dimensions"):
        sample_network(mlp(), batches(count=1, size=8))
