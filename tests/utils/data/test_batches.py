"""Batches: what torchvision's transforms make of the same draws, and the same whoever reads them."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from torchvision import transforms
from torchvision.transforms import functional

from tests.published_files import random_images, write_imagenet
from tests.utils.data.test_datasets import COLOR, everything, explained, load
from utils.data.batches import Normalization, generator, shares
from utils.data.folders import draw_crop, random_part, resized
from utils.data.memory import MemorySet, crop_and_flip
from utils.errors import RunError


@pytest.fixture
def coded():
    """4000 images of 12×12 whose first two channels say where each pixel comes from, from 1."""
    rows, columns = np.meshgrid(np.arange(1, 13), np.arange(1, 13), indexing="ij")
    image = torch.from_numpy(np.stack([rows, columns, 0 * rows], -1).astype(np.uint8))
    plain = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), peak=1)
    return MemorySet(image.repeat(4000, 1, 1, 1), torch.arange(4000), 4000, plain, padding=4)


def folder_set(tmp_path, *tree, size=16):
    write_imagenet(tmp_path, *tree)
    return load("imagenet", tmp_path, resize_images=size).train


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


# crops and flips


def test_crops_and_flips_are_torchvisions():
    images = torch.from_numpy(random_images(200, 32))
    offsets, flips = torch.randint(0, 9, (200, 2)), torch.rand(200) < 0.5
    got = crop_and_flip(images, offsets, flips, 4)
    for image, (top, left), flip, cropped in zip(images, offsets.tolist(), flips.tolist(), got):
        expected = functional.crop(functional.pad(Image.fromarray(image.numpy()), 4), top, left, 32, 32)
        assert np.array_equal(np.asarray(functional.hflip(expected) if flip else expected), cropped)


def test_augmented_batches_are_normalised_after_zero_padding():
    black, color = torch.zeros(50, 8, 8, 3, dtype=torch.uint8), Normalization(COLOR.mean, COLOR.std)
    images, _ = everything(MemorySet(black, torch.zeros(50).long(), 1, color, 4), augment=True, seed=3)
    torch.testing.assert_close(images, COLOR(torch.zeros(3, 1, 1)).expand(50, 3, 8, 8))


def test_offsets_and_flips_are_uniform_and_differ_within_a_batch(coded):
    images, labels = next(iter(coded.loader(4000, shuffle=True, seed=5, epoch=2, augment=True)))
    top = images[:, 0, 6, 6] - 7 + 4  # 0..8
    flipped = images[:, 1, 6, 5] > images[:, 1, 6, 6]
    left = torch.where(flipped, images[:, 1, 6, 5], images[:, 1, 6, 6]) - 7 + 4
    cells = (18 * top + 2 * left + flipped).long()
    assert len(cells.bincount(minlength=162)) == 162 and chisquare(cells.bincount(minlength=162)).pvalue > 1e-3
    assert len((162 * cells[:-1] + cells[1:]).unique()) > 3400  # of 162²: draws of neighbours are independent
    assert torch.equal(labels.sort().values, torch.arange(4000)) and not torch.equal(labels, torch.arange(4000))


# ImageNet's parts


def test_random_parts_are_torchvisions():
    image = Image.fromarray(random_images(1, 90)[0]).resize((90, 61))
    for seed in range(10):
        random = np.random.default_rng(seed)
        top, left, height, width = draw_crop(random, 61, 90)
        want = functional.resized_crop(image, top, left, height, width, [32, 32])
        want = functional.hflip(want) if random.random() < 0.5 else want
        assert np.array_equal(random_part(image, 32, np.random.default_rng(seed)), want)


def test_random_parts_have_torchvisions_distribution():
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    image = torch.empty(1, 61, 90)
    ours = np.array([draw_crop(random, 61, 90) for _ in range(3000)])
    get = transforms.RandomResizedCrop.get_params
    published = np.array([get(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)])
    assert (ours[:, 0] + ours[:, 2] <= 61).all() and (ours[:, 1] + ours[:, 3] <= 90).all() and (ours >= 0).all()
    assert (abs(ours.mean(0) - published.mean(0)) < 5 * published.std(0) * (2 / 3000) ** 0.5).all()
    assert np.allclose(ours.std(0), published.std(0), rtol=0.08)


@pytest.mark.parametrize("height, width", [(1, 1), (5, 400), (400, 5), (300, 1)])
def test_parts_of_extreme_images(height, width):
    image = torch.empty(1, height, width)
    for seed in range(5):
        top, left, h, w = draw_crop(np.random.default_rng(seed), height, width)
        assert 0 <= top <= height - h and 0 <= left <= width - w and h > 0 and w > 0
    if min(height, width) > 1:
        assert (h, w) == tuple(transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))[2:])


def test_whole_images_are_resized_to_torchvisions_sizes():
    shapes = [(103, 618), (618, 103), *np.random.default_rng(0).integers(1, 700, (3000, 2)).tolist()]
    for height, width in shapes:
        for shorter in (64, 256):
            want = functional.resize(torch.empty(1, height, width, device="meta"), shorter).shape[:0:-1]
            assert resized(width, height, shorter) == tuple(want), (height, width, shorter)


# what is drawn depends on seed and epoch only


def test_draws_are_those_of_all_versions():
    """A run that was started with an earlier version of this program resumes with the same batches."""
    steps = shares(23, 5, shuffle=True, seed=1, epoch=2, start_step=3)
    assert [batch.tolist() for batch in steps] == [[21, 6, 18, 7, 1], [12, 11, 2]]
    offsets = generator(1, 2, 1).integers(0, 8, (3, 2), endpoint=True)
    assert offsets.tolist() == [[5, 8], [3, 0], [4, 6]]
    assert draw_crop(generator(1, 2, 1, 5), 61, 90) == (9, 7, 42, 32)


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
    images = folder_set(tmp_path, 3, 6) if kind == "folder" else coded.select(torch.arange(23), torch.arange(23), 23)
    options = {"shuffle": True, "seed": 1, "epoch": 4, "augment": kind != "normalised"}
    batches = list(images.loader(5, **options))
    assert len(batches) == len(images.loader(5, **options)) == -(-len(images) // 5)
    for start in range(len(batches) + 2):
        rest = images.loader(5, start_step=start, **options)
        assert len(rest) == max(len(batches) - start, 0) == len(list(rest))
        assert all(equal(*pair) for pair in zip(rest, batches[start:]))
    for size in (2, 3, 7):
        ranks = [images.loader(5, rank=rank, world_size=size, **options) for rank in range(size)]
        for whole, *parts in zip(batches, *ranks):
            assert equal(whole, [torch.cat(each) for each in zip(*parts)])
            counts = [len(labels) for _, labels in parts]
            assert max(counts) - min(counts) <= 1


def test_workers_change_nothing(tmp_path):
    images = folder_set(tmp_path, 3, 7, size=24)
    options = {"shuffle": True, "seed": 3, "epoch": 1, "augment": True}
    state = torch.get_rng_state()
    alone = everything(images, **options)
    for workers in (1, 3):
        assert equal(alone, everything(images, workers=workers, **options))
    assert torch.equal(state, torch.get_rng_state())
    assert not equal(alone, everything(images, **{**options, "epoch": 2}))


@pytest.mark.parametrize("augment", [True, False])
def test_batches_are_float32_in_channels_last_memory_on_their_device(augment, coded, tmp_path):
    for images in (coded, coded.select(torch.arange(20), torch.arange(20), 20), folder_set(tmp_path, 1, 2)):
        batch, labels = next(iter(images.loader(8, augment=augment)))
        assert batch.is_contiguous(memory_format=torch.channels_last)
        assert batch.dtype == torch.float32 and labels.dtype == torch.int64
        elsewhere = images.loader(8, augment=augment, device="meta")
        assert {each.device.type for batch in elsewhere for each in batch} == {"meta"}


# bad images, workers


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_refused_or_skipped(tmp_path, workers, caplog):
    images = folder_set(tmp_path, 2, 6)
    bad = [tmp_path / "train" / "n00000000" / f"train_{i}.JPEG" for i in (1, 3, 4)]
    for path, content in zip(bad, (b"", b"<html>404</html>", bad[2].read_bytes()[:-400])):
        path.write_bytes(content)
    explained(lambda: list(images.loader(3, workers=workers)), bad[0], "--bad-images skip")
    explained(lambda: images.loader(3, bad_images="eat"), "error, skip")
    for _ in range(2):
        counts = [len(labels) for _, labels in images.loader(3, workers=workers, bad_images="skip")]
        assert counts == [2, 1, 3, 3]
    assert len(caplog.messages) == 3 and all(str(path) in text for path, text in zip(bad, caplog.messages))
    counts = [len(labels) for _, labels in images.loader(1, bad_images="skip")]
    assert counts == [1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1]


def test_workers_stop_only_when_their_parent_says_so(tmp_path):
    images = folder_set(tmp_path, 2, 20)
    batches = iter(images.loader(2, workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    send = f"import os; [os.kill({worker.pid}, number) for number in ({signal.SIGTERM:d}, {signal.SIGINT:d})]"
    assert os.spawnlp(os.P_WAIT, "python3", "python3", "-c", send) == 0  # by another process than the parent
    assert sum(1 for _ in batches) == 19
    batches = iter(images.loader(2, workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGBUS])
def test_a_worker_that_dies_ends_the_next_wait_with_a_line(tmp_path, signum):
    images, is_busy = folder_set(tmp_path, 2, 200), False
    with pytest.raises(RunError, match="-j") as error:
        for step, _ in enumerate(images.loader(1, workers=2)):
            is_busy = True
            if not step:
                os.kill(multiprocessing.active_children()[0].pid, signum)
                time.sleep(0.3)  # whatever it does meanwhile is not interrupted
            is_busy = False
    assert not is_busy
    assert "\n" not in str(error.value) and "/dev/shm" in str(error.value)


def test_shared_memory_that_is_full_is_done_without(tmp_path, monkeypatch, caplog):
    images = folder_set(tmp_path, 2, 6)
    alone = everything(images)

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # in the workers, which are forked
    for _ in range(2):
        assert equal(alone, everything(images, workers=2))
    assert ["/dev/shm" in text and "-j" in text for text in caplog.messages] == [True]


def test_workers_that_cannot_start_are_explained_in_a_line(tmp_path, monkeypatch):
    images = folder_set(tmp_path, 2, 6)
    monkeypatch.setattr("os.fork", lambda: os.open("/nowhere/at/all", os.O_RDONLY))
    with pytest.raises(RunError, match="No such file or directory.*-j 0"):
        next(iter(images.loader(2, workers=2)))
