"""Data sets: the published formats are read, parts of them chosen, and damaged or hostile files refused."""

import gzip
import io
import os
import pickle
import shutil
import struct
import tarfile
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from hashlib import md5
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from sklearn.datasets import load_digits
from torchvision import datasets as theirs
from torchvision import transforms
from torchvision.transforms import functional

import main_block
from tests import published_files
from tests.published_files import Hostile, random_images, to_rows, write_imagenet
from utils.data.batches import Normalization
from utils.data.datasets import load_datasets
from utils.data.memory import MemorySet
from utils.data.names import DATASETS, IN_FOLDERS
from utils.errors import UserError

COLOR = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GRAY = transforms.Normalize((0.481,), (0.239,))
IN_FILES = [name for name in DATASETS if name != "digits"]
IN_MEMORY = [name for name in IN_FILES if name != "imagenet"]


def load(dataset, folder="nowhere", **options):
    nothing = dict.fromkeys("data_subset classes_subset resize_images randomize_labels".split())
    places = {"data": str(folder), "data_dir": str(folder), "grayscale": False}
    return load_datasets(Namespace(dataset=dataset, **{**nothing, **places, **options}))


def everything(images, **options):
    """(n, C, M, N) and (n,): all batches after one another."""
    return tuple(torch.cat(each) for each in zip(*images.loader(7, **options)))


def check_set(images, expected, labels, normalize=COLOR):
    got, got_labels = everything(images)
    want = torch.stack([normalize(functional.to_tensor(image)) for image in expected])
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
    assert got_labels.dtype == torch.int64 and got_labels.tolist() == list(labels)
    assert images.labels.tolist() == list(labels) and len(images) == len(labels)


GREY = {  # reader, mean and deviation
    "mnist": ("MNIST", (0.1307,), (0.3081,)),
    "fashion-mnist": ("FashionMNIST", (0.2860,), (0.3530,)),
    "kmnist": ("KMNIST", (0.1918,), (0.3483,)),
}


def explained(call, *parts):
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert error.value.exit_status == 2
    assert "\n" not in message and all(str(part) in message for part in parts), message


@pytest.fixture
def write(tmp_path, monkeypatch):
    """`write(name)` writes files that pass for the published ones into `tmp_path`."""

    def write(name, *size):
        if name in GREY:
            return published_files.write_mnist(tmp_path, *size, name=GREY[name][0])
        parts = getattr(published_files, f"write_{name}")(tmp_path, *size)
        if name.startswith("cifar"):
            published_files.accept(monkeypatch, getattr(theirs, name.upper()), tmp_path)
        return parts

    return write


# the published formats


@pytest.mark.parametrize("name", IN_MEMORY)
def test_published_files_are_read(tmp_path, write, name):
    (images, labels), (test, test_labels) = write(name)
    first, ours = int(name == "imagenet32"), load(name, tmp_path)
    normalize = transforms.Normalize(*GREY[name][1:]) if name in GREY else COLOR
    check_set(ours.train, images, labels - first, normalize)
    check_set(ours.val, test, test_labels - first, normalize)
    classes = {"cifar100": 100, "imagenet32": 1000}.get(name, 10)
    assert (ours.num_classes, ours.name) == (classes, name)
    assert str(ours.signal) == ("1 real channels of 28×28" if name in GREY else "3 real channels of 32×32")
    is_augmented = not torch.equal(everything(ours.train)[0], everything(ours.train, augment=True)[0])
    assert is_augmented == (name not in GREY)


@pytest.mark.parametrize("name", GREY)
def test_idx_files_may_be_gzipped(tmp_path, write, name):
    (images, labels), _ = write(name)
    folder = tmp_path / GREY[name][0] / "raw"
    for file in folder.iterdir():
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    check_set(load(name, tmp_path).train, images, labels, transforms.Normalize(*GREY[name][1:]))
    packed = folder / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-100])
    explained(lambda: load(name, tmp_path), packed, "download it again")


