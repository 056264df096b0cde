"""Small files: written beside their place and renamed into it, read without surprises."""

import contextlib
import csv
import io
import json
import os
from pathlib import Path

from utils.errors import UserError, WriteError


@contextlib.contextmanager
def writing(path):
    """Turns an OSError into a WriteError that names what could not be written."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"could not write {path}: {error.strerror or error}") from error


def atomic_write(path, write, previous=None):
    """Calls `write(file)` on a binary file beside `path`, then renames it to `path`, what was there to `previous`.

    Raises WriteError, naming the file, where the disk refuses; the old content is then intact.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                os.replace(path, previous)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def write_csv(path, columns, rows):
    """Writes dicts with the keys `columns`, in this order, as CSV with a header, atomically. Raises WriteError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))


def write_json(path, value):
    """Writes `value` as JSON, atomically. Raises WriteError."""
    text = json.dumps(value, indent=2) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


def read_json(path, default=None):
    """The JSON object in a file. Raises UserError, or returns `default`, where it is missing or is not one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it should hold a JSON object")
    except (OSError, ValueError) as error:
        if default is not None:
            return default
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path}: no such file") from error
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    return value
