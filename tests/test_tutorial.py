"""The tutorial's library: theorems, and agreement with rainbow/ and utils/."""

import ast
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

import tutorial_lib as lib
from rainbow import Alignment, WeightCovariance, weight_layers
from rainbow.alignment import alignment_error, transport
from rainbow.clipping import clipped_accuracies
from rainbow.moments import moments
from rainbow.precision import rounding
from tests.conftest import ROOT
from tests.rounding import assert_values
from utils.data.datasets import load_datasets
from utils.runs.options import parse

NETWORKS = {"MLP": (lib.MLP, (24, 16)), "CNN": (lib.CNN, (6, 8))}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data():
    return lib.load_data("digits")


@pytest.fixture(scope="module")
def loader(data):
    return list(zip(data.x_train[:600].split(100), data.y_train[:600].split(100)))


@pytest.fixture(params=NETWORKS)
def pair(request, data):
    """Two small networks of each kind, with random weights."""
    make, widths = NETWORKS[request.param]
    return [make(data.shape, widths, seed=seed) for seed in (0, 1)]


def random_matrix(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def identity(size):
    return torch.eye(size, dtype=torch.float64)


def test_it_is_short_and_stands_alone():
    source = (ROOT / "tutorial_lib.py").read_text()
    assert len(source.splitlines()) <= 350
    imported = set()
    for node in ast.walk(ast.parse(source)):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported |= {name.split(".")[0] for name in names}
    assert imported <= sys.stdlib_module_names | {"matplotlib", "numpy", "sklearn", "torch", "torchvision"}


def test_digits_are_split_and_standardised(data):
    assert (len(data.x_train), len(data.x_test), data.shape) == (1297, 500, (1, 8, 8))
    assert abs(data.x_train.mean()) < 1e-5 and abs(data.x_train.std() - 1) < 1e-5
    again = lib.load_data("digits")
    assert torch.equal(again.x_test, data.x_test) and torch.equal(again.y_test, data.y_test)
    with pytest.raises(ValueError, match="'digits' or 'cifar10'"):
        lib.load_data("mnist")


def test_networks_compute_the_formula(pair, data):
    net, x = pair[0], data.x_test[:7]
    W = [layer.weight for layer in net.layers]
    if isinstance(net, lib.MLP):
        phi_2 = F.relu(F.relu(x.flatten(1) @ W[0].T) @ W[1].T)
    else:
        phi_2 = F.relu(F.conv2d(F.relu(F.conv2d(x, W[0], stride=2, padding=2)), W[1], stride=2, padding=2))
    assert_values(net.activations(x)[2], phi_2, 5 * 5 * 6, 2)  # at most so many terms in each of two sums
    assert_values(net(x), phi_2.flatten(1) @ W[2].T, 5 * 5 * 6, 3)


def test_the_seed_alone_makes_the_network_and_its_training_repeats(data):
    state = torch.get_rng_state()
    nets = [lib.MLP(data.shape, (32, 16), seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    for trained in (False, True):
        a, same, b = (net.weight(1) for net in nets)
        is_same = torch.equal if a.device.type == "cpu" else torch.allclose
        assert is_same(a, same) and not torch.allclose(a, b)
        if not trained:
            nets = [lib.train(net, data, epochs=3, lr=0.05, batch_size=32, seed=1) for net in nets]
    assert lib.accuracies(nets, data)[0] > 80


def test_accuracies_of_many_networks_are_those_of_each(pair, data):
    right = [(net(data.x_test).argmax(1) == data.y_test).double().mean().item() for net in pair]
    assert lib.accuracies(pair, data, batch_size=37) == pytest.approx([100 * share for share in right])


def test_a_weight_that_was_set_is_given_back(pair):
    for net in pair:
        for j in (1, 2, 3):
            W = random_matrix(*net.weight(j).shape)
            net.set_weight(j, W)
            assert_values(net.weight(j), W, 1)


def test_the_covariance_of_many_rows_is_the_one_they_were_drawn_from():
    root = random_matrix(12, 12)
    C = root @ root.T
    found = [lib.weight_covariance(lib.gaussian_rows(n, C, torch.Generator().manual_seed(0))) for n in (1000, 100000)]
    errors = [((C_n - C).norm() / C.norm()).item() for C_n in found]
    assert errors[1] < 0.02 and errors[0] / errors[1] > 4  # like 1/sqrt(n): 10


def test_pca_rebuilds_the_covariance_and_white_keeps_its_variance():
    C = lib.weight_covariance(random_matrix(50, 9))
    values, E = lib.pca(C)
    assert torch.allclose((E * values) @ E.T, C) and torch.allclose(E.T @ E, identity(9))
    assert (values.diff() <= 0).all()
    assert lib.white(C).trace() == pytest.approx(C.trace().item())
    assert torch.equal(lib.white(C), lib.white(C)[0, 0] * identity(9))


def test_overlap_of_spaces():
    E = lib.random_basis(10)
    assert lib.overlap(E, E.roll(4, dims=1), 4) == pytest.approx(0, abs=1e-12)
    assert lib.overlap(E, torch.cat([E[:, [2, 1, 0]], E[:, 3:]], 1), 3) == pytest.approx(1)
    by_chance = np.mean([lib.overlap(E, lib.random_basis(10, seed), 4) for seed in range(1, 300)])
    assert by_chance == pytest.approx(0.4, abs=0.02)


def test_clipping_to_all_directions_changes_nothing(pair, data):
    net, x = pair[0], data.x_test[:20]
    for j in (1, 2, 3):
        D = net.weight(j).flatten(1).shape[1]
        assert_values(lib.clip(net, j, lib.random_basis(D), D)(x), net(x), 5 * 5 * 6, 4)
        assert lib.clip(net, j, lib.random_basis(D), 0)(x).abs().max() == 0
    _, E = lib.pca(lib.weight_covariance(net.weight(3)))
    assert_values(lib.clip(net, 3, E, 10)(x), net(x), 5 * 5 * 6, 4)  # ten rows span ten directions


def test_clipping_weights_is_projecting_activations(data):
    net, E, d = lib.MLP(data.shape, (24, 16)), lib.random_basis(24), 5
    phi_1 = net.activations(data.x_test[:20])[1]
    projected = phi_1 @ (E[:, :d] @ E[:, :d].T).to(phi_1)
    expected = F.relu(projected @ net.layers[1].weight.T) @ net.layers[2].weight.T
    assert_values(lib.clip(net, 2, E, d)(data.x_test[:20]), expected, 64, 4)


def test_accuracies_by_rank_go_from_none_to_all(pair, data):
    net = pair[0]
    curve = lib.accuracies_by_rank(net, 2, lib.random_basis(net.weight(2).flatten(1).shape[1]), data)
    zero = 100 * (data.y_test == 0).double().mean().item()  # equal scores: the first class
    assert list(curve)[0] == 0 and curve[0] == pytest.approx(zero)
    assert list(curve.values())[-1] == pytest.approx(lib.accuracies([net], data)[0], abs=0.3)


def test_alignment_is_procrustes_and_finds_a_rotation():
    a, b, R = random_matrix(200, 8), random_matrix(200, 8, seed=1), lib.random_basis(8)
    assert torch.allclose(lib.alignment(a.T @ b), torch.tensor(scipy.linalg.orthogonal_procrustes(a, b)[0]))
    A = lib.alignment(a.T @ (a @ R))
    assert torch.allclose(A, R)
    assert torch.allclose(lib.alignment((a @ A).T @ (a @ R)), identity(8))  # nothing left


def test_no_other_rotation_is_better(pair, data):
    a, b = pair
    A = lib.alignments(a, b, data.x_train)
    best = lib.explained(A, a, b, data.x_train)
    for seed in range(5):
        noise = [random_matrix(*A_j.shape, seed=seed) for A_j in A]
        nearby = [A_j @ torch.matrix_exp(0.1 * (N_j - N_j.T)) for A_j, N_j in zip(A, noise)]
        worse = lib.explained(nearby, a, b, data.x_train)
        assert best[1] > worse[1] and best[2] > worse[2]


def test_a_network_explains_itself_and_a_permuted_copy(pair, data):
    net = pair[0]
    A = lib.alignments(net, net, data.x_train)
    assert lib.explained(A, net, net, data.x_test) == pytest.approx([1, 1, 1], abs=1e-5)
    order = torch.randperm(net.widths[0])
    permuted = net.copy()
    permuted.set_weight(1, net.weight(1)[order])
    permuted.set_weight(2, net.weight(2)[:, order])
    assert_values(permuted(data.x_test), net(data.x_test), 5 * 5 * 6, 3)
    A = lib.alignments(net, permuted, data.x_train)
    assert torch.allclose(A[1], identity(net.widths[0])[:, order], atol=1e-3)
    assert torch.allclose(lib.rotate(net.weight(2), A[1]), permuted.weight(2), atol=1e-3)
    assert lib.explained(A, net, permuted, data.x_test)[1:] == pytest.approx([1, 1], abs=1e-5)


def test_networks_of_other_widths_align_partially(data):
    narrow, wide = lib.MLP(data.shape, (8, 6)), lib.MLP(data.shape, (24, 16), seed=1)
    A = lib.alignments(narrow, wide, data.x_train)
    assert [tuple(A_j.shape) for A_j in A] == [(64, 64), (8, 24), (6, 16)]
    assert torch.equal(A[0], identity(64))  # even if some pixels are always empty
    assert torch.allclose(A[1] @ A[1].T, identity(8))


def test_rotated_kernels_see_rotated_channels():
    W, x, A = random_matrix(5, 3, 2, 2), random_matrix(4, 3, 6, 6, seed=1), lib.random_basis(3)
    turned = torch.einsum("bcmn,cd->bdmn", x, A)
    assert torch.allclose(F.conv2d(turned, lib.rotate(W, A)), F.conv2d(x, W))


def test_resampling_repeats_and_keeps_only_the_classifier(pair, data):
    net, x = pair[0], data.x_train[:400]
    one, two, other = (lib.resample(net, x, seed) for seed in (0, 0, 1))
    assert all(torch.equal(one.weight(j), two.weight(j)) for j in (1, 2, 3))
    assert not torch.allclose(one.weight(1), other.weight(1))
    A = lib.alignments(net, one, x)
    assert torch.allclose(one.weight(3), lib.rotate(net.weight(3), A[2]), atol=1e-5)


def test_resampled_rows_have_the_aligned_covariance(data):
    net, x = lib.MLP(data.shape, (10, 8)), data.x_train[:400]
    wide = lib.resample(net, x, 0, widths=(10, 40000))
    A_1 = lib.alignments(net, wide, x)[1]
    expected = A_1.T @ lib.weight_covariance(net.weight(2)) @ A_1
    assert (lib.weight_covariance(wide.weight(2)) - expected).norm() < 0.05 * expected.norm()


def test_resampling_at_other_widths_and_covariances(pair, data):
    net, x = pair[0], data.x_train[:400]
    widths = tuple(2 * N for N in net.widths)
    wide = lib.resample(net, x, 0, widths=widths)
    assert [len(wide.weight(j)) for j in (1, 2)] == list(widths) and wide(x).shape == (400, 10)
    nothing = [torch.zeros_like(lib.weight_covariance(net.weight(j))) for j in (1, 2)]
    assert lib.resample(net, x, 0, nothing)(x).abs().max() == 0


def test_covariances_and_alignments_equal_those_of_rainbow(pair, data, loader):
    (a, b), x = pair, data.x_train[:600]
    names = [layer.name for layer in weight_layers(a, loader)]
    assert names == ["layers.0", "layers.1", "layers.2"]
    found = moments([a, b], names, loader, cross=0)
    theirs = Alignment().fit(a, b, loader, layers=names)
    K, A = lib.activation_covariances(b, a, x, batch_size=77), lib.alignments(a, b, x)
    own, explained = lib.activation_covariances(a, a, x), lib.explained(A, a, b, x)
    for j in (1, 2):  # phi_1 and phi_2: the inputs of the second and of the third layer
        name = names[j]
        assert_values(found.cross(1, 0, name).cpu(), K[j], 600 * 16, 2)  # 600 images, 16 positions
        assert_values(found.auto(0, name).cpu(), own[j], 600 * 16, 2)
        U, S, Vt = torch.linalg.svd(K[j])
        seen = 4 * rounding(600) * S[0] <= S  # theirs is 0 in the directions that rounding may have made
        assert torch.allclose(theirs.matrices[j].cpu(), (U[:, seen] @ Vt[seen]).T, atol=1e-3)
        assert torch.allclose(A[j], (U @ Vt).T, atol=1e-3)
        W = lib.rotate(a.weight(j + 1), A[j]).flatten(1)
        assert torch.allclose(transport(a.weight(j + 1).flatten(1), A[j]), W)
        assert torch.allclose(WeightCovariance.fit(W).matrix(), lib.weight_covariance(W), atol=1e-8)
        aa, bb = found.energy(0, name), found.energy(1, name)
        cross = aa + bb - (1 - explained[j]) * bb  # 2 E<phi_a A, phi_b>
        assert alignment_error(A[j], K[j].T, aa, bb) == pytest.approx(2 - cross / (aa * bb) ** 0.5, abs=1e-4)


def test_clipping_equals_that_of_rainbow(pair, data, loader):
    a = pair[0]
    lib.train(a, data, epochs=2, lr=0.05, batch_size=32)
    for j, layer in zip((1, 2, 3), weight_layers(a, loader)):
        _, E = lib.pca(lib.weight_covariance(a.weight(j)))
        ours = lib.accuracies_by_rank(a, j, E, data)
        ranks = [d for d in ours if d > 0]
        theirs = clipped_accuracies(a, layer, {"weights": E}, ranks, [(data.x_test, data.y_test)])["weights"]
        assert theirs == pytest.approx([ours[d] for d in ranks], abs=0.21)  # one picture of 500


def test_digits_are_those_of_utils(data):
    network = "--psi-arch mod --n-blocks 1 --Pr-size 8 --scat-angles 4 --dir unused".split()
    sets = load_datasets(parse(["--digits", "-a", "Fw Std Pr N", *network]))
    images, labels = next(iter(sets.val.loader(500, shuffle=False)))
    assert torch.equal(labels.cpu(), data.y_test.cpu())
    assert torch.allclose(images.cpu().contiguous(), data.x_test.cpu(), atol=1e-2)
