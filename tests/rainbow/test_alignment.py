"""Alignment: rotated and permuted copies, networks of other widths, mean networks, and errors between 0 and 2."""

import copy
from functools import partial

import pytest
import scipy.linalg
import torch
from torch import nn

from models.rainbow_layers import ProjectionLayer
from rainbow import Alignment, MeanNetwork, RainbowError, weight_layers
from rainbow.alignment import align, alignment_error, transport
from rainbow.moments import moments
from tests.rainbow import networks
from tests.rainbow.networks import batches, random_isometry, run
from tests.rounding import assert_values, of_sum


class OverNorm(nn.Module):
    """x / ‖x‖, which rotations pass through."""

    def forward(self, x):
        return x / x.norm(dim=1, keepdim=True)


def mlp(seed=0, width=10, non_linearity=OverNorm):
    return networks.mlp(seed, (width, width), 12, bias=False, non_linearity=non_linearity)


def cnn(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(2, 6, 3), OverNorm(), nn.Conv2d(6, 8, 3, bias=False), OverNorm(), nn.Flatten(), nn.Linear(128, 5)
    return nn.Sequential(*layers)


def scatnet(seed=0):
    """Complex, with rotation-invariant non-linearities only."""
    return networks.scatnet("Fw Pc N", "", seed, (6, 8), "none")


flat = partial(batches, size=64, shape=(12,))
CASES = {"mlp": (mlp, flat), "cnn": (cnn, partial(batches, size=64)), "scatnet": (scatnet, partial(batches, size=64))}


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


def rotated(network, data):
    """A copy whose hidden spaces are rotated: W_j becomes Q_j W_j A_j, with A_j undoing Q_{j-1}; and its A_j."""
    copied, rotations, Q = copy.deepcopy(network), [], None
    layers = weight_layers(copied, data)
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


# ---- theorems


@pytest.mark.parametrize("name", CASES)
def test_a_rotated_copy_computes_the_same_and_aligns_without_error(name):
    make, images = CASES[name]
    network, data = make(), images()
    copied, rotations = rotated(network, data)
    assert_values(run(copied, data), run(network, data), 128, steps=6)
    alignment = Alignment().fit(network, copied, data)
    assert alignment.score(network, copied, images(seed=1)) == [0.0] * len(rotations)
    assert [A.is_complex() for A in alignment.matrices] == [A.is_complex() for A in rotations]
    a, b = (weight_layers(each, data)[-1] for each in (network, copied))  # whose rows were not rotated
    torch.testing.assert_close(alignment.transform(-1, a.get()), b.get().double(), atol=1e-4, rtol=1e-3)
    b.set(alignment.transform(a.name, a.get()))
    torch.testing.assert_close(run(copied, data), run(network, data), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_a_network_is_at_no_distance_from_itself(name):
    make, images = CASES[name]
    network, data = make(), images()
    alignment = Alignment().fit(network, network, data)
    assert set(alignment.score(network, network, data)) == {0.0}
    for A in alignment.matrices:
        assert torch.equal(A, torch.eye(len(A), dtype=torch.float64))


def test_the_permutation_of_a_permuted_copy_is_recovered():
    network, order = mlp(non_linearity=nn.ReLU), torch.randperm(10, generator=torch.Generator().manual_seed(0))
    copied = copy.deepcopy(network)
    copied[1].weight.data = network[1].weight.data[order]
    copied[3].weight.data = network[3].weight.data[:, order]
    A = Alignment().fit(network, copied, flat()).matrices[1]
    assert torch.equal(A.round(), torch.eye(10, dtype=torch.float64)[order].T) and (A - A.round()).abs().max() < 1e-4


def test_it_is_scipys_orthogonal_procrustes():
    a, b = torch.randn(2, 200, 9, dtype=torch.float64)
    expected, _ = scipy.linalg.orthogonal_procrustes(a.numpy(), b.numpy())
    torch.testing.assert_close(align(a.T @ b), torch.from_numpy(expected))


def test_directions_that_rounding_may_have_made_are_cut():
    U, V = (random_isometry(8, torch.float64, seed) for seed in (0, 1))
    S, noise = 10.0 ** -torch.arange(0.0, 16, 2, dtype=torch.float64), 1e-5
    change = noise * torch.randn(8, 8, dtype=torch.float64) / 100
    one, other = (align((U * S) @ V.mT + sign * change, noise=noise) for sign in (1, -1))
    assert torch.linalg.matrix_rank(one) == torch.linalg.matrix_rank(other) == (4 * noise <= S).sum()
    assert (one - other).norm() < 0.02 < (align((U * S) @ V.mT + change) - align((U * S) @ V.mT - change)).norm()


def test_complex_alignment_is_better_than_any_real_one():
    a, U = torch.randn(300, 7, dtype=torch.complex128), random_isometry(7, torch.complex128)
    K = a.T @ (a @ U.T).conj() / 300  # φ_b = U φ_a
    energy = a.abs().square().sum(1).mean().item()
    assert alignment_error(align(K, complex_values=True), K, energy, energy) < 1e-12
    real = align(K)
    assert not real.is_complex() and alignment_error(real, K, energy, energy) > 0.1


def test_aligning_twice_changes_nothing():
    found = moments([mlp(0), mlp(1)], None, flat(), cross=[(0, 1)])
    for k in range(3):
        A = align(found.cross(0, 1, k))
        torch.testing.assert_close(align(A.mH @ found.cross(0, 1, k)), torch.eye(len(A), dtype=torch.float64))


@pytest.mark.parametrize("widths", [(7, 10), (10, 7)])
def test_networks_of_other_widths_align_by_a_partial_isometry(widths):
    A = Alignment().fit(*(mlp(seed, width) for seed, width in enumerate(widths)), flat()).matrices[1]
    assert A.shape == widths
    thin = A if A.shape[0] > A.shape[1] else A.T
    torch.testing.assert_close(thin.T @ thin, torch.eye(7, dtype=torch.float64))


def test_a_narrow_part_of_a_network_aligns_with_it():
    """Half the neurons of a network explain what they can: the error is that of the missing energy."""
    network, data = mlp(), flat()
    part = copy.deepcopy(network)
    part[1].weight.data[5:] = 0
    part[3].weight.data[:, 5:] = 0
    errors = Alignment().fit(part, network, data).score(part, network, data)
    assert 0.0 == errors[0] < 0.01 < errors[1] < 1


@pytest.mark.parametrize("standardize", [False, True])
def test_the_error_on_test_data_is_what_its_formula_says(standardize):
    """2 (1 - ⟨aA, b⟩ / √(‖a‖² ‖b‖²)) from all samples at once."""
    (a, b), train, test = (mlp(0), mlp(1)), flat(), flat(seed=1)
    alignment, phis = Alignment(standardize).fit(a, b, train), []
    for network in (a, b):
        phi, of_train = run(network[:5], test).double(), run(network[:5], train).double()
        phis.append((phi - of_train.mean(0)) / of_train.std(0, correction=0) if standardize else phi)
    ab = (phis[0] @ alignment.matrices[2] * phis[1]).sum(1).mean()
    expected = 2 * (1 - ab / (phis[0].square().sum(1).mean() * phis[1].square().sum(1).mean()).sqrt())
    assert alignment.score(a, b, test)[2] == pytest.approx(expected.item(), abs=4 * of_sum(256))
    assert alignment.score(a, b, test)[2] >= alignment.score(a, b, train)[2]


def test_errors_do_not_depend_on_scale():
    A, K = torch.eye(3, dtype=torch.float64), 0.5 * torch.eye(3, dtype=torch.float64)
    assert alignment_error(A, K, 3, 3) == alignment_error(A, 10 * K, 100 * 3, 3) == 1.0
    assert alignment_error(A, 0 * K, 0, 0) == 0 and alignment_error(A, 0 * K, 0, 1) == 2


def test_transport_acts_on_the_channels_of_kernels():
    weights, A = torch.randn(4, 3, 5), random_isometry(3)
    expected = torch.stack([weights[:, :, p].double() @ A for p in range(5)], 2)
    torch.testing.assert_close(transport(weights.flatten(1), A), expected.flatten(1))


# ---- mean networks


def test_rotated_copies_have_a_mean_that_leaves_nothing_unexplained():
    network, data = mlp(), flat()
    mean = MeanNetwork.fit([network] + [rotated(network, data)[0] for _ in range(2)], data)
    assert max(max(line) for line in mean.unexplained) < 4 * of_sum(256)
    first, *others = mean.aligned_weights(2)
    for other in others:
        torch.testing.assert_close(first, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["mlp", "scatnet"])
def test_each_iteration_explains_more(name):
    make, images = CASES[name]
    mean = MeanNetwork.fit([make(seed) for seed in range(4)], images(), num_iters=4)
    for layer in zip(*mean.unexplained):
        assert all(after <= before + 4 * of_sum(4096) for before, after in zip(layer, layer[1:]))
    assert mean.unexplained[0][1] > mean.unexplained[-1][1]


def test_the_first_layer_of_equal_inputs_is_not_rotated():
    mean = MeanNetwork.fit([scatnet(seed) for seed in range(3)], batches(size=64))
    for alignments in mean.alignments:
        assert torch.equal(alignments[0], torch.eye(len(alignments[0]), dtype=torch.float64))


def test_the_mean_of_one_network_is_itself_and_needs_no_images():
    mean = MeanNetwork.fit([network := mlp()])
    for k, layer in enumerate(weight_layers(network)):
        (weights,) = mean.aligned_weights(k)
        assert torch.equal(weights, layer.get().double())


def test_mean_activations_are_those_of_their_definition():
    nets, data = [mlp(seed) for seed in range(3)], flat()
    mean = MeanNetwork.fit(nets, data)
    phis = [run(network[:3], data) for network in nets]
    expected = sum(phi.double() @ alignments[1] for phi, alignments in zip(phis, mean.alignments)) / 3
    assert_values(mean.average(1, phis).double(), expected, 12, steps=3)


# ---- bad input


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: align(torch.full((2, 2), float("nan"))), "not a finite matrix"),
        (lambda: transport(torch.ones(2, 5), torch.eye(3)), "do not fit an alignment of 3 channels"),
        (lambda: Alignment().transform(0, torch.ones(1, 1)), "not fitted"),
        (lambda: Alignment().fit(mlp(), cnn(), flat()), "cannot process images"),
        (lambda: Alignment().fit(mlp(), mlp(), flat(), ["2"]), "no weight layer '2'"),
        (lambda: MeanNetwork.fit([mlp(), mlp()]), "give a loader"),
    ],
)
def test_what_cannot_be_aligned(act, message):
    with pytest.raises(RainbowError, match=message):
        act()
