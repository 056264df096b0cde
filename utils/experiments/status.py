"""What the folders say: which experiments are done, running, failed or missing, how good, and how long still.

Reads what `utils/checkpoints.py` and `resample.py` leave in ROOT/NAME (args.json, status.json, metrics.csv), without
torch, so that a table of all experiments takes no time.
"""

import csv
import dataclasses
from pathlib import Path

from utils import lock
from utils.experiments.registry import flags_of
from utils.files import read_json

# Flags that say where and how fast something runs, not what it computes.
PLACEMENT = {
    "-p",
    "--print-freq",
    "-j",
    "--workers",
    "--device",
    "--checkpoints",
    "--data",
    "--data-dir",
    "--dir",
    "--experiment",
    "--resume",
    "--tensorboard",
}
ALIASES = {"-b": "--batch-size", "--wd": "--weight-decay", "-a": "--arch"}

# A step's own cost beside its products (loader, Python, small kernels), in multiply-adds of one core.
STEP = 100_000_000


@dataclasses.dataclass(frozen=True)
class State:
    """Of one experiment. name: "missing", "running", "stopped", "failed", "changed", "damaged" or "finished".

    epoch: the last one that is done, of `epochs`. acc1, acc5: percent on the test set. detail: a word to the user.
    """

    name: str
    epoch: int | None = None
    epochs: int | None = None
    acc1: float | None = None
    acc5: float | None = None
    detail: str = ""


def read_state(root, experiment):
    """The `State` of an experiment's folder under `root`. Never raises: what cannot be read is "damaged"."""
    folder = Path(root) / experiment.name
    status, arguments = (read_json(folder / name, default={}) for name in ("status.json", "args.json"))
    known = {"epoch": status.get("epoch"), "epochs": status.get("epochs"), "acc1": status.get("acc1")}
    holder = lock.holder(folder / "lock")
    if holder:
        return State("running", detail=holder, **known)
    if not (folder / "args.json").exists() and not (folder / "status.json").exists():
        return State("missing")
    if "argv" in arguments:
        differences = changes(arguments["argv"], experiment.command()[2:])
        if differences:
            return State("changed", detail=differences, **known)
    if status.get("state") == "finished":
        if not (folder / experiment.output).exists():
            return State("damaged", detail=f"{experiment.output} is not there", **known)
        return State("finished", acc5=_last_acc5(folder), **known)
    if status.get("state") == "failed":
        return State("failed", detail=str(status.get("message") or ""), **known)
    return State("stopped", **known) if status else State("damaged", detail="status.json cannot be read")


def changes(before, now):
    """What differs between two command lines' definitions ("--lr 0.01, now 0.05; …"), "" if nothing does."""
    before, now = _definition(before), _definition(now)
    names = [flag for flag in {**before, **now} if before.get(flag) != now.get(flag)]
    return "; ".join(f"{flag} {_shown(before, flag)}, now {_shown(now, flag)}" for flag in names)


def _definition(argv):
    flags = {ALIASES.get(flag, flag): values for flag, values in flags_of(map(str, argv)).items()}
    return {flag: values for flag, values in flags.items() if flag not in PLACEMENT}


def _shown(flags, flag):
    return (" ".join(flags[flag]) or "set") if flag in flags else "absent"


# --- Time --------------------------------------------------------------------------------------------------------


def work(experiment):
    """The effort of an experiment in multiply-adds: its cost, and what every step costs whatever the network."""
    return experiment.cost + STEP * experiment.steps


def read_metrics(folder):
    """The rows of metrics.csv as dicts of numbers (None where empty), [] where there is none."""
    try:
        with open(Path(folder) / "metrics.csv", newline="") as file:
            return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, csv.Error, UnicodeDecodeError):
        return []


def _number(text):
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _last_acc5(folder):
    rows = read_metrics(folder)
    return rows[-1].get("val_acc5") if rows else None


def seconds_spent(root, experiment):
    """Seconds of training that an experiment's metrics tell of, None if they tell of none."""
    speeds = [row.get("images_per_second") for row in read_metrics(Path(root) / experiment.name)]
    seconds = [experiment.images / speed for speed in speeds if speed]
    return sum(seconds) or None


class Clock:
    """Foretells times from the work done so far and the seconds it took."""

    def __init__(self):
        self.work, self.seconds = 0, 0.0

    def add(self, work, seconds):
        self.work, self.seconds = self.work + work, self.seconds + seconds

    def foretell(self, work):
        """Seconds that `work` will take, None before anything is known."""
        return work * self.seconds / self.work if self.work else None


def remaining(experiment, state):
    """Work that is left of an experiment in a state."""
    if state.name in ("finished", "changed"):
        return 0
    done = (state.epoch or 0) / max(state.epochs or experiment.epochs, 1)
    return work(experiment) * (1 - min(done, 1))


def clock_of(root, experiments, states):
    """A `Clock` set by the metrics of everything that has been trained so far."""
    clock = Clock()
    for experiment, state in zip(experiments, states):
        seconds = seconds_spent(root, experiment) if state.epoch else None
        if seconds:
            clock.add(work(experiment) - remaining(experiment, dataclasses.replace(state, name="stopped")), seconds)
    return clock


def duration(seconds):
    """Seconds for a reader: "42 s", "3:07 min", "2:05 h", "3 days 4 h"; "?" for None."""
    if seconds is None:
        return "?"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    if seconds < 48 * 3600:
        return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"
    return f"{seconds // 86400} days {seconds % 86400 // 3600} h"


# --- The table ---------------------------------------------------------------------------------------------------


def status_table(root, experiments):
    """Lines: for every experiment its state, epoch, accuracy, published accuracy and time left; then the totals."""
    states = [read_state(root, experiment) for experiment in experiments]
    clock = clock_of(root, experiments, states)
    rows = [("experiment", "state", "epoch", "accuracy", "published", "left")]
    notes = []
    for experiment, state in zip(experiments, states):
        left = remaining(experiment, state)
        rows.append(
            (
                experiment.name,
                state.name,
                _epochs(experiment, state),
                _accuracy(experiment, state),
                _published(experiment),
                duration(clock.foretell(left)) if left else "",
            )
        )
        if state.detail and state.name in ("changed", "damaged", "failed"):
            notes.append(f"{experiment.name}: {state.name}: {state.detail}")
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    counts = {}
    for state in states:
        counts[state.name] = counts.get(state.name, 0) + 1
    total = sum(remaining(experiment, state) for experiment, state in zip(experiments, states))
    left = f"; about {duration(clock.foretell(total))} left, one after another" if total and clock.work else ""
    summary = ", ".join(f"{count} {name}" for name, count in counts.items())
    return [*lines, *notes, f"{len(experiments)} experiments: {summary}{left}"]


def _epochs(experiment, state):
    if experiment.script != "main_block.py" or state.epoch is None:
        return ""
    return f"{state.epoch}/{state.epochs or experiment.epochs}"


def _accuracy(experiment, state):
    if experiment.published and "acc5" in experiment.published:
        return "" if state.acc5 is None else f"{state.acc5:.1f} top-5"
    return "" if state.acc1 is None else f"{state.acc1:.1f}"


def _published(experiment):
    published = experiment.published or {}
    if "acc5" in published:
        return f"{published['acc5']:.1f} top-5"
    return f"{published['acc1']:.1f}" if "acc1" in published else ""
