"""The figures of a scale: numbers kept in files or computed from checkpoints, drawings, and the table of claims."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from pathlib import Path

import matplotlib.style
import PIL.Image
from matplotlib.figure import Figure as Canvas

from rainbow import RainbowError
from utils.device import pick_device
from utils.errors import RunError, UserError, as_user_error
from utils.experiments.registry import SCALES
from utils.figures.catalogue import FIGURES, Figure
from utils.figures.claims import Claim
from utils.figures.data import (
    ROOT,
    FigureData,
    checkpoints_key,
    data_path,
    load_numbers,
    provenance,
    published_numbers,
    save_numbers,
)
from utils.figures.drawing import STYLE
from utils.figures.numbers import SHOWN
from utils.figures.source import Source
from utils.files import atomic_write

VERSION = "2"  # of the numbers: raise it when they are computed differently


def compute(figure: Figure, source: Source, command: str, root: Path = ROOT) -> FigureData:
    """The numbers of a figure from the source's checkpoints: those kept if made from the same checkpoints, or new ones.

    Raises UserError, with the command that runs them, if experiments are not finished.
    """
    source.require(figure.number)
    key = checkpoints_key(source.files(figure.number), f"{VERSION} {SHOWN[source.scale]}")
    path = data_path(source.scale, figure.name, root)
    if path.exists() and (kept := load_numbers(path)).provenance.get("checkpoints") == key:
        return kept
    names = [experiment.name for experiment in source.experiments(figure.number)]
    with as_user_error(kind=RainbowError):
        data = FigureData(figure.compute(source), provenance(command, names, key))
    save_numbers(path, data)
    return data


def save(canvas: Canvas, folder: Path, name: str) -> list[Path]:
    """Write NAME.pdf and NAME.png, each as a whole or not at all. Raises WriteError."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it warns about dates in matplotlib's own fonts
    paths = [folder / f"{name}.pdf", folder / f"{name}.png"]
    with matplotlib.style.context(STYLE):
        for path, metadata in zip(paths, ({"CreationDate": None}, {"Software": None})):
            buffer = io.BytesIO()
            canvas.savefig(buffer, format=path.suffix[1:], metadata=metadata)
            atomic_write(path, lambda file, buffer=buffer: file.write(buffer.getvalue()))
    return paths


def claims_table(claims: list[Claim]) -> str:
    """Markdown: all claims, published and of this run, and whether they hold."""
    rows = [(str(c.figure), c.text, c.published, c.measured, "yes" if c.holds else "**no**") for c in claims]
    return _markdown(("figure", "claim", "published", "this run", "holds?"), rows)


def _markdown(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


class Gallery:
    """The figures of a scale, from numbers kept under `root` to files under `out`.

    recompute: compute numbers again if the checkpoints have changed. checkpoints, places, batch: as in `Source`.
    command: recorded as having made new numbers. Raises UserError for an unknown scale or device.
    """

    def __init__(
        self,
        scale: str,
        recompute: bool = False,
        device: str = "auto",
        *,
        checkpoints: str = "checkpoints",
        places: dict | None = None,
        batch: int = 128,
        out: str | Path = "figures",
        root: str | Path = ROOT,
        command: str = "paper_figs.ipynb with RECOMPUTE = True",
    ):
        if scale not in SCALES:
            raise UserError(f"no scale {scale!r}: choose {' or '.join(SCALES)}")
        self.scale, self.recompute, self.command = scale, recompute, command
        self.root, self.folder = Path(root), Path(out) / scale
        self.source = Source(scale, checkpoints, pick_device(device), places, batch)

    def make(self, number: int) -> tuple[FigureData, Canvas, list[Path]]:
        """A figure's numbers, the figure and its files, PDF and PNG. Raises RunError."""
        figure = FIGURES[number]
        path = data_path(self.scale, figure.name, self.root)
        kept = path.exists() and not self.recompute
        data = load_numbers(path) if kept else compute(figure, self.source, self.command, self.root)
        canvas = figure.draw(data, published_numbers(figure.name) if self.scale == "paper" else None)
        return data, canvas, save(canvas, self.folder, f"{number}_{figure.name}")

    def claims(self) -> list[Claim]:
        """The claims of all figures whose numbers are kept."""
        paths = {figure: data_path(self.scale, figure.name, self.root) for figure in FIGURES.values()}
        kept = {figure: load_numbers(path) for figure, path in paths.items() if path.exists()}
        return [claim for figure, data in kept.items() for claim in figure.claims(data)]

    def show(self, number: int) -> None:
        """In a notebook: a figure, how its numbers were made, and the published ones if of another scale."""
        from IPython.display import Image, Markdown, display

        try:
            data, _, paths = self.make(number)
        except RunError as error:
            display(Markdown(f"**Figure {number} cannot be drawn.** {error}"))
            return
        picture = io.BytesIO()
        PIL.Image.open(paths[1]).convert("RGB").quantize(128).save(picture, "png", optimize=True)  # a third of the size
        display(Image(picture.getvalue(), width=round(100 * FIGURES[number].size[0])))
        made = data.provenance
        count = len(made["experiments"])
        text = (
            f"Numbers of {count} experiment{'s' if count > 1 else ''}, made {made['date']} at commit "
            f"`{made['commit']}` by `{made['command']}`; saved as `{paths[0]}` and `.png`."
        )
        rows = [] if self.scale == "paper" else FIGURES[number].comparison(data)
        table = _markdown(("", "published", "this run"), rows) if rows else ""
        display(Markdown(f"{text}\n\n{table}"))

    def show_claims(self) -> None:
        """In a notebook: the table of all claims."""
        from IPython.display import Markdown, display

        display(Markdown(claims_table(self.claims())))
