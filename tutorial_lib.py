"""The analysis of 'A Rainbow in Deep Network Black Boxes' in plain lines, for a small MLP and a small CNN.

It needs nothing else of this repository; `tutorial.ipynb` is the lesson that uses it. Throughout,

    phi_0 = x,    phi_j = relu(W_j phi_{j-1})  for j = 1..J,    logits = W_{J+1} phi_J,

with no biases. The N_j neurons of layer j are the rows of W_j; lists of activations and of alignments count j
from 0, weights count j from 1, as in the formulas. There phi_j is a column; in an array every sample is a row.
Statistics are kept in double precision, on the CPU.
"""

import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"]  # safe for colour-blind readers (Okabe-Ito)
MARKERS, LINES = ["o", "s", "^", "D", "v"], ["-", "--", ":", "-.", "-"]
CIFAR10_NAMES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


# ---- data ----------------------------------------------------------------------------------------


class Data:
    """Images of two sets on a device, standardised by the training set's mean and standard deviation."""

    def __init__(self, train, test, names):
        """`train`, `test`: (images (B, 1, M, N) float, labels (B,) int64); `names` of the classes."""
        device = pick_device()
        mean, std = train[0].mean(), train[0].std()
        self.x_train, self.y_train = ((train[0] - mean) / std).to(device), train[1].to(device)
        self.x_test, self.y_test = ((test[0] - mean) / std).to(device), test[1].to(device)
        self.names = names
        self.shape = tuple(train[0].shape[1:])  # (1, M, N)


