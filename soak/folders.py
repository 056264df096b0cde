"""What a folder of runs holds: whether every file of it can be read, and whether it is what another folder holds."""

import csv
import json
import time
from pathlib import Path

import torch

from utils.errors import UserError
from utils.runs.checkpoints import load

TIMES = {"images_per_second"}
PLACES = {"dir", "checkpoints"}


def unreadable(root):
    """A line for every file under `root` that cannot be read; half-written ones beside their place do not count."""
    return [f"{path}: {error}" for path in files(root) if (error := _lasting_complaint(path))]


def _lasting_complaint(path):
    """A complaint that stands a second look: what a killed runner has started may just be replacing the file."""
    if not _complaint(path):
        return None
    time.sleep(0.2)
    return _complaint(path) if path.exists() else None


def differences(root, other, ignored=()):
    """A line for everything in which the folders differ but for times, places, what was printed and `ignored` files."""
    names, others = (
        {path.relative_to(folder): path for path in files(folder) if path.name not in ignored}
        for folder in (root, other)
    )
    found = [f"{name}: only in one of the folders" for name in sorted(names.keys() ^ others.keys())]
    for name in sorted(names.keys() & others.keys()):
        if name.suffix in (".pt", ".csv") and not same(_content(names[name]), _content(others[name])):
            found.append(f"{names[name]}: differs from {others[name]}")
    return found


def left_overs(root):
    """The files that should be gone once everything has ended well."""
    return [path for path in Path(root).rglob("*") if path.name.startswith(".") or path.name == "lock"]


def files(root):
    """The files of runs under `root`."""
    return [
        path
        for path in sorted(Path(root).rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.name != "lock"
    ]


def same(a, b):
    """Whether two values are the same, tensors bit for bit, but for times and places."""
    if isinstance(a, dict):
        unlike = TIMES | PLACES
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in unlike)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def _content(path):
    if path.suffix == ".pt":
        return load(path)
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            return list(csv.DictReader(file, strict=True))
    return path.read_text()


def _complaint(path):
    try:
        _content(path)
    except FileNotFoundError:
        return None  # renamed by a process that still ends
    except (UserError, ValueError, OSError, csv.Error) as error:
        return error
    return None
