"""Sets of image files, read, cropped and resized by worker processes."""

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import warnings
from dataclasses import dataclass, field, replace
from threading import Thread, current_thread, main_thread

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info

from utils.data.batches import ImageSet, Normalization, generator
from utils.errors import RunError, UserError, first_line

_log = logging.getLogger(__name__)
_SHARED = "shared memory (/dev/shm)"
_SLOWER = "they hand on images through pipes, which is slower; enlarge it (docker run --shm-size) or use fewer"


def centre(image, size):
    """The central square of `size` pixels of a PIL image, after its shorter side became 256/224·size."""
    width, height = resized(*image.size, round(size * 256 / 224))
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.BILINEAR).crop((left, top, left + size, top + size))


def eight_bits(image):
    """A PIL image whose pixels have 8 bits: 16 bits of grey, which PIL would clip, are scaled. Raises ValueError."""
    if image.mode == "F" or image.mode.startswith("I"):
        values, is_long = np.asarray(image), image.mode == "F" or (image.mode, image.format) == ("I", "TIFF")
        if is_long or not 0 <= values.min() <= values.max() <= 65535:
            raise ValueError(f"grey values {values.min():g}..{values.max():g} of {values.dtype}, expected 8 or 16 bits")
        return Image.fromarray(((values.astype(np.int32) + 128) // 257).astype(np.uint8))
    return image


def resized(width, height, shorter):
    """(width, height) of an image after its shorter side became `shorter` pixels, the longer one rounded down."""
    return tuple(shorter * side // min(width, height) for side in (width, height))


def random_part(image, size, random):
    """A part of a PIL image drawn by `draw_crop`, as a square of `size` pixels, mirrored with probability 1/2."""
    top, left, height, width = draw_crop(random, image.height, image.width)
    part = image.crop((left, top, left + width, top + height)).resize((size, size), Image.BILINEAR)
    return part.transpose(Image.FLIP_LEFT_RIGHT) if random.random() < 0.5 else part


def draw_crop(random, height, width):
    """(top, left, height, width) in pixels of a random part of an image: its area is uniform in 8–100 % of the image's,
    the logarithm of its aspect ratio uniform between those of 3/4 and 4/3. If ten draws do not fit, the largest central
    part with such a ratio."""
    for _ in range(10):
        area = height * width * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    w = min(width, max(1, round(height * 4 / 3)))
    h = min(height, max(1, round(width * 4 / 3)))
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True, eq=False)
class FolderSet(ImageSet):
    """Image files as squares of `size` pixels: augmented by `random_part`, otherwise cut out by `centre`.

    `names` (n,) are paths relative to the folder `root`, as bytes in one array (a list of a million strings would
    gradually be copied into every worker); `labels` (n,) int64 in 0..num_classes−1; `mode` is "RGB" or "L".
    """

    root: str
    names: np.ndarray
    labels: torch.Tensor
    num_classes: int
    normalization: Normalization
    mode: str = "RGB"
    size: int = 224
    reported: set = field(default_factory=set, init=False, repr=False)

    @property
    def image_shape(self):
        """(C, M, N)"""
        return len(self.mode), self.size, self.size

    @property
    def content(self):
        return self.names.view(np.uint8).reshape(len(self.names), -1)

    def path(self, index):
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def select(self, indices, labels, num_classes):
        """The set of the images `indices`, with as many new `labels`."""
        return replace(self, names=self.names[indices.numpy()], labels=labels, num_classes=num_classes)

    def batches(self, loader):
        """The batches of a `Loader`."""
        normalize = self.normalization.on(loader.device, self.size)
        for images, labels, bad in _read(_Reader(self, loader.key), loader):
            for path, why in bad:
                problem = f"{path}: not a readable image ({why})"
                if not loader.skip:
                    raise UserError(f"{problem}; repair or remove it, or pass --bad-images skip")
                self._warn_once(path, f"{problem}, skipped")
            if isinstance(images, np.ndarray):
                self._warn_once(_SHARED, f"{_SHARED} is too small for {loader.workers} processes (-j): {_SLOWER}")
            images = torch.as_tensor(images).to(loader.device, non_blocking=True)
            yield normalize(images), torch.from_numpy(labels).to(loader.device, non_blocking=True)

    def _warn_once(self, what, text):
        if what not in self.reported:
            self.reported.add(what)
            _log.warning(text)


class _Reader(Dataset):
    """Reads whole batches: indices (B,) -> images (B, size, size, C) uint8, labels (B,), bad files [(path, why)].

    A worker's images are in shared memory, or an array, which goes through a pipe, where that has no room.
    """

    def __init__(self, files, key):
        self.files, self.key = files, key

    def __getitem__(self, indices):
        channels, height, width = self.files.image_shape
        images = np.empty((len(indices), height, width, channels), np.uint8)
        good, bad = [], []
        for index in indices.tolist():
            try:
                images[len(good)] = self._read(index).reshape(height, width, channels)
                good.append(index)
            except Exception as error:  # decoders answer foreign bytes with any exception
                bad.append((self.files.path(index), first_line(error)))
        images, labels = images[: len(good)], self.files.labels[good].numpy()
        if get_worker_info() is None:
            return torch.from_numpy(images), labels, bad
        with contextlib.suppress(RuntimeError):
            return torch.from_numpy(images).share_memory_(), labels, bad
        return images, labels, bad

    def _read(self, index):
        with Image.open(self.files.path(index)) as file:
            image = eight_bits(file).convert(self.files.mode)
        if self.key is None:
            return np.asarray(centre(image, self.files.size))
        return np.asarray(random_part(image, self.files.size, generator(*self.key, index)))


def _read(reader, loader):
    """What `reader` reads for each step of `loader`. Raises RunError if its processes cannot start or go on."""
    try:
        if loader.workers:  # more than torch needs: it ends untidily if there are none left in /dev/shm
            [multiprocessing.Queue() for _ in range(loader.workers + 3)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores
            batches = iter(
                DataLoader(
                    reader,
                    sampler=loader.steps,
                    batch_size=None,
                    collate_fn=tuple,  # leaves arrays as they are
                    num_workers=loader.workers,
                    worker_init_fn=_leave_signals_to_the_parent,
                    pin_memory=loader.device.type == "cuda",
                    generator=torch.Generator(),  # the global one belongs to the training
                )
            )
        is_watched = loader.workers and current_thread() is main_thread() and hasattr(signal, "SIGCHLD")
        yield from _watched(batches) if is_watched else batches
    except RunError:
        raise
    except Exception as error:  # what a process that died in the middle of anything leaves
        if not loader.workers:
            raise
        hint = f"memory or {_SHARED} may have run out: use fewer processes (-j), or none (-j 0)"
        what = f"the processes that read images failed: {first_line(error).rstrip(' .')}"
        raise RunError(f"{what}; {hint}") from error


class _Watch:
    """Calls torch's handler of SIGCHLD, which raises RuntimeError if a worker has died, only while a batch is waited
    for: elsewhere it would interrupt anything, the writing of a file too."""

    def __init__(self, handler):
        self.handler, self.is_waiting = handler, False

    def __call__(self, signum, frame):
        if self.is_waiting:
            self.handler(signum, frame)


def _watched(batches):
    watch = signal.getsignal(signal.SIGCHLD)
    if not callable(watch):  # somebody has removed torch's
        return (yield from batches)
    if not isinstance(watch, _Watch):
        watch = _Watch(watch)
        signal.signal(signal.SIGCHLD, watch)
    while True:
        watch.is_waiting = True
        try:
            watch.handler(signal.SIGCHLD, None)  # one may have died since the last batch
            batch = next(batches, None)
        finally:
            watch.is_waiting = False
        if batch is None:
            return None
        yield batch


def _leave_signals_to_the_parent(_):
    """Ctrl-C and a scheduler's SIGTERM reach all processes of a job; the parent decides when its workers stop."""
    warnings.filterwarnings("ignore", module="PIL")
    signal.set_wakeup_fd(-1)
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_stop_when_the_parent_says, args=(os.getppid(),), daemon=True).start()


def _stop_when_the_parent_says(parent):
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
