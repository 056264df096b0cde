"""Data: the published formats are read, and batches are what torchvision's transforms would make of the same draws."""

import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from argparse import Namespace
from hashlib import md5
from itertools import count
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from torchvision import datasets as theirs
from torchvision import transforms
from torchvision.transforms import functional

import main_block
from tests.conftest import ROOT
from tests.published_files import (
    python2_pickle,
    random_images,
    to_rows,
    write_cifar10,
    write_cifar100,
    write_imagenet,
    write_imagenet32,
    write_mnist,
)
from utils.data import downloads
from utils.data.batches import MemorySet, Normalization, crop_and_flip, draw_crop, random_part
from utils.data.datasets import load_datasets
from utils.errors import UserError

COLOR = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GRAY = transforms.Normalize((0.481,), (0.239,))


def load(dataset, folder, **options):
    defaults = {
        "data": str(folder),
        "data_dir": str(folder),
        "grayscale": False,
        "data_subset": None,
        "classes_subset": None,
        "resize_images": None,
        "randomize_labels": None,
    }
    return load_datasets(Namespace(dataset=dataset, **{**defaults, **options}))


def everything(images, **options):
    """(n, C, M, N) and (n,): all batches after one another."""
    return tuple(torch.cat(each) for each in zip(*images.loader(7, **options)))


def check_set(images, expected, labels, normalize=COLOR):
    got, got_labels = everything(images)
    want = torch.stack([normalize(functional.to_tensor(image)) for image in expected])
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
    assert got_labels.dtype == torch.int64 and got_labels.tolist() == list(labels)
    assert images.labels.tolist() == list(labels) and len(images) == len(labels)


@pytest.fixture
def coded():
    """4000 images of 12×12 whose first two channels say where each pixel comes from, from 1."""
    rows, columns = np.meshgrid(np.arange(1, 13), np.arange(1, 13), indexing="ij")
    image = torch.from_numpy(np.stack([rows, columns, 0 * rows], -1).astype(np.uint8))
    plain = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), peak=1)
    return MemorySet(image.repeat(4000, 1, 1, 1), torch.arange(4000), 4000, plain, padding=4)


# the published formats


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, name):
    write, reader = {"cifar10": (write_cifar10, theirs.CIFAR10), "cifar100": (write_cifar100, theirs.CIFAR100)}[name]
    train, test = write(tmp_path)
    ours = load(name, tmp_path)
    check_set(ours.train, *train)
    check_set(ours.val, *test)
    assert (ours.num_classes, ours.name) == (int(name[5:]), name)
    assert (ours.signal.channels, ours.signal.height, ours.signal.width, ours.signal.complex) == (3, 32, 32, False)

    def checksum(file):
        return md5((tmp_path / reader.base_folder / file).read_bytes()).hexdigest()

    for files in ("train_list", "test_list"):
        monkeypatch.setattr(reader, files, [(file, checksum(file)) for file, _ in getattr(reader, files)])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": checksum(reader.meta["filename"])})
    images = reader(tmp_path, train=True)
    assert np.array_equal(images.data, train[0]) and images.targets == train[1].tolist()


def test_mnist(tmp_path):
    train, test = write_mnist(tmp_path)
    ours = load("mnist", tmp_path)
    normalize = transforms.Normalize((0.1307,), (0.3081,))
    check_set(ours.train, *train, normalize)
    check_set(ours.val, *test, normalize)
    assert ours.signal.channels == 1 and ours.signal.height == 28
    images = theirs.MNIST(tmp_path, train=True)
    assert np.array_equal(images.data.numpy(), train[0][..., 0]) and images.targets.tolist() == train[1].tolist()
    still, _ = everything(ours.train, augment=True)
    assert torch.equal(still, everything(ours.train)[0])


def test_imagenet32_counts_classes_from_one(tmp_path):
    train, val = write_imagenet32(tmp_path / "batches")
    ours = load("imagenet32", tmp_path / "batches")
    check_set(ours.train, train[0], train[1] - 1)
    check_set(ours.val, val[0], val[1] - 1)
    assert ours.num_classes == 1000 and ours.signal.height == 32


