"""Weight layers of any network, and the second moments of their inputs: streamed equals in memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.block import BlockConfig
from models.rainbow_layers import ProjectionLayer
from models.scatnet import ScatNet, ScatNetConfig
from models.signal import Signal
from rainbow import weight_layers
from rainbow.errors import RainbowError
from rainbow.layers import ConvLayer, LinearLayer
from rainbow.moments import moments
from rainbow.network import analyse
from rainbow.samples import ChannelSums, ProductSum, Samples


def batches(count=3, size=8, channels=2, side=8, seed=0):
    """Random images with labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, channels, side, side, generator=generator), torch.zeros(size, dtype=torch.long))
        for _ in range(count)
    ]


def cnn(seed=0, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, width, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(20, 7),
        nn.ReLU(),
        nn.Linear(7, 3),
    ).eval()


def scatnet(arch="Fw Std Pr N", psi="mod", seed=0, widths=(4, 5)):
    torch.manual_seed(seed)
    blocks = tuple(
        BlockConfig(tuple(arch.split()), psi_arch=tuple(psi.split()), kind=i % 2, Pr_size=n, Pc_size=n)
        for i, n in enumerate(widths)
    )
    return ScatNet(ScatNetConfig(Signal(2, 8, 8), 3, blocks, "std", False)).eval()


COMPLEX = {"arch": "Fw rho Std Pc N", "psi": ""}


# ---- layers


def test_layers_of_a_cnn_in_forward_order():
    layers = weight_layers(cnn(), batches()[0][0])
    assert [(layer.name, type(layer), layer.channels, layer.kernel) for layer in layers] == [
        ("0", ConvLayer, 2, (3, 3)),
        ("2", ConvLayer, 6, (3, 3)),
        ("6", LinearLayer, 5, (2, 2)),
        ("8", LinearLayer, 7, (1, 1)),
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
    assert {name: reason for name, (reason, _) in found.skipped.items()} == {"unused": "not called in a forward pass"}


def test_layers_of_a_scattering_network_need_no_example():
    layers = weight_layers(scatnet())
    assert [(type(layer), layer.channels, layer.neurons) for layer in layers] == [
        (ProjectionLayer, 10, 4),
        (ProjectionLayer, 20, 5),
        (LinearLayer, 5, 3),
    ]
    assert layers[-1].kernel == (4, 4)


def test_setting_a_layer_to_its_own_matrix_changes_nothing():
    for network in (cnn(), scatnet(**COMPLEX)):
        images = batches()[0][0]
        with torch.no_grad():
            expected = network(images)
            for layer in weight_layers(network, images):
                layer.set(layer.get().to(torch.promote_types(layer.get().dtype, torch.float64)))
            assert torch.equal(network(images), expected)


def test_rotating_an_input_is_rotating_weights():
    network, images = cnn(), batches()[0][0]
    generator = torch.Generator().manual_seed(1)
    for layer, x in zip(
        weight_layers(network, images), [images, torch.randn(2, 6, 4, 4), torch.randn(2, 20), torch.randn(2, 7)]
    ):
        rotation = torch.linalg.qr(torch.randn(layer.channels, layer.channels, generator=generator)).Q
        with torch.no_grad():
            expected = layer.module(layer.rotate(x, rotation))
            kernels = layer.get().unflatten(1, (layer.channels, -1))
            layer.set(torch.einsum("nck,dc->ndk", kernels, rotation).flatten(1))
            torch.testing.assert_close(layer.module(x), expected, atol=1e-5, rtol=1e-5)


def test_what_is_skipped_and_why():
    network = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 2, 2))
    skipped = analyse(network, torch.randn(1, 2, 8, 8)).skipped
    assert "4 groups" in skipped["1"].reason and "transposed" in skipped["2"].reason


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda x: x, "torch.nn.Module"),
        (nn.ReLU(), "no linear layer"),
        (torch.jit.script(nn.Linear(2, 2)), "offers no hooks"),
        (torch.compile(nn.Linear(2, 2)), "offers no hooks"),
    ],
)
def test_what_has_no_layers_is_refused(model, message):
    with pytest.raises(RainbowError, match=message):
        weight_layers(model, torch.randn(1, 2))


