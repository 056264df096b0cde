"""Sets of images and the batches they give: a set in memory, cropped and flipped a batch at a time, and a folder of
image files that worker processes read.

Whatever is drawn is a function of (seed, epoch) and of the image's index alone, so that a run can go on at any step,
with any number of workers or processes, as if it had never stopped.
"""

import logging
import math
import os
import signal
import warnings
from dataclasses import dataclass, field, replace
from threading import Thread

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from utils.data.names import BAD_IMAGES
from utils.errors import UserError

_ORDER, _AUGMENTATION = 0, 1  # streams of random numbers
_NORMALIZED_BYTES = 64 << 20  # sets this small are kept normalised too
_RESIDENT_BYTES = 1 << 30  # sets this small are kept on the accelerator
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Normalization:
    """(x / peak − mean) / std per channel, for pixels x in 0..peak."""

    mean: tuple
    std: tuple
    peak: int = 255

    def on(self, device, width):
        """A function (B, M, width, C) uint8 -> (B, C, M, width) float32 in channels-last memory, on `device`."""
        std = torch.tensor(self.std)
        scale = (1 / (self.peak * std)).repeat(width).to(device)  # (width·C,): long rows are what is fast
        shift = (-torch.tensor(self.mean) / std).repeat(width).to(device)

        def normalize(images):
            rows = images.reshape(*images.shape[:2], len(scale)).float()
            return torch.addcmul(shift, rows, scale, out=rows).view(images.shape).permute(0, 3, 1, 2)

        return normalize


@dataclass(frozen=True)
class Plan:
    """Indices of the images of each batch: `batch_size` of all ranks together, this rank's share being contiguous.

    Iterates over the steps from `start_step` on. Where a last batch has fewer images than there are ranks, the shares
    of some are empty.
    """

    order: np.ndarray
    batch_size: int
    start_step: int = 0
    rank: int = 0
    world_size: int = 1

    def __len__(self):
        return max(math.ceil(len(self.order) / self.batch_size) - self.start_step, 0)

    def __iter__(self):
        for step in range(self.start_step, self.start_step + len(self)):
            batch = self.order[step * self.batch_size : (step + 1) * self.batch_size]
            low, high = (r * len(batch) // self.world_size for r in (self.rank, self.rank + 1))
            yield batch[low:high]


def _random(*key):
    """numpy's generator for a stream of random numbers that `key` (integers ≥ 0) determines."""
    return np.random.default_rng(np.random.SeedSequence(key))


def _order(size, shuffle, seed, epoch):
    return _random(seed, epoch, _ORDER).permutation(size) if shuffle else np.arange(size)


def crop_and_flip(images, offsets, flips, padding):
    """Crops each image of (B, M, N, C) at its own `offsets` (B, 2), rows then columns, of the image with `padding`
    zero pixels on every side, and mirrors those whose `flips` (B,) is true. Same shape; the last two on the CPU."""
    count, height, width, channels = images.shape
    flipped = flips.nonzero()[:, 0]
    chosen = images.index_select(0, flipped.to(images.device))
    padded = images.new_zeros(count + len(flipped), height + 2 * padding, width + 2 * padding, channels)
    inside = padded[:, padding : padding + height, padding : padding + width]
    inside[:count] = images
    inside[count:] = chosen.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)  # fast in this order
    source = torch.arange(count)
    source[flipped] = count + torch.arange(len(flipped))
    left = torch.where(flips, 2 * padding - offsets[:, 1], offsets[:, 1])  # as if mirrored after the crop
    rows = source[:, None] * padded.shape[1] + offsets[:, :1] + torch.arange(height)
    starts = rows * padded.shape[2] + left[:, None]  # (B, M): first pixel of each row
    windows = padded.view(-1).unfold(0, width * channels, channels)  # (pixels, N·C), overlapping
    return windows.index_select(0, starts.view(-1).to(images.device)).view(images.shape)