def test_imagenet(tmp_path):
    write_imagenet(tmp_path)
    (tmp_path / "train" / "n00000001" / "notes.txt").write_text("no image")
    ours = load("imagenet", tmp_path)
    folder = theirs.ImageFolder(tmp_path / "val", lambda i: functional.pil_to_tensor(i))
    assert ours.num_classes == len(folder.classes) == 3 and ours.signal.height == 224
    assert [ours.val.path(i) for i in range(len(ours.val))] == [path for path, _ in folder.samples]
    test = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), COLOR])
    folder.transform = test
    images, labels = everything(ours.val)
    torch.testing.assert_close(images, torch.stack([image for image, _ in folder]), atol=2e-6, rtol=0)
    assert labels.tolist() == folder.targets


def test_imagenet_with_options(tmp_path):
    write_imagenet(tmp_path)
    ours = load("imagenet", tmp_path, grayscale=True, resize_images=56, classes_subset=[1, None, None])
    assert str(ours.signal) == "1 real channels of 56×56" and ours.num_classes == 2
    folder = theirs.ImageFolder(tmp_path / "val")
    resize = transforms.Compose([transforms.Grayscale(), transforms.Resize(64), transforms.CenterCrop(56)])
    check_set(ours.val, [resize(image) for image, label in folder if label], [0] * 4 + [1] * 4, GRAY)


def test_digits():
    ours = load("digits", "nowhere")
    (train, labels), (val, _) = everything(ours.train), everything(ours.val)
    assert train.shape == (1297, 1, 8, 8) and val.shape == (500, 1, 8, 8) and ours.num_classes == 10
    assert abs(train.mean()) < 1e-5 and abs(train.std() - 1) < 1e-3
    from sklearn.datasets import load_digits

    pixels = torch.from_numpy(load_digits().images).float().flatten(1)
    values = torch.cat([train, val]).flatten(1)
    originals = (values - values.min()) / (values.max() - values.min()) * 16
    assert (originals - originals.round()).abs().max() < 1e-5
    originals = originals.round()
    assert sorted(map(tuple, originals.tolist())) == sorted(map(tuple, pixels.tolist()))
    assert torch.equal(everything(load("digits", "nowhere").train)[1], labels)
    large = load("digits", "nowhere", resize_images=32)
    enlarged, _ = everything(large.train)
    assert enlarged.shape == (1297, 1, 32, 32) and abs(enlarged.std() - 1) < 1e-3
    want = torch.nn.functional.interpolate(train, (32, 32), mode="bilinear")
    want = (want - want.mean()) / want.std()
    torch.testing.assert_close(enlarged, want, atol=0.02, rtol=0)  # pixels are rounded to 1/240


# crops and flips


def test_crops_and_flips_are_torchvisions():
    images = torch.from_numpy(random_images(200, 32))
    offsets, flips = torch.randint(0, 9, (200, 2)), torch.rand(200) < 0.5
    got = crop_and_flip(images, offsets, flips, 4)
    for image, (top, left), flip, cropped in zip(images, offsets.tolist(), flips.tolist(), got):
        expected = functional.crop(functional.pad(Image.fromarray(image.numpy()), 4), top, left, 32, 32)
        if flip:
            expected = functional.hflip(expected)
        assert np.array_equal(np.asarray(expected), cropped)


def test_augmented_batches_are_normalised_after_zero_padding(coded):
    black = MemorySet(torch.zeros(50, 8, 8, 3, dtype=torch.uint8), torch.zeros(50).long(), 1, coded.normalization, 4)
    images, _ = everything(black, augment=True, seed=3)
    assert torch.equal(images, torch.zeros_like(images))
    normalized = MemorySet(black.images, black.labels, 1, Normalization(COLOR.mean, COLOR.std), 4)
    images, _ = everything(normalized, augment=True, seed=3)
    want = COLOR(torch.zeros(3, 1, 1)).expand(3, 8, 8)
    torch.testing.assert_close(images, want.expand_as(images))


