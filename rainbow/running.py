"""Running networks: images of a batch, evaluation mode, and the inputs of modules on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rainbow.errors import RainbowError


def first_images(batch: Any) -> Tensor:
    """The images of a batch: (images, labels, ...) or the images alone. Raises RainbowError for anything else."""
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        raise RainbowError("the data holds no images: a loader yields (images, labels), or images alone, as tensors")
    return images


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
