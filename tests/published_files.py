"""Writes small data sets in the formats the real ones are published in."""

import pickle
import struct

import numpy as np
from PIL import Image


def random_images(count, size, channels=3, seed=0):
    """(count, size, size, channels) uint8"""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def to_rows(images):
    """(n, S, S, 3) -> (n, 3·S·S), colour planes one after the other, as CIFAR and ImageNet32 store them."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def python2_pickle(content):
    """Bytes as Python 2 pickled a dict of uint8 matrices and lists of integers: the format of CIFAR's batches."""

    def string(text):
        data = text if isinstance(text, bytes) else text.encode()
        return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data

    def integer(number):
        return b"J" + struct.pack("<i", number)

    def array(matrix):
        state = b"(" + integer(1) + integer(matrix.shape[0]) + integer(matrix.shape[1]) + b"\x86"
        state += b"cnumpy\ndtype\n" + string("u1") + integer(0) + integer(1) + b"\x87R"
        state += b"(" + integer(3) + string("|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
        state += b"\x89" + string(matrix.tobytes()) + b"t"
        empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85" + string("b")
        return empty + b"\x87R" + state + b"b"

    def value(item):
        if isinstance(item, np.ndarray):
            return array(item)
        return b"](" + b"".join(map(integer, item)) + b"e"

    items = b"".join(string(key) + value(item) for key, item in content.items())
    return b"\x80\x02}(" + items + b"u."


def write_cifar10(data_dir, per_batch=20):
    """Five training batches and a test batch; returns (training images, labels), (test images, labels)."""
    folder = data_dir / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    parts = []
    for i, name in enumerate([f"data_batch_{b}" for b in range(1, 6)] + ["test_batch"]):
        images, labels = random_images(per_batch, 32, seed=i), np.arange(per_batch) * 7 % 10
        content = {"data": to_rows(images), "labels": labels.tolist()}
        (folder / name).write_bytes(python2_pickle(content))
        parts.append((images, labels))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}, protocol=2))
    train = tuple(np.concatenate(each) for each in zip(*parts[:5]))
    return train, parts[5]


def write_cifar100(data_dir, count=120):
    folder = data_dir / "cifar-100-python"
    folder.mkdir(parents=True)
    parts = []
    for i, name in enumerate(["train", "test"]):
        images, labels = random_images(count, 32, seed=i), np.arange(count) * 7 % 100
        content = {"data": to_rows(images), "fine_labels": labels.tolist(), "coarse_labels": (labels // 5).tolist()}
        (folder / name).write_bytes(python2_pickle(content))
        parts.append((images, labels))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}, protocol=2))
    return parts


def write_mnist(data_dir, count=30):
    folder = data_dir / "MNIST" / "raw"
    folder.mkdir(parents=True)
    parts = []
    for i, name in enumerate(["train", "t10k"]):
        images, labels = random_images(count, 28, 1, seed=i), np.arange(count, dtype=np.uint8) * 7 % 10
        header = struct.pack(">iiii", 0x803, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, count) + labels.tobytes())
        parts.append((images, labels))
    return parts


def write_imagenet32(folder, per_batch=4):
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for i, name in enumerate([f"train_data_batch_{b}" for b in range(1, 11)] + ["val_data"]):
        images, labels = random_images(per_batch, 32, seed=i), np.arange(per_batch) + 1 + 90 * i
        mean = images.reshape(per_batch, -1).mean(0)
        content = {"data": to_rows(images), "labels": labels.tolist(), "mean": mean}
        (folder / name).write_bytes(pickle.dumps(content))
        parts.append((images, labels))
    train = tuple(np.concatenate(each) for each in zip(*parts[:10]))
    return train, parts[10]


def write_imagenet(folder, classes=3, per_class=4, seed=0):
    """train/ and val/ with JPEGs of many sizes; the first of each class is grayscale, the second CMYK."""
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
