"""Writes small data sets in the formats that the real ones are published in.

Each function returns (training images, labels), (test images, labels) as arrays (n, M, N, C) and (n,).
"""

import os
import pickle
import struct
from hashlib import md5

import numpy as np
from PIL import Image
from torchvision import datasets


def random_images(count, size, channels=3, seed=0):
    """(count, size, size, channels) uint8"""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def to_rows(images):
    """(n, S, S, 3) -> (n, 3·S·S), colour planes one after the other, as CIFAR and ImageNet32 store them."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


class Hostile:
    """Makes the folder `path` when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_cifar10(data_dir, per_file=20):
    return _write_cifar(data_dir, datasets.CIFAR10, per_file, 10, "labels")


def write_cifar100(data_dir, per_file=120):
    return _write_cifar(data_dir, datasets.CIFAR100, per_file, 100, "fine_labels")


def _write_cifar(data_dir, reader, per_file, classes, key):
    folder = data_dir / reader.base_folder
    folder.mkdir(parents=True)
    parts = []
    for i, (name, _) in enumerate([*reader.train_list, *reader.test_list]):
        images, labels = random_images(per_file, 32, seed=i), np.arange(per_file) * 7 % classes
        (folder / name).write_bytes(pickle.dumps({"data": to_rows(images), key: labels.tolist()}, 2))
        parts.append((images, labels))
    names = {reader.meta["key"]: [str(i) for i in range(classes)]}
    (folder / reader.meta["filename"]).write_bytes(pickle.dumps(names, 2))
    return tuple(map(np.concatenate, zip(*parts[:-1]))), parts[-1]


def accept(monkeypatch, reader, data_dir):
    """Makes torchvision's `reader` of CIFAR take the files in `data_dir` for the published ones."""

    def checksum(name):
        return name, md5((data_dir / reader.base_folder / name).read_bytes()).hexdigest()

    for files in ("train_list", "test_list"):
        monkeypatch.setattr(reader, files, [checksum(name) for name, _ in getattr(reader, files)])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": checksum(reader.meta["filename"])[1]})


def write_mnist(data_dir, count=30, name="MNIST"):
    folder = data_dir / name / "raw"
    folder.mkdir(parents=True)
    parts = []
    for i, name in enumerate(["train", "t10k"]):
        images, labels = random_images(count, 28, 1, seed=i), np.arange(count, dtype=np.uint8) * 7 % 10
        header = struct.pack(">iiii", 0x803, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, count) + labels.tobytes())
        parts.append((images, labels))
    return parts


def write_imagenet32(folder, per_file=4, pickled=pickle.dumps, **others):
    """The labels in the files, and those returned, count from 1; `others` are files with other bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for i, name in enumerate([f"train_data_batch_{b}" for b in range(1, 11)] + ["val_data"]):
        images, labels = random_images(per_file, 32, seed=i), np.arange(per_file) + 1 + 90 * i
        content = {"data": to_rows(images), "labels": labels.tolist(), "mean": to_rows(images).mean(0)}
        (folder / name).write_bytes(others.get(name, pickled(content)))
        parts.append((images, labels))
    return tuple(map(np.concatenate, zip(*parts[:10]))), parts[10]


def write_imagenet(folder, classes=3, per_class=4, seed=0):
    """train/ and val/ with JPEGs of many sizes; the first of each class is grayscale, the second CMYK. Returns None."""
    random = np.random.default_rng(seed)
    for part in ("train", "val"):
        for c in range(classes):
            place = folder / part / f"n{c:08d}"
            place.mkdir(parents=True)
            for i in range(per_class):
                coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                size = tuple(int(side) for side in random.integers(40, 120, 2))
                mode = {0: "L", 1: "CMYK"}.get(i, "RGB")
                Image.fromarray(coarse).resize(size, Image.BILINEAR).convert(mode).save(place / f"{part}_{i}.JPEG")
