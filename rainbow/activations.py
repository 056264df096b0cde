"""The values of several networks' programs over one data set, kept as far along as memory allows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rainbow.errors import RainbowError
from rainbow.program import INPUT, Program, Values
from rainbow.running import device_of, first_images

MOST_MEMORY = 8 << 30  # bytes of activations kept on a CPU unless told otherwise
Batch = tuple[list[Values], Tensor | None]


class Activations:
    """The values of programs of the same steps, continued from the furthest position whose values fit the memory, or
    from the images if none does."""

    def __init__(
        self, programs: Sequence[Program], loader: Iterable, memory: int, progress: Callable[[Iterable, str], Iterable]
    ):
        self.programs, self.loader, self.memory, self.progress = list(programs), loader, memory, progress
        self.position, self.kept = 0, list[Batch]()

    def at(self, position: int, text: str, last_only: bool = False) -> Iterator[Batch]:
        """For each batch, the values live at a position of every network (or the last one only), and the labels."""
        self.advance(position, text)
        programs = self.programs[-1:] if last_only else self.programs
        for values, labels in self.kept if self.position else map(self._read, self.progress(self.loader, text)):
            pairs = zip(programs, values[-len(programs) :])
            yield [program.run(each, self.position, position) for program, each in pairs], labels

    def advance(self, position: int, text: str) -> None:
        """Keeps the values at the furthest position up to this one that fits, instead of those kept before."""
        target = self._furthest(position)
        if target == self.position:
            return
        if not self.position:
            self.kept = [self._moved(self._read(batch), target) for batch in self.progress(self.loader, text)]
        else:
            for index, batch in enumerate(self.progress(self.kept, text)):
                self.kept[index] = self._moved(batch, target)
        self.position = target

    @cached_property
    def images(self) -> int:
        """How many there are."""
        data = getattr(self.loader, "dataset", None)
        if isinstance(data, Sized):
            return len(data)
        first = next(iter(self.loader), None)
        if first is None:
            raise RainbowError("the data is empty")
        if isinstance(self.loader, Sized):
            return len(self.loader) * len(first_images(first))
        return sum(len(first_images(batch)) for batch in self.loader)

    def _read(self, batch: Any) -> Batch:
        images = first_images(batch).to(device_of(self.programs[0].network), non_blocking=True)
        labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
        return [{INPUT: images}] * len(self.programs), labels

    def _moved(self, batch: Batch, target: int) -> Batch:
        values, labels = batch
        return [program.run(each, self.position, target) for program, each in zip(self.programs, values)], labels

    def _furthest(self, position):
        """The furthest position up to the one given whose values fit; the present one if none does."""
        for candidate in range(position, self.position, -1):
            if self.images * sum(program.bytes_at(candidate) for program in self.programs) <= self.memory:
                return candidate
        return self.position


def memory_for(device: torch.device, given: int | None = None) -> int:
    """Bytes for activations: those given, else half of a GPU's free memory, or a quarter of the processor's."""
    if given is not None:
        return given
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on this system
        return MOST_MEMORY // 4
    return min(free // 4, MOST_MEMORY)
