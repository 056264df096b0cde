"""Progress of a run: lines, a progress bar on a terminal, metrics.csv, status.json, TensorBoard."""

import contextlib
import os
import socket
import sys
import time

from tqdm import tqdm

from utils.errors import UserError, WriteError
from utils.files import write_csv, write_json

COLUMNS = "epoch train_loss train_acc1 train_acc5 val_loss val_acc1 val_acc5 lr images_per_second".split()


class RunLog:
    """Reports a run's progress. `folder`: a RunFolder to write to, or None; `silent`: prints nothing (other ranks).

    Writing raises WriteError, naming the file.
    """

    def __init__(self, folder=None, silent=False, tensorboard=False):
        self.folder, self.silent = folder, silent
        self.curves = _summary_writer(folder) if tensorboard and folder is not None else None

    def where(self):
        """The folder's path, or words for none."""
        return "no folder" if self.folder is None else str(self.folder.path)

    def say(self, text):
        """Prints a line, and adds it to log.txt."""
        if self.silent:
            return
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:
            raise WriteError(f"could not write to the standard output: {error.strerror}") from error
        if self.folder is not None:
            path = self.folder.path / "log.txt"
            try:
                with open(path, "a") as file:
                    file.write(text + "\n")
            except OSError as error:
                raise WriteError(f"could not write {path}: {error.strerror}") from error

    def bar(self, steps, done, title):
        """A progress bar on a terminal, disabled elsewhere."""
        hidden = self.silent or not sys.stderr.isatty()
        return tqdm(total=steps, initial=done, desc=title, leave=False, dynamic_ncols=True, disable=hidden)

    def metrics(self, rows):
        """Writes metrics.csv from dicts with COLUMNS as keys, and the last one's curves."""
        if self.folder is None:
            return
        shown = ({key: "" if row[key] is None else f"{row[key]:.7g}" for key in COLUMNS} for row in rows)
        write_csv(self.folder.path / "metrics.csv", COLUMNS, shown)
        if self.curves is not None:
            for key in COLUMNS[1:]:
                if rows[-1][key] is not None:
                    self.curves.add_scalar(key, rows[-1][key], rows[-1]["epoch"])
            self.curves.flush()

    def status(self, state, epoch, epochs, acc1=None, best_acc1=None, message=""):
        """Writes status.json. `state`: "running", "finished", "stopped" or "failed"."""
        if self.folder is None:
            return
        progress = {"state": state, "epoch": epoch, "epochs": epochs, "acc1": acc1, "best_acc1": best_acc1}
        process = {"pid": os.getpid(), "host": socket.gethostname(), "updated": time.time()}
        write_json(self.folder.path / "status.json", {**progress, **process, "message": message})

    def failed(self, message):
        """Notes in status.json that the run has failed, and why, if the disk still allows it."""
        if self.folder is None:
            return
        with contextlib.suppress(UserError, WriteError):
            known = self.folder.status()
            self.status("failed", *map(known.get, ("epoch", "epochs", "acc1", "best_acc1")), message)


def _summary_writer(folder):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(folder.path / "tensorboard")