def test_offsets_and_flips_are_uniform_and_differ_within_a_batch(coded):
    images, labels = next(iter(coded.loader(4000, shuffle=True, seed=5, epoch=2, augment=True)))
    top = images[:, 0, 6, 6] - 7 + 4  # 0..8
    flipped = images[:, 1, 6, 5] > images[:, 1, 6, 6]
    left = torch.where(flipped, images[:, 1, 6, 5], images[:, 1, 6, 6]) - 7 + 4
    cells = (18 * top + 2 * left + flipped).long().bincount(minlength=162)
    assert cells.sum() == 4000 and len(cells) == 162
    assert chisquare(cells.numpy()).pvalue > 1e-3
    order = (81 * flipped + 9 * top + left).long()
    neighbours = (162 * order[:-1] + order[1:]).unique()
    assert len(neighbours) > 3400  # of 162²: draws of neighbours are independent
    assert torch.equal(labels.sort().values, torch.arange(4000)) and not torch.equal(labels, torch.arange(4000))


# what is drawn depends on seed and epoch only


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


def test_draws_are_a_function_of_seed_and_epoch(coded):
    options = {"shuffle": True, "augment": True}
    first = everything(coded, seed=1, epoch=1, **options)
    torch.manual_seed(0)
    assert equal(first, everything(coded, seed=1, epoch=1, **options))
    for seed, epoch in ((1, 2), (2, 1), (0, 1), (1, 0)):
        other = everything(coded, seed=seed, epoch=epoch, **options)
        assert not torch.equal(first[1], other[1])
        assert (first[0][first[1].argsort()] == other[0][other[1].argsort()]).float().mean() < 0.9


@pytest.mark.parametrize("kind", ["memory", "normalised", "folder"])
def test_resuming_and_sharing_are_exact(kind, coded, tmp_path):
    images = coded.select(torch.arange(23), torch.arange(23), 23)
    if kind == "folder":
        write_imagenet(tmp_path, 3, 6)
        images = load("imagenet", tmp_path, resize_images=16).train
    options = {"shuffle": True, "seed": 1, "epoch": 4, "augment": kind != "normalised"}
    batches = list(images.loader(5, **options))
    assert len(batches) == len(images.loader(5, **options)) == -(-len(images) // 5)
    for start in range(len(batches) + 2):
        rest = images.loader(5, start_step=start, **options)
        assert len(rest) == max(len(batches) - start, 0) == len(list(rest))
        assert all(equal(*pair) for pair in zip(rest, batches[start:]))
    for size in (2, 3, 7):
        ranks = [images.loader(5, rank=rank, world_size=size, **options) for rank in range(size)]
        for whole, *shares in zip(batches, *ranks):
            assert equal(whole, [torch.cat(each) for each in zip(*shares)])
            counts = [len(labels) for _, labels in shares]
            assert max(counts) - min(counts) <= 1


def test_workers_change_nothing(tmp_path):
    write_imagenet(tmp_path, 3, 7)
    images = load("imagenet", tmp_path, resize_images=24).train
    options = {"shuffle": True, "seed": 3, "epoch": 1, "augment": True}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    alone = everything(images, **options)
    for workers in (1, 3):
        assert equal(alone, everything(images, workers=workers, **options))
    assert torch.equal(state, torch.get_rng_state())
    assert not equal(alone, everything(images, **{**options, "epoch": 2}))


def test_batches_lie_in_channels_last_memory(coded, tmp_path):
    write_imagenet(tmp_path, 1, 2)
    folder = load("imagenet", tmp_path, resize_images=24).train
    for images in (coded, folder):
        for augment in (True, False):
            batch, labels = next(iter(images.loader(8, augment=augment)))
            assert batch.is_contiguous(memory_format=torch.channels_last)
            assert batch.dtype == torch.float32 and labels.dtype == torch.int64


def test_batches_lie_on_the_device(coded):
    small = coded.select(torch.arange(20), torch.arange(20), 20)
    for images in (coded, small):
        for augment in (True, False):
            batches = images.loader(8, augment=augment, device="meta")
            assert {each.device.type for batch in batches for each in batch} == {"meta"}


# ImageNet's random parts


def test_random_parts_are_torchvisions():
    image = Image.fromarray(random_images(1, 90)[0]).resize((90, 61))
    for seed in range(10):
        random = np.random.default_rng(seed)
        top, left, height, width = draw_crop(random, 61, 90)
        want = functional.resized_crop(image, top, left, height, width, [32, 32])
        if random.random() < 0.5:
            want = functional.hflip(want)
        assert np.array_equal(random_part(image, 32, np.random.default_rng(seed)), want)


def test_random_parts_have_torchvisions_distribution():
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    image = torch.empty(1, 61, 90)
    ours = np.array([draw_crop(random, 61, 90) for _ in range(3000)])
    get = transforms.RandomResizedCrop.get_params
    published = np.array([get(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)])
    assert (ours[:, 0] + ours[:, 2] <= 61).all() and (ours[:, 1] + ours[:, 3] <= 90).all() and (ours >= 0).all()
    error = 5 * published.std(0) * (2 / 3000) ** 0.5
    assert (abs(ours.mean(0) - published.mean(0)) < error).all()
    assert np.allclose(ours.std(0), published.std(0), rtol=0.08)


@pytest.mark.parametrize("height, width", [(1, 1), (5, 400), (400, 5), (300, 1)])
def test_parts_of_extreme_images(height, width):
    image = torch.empty(1, height, width)
    for seed in range(5):
        top, left, h, w = draw_crop(np.random.default_rng(seed), height, width)
        assert 0 <= top <= height - h and 0 <= left <= width - w and h > 0 and w > 0
    if min(height, width) > 1:
        assert (h, w) == tuple(transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))[2:])


