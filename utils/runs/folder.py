"""The folder of a run: what it holds, how it is found again, and what protects it from kills and full disks.

ROOT/NAME holds args.json, metrics.csv, log.txt, status.json, last.pt (with the states of optimiser and generator),
previous.pt (the last.pt before), best.pt and epoch_{0,1,2,5,10,20,50,…}.pt. Every file is written beside its place
and renamed into it: a reader finds the old content or the new, never a part.
"""

import errno
import os
import re
import sys
from pathlib import Path

from utils.errors import UserError, WriteError
from utils.files import read_json, writing
from utils.runs.checkpoints import load, save
from utils.runs.options import SAMPLING, TRAINING

_RECORDS = ("args.json", "metrics.csv", "log.txt", "status.json")
_CHECKPOINTS = ("last.pt", "previous.pt", "best.pt", "epoch_*.pt")
# What a folder holds if a program works there: an argument in args.json, files
_TRACES = {
    TRAINING.program: ("arch", (*_CHECKPOINTS, "metrics.csv")),
    SAMPLING.program: ("experiment", ("accuracies.csv", "checkpoint_repeat*.pt")),
}


class RunFolder:
    """The folder ROOT/NAME of a run. Raises UserError for a name that leads out of ROOT, or to ROOT itself."""

    def __init__(self, root, name):
        parts = re.split(r"[/\\]", str(name))
        is_inside = Path(name).parts and ".." not in parts and not Path(name).is_absolute() and ":" not in parts[0]
        if not is_inside or not str(name).isprintable():
            raise UserError(f"--dir {name}: not a name of a run, which must stay inside {root}")
        self.name = str(name)
        self.path = Path(root) / name

    def create(self):
        """Makes the folder. Raises UserError for a path that no folder can have, WriteError if it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe.{os.getpid()}.tmp"
            probe.touch()
            probe.unlink()
        except OSError as error:
            is_path = error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
            kind = UserError if is_path else WriteError
            raise kind(f"{self.path}: cannot be written ({error.strerror})") from error

    def programs(self):
        """The programs that have worked here, by what they leave."""
        stored = read_json(self.path / "args.json", default={}).get("args")
        for program, (argument, names) in _TRACES.items():
            is_described = isinstance(stored, dict) and argument in stored
            if is_described or any(any(self.path.glob(name)) for name in names):
                yield program

    def refuse_work_of_others(self, program):
        """Raises UserError if another program than `program` has worked here."""
        for other in self.programs():
            if other != program:
                raise UserError(f"{self.path} holds the work of {other}: give another --dir")

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
        found = read_json(path) if path.exists() else {}
        for key in ("epoch", "epochs", "acc1", "best_acc1"):
            if not isinstance(found.get(key), (int, float, type(None))):
                raise UserError(f"{path}: {key} is {found[key]!r}, not a number")
        return found

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
            with writing(path):
                os.replace(previous, path)
        return checkpoint

    def save_last(self, checkpoint):
        """Writes last.pt and keeps the one before as previous.pt. Raises WriteError, with both unchanged."""
        save(self.file("last"), checkpoint, self.file("previous"))

    def clean(self):
        """Removes what a killed process left half-written. Only for the holder of the folder's lock."""
        self.remove(".*.tmp")

    def clear(self):
        """Removes what a run has left. Only for the holder of the folder's lock."""
        self.remove(*_RECORDS, *_CHECKPOINTS)

    def remove(self, *patterns):
        """Removes files of its own, in the order of the patterns of their names. Raises WriteError."""
        with writing(self.path):
            for pattern in patterns:
                for file in self.path.glob(pattern):
                    file.unlink(missing_ok=True)


def find_checkpoint(name, root):
    """The file of a checkpoint given as a file or a run's folder, as it is or under `root`. Raises UserError."""
    for path in (Path(name), Path(root) / name):
        if path.is_dir() and (path / "last.pt").is_file():
            return path / "last.pt"
        if path.is_file():
            return path
    raise UserError(f"--resume {name}: no such checkpoint, neither there nor in {root}")
