"""The published data sets, read from their files: CIFAR and MNIST by torchvision, which also downloads them, the digits
by scikit-learn. Both are slow to import, so that only those who need them wait."""

import gzip
import os
import shutil
import socket
import zlib
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from filelock import FileLock

from utils.data.batches import Normalization, class_labels
from utils.data.folders import FolderSet
from utils.data.memory import MemorySet
from utils.data.safe_pickle import read_pickle
from utils.errors import UserError, as_user_error, first_line

COLOR = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GRAY = Normalization((0.481,), (0.239,))
MNISTS = {  # torchvision's reader, and the mean and deviation of the training set's pixels
    "mnist": ("MNIST", Normalization((0.1307,), (0.3081,))),
    "fashion-mnist": ("FashionMNIST", Normalization((0.2860,), (0.3530,))),
    "kmnist": ("KMNIST", Normalization((0.1918,), (0.3483,))),
}
PADDING = 4  # zero pixels around CIFAR's and ImageNet32's images before they are cropped
_DIGITS_TRAIN = 1297
_IMAGE_FILES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


def _cifar(args):
    """CIFAR-10 or CIFAR-100. torchvision unpickles only files with their published checksums."""
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[args.dataset]
    data_dir = Path(args.data_dir)
    folder = _downloaded(data_dir, reader, reader.base_folder, "", reader.url, [reader.filename])
    try:
        parts = [reader(data_dir, train=train) for train in (True, False)]
    except RuntimeError:
        files = [*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])]
        bad = next((name for name, md5 in files if not check_integrity(folder / name, md5)), "")
        problem = "is not the published file (other checksum)" if (folder / bad).exists() else "is missing"
        raise UserError(f"{folder / bad}: {problem}; remove {folder} to have it downloaded again") from None
    images = [torch.from_numpy(np.ascontiguousarray(part.data)) for part in parts]
    return [MemorySet(i, torch.tensor(p.targets), len(p.classes), COLOR, PADDING) for i, p in zip(images, parts)]


def _mnist(args):
    """MNIST, Fashion-MNIST or KMNIST, from IDX files, gzipped or not."""
    from torchvision import datasets
    from torchvision.datasets.mnist import read_image_file, read_label_file

    name, normalization = MNISTS[args.dataset]
    reader, inside = getattr(datasets, name), os.path.join(name, "raw")
    archives = [archive for archive, _ in reader.resources]
    folder = _downloaded(Path(args.data_dir), reader, name, inside, reader.mirrors[0], archives, inside) / "raw"
    sets = []
    for part in ("train", "t10k"):
        images = _idx(read_image_file, folder / f"{part}-images-idx3-ubyte")[..., None]
        path = folder / f"{part}-labels-idx1-ubyte"
        with as_user_error(f"{path}: "):
            labels = class_labels(_idx(read_label_file, path), len(images), 10)
        sets.append(MemorySet(images, labels, 10, normalization))
    return sets


def _idx(read, path):
    """What a torchvision reader reads from a file, or from its gzipped form PATH.gz."""
    packed = path.with_name(f"{path.name}.gz")
    with TemporaryDirectory() as folder:
        try:
            if packed.is_file() and not path.exists():
                plain, path = Path(folder) / path.name, packed
                plain.write_bytes(gzip.decompress(packed.read_bytes()))
                return read(plain)
            return read(path)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path}: damaged ({first_line(error)}); download it again") from None
        except OSError:
            raise
        except Exception as error:  # the reader checks with assertions and answers foreign bytes with any exception
            raise UserError(f"{path}: not an IDX file ({first_line(error)}); download it again") from None


def _downloaded(data_dir, reader, name, inside, url, archives, place=""):
    """The folder `name` in `data_dir`; if there is none, `reader` downloads it beside its place, one process at a time.

    Archives that are already in `data_dir` are not downloaded; torchvision looks for them in the folder `inside`.
    place: where in `data_dir` a user may put them.
    """
    folder = data_dir / name
    if folder.is_dir():
        return folder
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / ".download.lock"), TemporaryDirectory(dir=data_dir, prefix=".download-") as beside:
            if not folder.is_dir():
                os.makedirs(os.path.join(beside, inside), exist_ok=True)
                for archive in archives:
                    if (data_dir / archive).is_file():
                        shutil.copy(data_dir / archive, os.path.join(beside, inside))
                with ExitStack() as after:
                    after.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
                    socket.setdefaulttimeout(30)  # seconds of silence
                    reader(beside, download=True)
                os.replace(os.path.join(beside, name), folder)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"no data in {folder}, and the download failed ({reason}): put {', '.join(archives)} from {url} "
            f"into {data_dir / place}; --digits needs no files"
        ) from None
    return folder


