"""Reads a made-up ImageNet of small files, bad ones among them, for a few epochs, and checks what it must withstand.

The tree holds JPEGs of many sizes, some grayscale, CMYK or other formats under a JPEG's name (to be read), some empty,
truncated, text or noise (to be named and skipped, or refused):

    python benchmarks/imagenet_load.py [--images 20000] [--epochs 3] [--workers 2] [--size 224]

Checked: every bad file is named, once; each epoch has all other images; without the flag the first bad file ends the
run; no process is left behind; the memory that belongs to a worker alone does not grow within an epoch, nor this
process's after the second epoch. Exit status 1 if something fails.
"""

import argparse
import io
import logging
import multiprocessing
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.data.datasets import load_datasets  # noqa: E402
from utils.errors import UserError  # noqa: E402

CLASSES = 50
GOOD_KINDS = ("L", "CMYK", "P", "RGBA", "I;16")
BAD_KINDS = ("empty", "truncated", "text", "noise")
ALLOWED_GROWTH = 24 << 20  # bytes


def picture(random, kind):
    """The bytes of an image file of 40 to 120 pixels, of a `kind` of GOOD_KINDS or "RGB"."""
    size = tuple(int(side) for side in random.integers(40, 121, 2))
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.BILINEAR)
    image = Image.fromarray(np.asarray(coarse.convert("L")).astype(np.uint16) << 8) if kind == "I;16" else coarse
    buffer = io.BytesIO()
    if kind in ("RGB", "L", "CMYK"):
        image.convert(kind).save(buffer, "JPEG")
    else:
        (image if kind == "I;16" else image.convert(kind)).save(buffer, "PNG")
    return buffer.getvalue()


def spoiled(random, kind):
    """The bytes of a file that is no readable image, of a `kind` of BAD_KINDS."""
    if kind == "truncated":
        data = picture(random, "RGB")
        return data[: len(data) // 2]
    return {"empty": b"", "text": b"<html>404 Not Found</html>", "noise": random.bytes(2000)}[kind]


def make_tree(folder, images, seed=0):
    """Writes train/ with `images` files and val/ with one per class; every 100th is bad, every 50th unusual.

    Returns the set of the bad files' paths.
    """
    random = np.random.default_rng(seed)
    bad = set()
    for part, count in (("train", images), ("val", CLASSES)):
        for c in range(CLASSES):
            (folder / part / f"n{c:08d}").mkdir(parents=True)
        for i in range(count):
            path = folder / part / f"n{i % CLASSES:08d}" / f"{part}_{i}.JPEG"
            turn = i // 100
            if part == "train" and i % 100 == 57:
                path.write_bytes(spoiled(random, BAD_KINDS[turn % len(BAD_KINDS)]))
                bad.add(str(path))
            else:
                kind = GOOD_KINDS[turn % len(GOOD_KINDS)] if i % 50 == 3 else "RGB"
                path.write_bytes(picture(random, kind))
    return bad


def own_memory(pid="self"):
    """Bytes that belong to the process `pid` alone (Linux), 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))


class Names(logging.Handler):
    """Keeps the file that each warning begins with."""

    def __init__(self):
        super().__init__()
        self.paths = []

    def emit(self, record):
        self.paths.append(record.getMessage().split(": ")[0])


def epoch(images, number, workers):
    """Reads an epoch; (images read, growth in bytes of the worker that grew most after the first fifth)."""
    loader = images.loader(64, shuffle=True, seed=0, epoch=number, augment=True, workers=workers, bad_images="skip")
    count, early, growth = 0, {}, 0
    steps = len(loader)
    for step, (batch, labels) in enumerate(loader):
        assert batch.shape[0] == len(labels)
        count += len(labels)
        if step in (steps // 5, steps - 2 * workers - 1):
            for process in multiprocessing.active_children():
                memory = own_memory(process.pid)
                growth = max(growth, memory - early.setdefault(process.pid, memory))
    return count, growth


def check(name, holds, detail):
    print(f"{'ok  ' if holds else 'FAIL'} {name}: {detail}", flush=True)
    return holds


def read(args, folder, bad):
    """Runs all checks on the tree in `folder`; true if they hold."""
    options = {"grayscale": False, "data_subset": None, "classes_subset": None, "randomize_labels": None}
    images = load_datasets(Namespace(dataset="imagenet", data=folder, resize_images=args.size, **options)).train
    names = Names()
    log = logging.getLogger("utils.data.folders")
    log.addHandler(names)
    log.propagate = False
    good = args.images - len(bad)
    holds, memory = True, []
    for number in range(1, args.epochs + 1):
        start = time.perf_counter()
        count, growth = epoch(images, number, args.workers)
        memory.append(own_memory())
        detail = f"{count} of {args.images} images, {count / (time.perf_counter() - start):.0f} per second"
        holds &= check(f"epoch {number}", count == good, detail)
        holds &= check("workers' memory", growth < ALLOWED_GROWTH, f"grew by {growth >> 10} KiB")
    growth = memory[-1] - memory[:2][-1]
    holds &= check("own memory", growth < ALLOWED_GROWTH, f"grew by {growth >> 10} KiB after the second epoch")
    named = len(names.paths) == len(bad) and set(names.paths) == bad
    holds &= check("bad files", named, f"{len(names.paths)} named, once each, of {len(bad)}")
    try:
        for _ in images.loader(64, workers=args.workers):
            pass
        message = "none"
    except UserError as error:
        message = str(error)
    refused = any(path in message for path in bad) and "\n" not in message
    holds &= check("without --bad-images skip", refused, message)
    left = len(multiprocessing.active_children())
    return check("processes left", not left, left) and holds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", type=int, default=224, help="pixels of the images given to a network")
    args = parser.parse_args()
    if not own_memory():
        print("no /proc here: memory is not measured")
    with tempfile.TemporaryDirectory() as folder:
        bad = make_tree(Path(folder), args.images)
        holds = read(args, folder, bad)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
