"""Second moments of layers' inputs, and the sums they are made of: streamed equals in memory."""

import pytest
import torch
from torch import nn

from models.rainbow_layers import samples_of_columns
from rainbow import RainbowError, weight_layers
from rainbow.moments import moments
from rainbow.samples import ChannelSums, ProductSum, Samples
from tests.rainbow.networks import batches, cnn, double, run, scatnet, skip
from tests.rounding import assert_products, assert_values, of_sum


def complex_net(seed=0):
    return skip("Fw rho Std Pc N", seed=seed)


def inputs_of(network, names, data):
    """The inputs of modules when the network runs on all images at once."""
    inputs, modules = {}, [network.get_submodule(name) for name in names]
    handles = [
        module.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0].clone()})) for module in modules
    ]
    run(network, [(torch.cat([images for images, _ in data]), None)])
    for handle in handles:
        handle.remove()
    return [inputs[module] for module in modules]


def in_memory(network, data, patches=False):
    """All samples of every layer's input in double precision."""
    layers = weight_layers(network, data)
    inputs = inputs_of(network, [layer.name for layer in layers], data)
    return [double(layer.samples(x, patches)) for layer, x in zip(layers, inputs)]


# ---- moments


@pytest.mark.parametrize("make", [cnn, lambda seed=0: scatnet(seed=seed), complex_net])
@pytest.mark.parametrize("patches", [False, True])
def test_one_streamed_pass_equals_all_in_memory(make, patches, monkeypatch):
    monkeypatch.setattr("rainbow.moments.ROWS_AT_ONCE", 1000)
    networks, data = [make(), make(1)], batches()
    found = moments(networks, None, data, cross=[(0, 1)], patches=patches)
    phis = [in_memory(network, data, patches) for network in networks]
    for k, (a, b) in enumerate(zip(*phis)):
        count, energies = len(a), b.abs().square().mean(0)
        assert_products(count * found.auto(0, k), a, steps=4)
        assert_products(count * found.cross(0, 1, k), a, b, steps=4)
        assert_products(count * found.cross(1, 0, k), b, a, steps=4)
        assert ((found.mean(1, k) - b.mean(0)).abs() <= 4 * of_sum(count) * energies.sqrt()).all()
        assert ((found.var(1, k) - b.var(0, correction=0)).abs() <= 4 * of_sum(count) * energies).all()
        assert (found.count(0, k), found.energy(1, k)) == (
            count,
            pytest.approx(energies.sum().item(), rel=4 * of_sum(count)),
        )


def test_many_networks_are_paired_with_one():
    networks, data = [cnn(seed) for seed in range(3)], batches()
    found = moments(networks, ["3", "7"], data, cross=1)
    alone = moments([networks[2], networks[1]], ["3", "7"], data, cross=[(0, 1)])
    torch.testing.assert_close(found.cross(2, 1, "7"), alone.cross(0, 1, "7"))
    with pytest.raises(RainbowError, match="were not asked for"):
        found.cross(0, 2, "3")


def test_a_convolutions_patches_give_the_energy_of_its_output():
    network, data = cnn(), batches()
    for layer in weight_layers(network, data):
        found = moments([network], [layer.name], data, patches=True).auto(0, 0)
        with torch.no_grad():
            output = layer.module(*inputs_of(network, [layer.name], data)).double()
        samples = output.flatten(2).mT if output.ndim == 4 else output
        expected = (samples - layer.module.bias.detach().double()).flatten(0, -2).square().mean(0)
        weights = layer.get().double()
        rtol = 8 * of_sum(len(samples.flatten(0, -2)))
        torch.testing.assert_close(((weights @ found) * weights).sum(1), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (2, 3), "stride": (1, 2)},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 3, "dilation": 2, "padding": (2, 0)},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
)
def test_patches_are_what_a_convolution_multiplies(options):
    network, data = nn.Sequential(nn.Conv2d(2, 4, **options)), batches(1)
    (layer,), expected = weight_layers(network, data), run(network, data).movedim(1, -1).flatten(0, 2)
    found = layer.samples(data[0][0], patches=True) @ layer.get().T + network[0].bias.detach()
    torch.testing.assert_close(found, expected)


def test_batches_of_any_sizes_give_the_same():
    network, images = cnn(), torch.cat([images for images, _ in batches()])
    one_by_one, together = (moments([network], ["0", "3"], images.split(size)) for size in (1, 128))
    assert_values(together.auto(0, "3"), one_by_one.auto(0, "3"), 8192)
    assert_values(together.var(0, "3"), one_by_one.var(0, "3"), 8192)


def test_a_network_runs_no_further_than_asked_and_stays_as_it_was():
    network, calls = cnn().train(), []
    network[5].register_forward_hook(lambda *_: calls.append("later"))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    moments([network], ["3"], batches(2))
    assert calls == ["later"]  # the dry run that finds the layers
    assert network.training and network[2].inplace
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# ---- sums