def test_missing_fashion_mnist_names_its_four_files_and_their_place(tmp_path, monkeypatch):
    monkeypatch.setattr(theirs.FashionMNIST, "mirrors", ["file:///nowhere/"])
    archives = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    explained(lambda: load("fashion-mnist", tmp_path), tmp_path / "FashionMNIST" / "raw", "download failed", *archives)


def test_imagenet(tmp_path):
    write_imagenet(tmp_path)
    (tmp_path / "train" / "n00000001" / "notes.txt").write_text("not an image")
    ours = load("imagenet", tmp_path)
    crop = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    folder = theirs.ImageFolder(tmp_path / "val")
    assert ours.num_classes == len(folder.classes) == 3 and ours.signal.height == 224
    assert [ours.val.path(i) for i in range(len(ours.val))] == [path for path, _ in folder.samples]
    check_set(ours.val, [crop(image) for image, _ in folder], folder.targets)
    ours = load("imagenet", tmp_path, grayscale=True, resize_images=56, classes_subset=[1, None, None])
    assert str(ours.signal) == "1 real channels of 56×56" and ours.num_classes == 2
    crop = transforms.Compose([transforms.Grayscale(), transforms.Resize(64), transforms.CenterCrop(56)])
    check_set(ours.val, [crop(image) for image, label in folder if label], [0] * 4 + [1] * 4, GRAY)


def test_digits():
    ours = load("digits")
    (train, labels), (val, _) = everything(ours.train), everything(ours.val)
    assert train.shape == (1297, 1, 8, 8) and val.shape == (500, 1, 8, 8) and ours.num_classes == 10
    assert abs(train.mean()) < 1e-5 and abs(train.std() - 1) < 1e-3
    pixels = load_digits().images.reshape(-1, 64).astype(int).tolist()
    values = torch.cat([train, val]).flatten(1)
    originals = (values - values.min()) / (values.max() - values.min()) * 16
    assert sorted(originals.round().int().tolist()) == sorted(pixels)
    assert torch.equal(everything(load("digits").train)[1], labels)
    enlarged, _ = everything(load("digits", resize_images=32).train)
    want = torch.nn.functional.interpolate(train, (32, 32), mode="bilinear")
    torch.testing.assert_close(enlarged, (want - want.mean()) / want.std(), atol=0.02, rtol=0)  # pixels: 1/240 of white


@pytest.mark.parametrize("name", IN_FILES)
def test_a_network_trains_on_files(name, tmp_path, write):
    write(name)
    place = ["--data" if name in IN_FOLDERS else "--data-dir", str(tmp_path)]
    network = "--psi-arch mod --Pr-size 4 --n-blocks 2 --resize-images 16".split()
    run = "--epochs 1 --batch-size 16 --device cpu --workers 1 --dir run --checkpoints".split()
    assert main_block.main(["--dataset", name, *place, "-a", "Fw Std Pr N", *network, *run, str(tmp_path)]) == 0
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3 and rows[2].startswith("1,")


# parts and conversions


def test_grayscale_is_pils(tmp_path, write):
    (images, labels), _ = write("cifar10")
    ours = load("cifar10", tmp_path, grayscale=True)
    check_set(ours.train, [Image.fromarray(image).convert("L") for image in images], labels, GRAY)
    assert ours.signal.channels == 1 and load("digits", grayscale=True).signal.channels == 1


@pytest.mark.parametrize("size", [16, 48])
def test_resizing_is_torchvisions(tmp_path, write, size):
    (images, _), _ = write("cifar10")
    ours = load("cifar10", tmp_path, resize_images=size).train.images
    want = torch.stack([functional.pil_to_tensor(functional.resize(Image.fromarray(i), [size, size])) for i in images])
    assert (ours.permute(0, 3, 1, 2).int() - want.int()).abs().max() <= 1