# an epoch of each


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "imagenet", "imagenet32"])
def test_a_network_trains_on_files(name, tmp_path):
    writers = {
        "cifar10": write_cifar10,
        "cifar100": write_cifar100,
        "mnist": write_mnist,
        "imagenet": write_imagenet,
        "imagenet32": write_imagenet32,
    }
    writers[name](tmp_path)
    place = ["--data" if "imagenet" in name else "--data-dir", str(tmp_path)]
    network = ["-a", "Fw Std Pr N", "--psi-arch", "mod", "--Pr-size", "4", "--n-blocks", "2", "--resize-images", "16"]
    run = ["--epochs", "1", "--batch-size", "16", "--device", "cpu", "--workers", "1", "--checkpoints", str(tmp_path)]
    assert main_block.main(["--dataset", name, *place, *network, *run, "--dir", "run"]) == 0
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3 and rows[2].startswith("1,")


# options


def test_grayscale_is_pils(tmp_path):
    (images, labels), _ = write_cifar10(tmp_path)
    ours = load("cifar10", tmp_path, grayscale=True)
    check_set(ours.train, [Image.fromarray(image).convert("L") for image in images], labels, GRAY)
    assert ours.signal.channels == 1 and load("digits", tmp_path, grayscale=True).signal.channels == 1


@pytest.mark.parametrize("size", [16, 48])
def test_resizing_is_torchvisions(tmp_path, size):
    (images, _), _ = write_cifar10(tmp_path)
    ours = load("cifar10", tmp_path, resize_images=size).train.images
    want = torch.stack([functional.pil_to_tensor(functional.resize(Image.fromarray(i), [size, size])) for i in images])
    assert (ours.permute(0, 3, 1, 2).int() - want.int()).abs().max() <= 1


def test_choosing_classes_and_images(tmp_path):
    (images, labels), (test, test_labels) = write_cifar10(tmp_path)
    ours = load("cifar10", tmp_path, classes_subset=[2, 8, 3])
    for ours_part, pixels, old in ((ours.train, images, labels), (ours.val, test, test_labels)):
        kept = np.isin(old, (2, 5))
        check_set(ours_part, pixels[kept], (old[kept] == 5).astype(int))
    assert ours.num_classes == 2
    ours = load("cifar10", tmp_path, data_subset=[1, 6, 2])
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[1:6:2] for c in range(10)]))
    check_set(ours.train, images[chosen], labels[chosen])
    assert len(ours.val) == len(test) and ours.num_classes == 10


