"""Files from others that would run code if they could, and names that lead out of the folder of checkpoints."""

import json
import os
import pickle
import tarfile

import numpy as np
import torch

from soak.programs import DIGITS, SMALL, run, sampling, training
from utils.runs.folder import RunFolder

NAMES = ("../x", "../../x", "a/../../x", "/tmp/x", "a/..", "..", "a\\..\\..\\x", "C:x")
CIFAR = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused(trial):
    """Everything that is read, made by an enemy."""
    root = trial.fresh("run")
    marker = root / "executed"
    for protocol in (0, 2, 5):
        pickle.loads(pickle.dumps(Payload(marker), protocol))  # it would work
        trial.expect(marker.is_dir(), "the payload is none")
        marker.rmdir()
    trial.expect_status(run(training(root, "done")), 0)
    attempts = [*_checkpoints(root, marker), *_matrices(root, marker), *_arguments(root), *_data(root, marker)]
    for path, command in attempts:
        ended = run(command)
        trial.expect(
            ended.status == 2 and str(path) in ended.last_line and "Traceback" not in ended.output,
            f"{path}: status {ended.status}\n{ended.output}",
        )
        trial.expect(not marker.exists(), f"{path}: ITS CODE WAS RUN by {command}")
    return f"{len(attempts)} files refused, none of their code was run, each named in one line"


def names(trial):
    """--dir and --experiment that lead elsewhere."""
    root = trial.fresh("run") / "checkpoints"
    root.mkdir()
    trial.expect_status(run(training(root, "done")), 0)
    before = sorted(trial.folder.rglob("*"))
    commands = [
        command
        for name in NAMES
        for command in (training(root, name), sampling(root, name), sampling(root, "done", "--dir", name))
    ]
    for command in commands:
        ended = run(command)
        trial.expect(ended.status == 2 and "must stay inside" in ended.last_line, f"{command}: {ended.output}")
    trial.expect(sorted(trial.folder.rglob("*")) == before, "something was written")
    return f"{len(commands)} names refused, nothing written"


def _checkpoints(root, marker):
    """Checkpoints in every format there has been, given to every program that takes one: (file, command)."""
    content = {"state_dict": {"w": Payload(marker)}, "epoch": 1, "best_acc1": 1.0}
    writers = {
        "zip.pt": lambda path: torch.save(content, path),
        "old.pth.tar": lambda path: torch.save(content, path, _use_new_zipfile_serialization=False),
        "plain.pkl": lambda path: path.write_bytes(pickle.dumps(content)),
        "oldest.tar": lambda path: _oldest(path, content),
    }
    for name, write in writers.items():
        path = root / name
        write(path)
        yield path, training(root, "new", "--resume", path, "--restart")
        yield path, training(root, "new", "--resume", path, "--evaluate")
        folder = _copy_of_done(root, f"continued-{name}")
        write(folder.file("last"))
        folder.file("previous").unlink()
        yield folder.file("last"), training(root, folder.name)
        folder = _copy_of_done(root, f"sampled-{name}")
        write(folder.file("last"))
        folder.file("previous").unlink()
        yield folder.file("last"), sampling(root, folder.name)


def _oldest(path, content):
    """The tar files that the first versions of torch wrote, with a pickle inside."""
    inner = path.with_suffix(".pickle")
    inner.write_bytes(pickle.dumps(content))
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.add(inner, name)
    inner.unlink()


def _matrices(root, marker):
    """Covariances' eigenvectors and eigenvalues, and initial weights: (file, command)."""
    matrix = np.array([[Payload(marker)]], dtype=object)
    writers = {
        "matrix.npy": lambda path: np.save(path, matrix, allow_pickle=True),
        "matrix.npz": lambda path: np.savez(path, matrix=matrix),
        "matrix.pt": lambda path: torch.save(Payload(marker), path),
        "matrix.pkl": lambda path: path.write_bytes(pickle.dumps(Payload(marker))),
        "pickle.npy": lambda path: path.write_bytes(pickle.dumps(Payload(marker))),
    }
    for name, write in writers.items():
        path = root / name
        write(path)
        for flag in ("--P-eigenvectors", "--P-eigenvalues", "--P-initialization"):
            yield path, training(root, "new", flag, path, "none")


def _arguments(root):
    """args.json of a run that goes on, or is sampled from: (file, command)."""
    code = "__import__('os').mkdir('executed')"
    contents = {
        "code": {"args": {"arch": code, "n_blocks": code, "input_shape": code}},
        "pickle": pickle.dumps(Payload(root / "executed")),
        "list": [code],
        "shape": {"args": {"arch": [["Fw"]], "n_blocks": 10**12}},
    }
    for name, content in contents.items():
        folder = _copy_of_done(root, f"arguments-{name}")
        path = folder.path / "args.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        yield folder.path, training(root, folder.name)


def _data(root, marker):
    """The pickles that CIFAR and ImageNet32 are published as: (file, command)."""
    hostile = {b"data": Payload(marker), b"labels": [0]}
    cifar, imagenet32 = root / "data" / "cifar-10-batches-py", root / "imagenet32"
    for folder, files in ((cifar, CIFAR), (imagenet32, [*(f"train_data_batch_{i}" for i in range(1, 11)), "val_data"])):
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).write_bytes(pickle.dumps(hostile, 2))
    network, rest = SMALL[len(DIGITS) :], [*DIGITS[1:], "--epochs", "1", "--checkpoints", str(root), "--dir", "new"]
    yield cifar / CIFAR[0], ["main_block.py", "--cifar10", "--data-dir", str(root / "data"), *network, *rest]
    yield imagenet32, ["main_block.py", "--dataset", "imagenet32", "--data", str(imagenet32), *network, *rest]


def _copy_of_done(root, name):
    """A folder with the files of the finished run, under another name."""
    folder = RunFolder(root, name)
    folder.create()
    for file in RunFolder(root, "done").path.iterdir():
        (folder.path / file.name).write_bytes(file.read_bytes().replace(b'"done"', json.dumps(name).encode()))
    return folder