def pick_device():
    """The accelerator torch finds, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_data(name, root="data"):
    """`digits` (8x8, in scikit-learn, no download) or `cifar10` (32x32, gray, downloaded once into `root`).

    Raises ValueError for any other name.
    """
    if name == "digits":
        return load_digits()
    if name == "cifar10":
        return load_cifar10(root)
    raise ValueError(f"no data set {name!r}: choose 'digits' or 'cifar10'")


def load_digits(num_train=1297):
    """The 1,797 digits in an order drawn once and for all: 1,297 to train on, 500 to test on."""
    from sklearn import datasets

    digits = datasets.load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    images = torch.tensor(digits.images[order], dtype=torch.float32)[:, None]  # (1797, 1, 8, 8)
    labels = torch.tensor(digits.target[order])
    train, test = (images[:num_train], labels[:num_train]), (images[num_train:], labels[num_train:])
    return Data(train, test, [str(k) for k in range(10)])


def load_cifar10(root):
    """CIFAR-10 in gray: the mean of the three colours."""
    from torchvision.datasets import CIFAR10

    def gray(train):
        raw = CIFAR10(root, train=train, download=True)
        images = torch.tensor(np.asarray(raw.data)).float().mean(3)[:, None] / 255  # (B, 1, 32, 32)
        return images, torch.tensor(raw.targets)

    return Data(gray(True), gray(False), CIFAR10_NAMES)


# ---- networks ------------------------------------------------------------------------------------


class Network(nn.Module):
    """Linear maps without biases and ReLUs between them; MLP and CNN say which maps."""

    def __init__(self, shape, widths, classes, seed):
        """`shape` (1, M, N) of an image, `widths` N_1..N_J of the hidden layers, `seed` of the weights."""
        super().__init__()
        self.shape, self.widths, self.classes = tuple(shape), tuple(widths), classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(self.make_layers())  # PyTorch's own random initialisation
        self.to(pick_device())

    def activations(self, x):
        """x (B, 1, M, N) -> [phi_0, ..., phi_J], each (B, D) for an MLP, (B, C, M', N') for a CNN."""
        phi = [x]
        for layer in self.layers[:-1]:
            phi.append(F.relu(layer(phi[-1])))
        return phi

    def forward(self, x):
        """x (B, 1, M, N) -> logits (B, classes)."""
        return self.layers[-1](self.activations(x)[-1].flatten(1))

    def weight(self, j):
        """W_j, j = 1..J+1, on the CPU in double precision: its axes are neurons, input channels[, pixels].

        MLP: (N_j, D_j). CNN: (N_j, C, 5, 5), and (classes, C, M', N') for the classifier.
        """
        W = self.layers[j - 1].weight.detach().cpu().double()
        return W.view(len(W), *self.last_shape) if j == len(self.layers) else W

    def set_weight(self, j, W):
        """Put W, of the shape `weight(j)` has, into layer j."""
        parameter = self.layers[j - 1].weight
        parameter.data = W.reshape(parameter.shape).to(parameter)

    def copy(self):
        return copy.deepcopy(self)


class MLP(Network):
    """Every layer is a full matrix: D-512-256-10 unless told otherwise."""

    def __init__(self, shape, widths=(512, 256), classes=10, seed=0):
        super().__init__(shape, widths, classes, seed)

    def make_layers(self):
        self.last_shape = self.widths[-1:]
        sizes = [self.shape[1] * self.shape[2], *self.widths, self.classes]
        return [nn.Linear(d, n, bias=False) for d, n in zip(sizes[:-1], sizes[1:])]

    def activations(self, x):
        return super().activations(x.flatten(1))


class CNN(Network):
    """5x5 convolutions that halve the image (stride 2, padding 2), channels 1-32-64, and a classifier."""

    def __init__(self, shape, widths=(32, 64), classes=10, seed=0):
        super().__init__(shape, widths, classes, seed)

    def make_layers(self):
        channels, (M, N), layers = [self.shape[0], *self.widths], self.shape[1:], []
        for c, n in zip(channels[:-1], channels[1:]):
            layers.append(nn.Conv2d(c, n, 5, stride=2, padding=2, bias=False))
            M, N = (M + 1) // 2, (N + 1) // 2
        self.last_shape = (channels[-1], M, N)
        return [*layers, nn.Linear(channels[-1] * M * N, self.classes, bias=False)]


def train(net, data, epochs, lr, batch_size, momentum=0.9, seed=0):
    """Stochastic gradient descent on the cross-entropy, in place; `seed` draws the order of the images."""
    order = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.x_train), generator=order).split(batch_size):
            batch = batch.to(data.x_train.device)
            loss = F.cross_entropy(net(data.x_train[batch]), data.y_train[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return net


@torch.no_grad()
def accuracies(nets, data, batch_size=1000):
    """Test accuracy in per cent of many networks at once: every batch is read one time."""
    right = torch.zeros(len(nets), dtype=torch.float64)
    for x, y in zip(data.x_test.split(batch_size), data.y_test.split(batch_size)):
        right += torch.stack([(net(x).argmax(1) == y).sum().cpu() for net in nets])
    return (100 * right / len(data.y_test)).tolist()


# ---- covariances ---------------------------------------------------------------------------------


def samples(phi):
    """(B, D) as it is; (B, C, M, N) -> (B·M·N, C): every position of a feature map is one more sample."""
    return phi if phi.ndim == 2 else phi.movedim(1, -1).flatten(0, -2)


@torch.no_grad()
def activation_covariances(a, b, x, batch_size=1000):
    """[E[phi_a phi_b^T] for j = 0..J], each (D_a, D_b), of networks a, b over images x, in one streamed pass.

    These are second moments: means are not subtracted. With b = a: the network's own.
    """
    total, count = [0.0] * len(a.layers), [0] * len(a.layers)
    for batch in x.split(batch_size):
        for j, (phi_a, phi_b) in enumerate(zip(a.activations(batch), b.activations(batch))):
            phi_a, phi_b = samples(phi_a), samples(phi_b)
            total[j] = total[j] + (phi_a.T @ phi_b).cpu().double()
            count[j] += len(phi_a)
    return [K / n for K, n in zip(total, count)]


def weight_covariance(W):
    """(1/N) sum_n w_n w_n^T over the N rows of W, flattened where they are kernels -> (D, D)."""
    rows = W.flatten(1)
    return rows.T @ rows / len(rows)


def pca(C):
    """Eigenvalues (D,) of a covariance, the largest first, and its eigenvectors, the columns of (D, D)."""
    values, vectors = torch.linalg.eigh(C)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def clip(net, j, E, d):
    """A copy of the network with W_j E_d E_d^T for W_j; E_d: first d columns of E (D_j, D_j)."""
    W, clipped = net.weight(j), net.copy()
    clipped.set_weight(j, W.flatten(1) @ E[:, :d] @ E[:, :d].T)
    return clipped


def accuracies_by_rank(net, j, E, data):
    """{d: test accuracy with W_j clipped to the first d columns of E (D_j, D_j)}, from d = 0 to D_j."""
    D = len(E)
    ranks = [d for d in (0, 1, 2, 3, 4, 5, 7, 9, 12, 15, 20, 30, 50, 100, 200, 400) if d < D] + [D]
    return dict(zip(ranks, accuracies([clip(net, j, E, d) for d in ranks], data)))


def random_basis(D, seed=0):
    """A (D, D) orthogonal matrix drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))[0]


def white(C):
    """The covariance with the trace of C and no preferred direction: tr(C)/D times the identity."""
    return torch.eye(len(C), dtype=torch.float64) * C.trace() / len(C)


def overlap(E, G, d):
    """||E_d^T G_d||^2 / d: 1 if the first d columns of two bases span one space, d/D by chance."""
    return ((E[:, :d].T @ G[:, :d]).square().sum() / d).item()


# ---- alignment and rainbow networks --------------------------------------------------------------


def alignment(K):
    """A = U V^T, (D_a, D_b), where K = E[phi_a phi_b^T] = U S V^T: it makes E||A^T phi_a - phi_b||^2 least."""
    U, _, Vt = torch.linalg.svd(K, full_matrices=False)
    return U @ Vt