def test_choosing_classes_and_images(tmp_path, write):
    (images, labels), (test, test_labels) = write("cifar10")
    ours = load("cifar10", tmp_path, classes_subset=[2, 8, 3])
    for ours_part, pixels, old in ((ours.train, images, labels), (ours.val, test, test_labels)):
        kept = np.isin(old, (2, 5))
        check_set(ours_part, pixels[kept], (old[kept] == 5).astype(int))
    assert ours.num_classes == 2
    ours = load("cifar10", tmp_path, classes_subset={"classes": [5, 2]})
    check_set(ours.val, test[np.isin(test_labels, (2, 5))], test_labels[np.isin(test_labels, (2, 5))])
    assert ours.num_classes == 10
    for chosen, numbers in (({"range": [9, 0, -4]}, [9, 5, 1]), ({"images": [3, 0, 3]}, [3, 0, 3])):
        check_set(load("cifar10", tmp_path, data_subset=chosen).train, images[numbers], labels[numbers])
    explained(lambda: load("cifar10", tmp_path, data_subset={"range": [0, 10**6, 1]}), "are numbered from 0 to")
    ours = load("cifar10", tmp_path, data_subset=[1, 6, 2])
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[1:6:2] for c in range(10)]))
    check_set(ours.train, images[chosen], labels[chosen])
    assert len(ours.val) == len(test) and ours.num_classes == 10


def test_random_labels(tmp_path, write):
    (_, labels), _ = write("cifar100", 2000)
    ours = load("cifar100", tmp_path, randomize_labels=3)
    random = ours.train.labels
    assert (random.numpy() == labels).mean() < 0.05 and chisquare(random.bincount(minlength=100)).pvalue > 1e-3
    for each in (ours.train, ours.val):  # as the authors' program draws them
        assert each.labels.tolist() == np.random.RandomState(3).randint(low=0, high=100, size=len(each)).tolist()
    for seed in (3, 4):
        assert torch.equal(random, load("cifar100", tmp_path, randomize_labels=seed).train.labels) == (seed == 3)
    part = load("cifar100", tmp_path, randomize_labels=3, data_subset=[None, 3, None]).train
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:3] for c in range(100)]))
    assert torch.equal(part.labels, random[chosen])


@pytest.mark.parametrize("options", [{"classes_subset": [50, 60, None]}, {"data_subset": [2000, None, None]}])
def test_choosing_nothing_is_refused(options):
    explained(lambda: load("digits", **options), "leaves n")


# which data these are


@pytest.mark.parametrize("name", IN_FILES)
def test_a_digest_tells_data_apart(name, tmp_path, write):
    write(name)
    ours = load(name, tmp_path, resize_images=24)
    count = len(ours.train)
    assert ours.digest == load(name, tmp_path, resize_images=24).digest
    assert ours.digest["train"].startswith(f"{count} images, ") and ours.digest["train"] != ours.digest["val"]
    parts = ({"classes_subset": [0, None, 2]}, {"randomize_labels": 0}, {"classes_subset": [1, None, None]})
    digests = {load(name, tmp_path, **part).digest["train"] for part in parts} | {ours.digest["train"]}
    assert len(digests) == 4
    order = torch.arange(count).flip(0)
    assert ours.train.select(order, ours.train.labels, ours.num_classes).digest != ours.digest["train"]


def test_a_digest_is_that_of_other_processors():
    digests = {load("digits", resize_images=size).digest["train"] for size in (None, 16, 32)}
    assert digests == {"1297 images, b2fbb2c1cb0e08e2"}


def test_a_file_that_comes_or_goes_changes_the_digest(tmp_path):
    write_imagenet(tmp_path)
    before, path = load("imagenet", tmp_path).digest, tmp_path / "val" / "n00000001" / "val_2.JPEG"
    path.rename(path.with_name("val_7.JPEG"))
    after = load("imagenet", tmp_path).digest
    assert after["train"] == before["train"] and after["val"] != before["val"]
    path.with_name("val_7.JPEG").rename(path)
    shutil.move(tmp_path / "train", tmp_path / "there" / "train")
    shutil.move(tmp_path / "val", tmp_path / "there" / "val")
    assert load("imagenet", tmp_path / "there").digest == before


# downloads


