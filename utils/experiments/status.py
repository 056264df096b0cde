"""What the folders say: which experiments are done, running, failed or missing, their accuracy and the time left.

Reads what `utils.runs.checkpoints` and `resample.py` leave in ROOT/NAME (args.json, status.json, metrics.csv), without
torch, so that a table of all experiments takes no time.
"""

import csv
import dataclasses
import math
from collections import Counter
from pathlib import Path

from utils import lock
from utils.errors import UserError
from utils.files import read_json
from utils.runs import options

STEP = 100_000_000  # what every step costs besides its products (loader, Python, small kernels), in multiply-adds


@dataclasses.dataclass(frozen=True)
class State:
    """Of one experiment. name: "missing", "running", "stopped", "failed", "changed", "damaged" or "finished".

    epoch: the last completed one, of `epochs`. acc1, acc5: percent on the test set. detail: a word to the user.
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
    epoch, epochs, acc1 = (_number(status.get(key)) for key in ("epoch", "epochs", "acc1"))
    known = State("finished", epoch and int(epoch), epochs and int(epochs), acc1)

    def state(name, detail=""):
        return dataclasses.replace(known, name=name, detail=detail)

    if holder := lock.holder(folder / "lock"):
        return state("running", holder)
    if not any((folder / name).exists() for name in ("args.json", "status.json")):
        return State("missing")
    if "args" in arguments and (differences := _changes(experiment, arguments["args"], known.epochs)):
        return state("changed", differences)
    if status.get("state") == "finished" and known.epochs == experiment.epochs:
        if not (folder / experiment.output).exists():
            return state("damaged", f"{experiment.output} is missing")
        return dataclasses.replace(known, acc5=([{}] + read_metrics(folder))[-1].get("val_acc5"))
    if status.get("state") == "failed":
        return state("failed", str(status.get("message") or ""))
    return state("stopped") if status else state("damaged", "status.json cannot be read")


def _changes(experiment, stored, epochs):
    """What the experiment would do differently from a run: "lr = 0.01, now 0.05; …", "" if it would resume the run."""
    try:
        differences = options.changes(experiment.script, stored, experiment.command()[2:])
    except UserError as error:
        return str(error)
    if epochs and epochs > experiment.epochs:
        differences["epochs"] = (epochs, experiment.epochs)
    return "; ".join(f"{field} = {before!r}, now {now!r}" for field, (before, now) in differences.items())


# --- Time --------------------------------------------------------------------------------------------------------


def work(experiment):
    """The effort of an experiment in multiply-adds: its cost, and what every step costs whatever the network."""
    return experiment.cost + STEP * experiment.steps


def remaining(experiment, state):
    """The work that is left of an experiment in a state."""
    if state.name in ("finished", "changed"):
        return 0
    return work(experiment) * (1 - _share_done(experiment, state))


def _share_done(experiment, state):
    return min((state.epoch or 0) / max(state.epochs or experiment.epochs, 1), 1)


def read_metrics(folder):
    """The rows of metrics.csv as dicts of numbers (None where empty), [] if there is none."""
    try:
        with open(Path(folder) / "metrics.csv", newline="") as file:
            return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, csv.Error, UnicodeDecodeError):
        return []


def _number(value):
    try:
        return float(value) if math.isfinite(float(value)) else None
    except (TypeError, ValueError):
        return None


def seconds_spent(root, experiment):
    """Seconds that the epochs of an experiment took so far, by its metrics."""
    speeds = [row.get("images_per_second") for row in read_metrics(Path(root) / experiment.name)]
    return sum(experiment.images / speed for speed in speeds if speed)


def _pace(root, experiments, states):
    """Seconds that a unit of work takes by the metrics of what has been trained so far, None if nothing has been."""
    done = seconds = 0
    for experiment, state in zip(experiments, states):
        if state.epoch and (spent := seconds_spent(root, experiment)):
            done, seconds = done + work(experiment) * _share_done(experiment, state), seconds + spent
    return seconds / done if done else None


def duration(seconds):
    """Seconds for a reader: "42 s", "3:07 min", "2:05 h", "3 days 4 h"; "?" for None."""
    if seconds is None:
        return "?"
    seconds = round(seconds)
    minutes, hours = seconds // 60, seconds // 3600
    if not minutes:
        return f"{seconds} s"
    if not hours:
        return f"{minutes}:{seconds % 60:02d} min"
    return f"{hours}:{minutes % 60:02d} h" if hours < 48 else f"{hours // 24} days {hours % 24} h"


# --- The table ---------------------------------------------------------------------------------------------------


def _states(root, experiments):
    states = [read_state(root, experiment) for experiment in experiments]
    return states, _pace(root, experiments, states)


def status_records(root, experiments):
    """What `status_table` says, as a dict per experiment: `State`, published accuracy, seconds left (or None)."""
    states, pace = _states(root, experiments)
    return [
        {"experiment": experiment.name}
        | {"state" if key == "name" else key: value for key, value in dataclasses.asdict(state).items()}
        | {"published": experiment.published, "seconds_left": pace and round(remaining(experiment, state) * pace, 1)}
        for experiment, state in zip(experiments, states)
    ]


def status_table(root, experiments):
    """Lines: for every experiment its state, epoch, accuracy, published accuracy and time left; then the totals."""
    states, pace = _states(root, experiments)
    rows = [("experiment", "state", "epoch", "accuracy", "published", "left")]
    rows += [_row(experiment, state, pace) for experiment, state in zip(experiments, states)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines += [
        f"{experiment.name}: {state.name}: {state.detail}"
        for experiment, state in zip(experiments, states)
        if state.detail and state.name in ("changed", "damaged", "failed")
    ]
    total = sum(remaining(experiment, state) for experiment, state in zip(experiments, states))
    left = f"; about {duration(total * pace)} left, one after another" if total and pace else ""
    counts = ", ".join(f"{count} {name}" for name, count in Counter(state.name for state in states).items())
    return [*lines, f"{len(experiments)} experiments: {counts}{left}"]


def accuracies(experiment, state):
    """The accuracy reached and the published one, in words; "" where there is none."""
    published = experiment.published or {}
    top, unit = ("acc5", " top-5") if "acc5" in published else ("acc1", "")
    return ["" if value is None else f"{value:.1f}{unit}" for value in (getattr(state, top), published.get(top))]


def _row(experiment, state, pace):
    is_training = experiment.script == "main_block.py" and state.epoch is not None
    epoch = f"{state.epoch}/{state.epochs or experiment.epochs}" if is_training else ""
    left = remaining(experiment, state)
    return (
        experiment.name,
        state.name,
        epoch,
        *accuracies(experiment, state),
        duration(pace and left * pace) if left else "",
    )
