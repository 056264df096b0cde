"""The fast path of a block equals its modules run one by one with wavelets by FFT: values, gradients, statistics."""

import copy
import itertools

import pytest
import torch

from models.block import Block, BlockConfig
from models.signal import Signal

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


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def cases():
    """Every kind of block at every size, every kind of filter at one size, without all combinations."""
    for name, size in itertools.product(BLOCKS, SIZES):
        yield name, size, FILTERS[0]
    for name, filters in itertools.product(("norm", "complex skip"), FILTERS[1:]):
        yield name, (12, 9), filters


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name, size, filters", list(cases()))
def test_equals_plain_modules(name, size, filters, training):
    torch.manual_seed(0)
    block, plain, images = pair(name, size, **filters)
    block.train(training), plain.train(training)
    gradient = torch.randn_like(plain(images))
    if plain.std is not None:
        block.load_state_dict(plain.state_dict())
    ours = outputs_and_gradients(block, images, gradient)
    theirs = outputs_and_gradients(plain, images, gradient)
    # Where a modulus is nearly 0, its gradient (the phase) amplifies rounding: the images' one is compared loosely.
    for mine, other, tolerance in zip(ours, theirs, (2e-5, 1e-3, 2e-5), strict=True):
        assert relative_error(mine, other) < tolerance
    if plain.std is not None:
        assert relative_error(block.std.var, plain.std.var) < 1e-5
        assert (block.std.mean - plain.std.mean).abs().max() < 1e-5


@pytest.mark.parametrize("channels", [1, 40])
@pytest.mark.parametrize("name", ["norm", "complex skip"])
def test_any_number_of_channels(name, channels):
    torch.manual_seed(0)
    block, plain, images = pair(name, (8, 8), channels, kind=0)
    gradient = torch.randn_like(plain(images))
    block.load_state_dict(plain.state_dict())
    ours, theirs = (outputs_and_gradients(b, images, gradient) for b in (block, plain))
    assert all(relative_error(a, b) < 1e-3 for a, b in zip(ours, theirs, strict=True))


def test_chunks_change_nothing(monkeypatch):
    """However a batch is cut for the cache, the result is the same."""
    torch.manual_seed(0)
    block, _, images = pair("skip", (16, 16), kind=1)
    whole = block.eval()(images)
    monkeypatch.setattr("models.fast._CHUNK_BYTES", 1)
    monkeypatch.setattr("models.fast._GROUP_ROWS", 1)
    assert relative_error(block(images), whole) < 1e-6


@pytest.mark.parametrize("name", ["norm", "complex skip"])
def test_features_are_the_projections_input(name):
    """`features` without gradients (fast) equals what a hook on the projection sees (plain), and `project` goes on."""
    torch.manual_seed(0)
    block, plain, images = pair(name, (9, 8))
    block(images)
    plain.load_state_dict(block.state_dict())
    block.eval(), plain.eval()
    seen = []
    handle = plain.P.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        plain(images)
        handle.remove()
        features = block.features(images)
        assert relative_error(features, seen[0]) < 1e-5
        assert relative_error(block.project(features), block(images)) < 1e-5


def test_hooks_see_their_inputs():
    """A hook on the projection makes a fast block run module by module: the hook sees W_j's input."""
    block, _, images = pair("norm", (8, 8))
    seen = []
    block.P.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    block(images)
    assert seen == [(4, 15, 4, 4)]


@pytest.mark.parametrize("name", ["no Std, no N", "complex skip"])
def test_constant_images_have_finite_gradients(name):
    """Wavelet coefficients of a constant image are 0, where the modulus has no gradient."""
    block, _, images = pair(name, (8, 8))
    images = torch.zeros_like(images).requires_grad_()
    y = block(images)
    y.abs().sum().backward()
    for gradient in (images.grad, block.P.weight.grad):
        assert torch.isfinite(gradient.abs()).all()


def test_same_bits_twice():
    torch.manual_seed(0)
    block, _, images = pair("skip", (16, 16))
    gradient = torch.randn_like(block(images))
    first, second = (outputs_and_gradients(block, images, gradient) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dense_and_separable_and_windows_are_all_used():
    """The cheaper transform is chosen: one matrix for small images, separable maps, windows of large ones."""
    kinds = {}
    for size in (4, 32, 112):
        block, *_ = pair("norm", (size, size))
        maps = block._fused.maps
        kinds[size] = "windows" if maps.windows else "dense" if maps.rows_0 is None else "separable"
    assert kinds == {4: "dense", 32: "separable", 112: "windows"}
