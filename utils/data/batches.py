"""What every loader of images shares: which images form a batch, and how their pixels become numbers.

Whatever is drawn is a function of (seed, epoch) and of the image's index alone, so that a run resumes at any step, with
any number of workers or processes, as if it had never stopped.
"""

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np
import torch

from utils.data.names import BAD_IMAGES
from utils.errors import UserError, as_user_error

_ORDER, _AUGMENTATION = 0, 1  # streams of random numbers


def generator(*key):
    """numpy's generator of the stream of random numbers that `key` (integers ≥ 0) determines."""
    return np.random.default_rng(np.random.SeedSequence(key))


@dataclass(frozen=True)
class Normalization:
    """(x / peak − mean) / std per channel, for pixels x in 0..peak."""

    mean: tuple
    std: tuple
    peak: int = 255

    def on(self, device, width):
        """A function (B, M, width, C) uint8 -> (B, C, M, width) float32 in channels-last memory, on `device`."""
        std = torch.tensor(self.std)
        scale = (1 / (self.peak * std)).repeat(width).to(device)  # (width·C,): long rows are fast
        shift = (-torch.tensor(self.mean) / std).repeat(width).to(device)

        def normalize(images):
            rows = images.reshape(*images.shape[:2], len(scale)).float()
            return torch.addcmul(shift, rows, scale, out=rows).view(images.shape).permute(0, 3, 1, 2)

        return normalize


def shares(size, batch_size, *, shuffle=False, seed=0, epoch=0, start_step=0, rank=0, world_size=1):
    """Indices of the images of each step from `start_step` on: this rank's contiguous share of a batch of all ranks.

    If a batch has fewer images than there are ranks, some shares are empty.
    """
    order = generator(seed, epoch, _ORDER).permutation(size) if shuffle else np.arange(size)
    batches = [order[first : first + batch_size] for first in range(start_step * batch_size, size, batch_size)]
    return [b[rank * len(b) // world_size : (rank + 1) * len(b) // world_size] for b in batches]


def class_labels(values, count, classes, first=0):
    """Labels (count,) int64 from 0, of labels (count,) or (count, 1) from `first`. Raises ValueError."""
    labels = np.asarray(values)
    if labels.shape not in ((count,), (count, 1)):
        hint = "; of one-hot labels pass the argmax" if labels.ndim > 1 else ""
        raise ValueError(f"labels of shape {labels.shape}: expected {count} labels, one class number per image{hint}")
    if count and labels.dtype.kind not in "iu":
        raise ValueError(f"labels of type {labels.dtype}: expected {count} labels, integers from {first}")
    labels = torch.from_numpy(labels.reshape(-1).astype(np.int64)) - first
    if count and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels are not all in {first}..{first + classes - 1}")
    return labels


class Loader:
    """Batches ((B, C, M, N) float32 in channels-last memory, (B,) int64) on `device`, made by `images` from `steps`.

    `batch_size` counts the images of all ranks together; `part` is shuffle, start_step, rank, world_size of `shares`.
    Image files are read by `workers` processes (0: by this one); an unreadable one raises UserError with its path or,
    if `bad_images` is "skip", is left out of its batch (which may become empty) and named once in the log.
    """

    def __init__(
        self, images, batch_size, *, augment=False, seed=0, epoch=0, device="cpu", workers=0, bad_images="error", **part
    ):
        if bad_images not in BAD_IMAGES:
            raise UserError(f"bad images: choose among {', '.join(BAD_IMAGES)}, not {bad_images!r}")
        self.images, self.workers, self.skip = images, workers, bad_images == "skip"
        self.steps = shares(len(images), batch_size, seed=seed, epoch=epoch, **part)
        self.key = (seed, epoch, _AUGMENTATION) if augment else None  # of the random numbers of augmentation
        self.device = torch.device(device)

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        return self.images.batches(self)


class ImageSet:
    """A set of images: `labels` (n,) int64 in 0..num_classes−1, `image_shape` (C, M, N), `batches` of a `Loader`;
    `content`, the array of their names or pixels. Labels (n, 1) are flattened, others refused with UserError."""

    def __post_init__(self):
        with as_user_error():
            labels = class_labels(self.labels, len(self.content), self.num_classes)
        object.__setattr__(self, "labels", labels)  # of a frozen dataclass

    def __len__(self):
        return len(self.labels)

    @cached_property
    def digest(self):
        """Which images and labels these are, in what order: their number and a hash, the same on every machine."""
        found = sha256(f"{self.num_classes} {self.content.shape}".encode())
        for array in (self.labels.numpy(), self.content):
            found.update(np.ascontiguousarray(array).data.cast("B"))
        return f"{len(self)} images, {found.hexdigest()[:16]}"

    def loader(self, batch_size, **options):
        """A `Loader` of these images."""
        return Loader(self, batch_size, **options)
