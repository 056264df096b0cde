"""Alignment: rotated and permuted copies, networks of other widths, mean networks, and errors between 0 and 2."""

import copy

import pytest
import scipy.linalg
import torch
from torch import nn

from models.block import BlockConfig
from models.rainbow_layers import ProjectionLayer
from models.scatnet import ScatNet, ScatNetConfig
from models.signal import Signal
from rainbow import weight_layers
from rainbow.alignment import Alignment, MeanNetwork, align, alignment_error, transport
from rainbow.errors import RainbowError
from rainbow.moments import moments


def batches(shape=(12,), count=4, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, *shape, generator=generator), torch.zeros(size)) for _ in range(count)]


class OverNorm(nn.Module):
    """x / ‖x‖, which rotations pass through."""

    def forward(self, x):
        return x / x.norm(dim=1, keepdim=True)


def mlp(seed=0, width=10, non_linearity=OverNorm):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, width, bias=False),
        non_linearity(),
        nn.Linear(width, width, bias=False),
        non_linearity(),
        nn.Linear(width, 5, bias=False),
    )


def cnn(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), OverNorm(), nn.Conv2d(6, 8, 3, bias=False), OverNorm(), nn.Flatten(), nn.Linear(128, 5)
    )


def scatnet(seed=0):
    """Complex, with rotation-invariant non-linearities only."""
    torch.manual_seed(seed)
    blocks = tuple(BlockConfig(("Fw", "Pc", "N"), kind=i % 2, Pc_size=n) for i, n in enumerate((6, 8)))
    return ScatNet(ScatNetConfig(Signal(2, 8, 8), 3, blocks, "none", False)).eval()


def random_isometry(size, dtype=torch.float64, seed=0):
    return torch.linalg.qr(torch.randn(size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))).Q


def input_rotation(Q, layer):
    """A with W A (Q φ) = W φ at the next layer: Q^H itself, on φ and every ψ of it, or on pairs of real channels."""
    inverse = Q.mH.contiguous()
    if layer.channels == len(Q):
        return inverse
    if isinstance(layer, ProjectionLayer):
        angles = layer.channels // len(Q) - 1
        return torch.block_diag(inverse, torch.kron(inverse, torch.eye(angles, dtype=Q.dtype)))
    one, i = torch.eye(2, dtype=torch.float64), torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    return torch.kron(inverse.real.contiguous(), one) + torch.kron(inverse.imag.contiguous(), i)


def rotated(network, images):
    """A copy whose hidden spaces are rotated: W_j becomes Q_j W_j A_j, with A_j undoing Q_{j-1}; and its A_j."""
    copied, rotations, Q = copy.deepcopy(network), [], None
    layers = weight_layers(copied, images)
    for k, layer in enumerate(layers):
        A = torch.eye(layer.channels, dtype=torch.float64) if Q is None else input_rotation(Q, layer)
        rotations.append(A)
        weights = transport(layer.get(), A)
        if layer is not layers[-1]:
            Q = random_isometry(layer.neurons, weights.dtype, seed=k)
            weights = Q @ weights
            if getattr(layer.module, "bias", None) is not None:
                layer.module.bias.data = Q.float() @ layer.module.bias.data
        layer.set(weights)
    return copied, rotations


CASES = {"mlp": (mlp, (12,)), "cnn": (cnn, (2, 8, 8)), "scatnet": (scatnet, (2, 8, 8))}


# ---- theorems


@pytest.mark.parametrize("name", CASES)
def test_a_rotated_copy_computes_the_same_and_aligns_without_error(name):
    make, shape = CASES[name]
    network, data = make(), batches(shape)
    copied, rotations = rotated(network, data[0][0])
    with torch.no_grad():
        torch.testing.assert_close(copied(data[0][0]), network(data[0][0]), atol=1e-5, rtol=1e-4)
    alignment = Alignment().fit(network, copied, data)
    assert max(alignment.score(network, copied, batches(shape, seed=1))) < 1e-5
    for k, (a, b) in enumerate(zip(weight_layers(network, data[0][0]), weight_layers(copied, data[0][0]))):
        assert alignment.matrices[k].is_complex() == rotations[k].is_complex()
        if k + 1 == len(rotations):  # the rows of the last layer were not rotated
            torch.testing.assert_close(alignment.transform(k, a.get()), b.get().to(torch.float64), atol=1e-4, rtol=1e-3)
        assert a.name == b.name