def test_random_labels(tmp_path):
    (_, labels), (_, test_labels) = write_cifar100(tmp_path, 2000)
    ours = load("cifar100", tmp_path, randomize_labels=3)
    random = ours.train.labels
    assert (random.numpy() == labels).mean() < 0.05 and chisquare(random.bincount(minlength=100)).pvalue > 1e-3
    assert ours.val.labels.tolist() == test_labels.tolist()
    assert torch.equal(random, load("cifar100", tmp_path, randomize_labels=3).train.labels)
    assert not torch.equal(random, load("cifar100", tmp_path, randomize_labels=4).train.labels)
    part = load("cifar100", tmp_path, randomize_labels=3, data_subset=[None, 3, None]).train
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:3] for c in range(100)]))
    assert torch.equal(part.labels, random[chosen])


@pytest.mark.parametrize("options", [{"classes_subset": [50, 60, None]}, {"data_subset": [2000, None, None]}])
def test_choosing_nothing_is_refused(options):
    with pytest.raises(UserError, match="leaves n"):
        load("digits", "nowhere", **options)


# files that are missing, damaged or hostile


def explained(call, *parts):
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert error.value.exit_status == 2
    assert "\n" not in message and all(str(part) in message for part in parts), message


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "imagenet", "imagenet32"])
def test_without_files_and_network(name, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(downloads, "download_url", offline)
    folder = tmp_path / "data"
    explained(lambda: load(name, folder), folder, "--digits needs no files", "unpack")
    assert not folder.exists()


def test_a_download_happens_once(tmp_path, monkeypatch):
    (images, labels), _ = write_cifar10(tmp_path / "far")
    fetched = []

    def download(url, root, filename, checksum):
        fetched.append(url)
        with tarfile.open(Path(root) / filename, "w:gz") as archive:
            archive.add(tmp_path / "far" / "cifar-10-batches-py", "cifar-10-batches-py")

    monkeypatch.setattr(downloads, "download_url", download)
    for _ in range(2):
        check_set(load("cifar10", tmp_path / "here").train, images, labels)
    assert fetched == [theirs.CIFAR10.url]
    assert os.listdir(tmp_path / "here") == ["cifar-10-batches-py"]


def test_an_archive_fetched_by_hand_is_unpacked(tmp_path, monkeypatch):
    train, _ = write_mnist(tmp_path / "far")
    resources = []
    for path in sorted((tmp_path / "far" / "MNIST" / "raw").iterdir(), key=lambda p: (p.name[1] == "1", "l" in p.name)):
        subprocess.run(["gzip", "-k", path], check=True)
        archive = path.with_name(path.name + ".gz")
        resources.append((archive.name, md5(archive.read_bytes()).hexdigest()))
        (tmp_path / "here").mkdir(exist_ok=True)
        shutil.copy(archive, tmp_path / "here")
    resources.sort(key=lambda r: [name for name, _ in theirs.MNIST.resources].index(r[0]))
    monkeypatch.setattr(theirs.MNIST, "resources", resources)
    monkeypatch.setattr(downloads, "download_url", None)
    check_set(load("mnist", tmp_path / "here").train, *train, transforms.Normalize((0.1307,), (0.3081,)))


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("hide", [lambda bad: bad, lambda bad: {"data": bad}, lambda bad: {"data": np.array([bad])}])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_runs_something_is_refused(tmp_path, hide, protocol):
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(pickle.dumps(hide(Hostile(str(tmp_path / "ran"))), protocol=protocol))
    explained(lambda: load("cifar10", tmp_path), path, "refused")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_any_protocol_are_read(tmp_path, protocol):
    (images, labels), _ = write_cifar100(tmp_path)
    content = {"data": np.asfortranarray(to_rows(images)), "fine_labels": list(labels)}
    path = tmp_path / "cifar-100-python" / "train"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    check_set(load("cifar100", tmp_path).train, images, labels)


ROWS = to_rows(random_images(3, 32))


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "damaged"),
        (python2_pickle({"data": ROWS, "labels": [1, 2, 3]})[:5000], "damaged"),
        (b"not a pickle at all", "damaged"),
        (pickle.dumps([1, 2]), "dictionary"),
        (python2_pickle({"labels": [1, 2, 3]}), "'data'"),
        (pickle.dumps({"data": ROWS.astype(float), "labels": [1, 2, 3]}), "'data'"),
        (python2_pickle({"data": ROWS[:, :3000], "labels": [1, 2, 3]}), "'data'"),
        (python2_pickle({"data": to_rows(random_images(3, 16)), "labels": [1, 2, 3]}), "32×32"),
        (python2_pickle({"data": ROWS, "labels": [1, 2]}), "3 labels"),
        (python2_pickle({"data": ROWS}), "3 labels"),
        (pickle.dumps({"data": ROWS, "labels": ["a", "b", "c"]}), "3 labels"),
        (python2_pickle({"data": ROWS, "labels": [1, 2, 10]}), "0..9"),
    ],
)
def test_damaged_pickles_are_named(tmp_path, content, complaint):
    write_cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_4"
    path.write_bytes(content)
    explained(lambda: load("cifar10", tmp_path), path, complaint)


