"""Small pictures of the figures for pages such as the README, each stamped with the numbers that it shows."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import PIL.Image
from PIL.PngImagePlugin import PngInfo

from utils.errors import UserError
from utils.figures import data
from utils.figures.catalogue import FIGURES
from utils.files import atomic_write

DPI = 130
COLOURS = 64
STAMP = "Numbers"  # the PNG text that holds the digest


def write_pictures(scale: str, folder: Path, root: Path = data.ROOT) -> list[Path]:
    """Write SCALE/NUMBER_NAME.png in `folder` for every figure whose numbers are kept. Raises UserError, WriteError."""
    paths, folder = [], folder / scale
    folder.mkdir(parents=True, exist_ok=True)
    for number, figure in FIGURES.items():
        source = data.data_path(scale, figure.name, root)
        if source.exists():
            picture, info = io.BytesIO(), PngInfo()
            figure.draw(data.load_numbers(source)).savefig(picture, format="png", dpi=DPI)
            info.add_text(STAMP, digest(source))
            paths.append(folder / f"{number}_{figure.name}.png")
            small = PIL.Image.open(picture).convert("RGB").quantize(COLOURS)
            atomic_write(paths[-1], lambda file: small.save(file, "png", optimize=True, pnginfo=info))  # noqa: B023
    if not paths:
        raise UserError(f"{Path(root) / scale}: no numbers of any figure")
    return paths


def digest(numbers: Path) -> str:
    """The digest of a file of numbers with which its picture is stamped."""
    return hashlib.sha256(numbers.read_bytes()).hexdigest()


def stamp(picture: Path) -> str | None:
    """The digest of the numbers that a picture shows, None if it is no picture of ours."""
    with PIL.Image.open(picture) as image:
        return image.info.get(STAMP)