@pytest.mark.parametrize("name", CASES)
def test_weights_taken_over_by_alignments_compute_the_same(name):
    make, shape = CASES[name]
    network, data = make(), batches(shape)
    copied, _ = rotated(network, data[0][0])
    alignment, mixed = Alignment().fit(network, copied, data), copy.deepcopy(copied)
    last = weight_layers(mixed, data[0][0])[-1]
    last.set(alignment.transform(last.name, weight_layers(network, data[0][0])[-1].get()))
    with torch.no_grad():
        torch.testing.assert_close(mixed(data[0][0]), network(data[0][0]), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_a_network_is_at_no_distance_from_itself(name):
    make, shape = CASES[name]
    network, data = make(), batches(shape)
    alignment = Alignment().fit(network, network, data)
    assert max(alignment.score(network, network, data)) < 1e-6
    for A in alignment.matrices:
        assert torch.equal(A, torch.eye(len(A), dtype=torch.float64))


def test_the_permutation_of_a_permuted_copy_is_recovered():
    network, data = mlp(non_linearity=nn.ReLU), batches()
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    copied = copy.deepcopy(network)
    copied[0].weight.data = network[0].weight.data[order]
    copied[2].weight.data = network[2].weight.data[:, order]
    A = Alignment().fit(network, copied, data).matrices[1]
    assert torch.equal(A.round(), torch.eye(10, dtype=torch.float64)[order].T) and (A - A.round()).abs().max() < 1e-4


def test_it_is_scipys_orthogonal_procrustes():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, 9, dtype=torch.float64, generator=generator) for _ in range(2))
    expected, _ = scipy.linalg.orthogonal_procrustes(a.numpy(), b.numpy())
    torch.testing.assert_close(align(a.T @ b), torch.from_numpy(expected))


def test_complex_alignment_is_better_than_any_real_one():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(300, 7, dtype=torch.complex128, generator=generator)
    U = random_isometry(7, torch.complex128)
    K = a.T @ (a @ U.T).conj() / 300  # φ_b = U φ_a
    energy = a.abs().square().sum(1).mean().item()
    assert alignment_error(align(K, complex_values=True), K, energy, energy) < 1e-12
    real = align(K)
    assert not real.is_complex() and alignment_error(real, K, energy, energy) > 0.1


def test_aligning_twice_changes_nothing():
    data = batches()
    moment = moments([mlp(0), mlp(1)], None, data, cross=[(0, 1)])
    for k in range(3):
        A = align(moment.cross(0, 1, k))
        torch.testing.assert_close(align(A.mH @ moment.cross(0, 1, k)), torch.eye(len(A), dtype=torch.float64))


@pytest.mark.parametrize("widths", [(7, 10), (10, 7)])
def test_networks_of_other_widths_align_by_a_partial_isometry(widths):
    a, b = (mlp(seed, width) for seed, width in enumerate(widths))
    A = Alignment().fit(a, b, batches()).matrices[1]
    assert A.shape == widths
    thin = A if A.shape[0] > A.shape[1] else A.T
    torch.testing.assert_close(thin.T @ thin, torch.eye(7, dtype=torch.float64))


def test_a_narrow_part_of_a_network_aligns_with_it():
    """Half the neurons of a network explain what they can: the error is that of the missing energy."""
    network, data = mlp(), batches()
    part = copy.deepcopy(network)
    part[0].weight.data[5:] = 0
    part[2].weight.data[:, 5:] = 0
    errors = Alignment().fit(part, network, data).score(part, network, data)
    assert errors[0] < 1e-6 < errors[1] < 1


def in_memory_error(a, b, A, train, test, standardize):
    """2 (1 - ⟨aA, b⟩ / √(‖a‖² ‖b‖²)) from all samples at once."""

    def last_inputs(network, data):
        with torch.no_grad():
            return network[:4](torch.cat([x for x, _ in data])).double()

    phis = []
    for network in (a, b):
        phi, of_train = last_inputs(network, test), last_inputs(network, train)
        phis.append((phi - of_train.mean(0)) / of_train.std(0, correction=0) if standardize else phi)
    ab = (phis[0] @ A * phis[1]).sum(1).mean()
    return 2 * (1 - ab / (phis[0].square().sum(1).mean() * phis[1].square().sum(1).mean()).sqrt()).item()