def test_unknown_layer_names_the_nearest():
    with pytest.raises(RainbowError, match="did you mean blocks.1.body.Pr"):
        weight_layers(scatnet(), names=["blocks.1.Pr"])


def test_wrong_images_are_refused():
    with pytest.raises(RainbowError, match=r"cannot process images of shape \(2, 3, 8, 8\)"):
        weight_layers(cnn(), torch.randn(4, 3, 8, 8))


# ---- moments


def in_memory(network, layers, data):
    """All samples of every layer's input, in double precision, by running the network on everything at once."""
    inputs = {}
    handles = [
        layer.module.register_forward_pre_hook(lambda m, args, k=k: inputs.__setitem__(k, args[0].clone()))
        for k, layer in enumerate(layers)
    ]
    with torch.no_grad():
        network(torch.cat([images for images, _ in data]))
    for handle in handles:
        handle.remove()
    samples = [layers[k].samples(inputs[k]) for k in range(len(layers))]
    return [phi.to(torch.complex128 if phi.is_complex() else torch.float64) for phi in samples]


@pytest.mark.parametrize("make", [cnn, lambda seed=0: scatnet(seed=seed), lambda seed=0: scatnet(seed=seed, **COMPLEX)])
def test_one_streamed_pass_equals_all_in_memory(make):
    networks, data = [make(), make(1)], batches()
    found = moments(networks, None, data, cross=[(0, 1)])
    phis = [in_memory(network, weight_layers(network, data), data) for network in networks]
    for k, (a, b) in enumerate(zip(*phis)):
        close = {"atol": 2e-6 * a.abs().max().item() ** 2, "rtol": 1e-5}
        torch.testing.assert_close(found.auto(0, k), a.T @ a.conj() / len(a), **close)
        torch.testing.assert_close(found.cross(0, 1, k), a.T @ b.conj() / len(a), **close)
        torch.testing.assert_close(found.cross(1, 0, k), b.T @ a.conj() / len(a), **close)
        torch.testing.assert_close(found.mean(1, k), b.mean(0), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.var(1, k), (b - b.mean(0)).abs().square().mean(0), atol=1e-6, rtol=1e-5)
        assert found.count(0, k) == len(a)
        assert found.energy(0, k) == pytest.approx(a.abs().square().sum(1).mean().item(), rel=1e-5)


def test_many_networks_are_paired_with_one():
    networks, data = [cnn(seed) for seed in range(3)], batches()
    found = moments(networks, ["2", "8"], data, cross=1)
    alone = moments([networks[2], networks[1]], ["2", "8"], data, cross=[(0, 1)])
    torch.testing.assert_close(found.cross(2, 1, "8"), alone.cross(0, 1, "8"))
    with pytest.raises(RainbowError, match="were not asked for"):
        found.cross(0, 2, "2")


def test_a_convolutions_patches_give_the_energy_of_its_output():
    network, data = cnn(), batches()
    for name in ("0", "2", "6"):
        (layer,) = weight_layers(network, data, [name])
        found = moments([network], [name], data, patches=True)
        weights, outputs = layer.get().double(), []
        handle = layer.module.register_forward_hook(lambda m, args, out, outputs=outputs: outputs.append(out.double()))
        with torch.no_grad():
            network(torch.cat([images for images, _ in data]))
        handle.remove()
        samples = outputs[0].flatten(2).mT if outputs[0].ndim == 4 else outputs[0]
        samples = samples - layer.module.bias.detach().double()
        expected = samples.flatten(0, -2).square().mean(0)
        torch.testing.assert_close(((weights @ found.auto(0, 0)) * weights).sum(1), expected, rtol=1e-4, atol=1e-7)


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
    network, x = nn.Sequential(nn.Conv2d(2, 4, **options)), batches()[0][0]
    (layer,) = weight_layers(network, x)
    with torch.no_grad():
        expected = network(x).movedim(1, -1).flatten(0, 2) - network[0].bias
    torch.testing.assert_close(layer.samples(x, patches=True) @ layer.get().T, expected)


