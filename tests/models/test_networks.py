"""What the networks of the paper are: grammar, sizes, and the errors of networks that cannot be."""

import itertools

import pytest
import torch

from models import build
from models.config import BlockConfig, ScatNetConfig
from models.nonlinearity import NonLinearity
from models.signal import Signal, output_size, padding_indices

RGB = Signal(3, 32, 32)
STEPS = [False, True] * 5  # subsampling by the blocks of factorised octaves


@pytest.mark.parametrize(
    "size, subsamples, sizes",
    [
        (32, STEPS[:8], [32, 16, 16, 8, 8, 4, 4, 2]),
        (32, [True] * 4, [16, 8, 4, 2]),
        (224, [True, *STEPS], [112, 112, 56, 56, 28, 28, 14, 14, 7, 6, 3]),
    ],
)
def test_image_sizes_are_those_of_the_papers_networks(size, subsamples, sizes):
    assert list(itertools.accumulate(subsamples, output_size, initial=size))[1:] == sizes


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_padding_is_a_periodic_reflection(size):
    """Neighbours of the padded axis are neighbours of the axis, and its middle is the axis."""
    indices = padding_indices(size)
    before = (len(indices) - size) // 2
    assert indices[before : before + size] == list(range(size))
    assert all(abs(a - b) == (size > 1) for a, b in zip(indices, indices[1:], strict=False))


def block_network(arch, signal=RGB, **options):
    return build(ScatNetConfig(signal, 10, (BlockConfig(tuple(arch.split()), **options),)))


@pytest.mark.parametrize(
    "arch, options",
    [
        ("Fw", {}),
        ("Fw mod Std P N", {"P_size": 4}),
        ("Fw R Std P", {"P_size": 4}),
        ("Fw Pc R FrhoF C Std N", {"Pc_size": 4, "dictionary_size": 8}),
        ("Fw B Std", {"left_arch": ("mod",), "right_arch": ("id",)}),
        ("Fw rho Pr", {"Pr_size": "id"}),
        ("Fw rho Std Pr N", {"Pr_size": 4, "linear_arch": ("Std",), "non_linear_arch": ("Std",)}),
        ("Fw Pr", {"psi_arch": ("mod",), "Pr_size": 4, "angles": 0}),
    ],
)
def test_every_module_of_the_grammar_runs(arch, options):
    net, images = block_network(arch, **options), torch.randn(2, 3, 32, 32)
    net(images).sum().backward()
    out, declared = net.blocks[0](images), net.blocks[0].out
    assert out.shape[1:] == (declared.channels, declared.height, declared.width)
    assert out.is_complex() == declared.complex


@pytest.mark.parametrize("name", ["mod", "abs", "cst", "mc", "ms", "tanh", "pow"])
def test_nonlinearities_depend_on_the_modulus_and_keep_the_phase(name):
    """ρ(e^{iα} z) = e^{iα} ρ(z), or ρ(z) where the output is real."""
    rho = NonLinearity(name, Signal(3, 4, 4, True))
    z, turn = torch.randn(2, 3, 4, 4, dtype=torch.cfloat), torch.exp(torch.tensor(0.7j))
    expected = rho(z) if not rho.out.complex else turn * rho(z)
    assert torch.allclose(rho(turn * z), expected, atol=1e-5)
    if name in ("mc", "ms", "tanh", "pow"):
        assert (rho(z).abs() <= 1 + 1e-5).all()


@pytest.mark.parametrize(
    "arch, options, message",
    [
        ("Fw mod", {"angles": 0}, "block 1 of 1.*'mod' is the modulus of complex numbers"),
        ("Fw", {"phi_arch": ("abs_",)}, "unknown module 'abs_'"),
        ("Fw Sdt", {}, "unknown module 'Sdt'; did you mean 'Std'"),
        ("Fw Pr", {}, "--Pr-size"),
        ("R", {}, "'R' needs a complex input"),
        ("C", {}, "'C' needs an even number"),
        ("Fw FrhoF", {}, "'FrhoF' needs a real input"),
        ("Fw", {"kind": 1, "angles": 2}, "at least 3 angles"),
        ("Fw mod", {"non_linearity": "tan"}, "unknown non-linearity 'tan'"),
        ("Fw mod", {"non_linearity": "relu"}, "'relu' needs a real input"),
        ("Fw mod", {"non_linearity_bias": 1.0}, "has no bias"),
    ],
)
def test_networks_that_cannot_be(arch, options, message):
    with pytest.raises(ValueError, match=message):
        block_network(arch, **options)


def test_too_many_blocks():
    blocks = tuple(BlockConfig(("Fw", "Pr"), psi_arch=("mod",), Pr_size=2) for _ in range(6))
    with pytest.raises(ValueError, match="block 4 of 6: an image of 1×1 is too small"):
        build(ScatNetConfig(Signal(1, 8, 8), 10, blocks))


def test_regularised_weights_approach_their_constraint():
    """Parseval steps make the rows of W orthonormal; they have no weight decay."""
    block = BlockConfig(("Fw", "Pr"), psi_arch=("mod",), Pr_size=4, orthogonal=True)
    net = build(ScatNetConfig(RGB, 10, (block,), regularization="parseval", beta=0.3))
    weight = net.blocks[0].P.weight
    identity = torch.eye(4)
    assert torch.allclose(weight @ weight.T, identity, atol=1e-5)
    with torch.no_grad():
        weight += 0.02 * torch.randn_like(weight)
    before = (weight @ weight.T - identity).norm()
    for _ in range(20):
        net.after_step()
    assert (weight @ weight.T - identity).norm() < 0.01 * before
    groups = net.parameter_groups(1e-4)
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0]
    assert groups[1]["params"] == [weight]


def test_fixed_projection_and_given_variances():
    """Weights start with the variances given along the directions given."""
    basis = torch.linalg.qr(torch.randn(15, 15))[0][:3]
    variances = torch.tensor([100.0, 1.0, 0.01])
    net = block_network(
        "Fw Std Pr", psi_arch=("mod",), Pr_size=4000, projection_basis=basis, projection_eigenvalues=variances
    )
    weight = net.blocks[0].P.weight
    assert torch.allclose(weight.var(0), variances, rtol=0.15)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(ValueError, match="takes 7 channels"):
        block_network("Fw Std Pr", psi_arch=("mod",), Pr_size=4, projection_basis=torch.ones(2, 7))
