"""Files from others that would run code if they could, given to every program that reads them."""

import os
import pickle
import tarfile

import numpy as np
import pytest
import torch

from tests.published_files import Hostile
from tests.soak.programs import copy, run, sampling, training


@pytest.fixture
def refuse(tmp_path, record_property):
    """`refuse(write, path, command)`: the command refuses the file in one line and runs nothing in it."""
    marker = tmp_path / "executed"
    for protocol in (0, 2, 5):
        pickle.loads(pickle.dumps(Hostile(marker), protocol))  # it would work
        marker.rmdir()

    def refuse(write, path, command):
        write(Hostile(marker), path)
        ended = run(command, 2)
        assert str(path) in ended.last_line and "Traceback" not in ended.output, ended.output
        assert not marker.exists(), f"{path}: ITS CODE WAS RUN by {command}"
        record_property("hostile files refused in one line, nothing in them run", 1)

    return refuse


def pickled(value, path):
    path.write_bytes(pickle.dumps(value))


def oldest(value, path):
    """The tar files that the first versions of torch wrote, with a pickle inside."""
    pickled(value, path)
    with tarfile.open(f"{path}.tar", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.add(path, name)
    os.replace(f"{path}.tar", path)


def old(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [torch.save, old, oldest, pickled])
@pytest.mark.parametrize("use", ["restart", "evaluate", "resume", "sample"])
def test_checkpoints(write, use, trained, tmp_path, refuse):
    root = copy(trained, tmp_path / "root")
    (root / "run" / "previous.pt").unlink()
    path = root / "run" / "last.pt" if use in ("resume", "sample") else tmp_path / "file.pt"
    command = sampling(root) if use == "sample" else training(root)
    if use in ("restart", "evaluate"):
        command += ["--dir", "new", "--resume", path, f"--{use}"]
    refuse(lambda bad, path: write({"state_dict": {"w": bad}, "epoch": 1, "best_acc1": 1.0}, path), path, command)


@pytest.mark.parametrize("flag", ["--P-eigenvectors", "--P-eigenvalues", "--P-initialization"])
@pytest.mark.parametrize("name", ["objects.npy", "objects.npz", "zip.pt", "pickle.pt", "pickle.npy"])
def test_matrices(flag, name, tmp_path, refuse):
    def write(bad, path):
        matrix = np.array([[bad]], dtype=object)
        if name == "objects.npy":
            np.save(path, matrix, allow_pickle=True)
        elif name == "objects.npz":
            np.savez(path, matrix=matrix)
        else:
            (torch.save if name == "zip.pt" else pickled)(bad, path)

    refuse(write, tmp_path / name, training(tmp_path, flag, tmp_path / name, "none"))
