"""The folder of a run: what it holds, how it is found again, and what protects it from kills and full disks.

ROOT/NAME holds args.json, metrics.csv, log.txt, status.json, last.pt (with the states of optimiser and generator),
previous.pt (the last.pt before), best.pt and epoch_{0,1,2,5,10,20,50,…}.pt. Every file is written beside its place
and renamed into it: a reader finds the old content or the new, never a part.
"""

import os
import re
import sys
from pathlib import Path

from utils.errors import UserError
from utils.files import read_json
from utils.runs.checkpoints import load, save
from utils.runs.options import TRAINING

_RECORDS = ("args.json", "metrics.csv", "log.txt", "status.json")


class RunFolder:
    """The folder ROOT/NAME of a run. Raises UserError for a name that leads out of ROOT."""

    def __init__(self, root, name):
        parts = re.split(r"[/\\]", str(name))
        if not name or ".." in parts or Path(name).is_absolute() or not str(name).isprintable() or ":" in parts[0]:
            raise UserError(f"--dir {name}: not a name of a run, which must stay inside {root}")
        self.name = str(name)
        self.path = Path(root) / name

    def create(self):
        """Makes the folder. Raises UserError if it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe.{os.getpid()}.tmp"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error

    def is_started(self):
        """Whether a run has left a checkpoint to resume from."""
        return self.file("last").exists() or self.file("previous").exists()

    def file(self, epoch=None):
        """Path of a checkpoint: of the `epoch` (an integer), "best", "previous" or "last" (the default)."""
        name = f"epoch_{epoch}" if isinstance(epoch, int) else epoch or "last"
        return self.path / f"{name}.pt"

    def epochs(self):
        """The epochs whose checkpoints are kept, increasing."""
        found = (re.fullmatch(r"epoch_(\d+)\.pt", file.name) for file in self.path.glob("epoch_*.pt"))
        return sorted(int(match[1]) for match in found if match)

    def description(self):
        """args.json as a dict: argv, args, versions, seed, parameters. Raises UserError."""
        return read_json(self.path / "args.json")

    def args(self):
        """The resolved arguments of the training, as `utils.runs.options.parse` gives them. Raises UserError."""
        return TRAINING.restore(self.description().get("args"), self.path / "args.json")

    def status(self):
        """status.json as a dict, {} for a run that has not begun. Raises UserError if it cannot be read."""
        path = self.path / "status.json"
        return read_json(path) if path.exists() else {}

    def checkpoint(self, epoch=None, repair=False):
        """The checkpoint of `epoch` (see `file`); for a damaged last one that before, with a warning on stderr.

        repair: previous.pt takes the place of a damaged last.pt; only for the holder of the folder's lock.
        Raises UserError if there is none.
        """
        path, previous = self.file(epoch), self.file("previous")
        if epoch not in (None, "last") and not path.exists():
            kept = ", ".join(map(str, self.epochs())) or "none"
            raise UserError(f"{path}: no such checkpoint (epochs kept in {self.path}: {kept})")
        try:
            return load(path)
        except UserError as error:
            if epoch not in (None, "last") or not previous.exists():
                raise
            checkpoint = load(previous)
            print(f"WARNING: {error}; using {previous} instead", file=sys.stderr)
        if repair:
            os.replace(previous, path)
        return checkpoint

    def save_last(self, checkpoint):
        """Writes last.pt and keeps the one before as previous.pt. Raises WriteError, with both unchanged."""
        save(self.file("last"), checkpoint, self.file("previous"))

    def clean(self):
        """Removes what a killed process left half-written. Only for the holder of the folder's lock."""
        for file in self.path.glob(".*.tmp"):
            file.unlink(missing_ok=True)

    def clear(self):
        """Removes what a run has left. Only for the holder of the folder's lock."""
        for file in [*self.path.glob("*.pt"), *(self.path / name for name in _RECORDS)]:
            file.unlink(missing_ok=True)


def find_checkpoint(name, root):
    """The file of a checkpoint given as a file or a run's folder, as it is or under `root`. Raises UserError."""
    for path in (Path(name), Path(root) / name):
        if path.is_dir() and (path / "last.pt").is_file():
            return path / "last.pt"
        if path.is_file():
            return path
    raise UserError(f"--resume {name}: no such checkpoint, neither there nor in {root}")
