"""The data of a run: one of the published data sets, or the part of it that the arguments choose."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.functional import interpolate

from models.signal import Signal
from utils.data.batches import ImageSet, Normalization
from utils.data.memory import MemorySet
from utils.data.published import GRAY, READERS
from utils.errors import UserError

_CHUNK = 4096  # images converted at a time


@dataclass(frozen=True)
class Datasets:
    """Training and validation images and what a network must know of them."""

    train: ImageSet
    val: ImageSet
    num_classes: int
    signal: Signal
    name: str

    @property
    def digest(self):
        """Which data these are, for checkpoints: the digests of both sets by name."""
        return {"train": self.train.digest, "val": self.val.digest}


def load_datasets(args) -> Datasets:
    """The data of the resolved arguments `args`: dataset, data, data_dir, grayscale, data_subset, classes_subset,
    resize_images, randomize_labels. CIFAR and MNIST are downloaded unless they are in `data_dir`.

    Raises UserError if files are missing or damaged, or if nothing is left of the chosen part.
    """
    try:
        train, val = _converted(READERS[args.dataset](args), args)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if args.classes_subset is not None:
        train, val = _choose_classes(train, args.classes_subset), _choose_classes(val, args.classes_subset)
    train = _choose_images(train, args.data_subset, args.randomize_labels)
    signal = Signal(*train.image_shape, complex=False)
    return Datasets(train, val, train.num_classes, signal, args.dataset)


def _converted(sets, args):
    """Training and validation set in the colours and size of `args`; image files are converted as they are read."""
    if not isinstance(sets[0], MemorySet):
        return sets
    if args.grayscale and sets[0].image_shape[0] == 3:
        sets = [replace(each, images=_in_chunks(_to_gray, each.images), normalization=GRAY) for each in sets]
    if args.resize_images is not None:
        size = args.resize_images
        sets = [replace(each, images=_resized(each.images, size), original=each.images) for each in sets]
    return _standardized(*sets) if args.dataset == "digits" else sets


def _standardized(train, val):
    """Both sets with mean 0 and variance 1 over all pixels of the training set."""
    pixels = train.images.double() / train.normalization.peak
    mean, std = (pixels.mean().item(),), (pixels.std(correction=0).item(),)
    return [replace(each, normalization=Normalization(mean, std, each.normalization.peak)) for each in (train, val)]


def _in_chunks(function, images):
    return torch.cat([function(chunk) for chunk in images.split(_CHUNK)])


def _to_gray(images):
    """(n, M, N, 3) uint8 -> (n, M, N, 1): luma of ITU-R 601 in PIL's fixed-point arithmetic."""
    red, green, blue = images.int().unbind(3)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)[..., None]


def _resized(images, size):
    """(n, M, N, C) uint8 -> (n, size, size, C), bilinear, antialiased."""

    def resize(chunk):
        chunk = chunk.permute(0, 3, 1, 2)
        return interpolate(chunk, (size, size), mode="bilinear", antialias=True).permute(0, 2, 3, 1).contiguous()

    return _in_chunks(resize, images)


def _choose_classes(images, interval):
    """The images of the classes in `interval` [start, stop, step], renumbered from 0."""
    classes = torch.arange(images.num_classes)[slice(*interval)]
    new = torch.full((images.num_classes,), -1)
    new[classes] = torch.arange(len(classes))
    labels = new[images.labels]
    indices = (labels >= 0).nonzero()[:, 0]
    if not len(indices):
        raise UserError(f"--classes-subset leaves none of the {images.num_classes} classes")
    return images.select(indices, labels[indices], len(classes))


def _choose_images(images, interval, seed):
    """The images in `interval` of every class (None: all), with random labels drawn from `seed` (None: their own).

    A random label depends on the image and the seed, not on which other images are chosen.
    """
    if interval is None and seed is None:
        return images
    labels, indices = images.labels, torch.arange(len(images))
    if seed is not None:
        labels = torch.from_numpy(np.random.default_rng(seed).integers(0, images.num_classes, len(images)))
    if interval is not None:
        of_class = [(images.labels == label).nonzero()[:, 0] for label in range(images.num_classes)]
        indices = torch.cat([each[slice(*interval)] for each in of_class]).sort().values
    if not len(indices):
        raise UserError("--data-subset leaves no image")
    return images.select(indices, labels[indices], images.num_classes)
