"""The data sets: CIFAR-10 and -100, MNIST, ImageNet, ImageNet32 and scikit-learn's digits, read from their published
files; and the choice of a part of them."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from models.signal import Signal
from utils.data.batches import FolderSet, MemorySet, Normalization
from utils.data.safe_pickle import read_pickle
from utils.errors import UserError

COLOR = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GRAY = Normalization((0.481,), (0.239,))
MNIST = Normalization((0.1307,), (0.3081,))
PADDING = 4  # zero pixels around CIFAR's and ImageNet32's images before they are cropped
_CHUNK = 4096  # images converted at a time
_DIGITS_TRAIN = 1297
_IMAGE_FILES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Datasets:
    """Training and validation images (`MemorySet` or `FolderSet`), and what a network must know of them."""

    train: MemorySet | FolderSet
    val: MemorySet | FolderSet
    num_classes: int
    signal: Signal
    name: str


def load_datasets(args) -> Datasets:
    """The data of the resolved arguments `args`: dataset, data, data_dir, grayscale, data_subset, classes_subset,
    resize_images, randomize_labels. CIFAR and MNIST are downloaded if they are not in `data_dir`.

    Raises UserError where files are missing or damaged, or nothing is chosen.
    """
    try:
        train, val = _imagenet(args) if args.dataset == "imagenet" else _in_memory(args)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if args.classes_subset is not None:
        train, val = _choose_classes(train, args.classes_subset), _choose_classes(val, args.classes_subset)
    train = _choose_images(train, args.data_subset, args.randomize_labels)
    signal = Signal(*train.image_shape, complex=False)
    return Datasets(train, val, train.num_classes, signal, args.dataset)


def _in_memory(args):
    readers = {"cifar10": _cifar, "cifar100": _cifar, "mnist": _mnist, "imagenet32": _imagenet32, "digits": _digits}
    folder = Path(args.data if args.dataset == "imagenet32" else args.data_dir)
    sets = readers[args.dataset](folder, args.dataset)
    if args.grayscale and sets[0].image_shape[0] == 3:
        sets = [replace(each, images=_in_chunks(_to_gray, each.images), normalization=GRAY) for each in sets]
    if args.resize_images is not None:
        sets = [replace(each, images=_resized(each.images, args.resize_images)) for each in sets]
    return _standardized(*sets) if args.dataset == "digits" else sets


def _standardized(train, val):
    """Both sets with mean 0 and variance 1 over all pixels of the training set."""
    pixels = train.images.double() / train.normalization.peak
    mean, std = (pixels.mean().item(),), (pixels.std(correction=0).item(),)
    return [replace(each, normalization=Normalization(mean, std, each.normalization.peak)) for each in (train, val)]


def _in_chunks(function, images):
    return torch.cat([function(chunk) for chunk in images.split(_CHUNK)])


def _to_gray(images):
    """(n, M, N, 3) uint8 -> (n, M, N, 1): luma of ITU-R 601 in the fixed-point numbers of PIL."""
    red, green, blue = images.int().unbind(3)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)[..., None]


def _resized(images, size):
    """(n, M, N, C) uint8 -> (n, size, size, C), bilinear, smoothed where it shrinks."""

    def resize(chunk):
        chunk = chunk.permute(0, 3, 1, 2)
        return interpolate(chunk, (size, size), mode="bilinear", antialias=True).permute(0, 2, 3, 1).contiguous()

    return _in_chunks(resize, images)


def _choose_classes(images, interval):
    """The images of the classes in `interval` [start, stop, step], numbered anew from 0."""
    classes = torch.arange(images.num_classes)[slice(*interval)]
    new = torch.full((images.num_classes,), -1)
    new[classes] = torch.arange(len(classes))
    labels = new[images.labels]
    indices = (labels >= 0).nonzero()[:, 0]
    if not len(indices):
        raise UserError(f"--classes-subset leaves none of the {images.num_classes} classes")
    return images.select(indices, labels[indices], len(classes))


def _choose_images(images, interval, seed):
    """Of every class the images in `interval` (None: all), with random labels of a `seed` (None: their own).

    A random label depends on the image and the seed, not on what else is chosen of its classes.
    """
    if interval is None and seed is None:
        return images
    labels, indices = images.labels, torch.arange(len(images))
    if seed is not None:
        drawn = np.random.default_rng(seed).integers(0, images.num_classes, len(images))
        labels = torch.from_numpy(drawn)
    if interval is not None:
        of_class = [(images.labels == label).nonzero()[:, 0] for label in range(images.num_classes)]
        indices = torch.cat([each[slice(*interval)] for each in of_class]).sort().values
    if not len(indices):
        raise UserError("--data-subset leaves no image")
    return images.select(indices, labels[indices], images.num_classes)


def _labels(path, values, count, classes, first=0):
    """Labels (count,) int64 from 0, of published labels from `first`; raises UserError naming `path`."""
    try:
        labels = torch.from_numpy(np.asarray(values, dtype=np.int64)) - first
    except (ValueError, TypeError, OverflowError):
        labels = torch.tensor([])
    if labels.shape != (count,):
        raise UserError(f"{path}: has no list of {count} labels, one for each image; get it again")
    if count and not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(f"{path}: labels are not all in {first}..{first + classes - 1}")
    return labels


def _planes(path, data):
    """(n, 3·S·S) uint8, colour planes one after the other, -> (n, S, S, 3); raises UserError naming `path`."""
    size = round((data.shape[1] / 3) ** 0.5) if isinstance(data, np.ndarray) and data.ndim == 2 else 0
    if not size or data.dtype != np.uint8 or data.shape[1] != 3 * size * size:
        raise UserError(f"{path}: its 'data' are no rows of bytes, one for each colour image; get it again")
    return torch.from_numpy(data.reshape(-1, 3, size, size).transpose(0, 2, 3, 1).copy())


# CIFAR


def _cifar(data_dir, name):
    """The training and test set of CIFAR-10 or CIFAR-100."""
    from utils.data.downloads import cifar_files  # torchvision is slow to import

    return [_cifar_set(files, name) for files in cifar_files(data_dir, name)]


def _cifar_set(files, name):
    key, classes = {"cifar10": ("labels", 10), "cifar100": ("fine_labels", 100)}[name]
    images, labels = [], []
    for path in files:
        content = read_pickle(path)
        images.append(_planes(path, content.get("data")))
        labels.append(_labels(path, content.get(key), len(images[-1]), classes))
        if images[-1].shape[1] != 32:
            raise UserError(f"{path}: its images are not 32×32")
    return MemorySet(torch.cat(images), torch.cat(labels), classes, COLOR, PADDING)


# MNIST


def _mnist(data_dir, name):
    """The training and test set of MNIST."""
    from utils.data.downloads import mnist_files  # torchvision is slow to import

    return [_mnist_set(*files) for files in mnist_files(data_dir)]


def _mnist_set(images_path, labels_path):
    images = _idx(images_path, 3)
    labels = _labels(labels_path, _idx(labels_path, 1), len(images), 10)
    return MemorySet(torch.from_numpy(images)[..., None], labels, 10, MNIST)


def _idx(path, dimensions):
    """The array of bytes in an IDX file: 0, 0, 8 (bytes), dimensions, sizes as big-endian int32, the bytes."""
    data = path.read_bytes()
    start = 4 + 4 * dimensions
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) < start:
        raise UserError(f"{path}: is no IDX file of bytes with {dimensions} dimensions; get it again")
    shape = np.frombuffer(data, ">i4", dimensions, 4).tolist()
    if min(shape) < 0 or len(data) - start != np.prod(shape, dtype=object):
        raise UserError(f"{path}: holds {len(data) - start} bytes where {shape} were announced; get it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy()


# ImageNet32


def _imagenet32(folder, name):
    """The training and validation set of ImageNet32 (or its sisters of other sizes), from its pickled batches."""
    train = [folder / f"train_data_batch_{i}" for i in range(1, 11)]
    val = [folder / "val_data"]
    missing = [path.name for path in train + val if not path.is_file()]
    if missing:
        raise UserError(
            f"ImageNet32 is not in {folder} ({', '.join(missing)} missing): unpack Imagenet32_train.zip and "
            f"Imagenet32_val.zip there, from image-net.org/download-images; --digits needs no files"
        )
    return [_imagenet32_set(files) for files in (train, val)]


def _imagenet32_set(files):
    images, labels, used = None, [], 0
    for path in files:
        content = read_pickle(path)
        batch = _planes(path, content.get("data"))
        if images is None:
            room = sum(file.stat().st_size for file in files) // batch[0].numel()  # no file is smaller than its pixels
            images = torch.empty((room, *batch.shape[1:]), dtype=torch.uint8)
        if batch.shape[1:] != images.shape[1:]:
            raise UserError(f"{path}: its images have another size than those of {files[0].name}")
        labels.append(_labels(path, content.get("labels"), len(batch), 1000, first=1))
        images[used : used + len(batch)] = batch
        used += len(batch)
    return MemorySet(images[:used], torch.cat(labels), 1000, COLOR, PADDING)


# digits


def _digits(data_dir, name):
    """scikit-learn's 8×8 digits, in a fixed random order: 1,297 for training, 500 for testing."""
    from sklearn.datasets import load_digits  # slow to import, and needed here only

    images, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    steps = 15  # pixels are integers 0..16; finer steps leave room for resizing
    pixels = torch.from_numpy((steps * images[order]).astype(np.uint8)).view(-1, 8, 8, 1)
    labels = torch.from_numpy(labels[order].astype(np.int64))
    unit = Normalization((0.0,), (1.0,), peak=16 * steps)
    parts = slice(None, _DIGITS_TRAIN), slice(_DIGITS_TRAIN, None)
    return [MemorySet(pixels[part], labels[part], 10, unit) for part in parts]


