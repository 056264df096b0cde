"""Rank-restricted networks (paper, section 5): accuracy with W_j replaced by W_j Π_d, for many d in one pass.

Π_d projects on the first d columns of an orthonormal basis V of the layer's input. With z = V^H φ,

    W Π_d φ = Σ_{r ≤ d} (W e_r) z_r,

so that the outputs for all ranks and bases are partial sums, found from one input of the layer. They go on through the
rest of the network side by side, as a longer batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rainbow.errors import RainbowError
from rainbow.layers import Layer
from rainbow.precision import to_double
from rainbow.running import check_scores, device_of, evaluating, first_images, labels_of, output_of

MAX_BATCH = 8192  # images side by side, all ranks together


def even_ranks(dimension: int, count: int = 51) -> list[int]:
    """`count` ranks from 0 to `dimension`, evenly spaced and rounded; all of them where there are no more."""
    return sorted(set(np.linspace(0, dimension, count).round().astype(int).tolist()))


def clipped_accuracies(
    model: nn.Module, layer: Layer, bases: Mapping[str, Tensor], ranks: Sequence[int], batches: Iterable
) -> dict[str, np.ndarray]:
    """Top-1 accuracy in percent of the network with W_j restricted to the first d directions of each basis.

    layer: one of the network's `weight_layers`; bases: (D, R) orthonormal columns each, or (C, R) for the channels
    alone, at least as many columns as the highest rank; ranks: the values of d; batches: (images, labels), gone through
    once. Where nothing is left to normalise (d = 0 before `N`), the scores are not numbers and class 0 is predicted.
    # {basis: (len(ranks),) float64}
    Raises RainbowError where a basis or a rank does not fit the layer, or there are no images.
    """
    device = device_of(model)
    restricted = _Restricted(layer, bases, ranks, device)
    correct = torch.zeros(restricted.copies, dtype=torch.int64, device=device)
    total, repeat = 0, None
    with evaluating(model):
        for batch in batches:
            images, labels = first_images(batch).to(device), labels_of(batch)
            if repeat is None:
                repeat = _needs_repeats(model, restricted, images[:2])
            size = max(1, MAX_BATCH // restricted.copies)
            start = 0
            for part in images.split(size):
                scores = restricted.run(model, part, repeat)  # (copies, B, classes)
                truth: Any = None if labels is None else labels[start : start + len(part)].to(device)
                check_scores(scores[0], truth)
                correct += scores.argmax(-1).eq(truth).sum(1)
                start += len(part)
            total += len(images)
    if not total:
        raise RainbowError("no images to measure an accuracy on")
    accuracies = (100.0 * correct.double() / total).cpu().numpy().reshape(len(bases), len(ranks))
    return dict(zip(bases, accuracies))


class _Restricted:
    """The layer's outputs for every basis and rank, one copy of the batch each, put in place of its output."""

    def __init__(self, layer, bases, ranks, device):
        if list(ranks) != sorted(set(ranks)) or not len(ranks) or ranks[0] < 0:
            raise RainbowError("ranks are different whole numbers from 0 up, in increasing order")
        weight = to_double(layer.get())  # (N, D)
        self.layer, self.copies = layer, len(bases) * len(ranks)
        self.bases = []
        for name, basis in bases.items():
            vectors, step = _full_basis(layer, name, basis, ranks[-1])
            vectors = vectors.to(weight.device)
            responses = weight.to(vectors.dtype) @ vectors  # (N, R) W e_r
            dtype = torch.complex64 if vectors.is_complex() or layer.is_complex else torch.float32
            ends = [rank * step for rank in ranks]
            self.bases.append((vectors.conj().to(device, dtype), responses.mT.to(device, dtype), ends))

    def run(self, model: nn.Module, images: Tensor, repeat: bool) -> Tensor:
        """Scores of the restricted networks. # (copies, B, classes)"""
        batch = len(images)

        def replace(module, inputs, output):
            return self._outputs(inputs[0][:batch], output[:batch])

        with _hook(self.layer.module, replace):
            scores = output_of(model(images.repeat(self.copies, *[1] * (images.ndim - 1)) if repeat else images))
        return scores.unflatten(0, (self.copies, batch))

    def _outputs(self, x, output):
        """x: the layer's input, output: its own output, both for B images. # (copies·B, ...)"""
        channels_last = output.movedim(self.layer.channel_axis, -1)  # (B, ..., N)
        samples = self.layer.samples(x, patches=True)  # (B·M'·N', D)
        bias = getattr(self.layer.module, "bias", None)
        outputs = []
        for vectors, responses, ends in self.bases:
            dtype = torch.promote_types(samples.dtype, vectors.dtype)
            coordinates = samples.to(dtype) @ vectors.to(dtype)  # (B·M'·N', R)
            partial = coordinates.new_zeros(len(samples), responses.shape[1])
            partial = partial if bias is None else partial + bias
            for start, end in zip([0, *ends], ends):
                partial = partial + coordinates[:, start:end] @ responses[start:end].to(dtype)  # (B·M'·N', N)
                outputs.append(partial)
        stacked = torch.stack(outputs).view(-1, *channels_last.shape[1:])  # (copies·B, ..., N)
        return stacked.movedim(-1, self.layer.channel_axis)


def _needs_repeats(model, restricted, images):
    """Whether the images must be repeated from the start: another path, such as a shortcut, leads around the layer."""
    whole = restricted.run(model, images, repeat=True)
    try:
        quick = restricted.run(model, images, repeat=False)
    except RuntimeError:  # batches of different lengths meet behind the layer
        return True
    tolerance = 1e-3 * whole.nan_to_num().abs().max().item()
    return quick.shape != whole.shape or not torch.allclose(quick, whole, rtol=0, atol=tolerance, equal_nan=True)


def _full_basis(layer, name, basis, highest):
    """A basis of all D entries in double precision, and how many of its columns one rank stands for."""
    step = 1
    if basis.ndim == 2 and basis.shape[0] == layer.channels != layer.dimension:
        step = layer.dimension // layer.channels
        basis = torch.kron(basis, torch.eye(step, dtype=basis.dtype, device=basis.device))  # (D, R·k²)
    if basis.ndim != 2 or basis.shape[0] != layer.dimension:
        needed = " or ".join(str(rows) for rows in sorted({layer.dimension, layer.channels}, reverse=True))
        raise RainbowError(f"basis {name!r} has the shape {tuple(basis.shape)}, layer {layer.name} needs {needed} rows")
    if basis.shape[1] < highest * step:
        raise RainbowError(f"basis {name!r} has {basis.shape[1] // step} directions, the highest rank is {highest}")
    return to_double(basis), step


@contextlib.contextmanager
def _hook(module, function) -> Iterator[None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()