@dataclass(frozen=True, eq=False)
class MemorySet:
    """Images in memory: `images` (n, M, N, C) uint8, `labels` (n,) int64 in 0..num_classes−1.

    With a `padding`, augmented batches are cropped with so many zero pixels around (before normalisation) and mirrored
    with probability 1/2; without, augmentation changes nothing.
    """

    images: torch.Tensor
    labels: torch.Tensor
    num_classes: int
    normalization: Normalization
    padding: int = 0
    _kept: dict = field(default_factory=dict, init=False, repr=False)

    def __len__(self):
        return len(self.labels)

    @property
    def image_shape(self):
        """(C, M, N)"""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def select(self, indices, labels, num_classes):
        """The set of the images `indices` with new `labels` (as many)."""
        return replace(self, images=self.images[indices], labels=labels, num_classes=num_classes)

    def loader(
        self,
        batch_size,
        *,
        shuffle=False,
        seed=0,
        epoch=0,
        augment=False,
        start_step=0,
        rank=0,
        world_size=1,
        workers=0,
        device="cpu",
        bad_images="error",
    ):
        """Batches ((B, C, M, N) float32 in channels-last memory, (B,) int64) on `device`; `len` of it counts them.

        `batch_size` images over all ranks together, of which `rank` gets its share. `start_step` skips that many
        batches. `workers` and `bad_images` are for sets in files and unused here.
        """
        plan = Plan(_order(len(self), shuffle, seed, epoch), batch_size, start_step, rank, world_size)
        draws = None
        if augment and self.padding:
            random = _random(seed, epoch, _AUGMENTATION)
            offsets = random.integers(0, 2 * self.padding, (len(self), 2), endpoint=True)
            draws = torch.from_numpy(offsets), torch.from_numpy(random.random(len(self)) < 0.5)
        return _MemoryBatches(self, plan, draws, torch.device(device))

    def pixels_on(self, device):
        """The images as (n, M, N, C) uint8 on `device`, copied once; those of this process if they are too many."""
        if device.type == "cpu" or self.images.nbytes > _RESIDENT_BYTES:
            return self.images
        if device not in self._kept:
            self._kept[device] = self.images.to(device)
        return self._kept[device]

    def normalized_on(self, device):
        """The images as (n, M, N, C) float32 on `device`, normalised once; None if that is too much to keep."""
        if 4 * self.images.nbytes > _NORMALIZED_BYTES:
            return None
        key = device, "normalized"
        if key not in self._kept:
            normalize = self.normalization.on(device, self.images.shape[2])
            self._kept[key] = normalize(self.images.to(device)).permute(0, 2, 3, 1)
        return self._kept[key]


@dataclass(frozen=True, eq=False)
class _MemoryBatches:
    images: MemorySet
    plan: Plan
    draws: tuple | None
    device: torch.device

    def __len__(self):
        return len(self.plan)

    def __iter__(self):
        normalized = self.images.normalized_on(self.device) if self.draws is None else None
        if normalized is None:
            return self._from_pixels()
        return self._from_normalized(normalized)

    def _from_normalized(self, normalized):
        for indices in self.plan:
            chosen = torch.from_numpy(indices)
            images = normalized.index_select(0, chosen.to(self.device))  # (B, M, N, C)
            yield images.permute(0, 3, 1, 2), _to(self.images.labels[chosen], self.device)

    def _from_pixels(self):
        pixels = self.images.pixels_on(self.device)
        normalize = self.images.normalization.on(self.device, pixels.shape[2])
        for indices in self.plan:
            chosen = torch.from_numpy(indices)
            images = _to(pixels.index_select(0, chosen.to(pixels.device)), self.device)  # (B, M, N, C)
            if self.draws is not None and len(chosen):
                offsets, flips = (draw[chosen] for draw in self.draws)
                images = crop_and_flip(images, offsets, flips, self.images.padding)
            yield normalize(images), _to(self.images.labels[chosen], self.device)