@pytest.mark.parametrize("standardize", [False, True])
def test_the_error_on_test_data_is_what_its_formula_says(standardize):
    (a, b), train, test = (mlp(0), mlp(1)), batches(seed=0), batches(seed=1)
    alignment = Alignment(standardize).fit(a, b, train)
    expected = in_memory_error(a, b, alignment.matrices[2], train, test, standardize)
    assert alignment.score(a, b, test)[2] == pytest.approx(expected, abs=1e-6)
    assert alignment.score(a, b, test)[2] >= alignment.score(a, b, train)[2]


def test_errors_do_not_depend_on_scale():
    A, K = torch.eye(3, dtype=torch.float64), 0.5 * torch.eye(3, dtype=torch.float64)
    assert alignment_error(A, K, 3, 3) == alignment_error(A, 10 * K, 100 * 3, 3) == 1.0
    assert alignment_error(A, 0 * K, 0, 0) == 0 and alignment_error(A, 0 * K, 0, 1) == 2


def test_transport_acts_on_the_channels_of_kernels():
    generator = torch.Generator().manual_seed(0)
    weights, A = torch.randn(4, 3, 5, generator=generator), random_isometry(3)
    expected = torch.stack([weights[:, :, p].double() @ A for p in range(5)], 2)
    torch.testing.assert_close(transport(weights.flatten(1), A), expected.flatten(1))


# ---- mean networks


def test_rotated_copies_have_a_mean_that_leaves_nothing_unexplained():
    network, data = mlp(), batches()
    copies = [network] + [rotated(network, data[0][0])[0] for _ in range(2)]
    mean = MeanNetwork.fit(copies, data)
    assert max(max(line) for line in mean.unexplained) < 1e-5
    first, second, third = mean.aligned_weights(2)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(first, third, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("make, shape", [(mlp, (12,)), (scatnet, (2, 8, 8))])
def test_each_iteration_explains_more(make, shape):
    mean = MeanNetwork.fit([make(seed) for seed in range(4)], batches(shape), num_iters=4)
    for layer in zip(*mean.unexplained):
        assert all(after <= before + 1e-6 for before, after in zip(layer, layer[1:]))
    assert mean.unexplained[0][1] > mean.unexplained[-1][1]


def test_the_first_layer_of_equal_inputs_is_not_rotated():
    mean = MeanNetwork.fit([scatnet(seed) for seed in range(3)], batches((2, 8, 8)))
    for alignments in mean.alignments:
        assert torch.equal(alignments[0], torch.eye(len(alignments[0]), dtype=torch.float64))


def test_the_mean_of_one_network_is_itself():
    network, data = mlp(), batches()
    mean = MeanNetwork.fit([network], data)
    for k, layer in enumerate(weight_layers(network, data[0][0])):
        (weights,) = mean.aligned_weights(k)
        assert torch.equal(weights, layer.get().double())


def test_mean_activations_are_those_of_their_definition():
    networks, data = [mlp(seed) for seed in range(3)], batches()
    mean = MeanNetwork.fit(networks, data)
    with torch.no_grad():
        phis = [network[:2](data[0][0]) for network in networks]
    expected = sum(phi.double() @ alignments[1] for phi, alignments in zip(phis, mean.alignments)) / 3
    torch.testing.assert_close(mean.average(1, phis).double(), expected, atol=1e-6, rtol=1e-5)


# ---- bad input


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: align(torch.full((2, 2), float("nan"))), "not a finite matrix"),
        (lambda: transport(torch.ones(2, 5), torch.eye(3)), "do not fit an alignment of 3 channels"),
        (lambda: Alignment().transform(0, torch.ones(1, 1)), "not fitted"),
        (lambda: Alignment().fit(mlp(), cnn(), batches()), "cannot process images"),
        (lambda: Alignment().fit(mlp(), mlp(), batches(), ["1"]), "no weight layer '1'"),
    ],
)
def test_what_cannot_be_aligned(act, message):
    with pytest.raises(RainbowError, match=message):
        act()
