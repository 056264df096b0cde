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
        train, val = (_choose_classes(each, args.classes_subset) for each in (train, val))
    indices = _chosen_images(train, args.data_subset)
    if args.randomize_labels is not None:
        train, val = (_with_random_labels(each, args.randomize_labels) for each in (train, val))
    if indices is not None:
        train = train.select(indices, train.labels[indices], train.num_classes)
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


def _choose_classes(images, chosen):
    """The images of the classes in [start, stop, step], renumbered from 0, or of those in {"classes": …}, which keep
    their numbers."""
    if isinstance(chosen, dict):
        indices = torch.isin(images.labels, torch.tensor(chosen["classes"])).nonzero()[:, 0]
        labels, count = images.labels, images.num_classes
    else:
        classes = torch.arange(images.num_classes)[slice(*chosen)]
        new = torch.full((images.num_classes,), -1)
        new[classes] = torch.arange(len(classes))
        labels, count = new[images.labels], len(classes)
        indices = (labels >= 0).nonzero()[:, 0]
    if not len(indices):
        raise UserError(f"--classes-subset leaves none of the {images.num_classes} classes")
    return images.select(indices, labels[indices], count)


def _chosen_images(images, chosen):
    """The indices of [start, stop, step] of every class, or {"range": …} or {"images": …} of all; None for None."""
    if chosen is None:
        return None
    if isinstance(chosen, dict):
        indices = torch.tensor(chosen.get("images") or range(*chosen["range"]), dtype=torch.long)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(images):
            raise UserError(f"--data-subset: the {len(images)} images are numbered from 0 to {len(images) - 1}")
    else:
        of_class = [(images.labels == label).nonzero()[:, 0] for label in range(images.num_classes)]
        indices = torch.cat([each[slice(*chosen)] for each in of_class]).sort().values
    if not len(indices):
        raise UserError("--data-subset leaves no image")
    return indices


def _with_random_labels(images, seed):
    """The images with the labels that the authors' program draws from `seed`, for each set by itself."""
    labels = np.random.RandomState(seed).randint(0, images.num_classes, len(images))
    return images.select(torch.arange(len(images)), torch.from_numpy(labels), images.num_classes)
