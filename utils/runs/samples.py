"""accuracies.csv, which `resample.py` leaves in a folder: test accuracy of every sample after each of its layers."""

import csv

from utils.errors import UserError
from utils.files import write_csv

NAME = "accuracies.csv"
COLUMNS = ("repeat", "layer", "acc1", "acc5")  # sample, number of layers sampled, top-1 and top-5 in percent


def row_of(repeat, accuracy):
    """The row of a `rainbow.sampling.Accuracy`."""
    return {"repeat": repeat, "layer": accuracy.layer, "acc1": f"{accuracy.acc1:.4f}", "acc5": f"{accuracy.acc5:.4f}"}


def write_rows(folder, rows):
    """Writes the rows, the whole file or nothing. Raises WriteError."""
    write_csv(folder / NAME, COLUMNS, rows)


def read_rows(folder):
    """The rows in a folder, [] if there is no file. Raises UserError if it is damaged."""
    path = folder / NAME
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
        [float(row[column]) for row in rows for column in COLUMNS]
    except FileNotFoundError:
        return []
    except (OSError, csv.Error, KeyError, TypeError, ValueError) as error:
        hint = "sample again with --overwrite"
        raise UserError(f"{path}: not accuracies written by resample.py ({error}); {hint}") from error
    return rows


def rainbow_layer(rows):
    """How many layers of the paper's rainbow networks are sampled: all but the last projection and the classifier,
    which are the trained ones, rotated (section 4); all, if no row is of fewer."""
    layers = sorted({int(row["layer"]) for row in rows})
    return layers[-2] if len(layers) > 1 and layers[-2] > 0 else layers[-1]


def rainbow_accuracies(rows):
    """Top-1 accuracy in percent of each of the paper's rainbow networks."""
    return [float(row["acc1"]) for row in rows if int(row["layer"]) == rainbow_layer(rows)]