def serve(monkeypatch, archive):
    """Makes torchvision "download" by `archive(path)`, which writes a file; returns the list of addresses asked for."""
    asked = []

    def download_url(url, root, filename, checksum):
        if checksum is None or not (Path(root) / filename).exists():
            asked.append(url)
            archive(Path(root) / filename)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    return asked


@pytest.mark.parametrize("name", IN_FILES)
def test_without_files_and_network(name, tmp_path, monkeypatch):
    def offline(path):
        raise URLError("Name or service not known")

    serve(monkeypatch, offline)
    explained(lambda: load(name, tmp_path / "data"), tmp_path / "data", "--digits needs no files")
    assert not list(tmp_path.glob("data/[!.]*"))


def test_two_processes_download_once(tmp_path, write, monkeypatch):
    (images, labels), _ = write("cifar10")
    name = theirs.CIFAR10.base_folder
    shutil.move(tmp_path / name, tmp_path / "far" / name)

    def archive(path):
        time.sleep(0.2)
        with tarfile.open(path, "w:gz") as archive:
            archive.add(tmp_path / "far" / name, name)

    asked = serve(monkeypatch, archive)
    with ThreadPoolExecutor() as pool:
        for ours in pool.map(load, ["cifar10"] * 3, [tmp_path / "here"] * 3):
            check_set(ours.train, images, labels)
    assert asked == [theirs.CIFAR10.url]
    assert sorted(os.listdir(tmp_path / "here")) in ([name], [".download.lock", name])


def test_an_archive_fetched_by_hand_is_unpacked(tmp_path, monkeypatch):
    train, _ = published_files.write_mnist(tmp_path / "far")
    resources = []
    for name, _ in theirs.MNIST.resources:
        (tmp_path / "here").mkdir(exist_ok=True)
        archive = gzip.compress((tmp_path / "far" / "MNIST" / "raw" / name.removesuffix(".gz")).read_bytes())
        (tmp_path / "here" / name).write_bytes(archive)
        resources.append((name, md5(archive).hexdigest()))
    monkeypatch.setattr(theirs.MNIST, "resources", resources)
    asked = serve(monkeypatch, None)
    check_set(load("mnist", tmp_path / "here").train, *train, transforms.Normalize((0.1307,), (0.3081,)))
    assert not asked


# files that are damaged or hostile


CIFAR10_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]


@pytest.mark.parametrize("file", CIFAR10_FILES)
@pytest.mark.parametrize("damage", ["hostile", "flipped", "truncated", "missing"])
def test_only_the_published_files_of_cifar_are_unpickled(tmp_path, write, file, damage):
    write("cifar10")
    path, marker = tmp_path / "cifar-10-batches-py" / file, tmp_path / "executed"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        hostile = pickle.dumps({"data": Hostile(marker), "labels": []}, 2)
        flipped = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
        path.write_bytes({"hostile": hostile, "flipped": flipped, "truncated": content[:-1]}[damage])
    for _ in range(2):
        explained(lambda: load("cifar10", tmp_path), path, "missing" if damage == "missing" else "not the published")
    assert not marker.exists()


