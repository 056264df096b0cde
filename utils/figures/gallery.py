"""The figures of a scale: numbers kept in files or computed from checkpoints, drawings, and the table of claims."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.style
import PIL.Image
from matplotlib.figure import Figure as Canvas

from rainbow import RainbowError
from utils.device import pick_device
from utils.errors import RunError, UserError, as_user_error
from utils.experiments.registry import SCALES
from utils.figures import data
from utils.figures.catalogue import FIGURES, Figure
from utils.figures.claims import Claim
from utils.figures.data import FigureData
from utils.figures.drawing import STYLES
from utils.figures.numbers import SHOWN
from utils.figures.source import Source
from utils.files import atomic_write
from utils.runs.session import set_precision

FORMATS = ("pdf", "png")
NOTEBOOK = "paper_figs.ipynb with RECOMPUTE = True"
VERSION = "2"  # of the numbers: raise it when they are computed differently


def compute(figure: Figure, source: Source, command: str, root: Path = data.ROOT) -> FigureData:
    """The numbers of a figure from the source's checkpoints: those kept if made from the same checkpoints, or new ones.

    Raises UserError, with the command that runs them, if experiments are not finished.
    """
    source.require(figure.number)
    key = data.checkpoints_key(source.files(figure.number), f"{VERSION} {SHOWN[source.scale]}")
    path = data.data_path(source.scale, figure.name, root)
    if path.exists() and (kept := data.load_numbers(path)).provenance.get("checkpoints") == key:
        return kept
    names = [experiment.name for experiment in source.experiments(figure.number)]
    with as_user_error(kind=RainbowError):
        numbers = FigureData(figure.compute(source), data.provenance(command, names, key))
    data.save_numbers(path, numbers)
    return numbers


def save(canvas: Canvas, folder: Path, name: str, formats: Sequence[str] = FORMATS, style="paper") -> list[Path]:
    """Write NAME.FORMAT in each format, each as a whole or not at all. Raises WriteError."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it warns about dates in matplotlib's own fonts
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
    paths = [folder / f"{name}.{format}" for format in formats]
    with matplotlib.style.context([*STYLES[style], {"svg.hashsalt": name}]):
        for path, format in zip(paths, formats):
            buffer = io.BytesIO()
            canvas.savefig(buffer, format=format, metadata=undated[format])
            atomic_write(path, lambda file, buffer=buffer: file.write(buffer.getvalue()))
    return paths


def small_png(path: Path) -> bytes:
    """A PNG file in 128 colours: a third of its size."""
    content = io.BytesIO()
    PIL.Image.open(path).convert("RGB").quantize(128).save(content, "png", optimize=True)
    return content.getvalue()


def claims_table(claims: list[Claim]) -> str:
    """Markdown: all claims, published and of this run, and whether they hold."""
    rows = [(str(c.figure), c.text, c.published, c.measured, "yes" if c.holds else "**no**") for c in claims]
    return _markdown(("figure", "claim", "published", "this run", "holds?"), rows)


def _markdown(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


class Gallery:
    """The figures of a scale, from numbers kept under `root` to files under `out`.

    recompute: compute numbers again if the checkpoints have changed. by: the command recorded as having made them.
    root: by default this repository's numbers, or those of your own runs, OUT/numbers, if they are to be recomputed.
    look: what `save` takes, formats and style. options: of `Source`. Raises UserError for an unknown scale or device.
    """

    def __init__(
        self, scale, recompute=False, device="auto", *, out="figures", root=None, by=NOTEBOOK, look=None, **options
    ):
        if scale not in SCALES:
            raise UserError(f"no scale {scale!r}: choose {' or '.join(SCALES)}")
        self.scale, self.recompute, self.command = scale, recompute, by
        self.root = Path(root or (Path(out) / "numbers" if recompute else data.ROOT))
        self.folder, self.look = Path(out) / scale, {"formats": FORMATS, "style": "paper"} | (look or {})
        device = pick_device(device)
        set_precision(device)
        self.source = Source(scale, device=device, **options)

    def make(self, number: int) -> tuple[FigureData, Canvas, list[Path]]:
        """A figure's numbers, the figure and its files. Raises RunError."""
        figure, path = FIGURES[number], self._kept(number)
        keep = path.exists() and not self.recompute
        numbers = data.load_numbers(path) if keep else compute(figure, self.source, self.command, self.root)
        published = data.published_numbers(figure.name) if self.scale == "paper" else None
        canvas = figure.draw(numbers, published, self.look["style"])
        return numbers, canvas, save(canvas, self.folder, f"{number}_{figure.name}", **self.look)

    def claims(self) -> list[Claim]:
        """The claims of all figures whose numbers are kept."""
        kept = {number: self.numbers(number) for number in FIGURES}
        return [claim for number, numbers in kept.items() if numbers for claim in FIGURES[number].claims(numbers)]

    def numbers(self, number: int) -> FigureData | None:
        """The numbers kept of a figure, None if there are none. Raises UserError if they are damaged."""
        return data.load_numbers(self._kept(number)) if self._kept(number).exists() else None

    def _kept(self, number):
        return data.data_path(self.scale, FIGURES[number].name, self.root)

    def show(self, number: int) -> None:
        """In a notebook: a figure, how its numbers were made, and the published ones if of another scale."""
        from IPython.display import Image, Markdown, display

        try:
            numbers, _, paths = self.make(number)
        except RunError as error:
            display(Markdown(f"**Figure {number} cannot be drawn.** {error}"))
            return
        display(Image(small_png(paths[1]), width=round(100 * FIGURES[number].size[0])))
        made, count = numbers.provenance, len(numbers.provenance["experiments"])
        text = f"Numbers of {count} experiment{'s' if count > 1 else ''}, made {made['date']} at commit "
        text += f"`{made['commit']}` by `{made['command']}`; saved as `{paths[0]}` and `.png`."
        rows = [] if self.scale == "paper" else FIGURES[number].comparison(numbers)
        table = _markdown(("", "published", "this run"), rows) if rows else ""
        display(Markdown(f"{text}\n\n{table}"))

    def show_claims(self) -> None:
        """In a notebook: the table of all claims."""
        from IPython.display import Markdown, display

        display(Markdown(claims_table(self.claims())))
