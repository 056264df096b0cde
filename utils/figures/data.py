"""The numbers behind the figures, in small files: notebook_data/SCALE/NAME.npz, each with how it was made.

A file holds arrays under plain names and one text, `provenance`: JSON with the command, commit and date that made the
numbers, the experiments they were made from, and a key of the checkpoints that were read.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from utils.errors import UserError
from utils.experiments.published import load_published
from utils.files import atomic_write

ROOT = Path("notebook_data")


class FigureData(dict):
    """The numbers of one figure: arrays by name, and their `provenance`."""

    def __init__(self, numbers: Mapping[str, ArrayLike], provenance: dict):
        super().__init__((name, np.asarray(values)) for name, values in numbers.items())
        self.provenance = provenance


def data_path(scale: str, name: str, root: Path = ROOT) -> Path:
    """Where the numbers of a figure are kept."""
    return Path(root) / scale / f"{name}.npz"


def save_numbers(path: Path, data: FigureData) -> None:
    """Write the numbers, the whole file or nothing. Raises WriteError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = np.array(json.dumps(data.provenance, ensure_ascii=False))
    atomic_write(path, lambda file: np.savez_compressed(file, provenance=text, **data))


def load_numbers(path: Path) -> FigureData:
    """Read what `save_numbers` wrote. Raises UserError if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        provenance = json.loads(str(arrays.pop("provenance")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; compute the numbers with --recompute") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not the numbers of a figure ({error}); recompute them with --recompute") from None
    return FigureData(arrays, provenance)


def published_numbers(name: str) -> FigureData | None:
    """The numbers published with a figure, named like ours; None if only the plot was. Raises UserError."""
    entries = load_published().get(name)
    if entries is None:
        return None
    provenance = {key: entries.pop(key) for key in ("source", "note")}
    return FigureData(entries, provenance)


def provenance(command: str, experiments: list[str], key: str) -> dict:
    """How numbers were made: by `command`, now, from the checkpoints of `experiments`, which have this `key`."""
    return {
        "command": command,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "experiments": experiments,
        "checkpoints": key,
    }


def checkpoints_key(files: list[Path], version: str) -> str:
    """A key of the contents of checkpoint files, from the checksums stored in them, and of a `version`."""
    key = hashlib.sha256(version.encode())
    for file in files:
        try:
            with zipfile.ZipFile(file) as archive:
                parts = [(info.filename, info.CRC, info.file_size) for info in archive.infolist()]
        except (OSError, zipfile.BadZipFile):
            parts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns)] if file.exists() else []
        key.update(repr((file.name, parts)).encode())
    return key.hexdigest()[:32]


def _commit() -> str:
    """The commit of this source tree, with a + if files differ from it; "unknown" outside a repository."""

    def git(*arguments):
        folder = Path(__file__).parent
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