@pytest.mark.parametrize("change", [lambda d: d[:100], lambda d: b"", lambda d: b"\x1f\x8b" + d, lambda d: d + b"0"])
def test_damaged_idx_files_are_named(tmp_path, change):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    explained(lambda: load("mnist", tmp_path), path, "get it again")


def test_broken_folders_are_explained(tmp_path):
    write_imagenet(tmp_path / "one", 2, 1)
    (tmp_path / "one" / "val" / "n99").mkdir()
    explained(lambda: load("imagenet", tmp_path / "one"), tmp_path / "one" / "val" / "n99", "does not have")
    (tmp_path / "two" / "train").mkdir(parents=True)
    (tmp_path / "two" / "val").mkdir()
    explained(lambda: load("imagenet", tmp_path / "two"), "no folder of images")
    (tmp_path / "two" / "train" / "cats").mkdir()
    explained(lambda: load("imagenet", tmp_path / "two"), "no image files")
    write_imagenet32(tmp_path / "three")
    (tmp_path / "three" / "train_data_batch_7").unlink()
    explained(lambda: load("imagenet32", tmp_path / "three"), "(train_data_batch_7 missing)")


@pytest.fixture
def damaged(tmp_path):
    """An image folder of which three files of the first class are empty, text and truncated."""
    write_imagenet(tmp_path, 2, 6)
    place = tmp_path / "train" / "n00000000"
    bad = [place / f"train_{i}.JPEG" for i in (1, 3, 4)]
    bad[0].write_bytes(b"")
    bad[1].write_text("<html>404</html>")
    bad[2].write_bytes(bad[2].read_bytes()[:-400])
    return tmp_path, bad


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_refused_or_skipped(damaged, workers, caplog):
    folder, bad = damaged
    images = load("imagenet", folder, resize_images=16).train
    explained(lambda: list(images.loader(3, workers=workers)), bad[0], "--bad-images skip")
    explained(lambda: images.loader(3, bad_images="eat"), "error, skip")
    for _ in range(2):
        counts = [len(labels) for _, labels in images.loader(3, workers=workers, bad_images="skip")]
        assert counts == [2, 1, 3, 3]
    assert len(caplog.messages) == 3 and all(str(path) in text for path, text in zip(bad, caplog.messages))
    whole = load("imagenet", folder, resize_images=16).train
    assert [len(y) for _, y in whole.loader(1, bad_images="skip")] == [1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1]


def test_workers_leave_a_schedulers_signal_to_their_parent(tmp_path):
    write_imagenet(tmp_path, 2, 20)
    images = load("imagenet", tmp_path, resize_images=16).train
    batches = iter(images.loader(2, workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
    assert sum(1 for _ in batches) == 19
    batches = iter(images.loader(2, workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0


@pytest.mark.parametrize(
    "script, options, expected",
    [
        ("pipeline.py", ["--images", "600", "--repeats", "1"], "times faster than torchvision"),
        ("imagenet_load.py", ["--images", "300", "--epochs", "1", "--size", "32"], "3 named, once each, of 3"),
    ],
)
def test_benchmarks_run(script, options, expected):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in done.stdout and "FAIL" not in done.stdout and not done.stderr


def test_unreadable_files_are_named(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    calls = count()

    def refuse(self):
        next(calls)
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    explained(lambda: load("mnist", tmp_path), "Permission denied", "idx")