def _to(tensor, device):
    """On `device`, without waiting for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class FolderSet:
    """Image files, made square of `size` pixels: augmented, a random part of the image of 8 to 100 % of its area and
    aspect ratio 3/4 to 4/3, mirrored with probability 1/2; otherwise the centre, after the shorter side became
    256/224·size. `labels` (n,) int64; `mode` "RGB" or "L".

    Paths lie in one array of bytes: a list of a million strings would be copied, bit by bit, into every worker.
    """

    root: str
    names: np.ndarray
    ends: np.ndarray
    labels: torch.Tensor
    num_classes: int
    normalization: Normalization
    mode: str = "RGB"
    size: int = 224
    reported: set = field(default_factory=set, init=False, repr=False)

    @classmethod
    def of(cls, root, names, labels, **fields):
        """The set of the files `names`, relative to the folder `root`."""
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([len(name) for name in encoded])
        return cls(str(root), np.frombuffer(b"".join(encoded), np.uint8), ends, labels, **fields)

    def __len__(self):
        return len(self.labels)

    @property
    def image_shape(self):
        """(C, M, N)"""
        return len(self.mode), self.size, self.size

    def name(self, index):
        """The path of an image, relative to `root`."""
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.names[start : self.ends[index]].tobytes())

    def path(self, index):
        return os.path.join(self.root, self.name(index))

    def select(self, indices, labels, num_classes):
        """The set of the images `indices` with new `labels` (as many)."""
        fields = {"normalization": self.normalization, "mode": self.mode, "size": self.size}
        names = [self.name(index) for index in indices.tolist()]
        return FolderSet.of(self.root, names, labels, num_classes=num_classes, **fields)

    def loader(
        self,
        batch_size,
        *,
        shuffle=False,
        seed=0,
        epoch=0,
        augment=False,
        start_step=0,
        rank=0,
        world_size=1,
        workers=0,
        device="cpu",
        bad_images="error",
    ):
        """Batches as those of `MemorySet.loader`, read by `workers` processes (0: by this one).

        A file that is no readable image raises UserError with its path, or, with `bad_images` "skip", is left out of
        its batch (which may become empty) and named once in the log.
        """
        if bad_images not in BAD_IMAGES:
            raise UserError(f"bad images: choose among {', '.join(BAD_IMAGES)}, not {bad_images!r}")
        plan = Plan(_order(len(self), shuffle, seed, epoch), batch_size, start_step, rank, world_size)
        reader = _Reader(self, (seed, epoch, _AUGMENTATION) if augment else None)
        return _FolderBatches(reader, plan, workers, torch.device(device), bad_images == "skip")


class _Reader(Dataset):
    """Reads whole batches: indices (B,) -> images (B, size, size, C) uint8, labels (B,), bad files [(path, why)]."""

    def __init__(self, files, key):
        self.files = files
        self.key = key

    def __getitem__(self, indices):
        files = self.files
        channels, height, width = files.image_shape
        images = np.empty((len(indices), height, width, channels), np.uint8)
        good, bad = [], []
        for index in indices.tolist():
            try:
                images[len(good)] = self._read(index).reshape(height, width, channels)
                good.append(index)
            except Exception as error:  # decoders meet foreign bytes with any exception
                bad.append((files.path(index), _reason(error)))
        return torch.from_numpy(images[: len(good)]), files.labels[good], bad

    def _read(self, index):
        with open(self.files.path(index), "rb") as file:
            image = Image.open(file).convert(self.files.mode)
        if self.key is None:
            return np.asarray(centre(image, self.files.size))
        return np.asarray(random_part(image, self.files.size, _random(*self.key, index)))


def centre(image, size):
    """The central square of `size` pixels of a PIL image whose shorter side became 256/224·size."""
    shorter = round(size * 256 / 224)
    scale = shorter / min(image.size)
    width, height = (int(scale * side) if side > min(image.size) else shorter for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.BILINEAR).crop((left, top, left + size, top + size))


def random_part(image, size, random):
    """A part of a PIL image drawn by `draw_crop`, as a square of `size` pixels, mirrored with probability 1/2."""
    top, left, height, width = draw_crop(random, image.height, image.width)
    part = image.crop((left, top, left + width, top + height)).resize((size, size), Image.BILINEAR)
    return part.transpose(Image.FLIP_LEFT_RIGHT) if random.random() < 0.5 else part


def draw_crop(random, height, width):
    """(top, left, height, width) of a random part of an image: area uniform in 8–100 % of the image's, logarithm of
    the aspect ratio uniform between those of 3/4 and 4/3; if ten draws do not fit, the largest centre part that has
    such a ratio. In pixels."""
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
class _FolderBatches:
    reader: _Reader
    plan: Plan
    workers: int
    device: torch.device
    skip: bool

    def __len__(self):
        return len(self.plan)

    def __iter__(self):
        files = self.reader.files
        normalize = files.normalization.on(self.device, files.size)
        for images, labels, bad in self._read():
            for path, why in bad:
                self._report(path, why)
            images = images.to(self.device, non_blocking=True)
            yield normalize(images), labels.to(self.device, non_blocking=True)

    def _read(self):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores
            loader = DataLoader(
                self.reader,
                sampler=self.plan,
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=self.workers,
                worker_init_fn=_leave_signals_to_the_parent,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator(),  # the global one is the training's
            )
            return iter(loader)

    def _report(self, path, why):
        if not self.skip:
            raise UserError(f"{path}: no readable image ({why}); repair or remove it, or pass --bad-images skip")
        reported = self.reader.files.reported
        if path not in reported:
            reported.add(path)
            _log.warning("%s: no readable image (%s), skipped", path, why)


def _as_it_is(batch):
    return batch


def _reason(error):
    """Why an image could not be read, in a line."""
    if isinstance(error, UnidentifiedImageError):
        return "of no known format"
    return " ".join(str(error).split()) or type(error).__name__


def _leave_signals_to_the_parent(_):
    """Ctrl-C and a scheduler's SIGTERM reach all processes of a job; the parent decides when its workers stop."""
    warnings.filterwarnings("ignore", module="PIL")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_stop_when_the_parent_says, args=(os.getppid(),), daemon=True).start()


def _stop_when_the_parent_says(parent):
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
