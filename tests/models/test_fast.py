"""The fast path of a block equals its modules run one by one with wavelets by FFT: values, gradients, statistics."""

import copy

import pytest
import torch
from torch import nn

from models.block import Block, fused_block
from models.config import BlockConfig, ScatNetConfig
from models.scatnet import ScatNet
from models.signal import Signal, padded_size
from models.standardization import Standardization
from tests.rounding import assert_values, of_sum

NORM, SKIP = ("Fw", "Std", "Pr", "N"), ("Fw", "rho", "Std", "Pr", "N")
MOD = {"psi_arch": ("mod",)}
BLOCKS = {
    "norm": (False, NORM, MOD | {"Pr_size": 6}),
    "no Std, no N": (False, ("Fw", "Pr"), MOD | {"Pr_size": 6}),
    "complex weights": (False, ("Fw", "Std", "Pc"), MOD | {"Pc_size": 6}),
    "skip, real input": (False, SKIP, {"Pr_size": 6}),
    "skip": (True, SKIP, {"Pr_size": 6}),
    "complex skip": (True, ("Fw", "rho", "Std", "Pc"), {"Pc_size": 6}),
    "complex skip, no Std": (True, ("Fw", "rho", "Pc", "N"), {"Pc_size": 6}),
    "homogeneous": (True, ("Fw", "rho", "Std", "P"), {"P_size": 6, "homogeneous": True}),
}
TAPS = 12 * 12  # of a filter, for images of up to 9×9
SIZES = [(32, 32), (7, 9), (2, 3), (16, 20), (48, 64)]  # the last is cut into windows
FILTERS = [
    {"angles": 4, "kind": 0},
    {"angles": 4, "kind": 1},
    {"angles": 1},
    {"angles": 3, "kind": 1},
    {"angles": 8, "kind": 1},
    {"angles": 8, "full_angles": True, "scales_per_octave": 2},
    {"angles": 16},
]
CASES = [
    *((name, size, 3, FILTERS[0]) for name in BLOCKS for size in SIZES),
    *((name, (12, 9), 3, filters) for name in ("norm", "complex skip") for filters in FILTERS[1:]),
    *((name, (8, 8), channels, FILTERS[0]) for name in ("norm", "complex skip") for channels in (1, 40)),
]


def pair(name, size, channels=3, **filters):
    """A block that runs fused, the same block module by module, and a batch of images."""
    is_complex, arch, options = BLOCKS[name]
    block = Block(Signal(channels, *size, is_complex), BlockConfig(arch, **options, **filters))
    plain = copy.deepcopy(block)
    plain.fast = False
    dtype = torch.cfloat if is_complex else torch.float
    assert block.runs_fused(dtype) and not plain.runs_fused(dtype)
    return block, plain, torch.randn(4, channels, *size, dtype=dtype)


def outputs_and_gradients(block, images, gradient):
    images = images.clone().requires_grad_()
    y = block(images)
    gradients = torch.autograd.grad(y, (images, block.P.weight), gradient)
    return [y.detach(), *gradients]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name, size, channels, filters", CASES)
def test_equals_plain_modules(name, size, channels, filters, training):
    block, plain, images = pair(name, size, channels, **filters)
    block.train(training), plain.train(training)
    gradient = torch.randn_like(plain(images))
    block.load_state_dict(plain.state_dict())
    ours = outputs_and_gradients(block, images, gradient)
    theirs = outputs_and_gradients(plain, images, gradient)
    terms = max(gradient[:, 0].numel(), padded_size(size[0]) * padded_size(size[1]))
    # Where a modulus is nearly 0, its gradient (the phase) amplifies rounding: the images' one is compared loosely.
    for mine, other, steps in zip(ours, theirs, (4, 200, 4), strict=True):
        assert_values(mine, other, terms, steps)
    if plain.std is not None:
        assert_values(block.std.var, plain.std.var, terms, 2)
        deviation = plain.std.var.sqrt().max().item()
        assert (block.std.mean - plain.std.mean).abs().max() < 2 * of_sum(terms) * deviation