@pytest.mark.parametrize("hide", [lambda bad: bad, lambda bad: {"data": bad}, lambda bad: {"data": np.array([bad])}])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_runs_something_is_refused(tmp_path, hide, protocol):
    marker = tmp_path / "executed"
    bad = pickle.dumps(hide(Hostile(marker)), protocol=protocol)
    published_files.write_imagenet32(tmp_path, train_data_batch_4=bad)
    explained(lambda: load("imagenet32", tmp_path), tmp_path / "train_data_batch_4", "refused")
    assert not marker.exists()


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 does: as bytes of no encoding."""

    def save_string(self, value):
        content = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_string, str: save_string}


@pytest.mark.parametrize("protocol", ["Python 2", *range(pickle.HIGHEST_PROTOCOL + 1)])
def test_pickles_of_any_protocol_are_read(tmp_path, protocol):
    def pickled(content):
        content = {**content, "data": np.asfortranarray(content["data"]), "count": np.int64(len(content["labels"]))}
        if protocol != "Python 2":
            return pickle.dumps(content, protocol)
        file = io.BytesIO()
        Python2Pickler(file, 2).dump(content)
        return file.getvalue()

    (images, labels), _ = published_files.write_imagenet32(tmp_path, pickled=pickled)
    check_set(load("imagenet32", tmp_path).train, images, labels - 1)


ROWS = to_rows(random_images(3, 32))


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "damaged"),
        (pickle.dumps({"data": ROWS, "labels": [1, 2, 3]})[:5000], "damaged"),
        (b"not a pickle at all", "damaged"),
        (pickle.dumps([1, 2]), "dictionary"),
        (pickle.dumps({"labels": [1, 2, 3]}), "'data'"),
        (pickle.dumps({"data": ROWS.astype(float), "labels": [1, 2, 3]}), "'data'"),
        (pickle.dumps({"data": ROWS[:, :3000], "labels": [1, 2, 3]}), "'data'"),
        (pickle.dumps({"data": ROWS[:0], "labels": []}), "'data'"),
        (pickle.dumps({"data": to_rows(random_images(3, 16)), "labels": [1, 2, 3]}), "another size"),
        (pickle.dumps({"data": ROWS, "labels": [1, 2]}), "3 labels"),
        (pickle.dumps({"data": ROWS}), "3 labels"),
        (pickle.dumps({"data": ROWS, "labels": ["a", "b", "c"]}), "3 labels"),
        (pickle.dumps({"data": ROWS, "labels": [1.0, 2.5, 3.0]}), "3 labels, integers"),
        (pickle.dumps({"data": ROWS, "labels": np.eye(3, dtype=int)}), "one-hot"),
        (pickle.dumps({"data": ROWS, "labels": [0, 1, 2]}), "1..1000"),
        (pickle.dumps({"data": ROWS.astype(object), "labels": [1, 2, 3]}), "an array of O8"),
    ],
)
def test_damaged_pickles_are_named(tmp_path, content, complaint):
    published_files.write_imagenet32(tmp_path, train_data_batch_4=content)
    explained(lambda: load("imagenet32", tmp_path), tmp_path / "train_data_batch_4", complaint)


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize(
    "change", [None, lambda d: d[:20], lambda d: b"", lambda d: b"\x1f\x8b" + d, lambda d: d + b"0"]
)
def test_missing_and_damaged_idx_files_are_named(tmp_path, file, change):
    published_files.write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / file
    content = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(content))
    explained(lambda: load("mnist", tmp_path), path, "" if change else "No such file")


def test_missing_batches_of_imagenet32_are_named(tmp_path):
    published_files.write_imagenet32(tmp_path)
    (tmp_path / "train_data_batch_7").unlink()
    explained(lambda: load("imagenet32", tmp_path), "(train_data_batch_7 missing)")


def move(old, new):
    entries = list(old.iterdir())
    new.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        entry.rename(new / entry.name)


CAT = "train/n00000000"
TREES = [  # what happens to a tree, the folder that is named, what is said of it
    (lambda top: (top / "train").rename(top / "training"), "", "found training/, val/"),
    (lambda top: move(top, top / "imagenet"), "", "found imagenet/"),
    (lambda top: move(top / "val", top / "lost"), "val", "(found nothing)"),
    (
        lambda top: [move(each, each.parent) or each.rmdir() for each in top.glob("val/n*")],
        "val",
        "(found val_0.JPEG, ",
    ),
    (lambda top: [shutil.rmtree(each) for each in (top / "train").glob("n*")], "train", "no folder of images"),
    (lambda top: move(top / CAT, top / CAT / "images"), CAT, "no images of this class (found images/; expected .jpeg"),
    (lambda top: [each.rename(f"{each}.gz") for each in (top / CAT).iterdir()], CAT, "found train_0.JPEG.gz, train"),
    (lambda top: move(top / CAT, top / "lost"), CAT, "no images of this class (found nothing;"),
    (lambda top: [move(top / part, top / part / "all") for part in ("train", "val")], "train/all", "n00000000/, n0"),
    (lambda top: shutil.rmtree(top / CAT), "train", "no folder n00000000/, a class that"),
    (lambda top: shutil.rmtree(top / "val" / "n00000001"), "val", "no folder n00000001/, a class that"),
    (lambda top: (top / "val" / "extra").mkdir(), "train", "no folder extra/, a class that"),
]


@pytest.mark.parametrize("change, place, found", TREES)
def test_trees_that_are_not_what_they_claim_are_refused_with_what_was_found(tmp_path, change, place, found):
    top = tmp_path / "data"
    write_imagenet(top)
    change(top)
    explained(lambda: load("imagenet", top), top / place, found)


@pytest.mark.parametrize("name", ["._val_0.JPEG", ".hidden.png", ".DS_Store", "Thumbs.db", "photos.jpg/"])
def test_what_systems_leave_among_images_is_no_image(tmp_path, name):
    write_imagenet(tmp_path)
    before = load("imagenet", tmp_path).digest
    for folder in (tmp_path, *tmp_path.glob("*"), *tmp_path.glob("*/n*")):
        (folder / "__MACOSX").mkdir()
        (folder / "__MACOSX" / name).mkdir() if name.endswith("/") else (folder / name).write_bytes(b"\0\5\x16\7")
    assert load("imagenet", tmp_path).digest == before


# pixels and labels


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
@pytest.mark.parametrize("grayscale", [False, True])
def test_grey_of_16_bits_is_scaled(tmp_path, name, grayscale):
    ramp = np.arange(256 * 256, dtype=np.uint16).reshape(256, 256)
    for part in ("train", "val"):
        folder = tmp_path / part / "ramp"
        folder.mkdir(parents=True)
        Image.fromarray(ramp).save(folder / name)
    ours = load("imagenet", tmp_path, grayscale=grayscale, resize_images=224).val
    crop = transforms.CenterCrop(224)(Image.fromarray(np.round(ramp / 257).astype(np.uint8)))
    check_set(ours, [crop.convert(ours.mode)], [0], GRAY if grayscale else COLOR)


@pytest.mark.parametrize("pixels", [np.full((9, 9), 0.5, np.float32), np.full((9, 9), 70000, np.int32)])
def test_pixels_that_would_be_clipped_are_refused(tmp_path, pixels):
    write_imagenet(tmp_path, 1, 1)
    path = tmp_path / "val" / "n00000000" / "bad.tif"
    Image.fromarray(pixels).save(path)
    explained(lambda: everything(load("imagenet", tmp_path).val), path, "expected 8 or 16 bits")


def memory_set(labels):
    return MemorySet(torch.zeros(3, 4, 4, 1, dtype=torch.uint8), labels, 3, Normalization((0.0,), (1.0,)))


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list, lambda each: np.array(each, np.uint8)])
def test_labels_with_a_dimension_too_many_are_flattened(kind, tmp_path):
    assert everything(memory_set(kind([[2], [0], [1]])))[1].tolist() == [2, 0, 1]
    labels = pickle.dumps({"data": ROWS, "labels": kind([[3], [1], [2]])})
    if kind is not torch.tensor:
        published_files.write_imagenet32(tmp_path, val_data=labels)
        assert load("imagenet32", tmp_path).val.labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "labels, complaint",
    [
        (torch.eye(3), "one-hot"),
        (torch.eye(3).long(), "one-hot"),
        (torch.tensor([0.0, 1.0, 2.0]), "float32: expected 3 labels, integers"),
        (torch.tensor([True, False, True]), "bool"),
        (torch.tensor([0, 1]), "3 labels, one class number per image"),
        (torch.tensor([0, 1, 3]), "0..2"),
        (torch.tensor([0, 1, -1]), "0..2"),
        ([None, 1, 2], "object"),
        ([[0], [1, 2], [1]], "inhomogeneous"),
        ("012", "shape ()"),
    ],
)
def test_other_labels_are_refused_in_words(labels, complaint):
    explained(lambda: memory_set(labels), complaint)
