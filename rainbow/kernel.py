"""The kernel of a network's layer, and that of rainbow networks as they widen (paper, section 2).

    k_j(x, x') = ⟨φ_j(x), φ_j(x')⟩ / width,

the inner product over channels and positions, the width being the number of channels. What the paper proves is that the
kernel of random networks converges to a deterministic one as they widen; here it is estimated from sampled networks and
laid beside that of the trained network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from rainbow.errors import RainbowError
from rainbow.network import weight_layers
from rainbow.precision import to_double
from rainbow.running import device_of, evaluating, stream_inputs


def layer_kernels(
    network: nn.Module, images: Tensor, layers: Sequence[str] | None = None, batch: int = 256
) -> list[Tensor]:
    """k_j of the inputs of a network's weight layers (all, or those named) on n images; for complex ones its real part.

    images: (n, C, M, N). # [(n, n) float64, on the CPU]
    """
    chosen = weight_layers(network, images, layers)
    device = device_of(network)
    inputs: list[list[Tensor]] = [[] for _ in chosen]
    modules = [layer.module for layer in chosen]
    with evaluating(network):
        for part in images.to(device).split(batch):
            stream_inputs(partial(network, part), modules, lambda k, x: inputs[k].append(x.flatten(1).clone()))
    return [_gram(torch.cat(features), layer.channels) for features, layer in zip(inputs, chosen)]


def _gram(features, width):
    features = to_double(torch.view_as_real(features).flatten(1) if features.is_complex() else features)
    return (features @ features.T / width).cpu()


def centred_kernel_alignment(a: Tensor, b: Tensor) -> float:
    """⟨HaH, HbH⟩ / (‖HaH‖ ‖HbH‖) with H = 1 − 11ᵀ/n, for kernels (n, n): 1 for equal ones up to offset and scale.

    Raises RainbowError where the shapes differ or a kernel is constant, which has no direction to compare.
    """
    if a.shape != b.shape or a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise RainbowError(f"kernels of the shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
    a, b = (_centred(to_double(kernel)) for kernel in (a, b))
    norms = torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(b)
    if norms == 0:
        raise RainbowError("a kernel is the same for all pairs of images: there is nothing to compare")
    return ((a * b).sum() / norms).item()


def _centred(kernel):
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


@dataclass(frozen=True)
class KernelConvergence:
    """How kernels of sampled networks behave as these widen; one row for each width scaling, a column for each layer.

    names: of the layers whose inputs the kernels are of. spread: ‖k − E k‖ / ‖E k‖, root mean square over samples, E
    estimated by their mean: falls like 1/√width. distance: 1 − centred kernel alignment of E k with the trained
    network's kernel. # (scalings, layers) float64
    """

    scalings: tuple[float, ...]
    names: tuple[str, ...]
    spread: Tensor
    distance: Tensor

    def __str__(self):
        lines = ["kernel spread | distance to the trained, by width scaling", "  ".join(["scaling", *self.names])]
        for scaling, spread, distance in zip(self.scalings, self.spread.tolist(), self.distance.tolist()):
            cells = [f"{s:.3f} | {d:.3f}" for s, d in zip(spread, distance)]
            lines.append("  ".join([f"{scaling:g}", *cells]))
        return "\n".join(lines)


def kernel_convergence(
    trained: nn.Module,
    sample: Callable[[float, int], nn.Module],
    images: Tensor,
    scalings: Iterable[float],
    repeats: int = 5,
    layers: Sequence[str] | None = None,
) -> KernelConvergence:
    """Kernels of `repeats` ≥ 2 sampled networks of each width scaling against that of the trained network.

    sample: makes a network of a width scaling from a seed, 0 .. repeats − 1. images: (n, C, M, N).
    layers: names; default all but the first, whose input no weight has touched.
    """
    if repeats < 2:
        raise RainbowError(f"{repeats} sampled network cannot tell how far kernels spread: give at least 2")
    names = list(layers) if layers is not None else [layer.name for layer in weight_layers(trained, images)[1:]]
    target, scalings = layer_kernels(trained, images, names), tuple(scalings)
    spreads, distances = [], []
    for scaling in scalings:
        samples = [layer_kernels(sample(scaling, seed), images, names) for seed in range(repeats)]
        kernels = [torch.stack(each) for each in zip(*samples)]  # (repeats, n, n) for each layer
        spreads.append([_spread(each) for each in kernels])
        distances.append([1 - centred_kernel_alignment(each.mean(0), k) for each, k in zip(kernels, target)])
    return KernelConvergence(scalings, tuple(names), torch.tensor(spreads).double(), torch.tensor(distances).double())


def _spread(kernels):
    """(repeats, n, n) -> relative standard deviation, unbiased in the number of samples."""
    mean = kernels.mean(0)
    variance = torch.linalg.matrix_norm(kernels - mean).square().sum() / (len(kernels) - 1)
    return (variance.sqrt() / torch.linalg.matrix_norm(mean)).item()
