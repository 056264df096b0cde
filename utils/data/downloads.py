"""The files of CIFAR and MNIST, downloaded once: torchvision knows where they are and their checksums."""

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from pathlib import Path

from torchvision import datasets as published
from torchvision.datasets.utils import check_integrity, download_url, extract_archive

from utils.errors import UserError


def cifar_files(data_dir, name):
    """The paths of the batches of "cifar10" or "cifar100" for training and for test, downloaded if they are missing.

    Raises UserError where that fails.
    """
    source = {"cifar10": published.CIFAR10, "cifar100": published.CIFAR100}[name]
    folder = data_dir / source.base_folder
    train, test = ([folder / file for file, _ in files] for files in (source.train_list, source.test_list))
    _ensure(data_dir, folder, train + test, [(source.url, source.filename, source.tgz_md5)], source.base_folder)
    return train, test


def mnist_files(data_dir):
    """The paths of (images, labels) for training and for test, downloaded if they are missing. Raises UserError."""
    folder = data_dir / "MNIST" / "raw"
    files = [folder / file.removesuffix(".gz") for file, _ in published.MNIST.resources]
    archives = [(published.MNIST.mirrors[0] + file, file, md5) for file, md5 in published.MNIST.resources]
    _ensure(data_dir, folder, files, archives, ".")
    return files[:2], files[2:]


def _ensure(data_dir, folder, files, archives, inside):
    """Downloads `archives` [(url, file, md5)] and moves what they hold in the folder `inside` into `folder`, unless
    all `files` are there already. An archive that lies in `data_dir` is not downloaded."""
    if all(file.is_file() for file in files):
        return
    existed = data_dir.exists()
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with _alone(data_dir):
            if not all(file.is_file() for file in files):
                _fetch(data_dir, folder, archives, inside)
    except (OSError, RuntimeError) as error:
        if not existed and data_dir.is_dir() and not any(data_dir.iterdir()):
            data_dir.rmdir()
        names = ", ".join(file for _, file, _ in archives)
        reason = " ".join(str(error).split())
        raise UserError(
            f"no data in {folder}, and the download of {archives[0][0]} failed ({reason}): unpack {names} there by "
            f"hand, or put it into {data_dir}; --digits needs no files"
        ) from None


def _fetch(data_dir, folder, archives, inside):
    fetched = Path(tempfile.mkdtemp(dir=data_dir, prefix=".download-"))
    try:
        (fetched / "content").mkdir()
        for url, file, md5 in archives:
            archive = data_dir / file
            if not check_integrity(archive, md5):
                with _patience(30):
                    download_url(url, fetched, file, md5)
                archive = fetched / file
            extract_archive(archive, fetched / "content", remove_finished=False)
        folder.mkdir(parents=True, exist_ok=True)
        for path in (fetched / "content" / inside).iterdir():
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(fetched, ignore_errors=True)


@contextlib.contextmanager
def _alone(folder):
    """Waits until no other process downloads into `folder`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _patience(seconds):
    """Connections that say nothing for so long fail."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