def alignments(a, b, x):
    """[A_0, ..., A_J] from network a to network b on images x; A_0 is the identity, as phi_0 is common."""
    K = activation_covariances(a, b, x)
    return [torch.eye(len(K[0]), dtype=torch.float64)] + [alignment(K_j) for K_j in K[1:]]


@torch.no_grad()
def explained(A, a, b, x, batch_size=1000):
    """[1 - E||A_j^T phi_a - phi_b||^2 / E||phi_b||^2 for j = 0..J]: the share of phi_b that phi_a explains."""
    wrong, total = torch.zeros(len(A), dtype=torch.float64), torch.zeros(len(A), dtype=torch.float64)
    for batch in x.split(batch_size):
        for j, (phi_a, phi_b) in enumerate(zip(a.activations(batch), b.activations(batch))):
            phi_a, phi_b = samples(phi_a).cpu().double(), samples(phi_b).cpu().double()
            wrong[j] += (phi_a @ A[j] - phi_b).square().sum()
            total[j] += phi_b.square().sum()
    return (1 - wrong / total).tolist()


def rotate(W, A):
    """W (N, D[, pixels]) A (D, D') on the axis of the input channels -> (N, D'[, pixels])."""
    return torch.einsum("nc...,cd->nd...", W, A)


def gaussian_rows(n, C, generator):
    """n rows drawn from N(0, C) -> (n, D): white noise times the symmetric square root of C."""
    values, E = pca(C)
    white = torch.randn(n, len(C), generator=generator, dtype=torch.float64)
    return white @ (E * values.sqrt()) @ E.T


def resample(net, x, seed, covariances=None, widths=None):
    """A rainbow network: hidden weights from N(0, C_j), the trained classifier, all realigned.

    x: the images that align it with the trained network. `covariances` [C_1, ..., C_J], in the spaces of the
    trained network, and `widths` [N_1, ..., N_J] are the trained network's own unless given.
    """
    J, generator = len(net.widths), torch.Generator().manual_seed(seed)
    C = covariances or [weight_covariance(net.weight(j)) for j in range(1, J + 1)]
    new = type(net)(net.shape, widths or net.widths, net.classes)
    A = torch.eye(net.weight(1).shape[1], dtype=torch.float64)
    for j in range(1, J + 1):
        rows = gaussian_rows(new.widths[j - 1], C[j - 1], generator)
        W = rows.view(len(rows), *net.weight(j).shape[1:])  # in the trained network's space of phi_{j-1}
        new.set_weight(j, rotate(W, A))  # in the new network's
        A = alignments(net, new, x)[j]
    new.set_weight(J + 1, rotate(net.weight(J + 1), A))
    return new


# ---- numbers and pictures ------------------------------------------------------------------------


def report(title, numbers):
    """One line: the title, then {name: number}."""
    print(f"{title:<34}" + "   ".join(f"{name}: {float(x):.3g}" for name, x in numbers.items()))


def show_images(data, per_class=8):
    """A row of test images per class."""
    shape = len(data.names), per_class
    figure, axes = plt.subplots(*shape, figsize=(0.6 * shape[1], 0.62 * shape[0]))
    for k, row in enumerate(axes):
        for axis, image in zip(row, data.x_test[data.y_test == k]):
            axis.imshow(image[0].cpu(), cmap="gray")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(data.names[k], rotation=0, ha="right", va="center")


def plot_curves(axis, curves, markers=False, xscale="linear", yscale="linear", **labels):
    """Lines {label: {x: y}}, with `labels` (title, xlabel, ylabel and the like) for the axes."""
    for k, (label, curve) in enumerate(curves.items()):
        style = MARKERS[k] + "-" if markers else LINES[k]
        axis.plot(list(curve.keys()), list(curve.values()), style, label=label, color=COLOURS[k], markersize=4)
    axis.set_xscale(xscale, **({"linthresh": 1} if xscale == "symlog" else {}))
    axis.set_yscale(yscale)
    if xscale != "linear":
        axis.xaxis.set_major_formatter("{x:g}")
    axis.set(**labels)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def spectrum(values, first=None):
    """{rank: eigenvalue} of the first eigenvalues, to be drawn by `plot_curves`."""
    return dict(enumerate(values[:first].tolist(), start=1))


def show_overlaps(axis, E, G, d, **labels):
    """The d x d table of |<e_r, g_s>| between the first eigenvectors of two bases, and its colour bar."""
    table, edges = (E[:, :d].T @ G[:, :d]).abs(), (0.5, d + 0.5, d + 0.5, 0.5)
    image = axis.imshow(table, vmin=0, vmax=1, cmap="cividis", extent=edges)
    axis.set(xticks=range(1, d + 1, 2), yticks=range(1, d + 1, 2), **labels)
    axis.figure.colorbar(image, ax=axis, shrink=0.8)