def test_chunks_change_nothing(monkeypatch):
    """However a batch is cut for the cache, the result is the same."""
    block, _, images = pair("skip", (16, 16), kind=1)
    whole = block.eval()(images)
    monkeypatch.setattr("models.fast._CHUNK_BYTES", 1)
    monkeypatch.setattr("models.fast._GROUP_ROWS", 1)
    assert_values(block(images), whole, block.fused.layout.width)


@pytest.mark.parametrize("name", ["norm", "complex skip"])
def test_features_are_the_projections_input(name):
    """`features` without gradients (fast) equals what a hook on the projection sees, and `project` completes it."""
    block, plain, images = pair(name, (9, 8))
    block(images)
    plain.load_state_dict(block.state_dict())
    block.eval(), plain.eval()
    seen = []
    with torch.no_grad():
        features, output = block.features(images), block(images)
        for each in (plain, block):
            each.P.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
            assert_values(each(images), output, TAPS, 4)
        for x in seen:
            assert_values(x, features, TAPS, 2)
        assert len(seen) == 2
        assert_values(block.project(features), output, TAPS, 4)


HOOKS = ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["norm", "complex skip"])
def test_every_hook_of_every_module_fires(name, hook):
    """With a hook anywhere in a block it runs module by module; without, as one operation again."""
    _, arch, options = BLOCKS[name]
    network = ScatNet(ScatNetConfig(Signal(2, 16, 16), 3, (BlockConfig(arch, **options),) * 2))
    block = network.blocks[1]
    for path, module in block.named_modules():
        if path.startswith("fused"):
            continue
        fired = []
        handle = getattr(module, f"register_{hook}")(lambda *_, fired=fired: fired.append(True))
        network(torch.randn(4, 2, 16, 16, requires_grad=True)).sum().backward()
        assert fired == [True], path
        with torch.no_grad():
            network(torch.randn(4, 2, 16, 16))
        assert fired == [True] * (2 if "forward" in hook else 1), path
        handle.remove()
        assert block.runs_fused(torch.float)


class Doubled(Standardization):
    def forward(self, x):
        return 2 * super().forward(x)


Foreign = type("Standardization", (nn.Module,), {"forward": lambda self, x: 0 * x})


@pytest.mark.parametrize("make", [Doubled, lambda signal: Foreign()], ids=["subclass", "namesake"])
def test_other_classes_keep_their_own_arithmetic(make):
    block, plain, images = pair("complex weights", (8, 8))
    other = make(block.std.out)
    stages = list(block.body)
    assert fused_block(block.signal, stages) is not None
    assert fused_block(block.signal, [stages[0], other, *stages[2:]]) is None
    block.body[1] = other
    expected = plain.P(other(plain.body.Fw(images)))
    assert_values(block(images) + 1, expected + 1, TAPS, 4)


def test_a_module_with_another_forward_keeps_it():
    block, plain, images = pair("no Std, no N", (8, 8))
    block.P.forward = lambda x: x + 1
    assert torch.allclose(block(images), plain.body.Fw(images) + 1)


@pytest.mark.parametrize("name", ["no Std, no N", "complex skip"])
def test_constant_images_have_finite_gradients(name):
    """Wavelet coefficients of a constant image are 0, where the modulus has no gradient."""
    block, _, images = pair(name, (8, 8))
    images = torch.zeros_like(images).requires_grad_()
    block(images).abs().sum().backward()
    for gradient in (images.grad, block.P.weight.grad):
        assert torch.isfinite(gradient.abs()).all()


def test_same_bits_twice():
    block, _, images = pair("skip", (16, 16))
    gradient = torch.randn_like(block(images))
    first, second = (outputs_and_gradients(block, images, gradient) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
