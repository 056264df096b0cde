"""Reading tens of thousands of image files, bad ones among them: each is named once, and no memory leaks."""

import multiprocessing
from pathlib import Path

import torch

from tests.published_files import write_imagenet
from tests.utils.data.test_datasets import load

FILES, READ, WORKERS = 120, 20_000, 2
ALLOWED_GROWTH = 24 << 20  # bytes


def memory(pid, kind):
    """Bytes of the process `pid` (Linux, 0 once it is gone): "Private_", its own; "Anonymous", also those it shares."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))


def test_bad_files_are_named_once_and_no_memory_leaks(tmp_path, caplog, record_property):
    write_imagenet(tmp_path, 10, FILES // 10)
    bad = sorted(tmp_path.glob("train/*/train_5.JPEG"))
    for path, content in zip(bad, 3 * [b"", b"<html>404</html>", bad[0].read_bytes()[:-400], bytes(2000)]):
        path.write_bytes(content)
    images, indices = load("imagenet", tmp_path, resize_images=64).train, torch.arange(READ) % FILES
    images, used = images.select(indices, images.labels[indices], 10), []
    for epoch in range(3):
        loader, early = images.loader(64, epoch=epoch, augment=True, workers=WORKERS, bad_images="skip"), {}
        count = 0
        for step, (_, labels) in enumerate(loader):
            count += len(labels)
            if step in (len(loader) // 5, len(loader) - 3 * WORKERS):
                for worker in multiprocessing.active_children():
                    own = memory(worker.pid, "Private_")
                    assert own - early.setdefault(worker.pid, own) < ALLOWED_GROWTH
        assert count == sum(index % FILES % 12 != 5 for index in range(READ)) and len(early) == WORKERS
        used.append(memory("self", "Anonymous"))
    assert used[2] - used[1] < ALLOWED_GROWTH
    assert sorted(record.getMessage().split(": ")[0] for record in caplog.records) == [str(path) for path in bad]
    assert not multiprocessing.active_children()
    record_property("image files read, bad ones named once each, memory steady", 3 * READ)
