"""Progress of a run: lines, a progress bar on a terminal, metrics.csv, status.json, TensorBoard."""

import contextlib
import os
import socket
import sys
import time

from tqdm import tqdm

from utils.errors import UserError, WriteError
from utils.files import read_json, write_csv, write_json, writing

COLUMNS = "epoch train_loss train_acc1 train_acc5 val_loss val_acc1 val_acc5 lr images_per_second".split()


class RunLog:
    """Reports a run's progress. `folder`: a RunFolder to write to, or None; `silent`: prints nothing (other ranks).

    Writing raises WriteError, naming the file.
    """

    def __init__(self, folder=None, silent=False, tensorboard=False):
        self.folder, self.silent = folder, silent
        self.curves = None
        if tensorboard and folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
            with writing(folder.path / "tensorboard"):
                self.curves = SummaryWriter(folder.path / "tensorboard")

    def say(self, text):
        """Prints a line, and adds it to log.txt."""
        if self.silent:
            return
        with writing("to the standard output"):
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        self.keep(text)

    def keep(self, text):
        """Adds lines to log.txt."""
        if self.folder is not None:
            path = self.folder.path / "log.txt"
            with writing(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text + "\n")

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

    def ended(self, state, message, since):
        """Notes in status.json that the run has "failed" or "stopped", and why, if the disk still allows it.

        What another process of this run has noted `since` it began stays. Returns the message that stands there.
        """
        with contextlib.suppress(WriteError):
            known = read_json(self.folder.path / "status.json", default={})
            is_new = isinstance(known.get("updated"), float) and known["updated"] >= since
            if is_new and known.get("state") in ("failed", "stopped"):
                return known.get("message") or message
            self.status(state, *map(known.get, ("epoch", "epochs", "acc1", "best_acc1")), message)
        return message