def _imagenet32(args):
    """ImageNet32 (or its siblings of other sizes), from its pickled batches."""
    folder = Path(args.data)
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
        with as_user_error(f"{path}: "):
            labels.append(class_labels(content.get("labels", []), len(batch), 1000, first=1))
        images[used : used + len(batch)] = batch
        used += len(batch)
    return MemorySet(images[:used], torch.cat(labels), 1000, COLOR, PADDING)


def _planes(path, data):
    """(n, 3·S·S) uint8, colour planes one after the other, -> (n, S, S, 3); raises UserError naming `path`."""
    size = round((data.shape[1] / 3) ** 0.5) if isinstance(data, np.ndarray) and data.ndim == 2 else 0
    if not size or data.dtype != np.uint8 or data.shape[1] != 3 * size * size or not len(data):
        raise UserError(f"{path}: its 'data' are not rows of bytes, one per colour image; download it again")
    return torch.from_numpy(data.reshape(-1, 3, size, size).transpose(0, 2, 3, 1).copy())


def _digits(args):
    """scikit-learn's 8×8 digits, in a fixed random order: 1,297 for training, 500 for testing."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    steps = 15  # pixels are integers 0..16; finer steps leave room for resizing
    pixels = torch.from_numpy((steps * images[order]).astype(np.uint8)).view(-1, 8, 8, 1)
    labels = torch.from_numpy(labels[order].astype(np.int64))
    unit = Normalization((0.0,), (1.0,), peak=16 * steps)
    parts = slice(None, _DIGITS_TRAIN), slice(_DIGITS_TRAIN, None)
    return [MemorySet(pixels[part], labels[part], 10, unit) for part in parts]


def _imagenet(args):
    """ImageNet: the folders train/ and val/, each with a folder of image files per class."""
    folder = Path(args.data)
    train, val = folder / "train", folder / "val"
    if not (train.is_dir() and val.is_dir()):
        raise UserError(
            f"ImageNet is not in {folder} ({_found(folder)}), which needs the folders train/ and val/ with a folder of "
            f"images for each class: get ILSVRC 2012 from image-net.org/download-images and unpack it there; --digits "
            f"needs no files"
        )
    classes = [name.removesuffix("/") for name in _listed(train) if name.endswith("/")]
    normalization, mode = (GRAY, "L") if args.grayscale else (COLOR, "RGB")
    for part, other in ((train, val), (val, train)):
        if not any(name.endswith("/") for name in _listed(part)):
            raise UserError(f"{part}: no folder of images for any class ({_found(part)})")
        if missing := [name for name in _listed(other) if name.endswith("/") and not (part / name).is_dir()]:
            raise UserError(f"{part}: no folder {missing[0]}, a class that {other} has ({_found(part)})")
    files = [_image_files(part, classes) for part in (train, val)]
    return [FolderSet(*each, len(classes), normalization, mode, args.resize_images or 224) for each in files]


def _listed(folder):
    """The names in a folder, in order, those of folders with a / at the end; without what systems hide or add."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    return [e.name + "/" * e.is_dir() for e in entries if not e.name.startswith((".", "__MACOSX", "@eaDir"))]


def _found(folder):
    """What a folder holds, for a message."""
    names = _listed(folder) if folder.is_dir() else []
    return f"found {', '.join(names[:3]) or 'nothing'}" + f" and {len(names) - 3} more" * (len(names) > 3)


def _image_files(folder, classes):
    """(root, names, labels) of a `FolderSet`. Raises UserError if a class has no images."""
    names, labels = [], []
    for label, name in enumerate(classes):
        files = [file for file in _listed(folder / name) if file.lower().endswith(_IMAGE_FILES)]
        if not files:
            kinds = f"{', '.join(_IMAGE_FILES)}, in no further folder"
            raise UserError(f"{folder / name}: no images of this class ({_found(folder / name)}; expected {kinds})")
        names.extend(os.fsencode(os.path.join(name, file)) for file in files)
        labels.extend([label] * len(files))
    return str(folder), np.array(names), torch.tensor(labels)


READERS = {  # of resolved arguments -> training and validation set
    "cifar10": _cifar,
    "cifar100": _cifar,
    **dict.fromkeys(MNISTS, _mnist),
    "digits": _digits,
    "imagenet": _imagenet,
    "imagenet32": _imagenet32,
}
