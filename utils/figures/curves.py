"""Training curves: what the metrics.csv of runs say, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from utils.errors import UserError, did_you_mean
from utils.experiments.status import read_metrics
from utils.figures.drawing import ACCURACY, STYLES, shades

PANELS = {"loss": "loss (log scale)", "acc1": ACCURACY.replace("test accuracy", "accuracy")}


def draw_curves(checkpoints: Path, names: Sequence[str], style: str = "paper") -> Canvas:
    """Loss and accuracy of runs by epoch: on the training images dashed, on the test images solid.

    Raises UserError if a run under `checkpoints` has no metrics.csv.
    """
    metrics = {name: _metrics(checkpoints, name) for name in names}
    colors = shades("viridis", len(metrics))
    with matplotlib.style.context(STYLES[style]):
        canvas = Canvas(figsize=(7.5, 3.4), layout="constrained")
        for ax, (quantity, label) in zip(canvas.subplots(1, len(PANELS)), PANELS.items()):
            for rows, color in zip(metrics.values(), colors):
                for part, line in (("val", "-"), ("train", "--")):
                    values = [row.get(f"{part}_{quantity}") for row in rows]  # None, of a first row: a gap
                    ax.plot([row["epoch"] for row in rows], np.array(values, float), line, color=color)
            ax.set(xlabel="epoch", ylabel=label, yscale="log" if quantity == "loss" else "linear")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles = [Line2D([], [], color=color, label=name) for name, color in zip(metrics, colors)]
        handles.append(Line2D([], [], color="black", linestyle="--", label="on the training images"))
        canvas.legend(handles=handles, loc="outside lower center")
        canvas.draw_without_rendering()
    return canvas


def _metrics(checkpoints, name):
    rows = read_metrics(checkpoints / name)
    if not rows:
        known = sorted(str(path.parent.relative_to(checkpoints)) for path in checkpoints.glob("**/metrics.csv"))
        raise UserError(f"--curves {name}: no metrics.csv in {checkpoints / name}{did_you_mean(name, known)}")
    return rows