def test_half_a_symmetric_product_is_the_whole():
    x, total = torch.randn(50, 700), ProductSum()
    for part in x.split(20):
        total.add(Samples.of(part))
    assert_products(total.finish(), x)


@pytest.mark.parametrize("first, second", [("r", "r"), ("r", "c"), ("c", "r"), ("c", "c")])
def test_complex_products_come_from_real_ones(first, second):
    a, b = (torch.randn(60, 9, dtype=torch.complex64 if kind == "c" else torch.float32) for kind in (first, second))
    for of_two in (True, False):
        both, real = ProductSum(), ProductSum(complex_values=False)
        for total in (both, real):
            total.add(Samples.of(a), *([Samples.of(b)] * of_two))
        both, real = both.finish(), real.finish()
        assert both.is_complex() == ("c" in (first, second if of_two else first)) and not real.is_complex()
        for found in (both, real):
            assert_products(found, a, b if of_two else a)


def test_products_of_more_samples_than_are_summed_at_once():
    """They err no more than those that are, however few the channels."""
    a, b, product = torch.randn(100_000, 2), torch.randn(100_000, 5), ProductSum()
    product.add(Samples.of(a), Samples.of(b))
    assert_products(product.finish(), a, b)
    symmetric, sums = ProductSum(), ChannelSums()
    sums.add(Samples.of(a), symmetric.add(Samples.of(a)))
    assert_products(symmetric.finish(), a)
    torch.testing.assert_close(sums.var, a.double().var(0, correction=0), rtol=of_sum(100_000), atol=0)


@pytest.mark.parametrize("make", [scatnet, lambda: skip("Fw rho Pc N")])
def test_a_blocks_columns_are_its_features(make):
    block, x = make().blocks[0], batches(1)[0][0]
    with torch.no_grad():
        features = Samples.of(block.features(x).movedim(1, -1).flatten(0, 2))
    planar = x.movedim(1, -1).contiguous()
    columns = block.fused.columns_of(planar)
    continued = block.fused.forward_from(columns, planar, block.P.weight, block.std)
    torch.testing.assert_close(continued, block.forward_planar(planar))
    products, sums = (ProductSum(), ProductSum()), (ChannelSums(), ChannelSums())
    for k, samples in enumerate((features, samples_of_columns(block, columns))):
        products[k].add(features, samples)
        sums[k].add(samples)
    for expected, found in (
        [each.finish() for each in products],
        [each.mean for each in sums],
        [each.var for each in sums],
    ):
        assert_values(found, expected, 512, steps=4)


def test_sums_keep_the_digits_that_single_precision_loses():
    total, channels = ProductSum(), ChannelSums()
    total.add(Samples.of(torch.full((1, 1), 1e5)))
    for _ in range(300):
        total.add(Samples.of(torch.ones(1, 1)))
        channels.add(Samples.of(torch.full((1000, 1), 1000.0)))
    assert total.finish().item() == 1e10 + 300
    assert channels.var.item() == 0 and channels.count == 300_000


def test_a_constant_channel_has_no_variance_and_a_nearly_constant_one_has_its_own():
    values = torch.randn(200) * torch.logspace(-10, 10, 200)
    noise = 1e-3 * torch.randn(3001, 200)
    sums, nearly = ChannelSums(), ChannelSums()
    for part in noise.split(1000):
        rows = values.expand(len(part), -1)
        sums.add(Samples.of(torch.nextafter(rows, rows + part)))
        nearly.add(Samples.of(rows + values * part))
    assert (sums.var == 0).all()
    expected = (values + values * noise).double().var(0, correction=0)
    torch.testing.assert_close(nearly.var, expected, rtol=of_sum(3001), atol=0)


# ---- bad input


def broken(part, value):
    """A CNN two of whose weights, or all of whose biases, are not numbers."""
    network = cnn()
    (network[3].weight.data.view(-1)[:2] if part == "weight" else network[0].bias.data).fill_(value)
    return network


@pytest.mark.parametrize(
    "networks, layers, data, message",
    [
        ([broken("weight", float("nan"))], None, batches(), "layer 3: 2 of its 720 weights are not"),
        ([broken("bias", float("inf"))], None, batches(), "activations at layer 3 are not finite"),
        ([cnn()], None, [], "the data is empty"),
        ([cnn()], None, iter(batches()), "read only once"),
        ([cnn()], None, ["images"], "holds no images"),
        ([cnn()], ["4"], batches(), "no weight layer '4'"),
        ([cnn()], [], batches(), "no layer is asked for"),
        ([cnn()], ["0", "3", "0"], batches(), "layer 0 is asked for 2 times"),
        ([cnn(), scatnet()], None, batches(), "different numbers of layers"),
        ([cnn(), cnn()], [["3"], ["7"]], batches(1), "have 2048 and 512 samples"),
        ([cnn()], [["0"], ["3"]], batches(), "given for 2 networks"),
        ([], None, batches(), "no network"),
    ],
)
def test_bad_input_is_refused(networks, layers, data, message):
    with pytest.raises(RainbowError, match=message):
        moments(networks, layers, data, cross=0)