# ImageNet


def _imagenet(args):
    """The folders train/ and val/, each with a folder of image files per class."""
    folder = Path(args.data)
    train, val = folder / "train", folder / "val"
    if not (train.is_dir() and val.is_dir()):
        raise UserError(
            f"ImageNet is not in {folder}, which needs the folders train/ and val/ with a folder of images for each "
            f"class: get ILSVRC 2012 from image-net.org/download-images and unpack it there; --digits needs no files"
        )
    classes = _folders(train)
    if not classes:
        raise UserError(f"{train}: has no folder of images for any class")
    unknown = sorted(set(_folders(val)) - set(classes))
    if unknown:
        raise UserError(f"{val / unknown[0]}: is a class that {train} does not have")
    fields = {
        "num_classes": len(classes),
        "normalization": GRAY if args.grayscale else COLOR,
        "mode": "L" if args.grayscale else "RGB",
        "size": args.resize_images or 224,
    }
    return [_image_folder(part, classes, fields) for part in (train, val)]


def _folders(path):
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))


def _image_folder(folder, classes, fields):
    names, labels = [], []
    for label, name in enumerate(classes):
        if (folder / name).is_dir():
            files = sorted(f for f in os.listdir(folder / name) if f.lower().endswith(_IMAGE_FILES))
            names.extend(os.path.join(name, file) for file in files)
            labels.extend([label] * len(files))
    if not names:
        raise UserError(f"{folder}: has no image files in folders of classes")
    return FolderSet.of(folder, names, torch.tensor(labels), **fields)
