"""Running networks: images of a batch, evaluation mode, and the inputs of modules on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from rainbow.errors import RainbowError

IMAGES = ("pixel_values", "input_ids", "images", "image", "inputs", "input", "x")
LABELS = ("labels", "label", "targets", "target", "y")


def as_batches(data: Any) -> Iterable:
    """Data as batches: a loader as it is, a single batch or tensor as a list of one, a Dataset in batches of 128.

    Raises RainbowError for data that cannot be read twice, or not at all.
    """
    if isinstance(data, (Tensor, Mapping)) or is_pair(data):
        return [data]
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return DataLoader(data, 128)
    if isinstance(data, Iterator):
        raise RainbowError("the data can be read only once: give a list of batches or a DataLoader")
    if not isinstance(data, Iterable):
        raise RainbowError(f"data is a DataLoader, a Dataset or a list of batches, not a {type(data).__name__}")
    return data


def is_pair(data: Any) -> bool:
    """Whether this is one batch (images, labels, ...), not a list of batches."""
    tensors = isinstance(data, (tuple, list)) and len(data) > 1 and all(isinstance(each, Tensor) for each in data)
    return tensors and data[0].ndim > data[1].ndim <= 1 and len({len(each) for each in data if each.ndim}) == 1


def first_images(batch: Any) -> Tensor:
    """The images of a batch: a tensor, (images, labels, ...), or a dictionary with one of IMAGES, or with a single
    tensor that is no label. Raises RainbowError for anything else."""
    if isinstance(batch, Mapping):
        found = [key for key in IMAGES if key in batch] or [key for key in batch if key not in LABELS]
        if found[0:1] == found or found and found[0] in IMAGES:
            batch = batch[found[0]]
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        got = f"a dictionary of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(images).__name__
        raise RainbowError(
            f"the data holds no images, but {got}: a loader yields (images, labels), or images alone, as tensors"
        )
    return images


def labels_of(batch: Any) -> Tensor | None:
    """The labels of a batch, (B,); None if it has none."""
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABELS if key in batch), None)
    else:
        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if isinstance(labels, Tensor) and labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.flatten()
    return labels


def output_of(output: Any) -> Any:
    """The tensor of a network's output: itself, a tuple's first, or what is called logits or is the only one."""
    if isinstance(output, Mapping):  # transformers' outputs are such
        tensors = [value for value in output.values() if isinstance(value, Tensor)]
        return output.get("logits", output.get("out", tensors[0] if len(tensors) == 1 else output))
    return output[0] if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor) else output


def check_scores(scores: Any, labels: Any) -> None:
    """Raises RainbowError unless an accuracy means something: scores (B, classes) and whole labels (B,) below that."""
    if labels is None:
        raise RainbowError("accuracies need data of (images, labels)")
    found = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in (scores, labels)]
    fits = all(isinstance(x, Tensor) for x in (scores, labels)) and scores.ndim == 2 and found[1] == (len(scores),)
    if not fits or scores.shape[1] < 2 or labels.is_floating_point():
        raise RainbowError(
            f"no accuracy of outputs {found[0]} and labels {found[1]}: it is of scores (B, classes), at least two, and "
            "whole labels (B,)"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where the network's first parameter lives."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Within: no gradients, all modules in evaluation mode and none overwriting its input; afterwards as before."""
    modules = [module for model in models for module in model.modules()]
    training = [module.training for module in modules]
    in_place: list[Any] = [module for module in modules if getattr(module, "inplace", False) is True]
    for module in modules:
        module.training = False
    for module in in_place:
        module.inplace = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, training):
            module.training = mode
        for module in in_place:
            module.inplace = True


class _Enough(Exception):
    """Ends a forward pass once the last wanted module has been reached."""


def stream_inputs(
    call: Callable[[], object], modules: Sequence[nn.Module], receive: Callable[[int, Tensor], None]
) -> None:
    """`receive(k, input)` at the first call of every module k in `call()`, which runs no further than needed.

    Raises RainbowError if a module is not called.
    """
    waiting = set(range(len(modules)))

    def hook(k):
        def before(module, args):
            if k in waiting:
                waiting.remove(k)
                receive(k, args[0])
                if not waiting:
                    raise _Enough

        return before

    handles = [module.register_forward_pre_hook(hook(k)) for k, module in enumerate(modules)]
    try:
        with contextlib.suppress(_Enough):
            call()
    finally:
        for handle in handles:
            handle.remove()
    if waiting:
        raise RainbowError(f"{modules[min(waiting)]} was not called in the forward pass")


def input_of(module: nn.Module, call: Callable[[], object]) -> Tensor:
    """The input of a module that runs somewhere in `call()`, which runs no further."""
    found: list[Tensor] = []
    stream_inputs(call, [module], lambda _, x: found.append(x))
    return found[0]