def test_patches_piece_by_piece_equal_all_in_memory(monkeypatch):
    networks, data = [cnn(), cnn(1)], batches()
    monkeypatch.setattr("rainbow.moments.ROWS_AT_ONCE", 40)
    found = moments(networks, ["0", "2"], data, patches=True, cross=[(0, 1)])
    images = torch.cat([images for images, _ in data])
    for name in ("0", "2"):
        layers = [weight_layers(network, images, [name])[0] for network in networks]
        with torch.no_grad():
            inputs = [network[: int(name)](images) for network in networks]
        a, b = (layer.samples(x, patches=True).double() for layer, x in zip(layers, inputs))
        torch.testing.assert_close(found.auto(0, name), a.T @ a / len(a), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.cross(0, 1, name), a.T @ b / len(a), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.mean(1, name), b.mean(0), atol=1e-6, rtol=1e-5)
        assert found.count(0, name) == len(a)


def test_small_batches_run_together_and_large_ones_by_themselves(monkeypatch):
    network, lengths = cnn(), []
    network[0].register_forward_pre_hook(lambda module, args: lengths.append(len(args[0])))
    data = [*batches(5), *batches(2, side=10)]
    together = moments([network], ["0", "2"], data)
    assert lengths[1:] == [8, 32, 16]  # after the dry run: how large the first is, then all that have one shape
    monkeypatch.setattr("rainbow.moments.JOINED_BYTES", 1)
    lengths.clear()
    apart = moments([network], ["0", "2"], data)
    assert lengths[1:] == [8] * 7
    torch.testing.assert_close(together.auto(0, "2"), apart.auto(0, "2"), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(together.var(0, "2"), apart.var(0, "2"), rtol=1e-5, atol=1e-7)


def test_half_a_symmetric_product_is_the_whole():
    x, total = torch.randn(50, 700), ProductSum()
    for part in x.split(20):
        total.add(Samples.of(part))
    for _ in range(2):
        torch.testing.assert_close(total.total(), (x.T @ x).double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first, second", [("r", "r"), ("r", "c"), ("c", "r"), ("c", "c")])
def test_complex_products_come_from_real_ones(first, second):
    a, b = (torch.randn(60, 9, dtype=torch.complex64 if kind == "c" else torch.float32) for kind in (first, second))
    for of_two in (True, False):
        both, real = ProductSum(), ProductSum(complex_values=False)
        for total in (both, real):
            total.add(Samples.of(a), *([Samples.of(b)] * of_two))
        expected = a.T.to(torch.complex128) @ (b if of_two else a).to(torch.complex128).conj()
        torch.testing.assert_close(both.total().to(torch.complex128), expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(real.total(), expected.real, atol=1e-4, rtol=1e-5)


def test_products_of_more_samples_than_are_summed_at_once():
    """In pieces that hold more samples the fewer the channels, alike in both factors."""
    a, b, product = torch.randn(100_000, 2), torch.randn(100_000, 5), ProductSum()
    product.add(Samples.of(a), Samples.of(b))
    torch.testing.assert_close(product.total(), a.double().T @ b.double(), rtol=1e-4, atol=1e-2)
    symmetric, sums = ProductSum(), ChannelSums()
    squares = symmetric.add(Samples.of(a))
    sums.add(Samples.of(a), squares)
    torch.testing.assert_close(symmetric.total(), a.double().T @ a.double(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(sums.var, a.double().var(0, correction=0), rtol=1e-5, atol=0)


def test_a_blocks_columns_are_its_features():
    for arch, psi in (("Fw Std Pr N", "mod"), ("Fw rho Pc N", "")):
        block = scatnet(arch, psi).blocks[0]
        x = batches()[0][0]
        with torch.no_grad():
            features = Samples.of(block.features(x).movedim(1, -1).flatten(0, 2))
        planar = x.movedim(1, -1).contiguous()
        (real, real_order), (imaginary, imaginary_order) = block.fused.layout.parts_of(block.fused.columns_of(planar))
        ours = block.fused.forward_from(block.fused.columns_of(planar), planar, block.P.weight, block.std)
        torch.testing.assert_close(ours, block.forward_planar(planar))
        columns = Samples(real, imaginary, real_order, imaginary_order)
        products, sums = (ProductSum(), ProductSum()), (ChannelSums(), ChannelSums())
        for product, channel_sums, samples in zip(products, sums, (features, columns)):
            product.add(features, samples)
            channel_sums.add(samples)
        torch.testing.assert_close(products[0].total(), products[1].total(), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(sums[0].mean, sums[1].mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sums[0].var, sums[1].var, rtol=1e-4, atol=1e-5)


def test_sums_keep_the_digits_that_single_precision_loses():
    total, channels = ProductSum(), ChannelSums()
    total.add(Samples.of(torch.full((1, 1), 1e5)))
    for _ in range(300):
        total.add(Samples.of(torch.ones(1, 1)))
        channels.add(Samples.of(torch.full((1000, 1), 1000.0)))
    assert total.total().item() == 1e10 + 300
    assert channels.var.item() == 0 and channels.count == 300_000


def test_a_constant_channel_has_no_variance_and_a_nearly_constant_one_has_its_own():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(200, generator=generator) * torch.logspace(-10, 10, 200)
    noise = 1e-3 * torch.randn(3001, 200, generator=generator)
    sums, nearly = ChannelSums(), ChannelSums()
    for part in noise.split(1000):
        rows = values.expand(len(part), -1)
        sums.add(Samples.of(torch.nextafter(rows, rows + part)))
        nearly.add(Samples.of(rows + values * part))
    assert (sums.var == 0).all()
    expected = (values + values * noise).double().var(0, correction=0)
    torch.testing.assert_close(nearly.var, expected, rtol=1e-5, atol=0)


def test_a_network_runs_no_further_than_asked_and_stays_as_it_was():
    network, calls = cnn().train(), []
    network[3].register_forward_hook(lambda *_: calls.append(1))
    network[0].register_forward_pre_hook(lambda *_: calls.append(0))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    moments([network], ["2"], batches(2))
    assert calls.count(0) == 2 + 1 and calls.count(1) == 1  # one dry run to find the layers
    assert network.training and network[1].inplace
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda network: network[2].weight.data.view(-1)[:2].fill_(float("nan")),
            "layer 2: 2 of its 270 weights are not",
        ),
        (lambda network: network[0].bias.data.fill_(float("inf")), "activations at layer 2 are not finite"),
    ],
)
def test_numbers_that_are_none_are_refused(change, message):
    network = cnn()
    change(network)
    with pytest.raises(RainbowError, match=message):
        moments([network], None, batches())


@pytest.mark.parametrize(
    "networks, layers, data, message",
    [
        ([cnn()], None, [], "the data is empty"),
        ([cnn()], None, iter(batches()), "read only once"),
        ([cnn()], None, ["images"], "holds no images"),
        ([cnn()], ["3"], batches(), "no weight layer '3'"),
        ([cnn()], [], batches(), "no layer is asked for"),
        ([cnn(), scatnet()], None, batches(), "different numbers of layers"),
        ([cnn(), cnn()], [["0"], ["2"]], batches(), "have 512 and 128 samples"),
        ([cnn()], [["0"], ["2"]], batches(), "given for 2 networks"),
    ],
)
def test_questions_without_an_answer(networks, layers, data, message):
    with pytest.raises(RainbowError, match=message):
        moments(networks, layers, data, cross=0)
