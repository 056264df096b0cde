"""What the networks of the paper are: grammar, sizes, and the errors of networks that cannot be."""

import copy
import itertools

import pytest
import torch

from models import build
from models.block import exclude_from_compilation
from models.config import BlockConfig, ScatNetConfig, StandardConfig
from models.names import FRAME_NON_LINEARITIES
from models.nonlinearity import NonLinearity
from models.signal import Signal, output_size, padding_indices
from tests.rounding import assert_values

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


@pytest.mark.parametrize("standard", [False, True])
def test_blocks_are_never_compiled(standard):
    """Inductor fails on complex numbers that are learned, and fused operations have a backward pass of their own."""
    learned = {"non_linearity": "cst", "non_linearity_learned": True}
    net = block_network("Fw rho Std Pr N", Pr_size=4, **learned)
    net, graphs = build(StandardConfig("resnet18-custom", 10, RGB, width=0.1)) if standard else net, []
    images = torch.randn(2, 3, 32, 32)
    expected = net.eval()(images)
    exclude_from_compilation(net)
    compiled = torch.compile(net, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    torch.testing.assert_close(compiled(images), expected)
    assert bool(graphs) == standard
    copied = copy.deepcopy(net)
    torch.nn.init.zeros_(list(copied.parameters())[-1])
    assert not torch.equal(copied(images), net(images))


LEARNED = {"non_linearity_learned": True}
GRAMMAR = [
    ("Fw", {}),
    ("Fw mod Std P N", {"P_size": 4}),
    ("Fw R Std P", {"P_size": 4}),
    ("Fw Pc R FrhoF C Std N", {"Pc_size": 4, "dictionary_size": 8, "dictionary_threshold": 0.0}),
    ("Fw B Std", {"left_arch": ("mod",), "right_arch": ("id",)}),
    ("Fw rho Pr", {"Pr_size": "id"}),
    ("Fw rho Std Pr N", {"Pr_size": 4, "linear_arch": ("Std",), "non_linear_arch": ("Std",)}),
    ("Fw Pr", {"psi_arch": ("mod",), "Pr_size": 4, "angles": 0}),
    ("Fw Std Pc N", {"psi_arch": ("mod",), "Pc_size": 4}),
    *(("Fw rho Std Pr N", {"Pr_size": 4, "non_linearity": name, **LEARNED}) for name in ("cst", "ms", "tanh", "pow")),
]


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("arch, options", GRAMMAR)
def test_every_module_of_the_grammar_runs(arch, options, amp):
    net, images = block_network(arch, **options), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        net(images).float().sum().backward()
        out, declared = net.blocks[0](images), net.blocks[0].out
        double = build(ScatNetConfig(RGB, 10, net.config.blocks * 2))(images)
    assert out.shape[1:] == (declared.channels, declared.height, declared.width)
    assert out.is_complex() == declared.complex
    assert all(p.grad.abs().isfinite().all() for p in net.parameters() if p.requires_grad)
    assert double.isfinite().all()


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


def frame_network(**options):
    return block_network("Fw R FrhoF", dictionary_size=50, **options)


FRAMES = {  # of x, λ, δ, as the authors' program has them
    "relu": lambda x, t, d: (x - t).clamp(min=0),
    "modulus": lambda x, t, d: x.abs(),
    "softshrink": lambda x, t, d: x.sign() * (x.abs() - t).clamp(min=0),
    "softmodulus": lambda x, t, d: (x.abs() - t).clamp(min=0),
    "hardshrink": lambda x, t, d: torch.where(x.abs() > t, x, 0),
    "id": lambda x, t, d: x,
    "gate": lambda x, t, d: ((x > t) & (x <= t + d)).float(),
    "triang": lambda x, t, d: (1 - (x - t).abs() / d).clamp(min=0),
    "sigmo": lambda x, t, d: 1 / (1 + torch.exp((t - x) / d)),
    "sigmo_deriv": lambda x, t, d: 1 / (2 + torch.exp((t - x) / d) + torch.exp((x - t) / d)),
    "abs": lambda x, t, d: x.abs(),
    "tanh": lambda x, t, d: x.tanh(),
}


@pytest.mark.parametrize("name", FRAME_NON_LINEARITIES)
def test_a_frame_has_the_threshold_of_its_atoms(name):
    """x ↦ Fᵀ ρ(F x), the threshold λ*/√(atoms)."""
    options = {"dictionary_non_linearity": name, "dictionary_threshold": 0.7, "dictionary_delta": 0.3}
    frame = frame_network(**options).blocks[0].body.FrhoF
    x, F = torch.randn(2, 30, 4, 4), frame.frame
    expected = torch.einsum("ac,bamn->bcmn", F, FRAMES[name](torch.einsum("ac,bcmn->bamn", F, x), 0.7 / 50**0.5, 0.3))
    steps = 40 if "sig" in name or name in ("gate", "triang") else 2  # divided by δ, or with jumps
    assert_values(frame(x), expected, 50, steps)
    assert F.abs().max() <= 30**-0.5  # a convolution's weights


@pytest.mark.parametrize("ratio", [1.0, 1.1, 0.0])
def test_norms_of_atoms_stay_within_their_ratio(ratio):
    """After every step, around √(min(C, atoms)/atoms), and as they are for 0."""
    net = frame_network(dictionary_norms=ratio)
    frame = net.blocks[0].body.FrhoF.frame
    for scale in (1, 3, 0.1):
        with torch.no_grad():
            frame[0] *= scale
        before = frame.detach().clone()
        net.after_step()
        norms, centre = frame.norm(dim=1), (30 / 50) ** 0.5
        if ratio:
            assert (norms <= centre * ratio**0.5 + 1e-6).all() and (norms >= centre / ratio**0.5 - 1e-6).all()
            cosines = torch.cosine_similarity(frame, before)
            torch.testing.assert_close(cosines, torch.ones(50))
        else:
            assert torch.equal(frame, before)
    with pytest.raises(ValueError, match="--dict-norm 0.5: a ratio of norms is at least 1"):
        frame_network(dictionary_norms=0.5)


def test_frames_are_regularised_as_projections_are():
    net = build(
        ScatNetConfig(RGB, 10, frame_network(orthogonal=True).config.blocks, regularization="parseval", beta=0.3)
    )
    frame = net.blocks[0].body.FrhoF.frame
    torch.testing.assert_close(frame.T @ frame, torch.eye(30), atol=1e-5, rtol=0)
    with torch.no_grad():
        frame *= 1.05
    for _ in range(20):
        net.after_step()
    torch.testing.assert_close(frame.T @ frame, torch.eye(30), atol=1e-4, rtol=0)
    assert net.parameter_groups(1e-4)[1] == {"params": [frame], "weight_decay": 0.0}


def test_the_classifier_averages_over_windows_or_is_the_identity():
    block = BlockConfig(("Fw", "Std", "Pr"), psi_arch=("mod",), Pr_size=10)
    whole, windows, none = (
        build(ScatNetConfig(RGB, 10, (block,), **options)).eval()
        for options in ({"average_pooling": True, "average_kernel": 3}, {"average_kernel": 3}, {"average_kernel": 1})
    )
    sizes = [net.classifier.linear.in_features for net in (whole, windows, none)]
    assert sizes == [10, 10 * 14 * 14, 10 * 16 * 16]
    x = torch.randn(2, 10, 16, 16)
    means = torch.stack([x[:, :, i : i + 14, j : j + 14] for i in range(3) for j in range(3)]).mean(0)
    expected = windows.classifier.linear(windows.classifier.bn(means).flatten(1))
    assert_values(windows.classifier(x), expected, 10 * 14 * 14, 2)
    identity = build(ScatNetConfig(RGB, 10, (block,), identity_classifier=True, average_pooling=True)).eval()
    images = torch.randn(2, 3, 32, 32)
    features = identity.classifier.bn(identity.blocks[0](images)).mean((2, 3))
    torch.testing.assert_close(identity(images), features)
    for options, message in (
        ({"identity_classifier": True}, "--identity-classifier: 2560 numbers leave the blocks for 10 classes"),
        ({"average_kernel": 17}, "--avg-ker-size 17: windows of 17×17 do not fit maps of 16×16"),
    ):
        with pytest.raises(ValueError, match=message):
            build(ScatNetConfig(RGB, 10, (block,), **options))
