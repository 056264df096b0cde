"""accuracies.csv, which `resample.py` leaves in a folder: test accuracy of every sample after each of its layers."""

import csv
import io

from utils.errors import UserError
from utils.files import atomic_write

NAME = "accuracies.csv"
COLUMNS = ("repeat", "layer", "acc1", "acc5")  # sample, number of layers sampled, top-1 and top-5 in percent


def row_of(repeat, accuracy):
    """The row of a `rainbow.sampling.Accuracy`."""
    return {"repeat": repeat, "layer": accuracy.layer, "acc1": f"{accuracy.acc1:.4f}", "acc5": f"{accuracy.acc5:.4f}"}


def write_rows(folder, rows):
    """Write the rows, the whole file or nothing. Raises WriteError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(folder / NAME, lambda file: file.write(text.getvalue().encode()))


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
        raise UserError(
            f"{path}: not accuracies written by resample.py ({error}); sample again with --overwrite"
        ) from error
    return rows


def final_accuracies(rows):
    """Top-1 accuracy in percent of each sample with all layers sampled."""
    return list({row["repeat"]: float(row["acc1"]) for row in rows}.values())
