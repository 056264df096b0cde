"""The values of several networks' programs over one data set, kept as far along as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rainbow.errors import RainbowError
from rainbow.program import INPUT, Program, Values
from rainbow.running import device_of, first_images, labels_of

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
        return [{INPUT: images}] * len(self.programs), labels_of(batch)

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
    return min(free_memory() // 4, MOST_MEMORY)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what Linux calls available, within the limits of its container; where
    neither is told, MOST_MEMORY. root: where /proc and /sys are."""
    sizes = _numbers(root / "proc/meminfo")
    found = [1024 * sizes["MemAvailable:"]] if "MemAvailable:" in sizes else []
    for folder, limit, used in _control_groups(root):
        bounds = [_number(folder / name) for name in (limit, used)]
        if None not in bounds:
            stat = _numbers(folder / "memory.stat")
            cache = stat.get("total_inactive_file", stat.get("inactive_file", 0))  # given back when memory is short
            found.append(max(bounds[0] - bounds[1] + cache, 0))
    return min(found, default=MOST_MEMORY)


def _control_groups(root):
    """The folders of this process's control groups and all above them, with the names of limit and use (v2, v1)."""
    v2, v1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
            group = top / path.strip("/")
            for folder in [group, *group.parents]:
                if folder.is_relative_to(top):
                    yield folder, *(v1 if controllers else v2)


def _lines(path):
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _number(path):
    """The number in a file; None for no file, or for no number: "max", no limit."""
    text = "".join(_lines(path)[:1])
    return int(text) if text.isdecimal() else None


def _numbers(path):
    """The first number of every line, by its first word."""
    words = (line.split() for line in _lines(path))
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}
