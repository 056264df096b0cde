"""The paper's figures and its claims, from experiments to files: numbers first, drawing second.

    python -m utils.figures --scale laptop                  draw all figures, from the numbers that are kept
    python -m utils.figures --scale laptop --recompute      make these numbers anew where the checkpoints have changed

Numbers are kept in notebook_data/SCALE/, figures (PDF and PNG) and the table of claims go to figures/SCALE/.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure as Canvas

from rainbow import RainbowError
from utils.device import pick_device
from utils.errors import RunError, UserError, as_user_error
from utils.experiments.registry import SCALES
from utils.figures import drawing
from utils.figures import numbers as numbers_of
from utils.figures.claims import Claim, claims_of, comparison
from utils.figures.data import (
    ROOT,
    FigureData,
    checkpoints_key,
    data_path,
    load_numbers,
    load_published,
    provenance,
    save_numbers,
)
from utils.figures.numbers import SHOWN
from utils.figures.source import Source
from utils.files import atomic_write

STYLE = Path(__file__).with_name("paper.mplstyle")
VERSION = "2"  # of the numbers: raised where they are computed otherwise


@dataclass(frozen=True)
class Figure:
    """One figure of the paper. size: inches; panels: names of its axes in rows, from its numbers."""

    number: int
    name: str
    title: str
    size: tuple[float, float]
    compute: Callable
    draw: Callable
    panels: Callable[[FigureData], list[list[str]]]


def _grid(rows, key):
    return lambda numbers: [[f"{row} j{k}" for k in range(len(numbers[key]))] for row in rows]


def _figure(number, title, size, panels):
    name = list(_NAMES)[number - 1]
    return Figure(
        number,
        name,
        title,
        size,
        getattr(numbers_of, name),
        getattr(drawing, name),
        panels if callable(panels) else lambda _: panels,
    )


_NAMES = (
    "gaussian_histograms",
    "marchenko_pastur",
    "resampling_width",
    "activation_spectra",
    "alignment_convergence",
    "covariance_convergence",
    "imagenet_spectra",
    "clipping",
    "training_dynamics",
)

FIGURES = {
    figure.number: figure
    for figure in (
        _figure(
            1,
            "Whitened weights are Gaussian",
            (7, 5.2),
            lambda n: [[f"r{i} j{k}" for k in range(len(n["layers"]))] for i in range(len(n["ranks"]))],
        ),
        _figure(2, "Spectra of coloured and of whitened weights", (7.5, 4), _grid(("coloured", "white"), "layers")),
        _figure(3, "Accuracy of rainbow networks", (4.6, 3.4), [["accuracy"]]),
        _figure(4, "Spectra of activations", (7.5, 3.4), [["widths", "layers"]]),
        _figure(5, "Activations converge with width", (7.5, 3.2), [["scattering", "resnet"]]),
        _figure(
            6,
            "Covariances converge with networks and with width",
            (7.5, 5.8),
            [["networks", "widths"], ["clipped", "errors"]],
        ),
        _figure(
            7,
            "Spectra of large networks",
            (7.5, 6),
            [["scattering activations", "scattering weights"], ["resnet activations", "resnet weights"]],
        ),
        _figure(8, "Clipped networks", (7.5, 4.4), _grid(("variance", "accuracy"), "layers")),
        _figure(
            9,
            "Training amplifies the weights",
            (7.5, 5.6),
            [["amplification"] * 3 + ["cosine"] * 3, ["plane 0"] * 2 + ["plane 1"] * 2 + ["plane 2"] * 2],
        ),
    )
}


def compute(figure: Figure, source: Source, command: str, root: Path = ROOT) -> FigureData:
    """The numbers of a figure from the source's checkpoints: kept ones where they were made from the same, or new ones.

    Raises UserError where experiments are not finished, with the command that makes them.
    """
    source.require(figure.number)
    key = checkpoints_key(source.files(figure.number), f"{VERSION} {SHOWN[source.scale]}")
    path = data_path(source.scale, figure.name, root)
    if path.exists() and load_numbers(path).provenance.get("checkpoints") == key:
        return load_numbers(path)
    with as_user_error(kind=RainbowError):
        arrays = figure.compute(source, SHOWN[source.scale])
    names = [experiment.name for experiment in source.experiments(figure.number)]
    data = FigureData(arrays, provenance(command, names, key))
    save_numbers(path, data)
    return data


def draw(figure: Figure, numbers: FigureData, published: dict | None = None) -> Canvas:
    """A figure drawn from its numbers, and the published ones where they are of the same scale."""
    with matplotlib.style.context(STYLE):
        canvas = Canvas(figsize=figure.size, layout="constrained")
        axes = canvas.subplot_mosaic(figure.panels(numbers))
        figure.draw(axes, numbers, published)
        canvas.draw_without_rendering()
    return canvas


def save(canvas: Canvas, folder: Path, name: str) -> list[Path]:
    """Writes NAME.pdf and NAME.png, each as a whole or not at all. Raises WriteError."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it remarks on the dates in matplotlib's own fonts
    paths = [folder / f"{name}.pdf", folder / f"{name}.png"]
    with matplotlib.style.context(STYLE):
        for path, metadata in zip(paths, ({"CreationDate": None}, {"Software": None})):
            buffer = io.BytesIO()
            canvas.savefig(buffer, format=path.suffix[1:], metadata=metadata)
            atomic_write(path, lambda file, buffer=buffer: file.write(buffer.getvalue()))
    return paths


def claims_table(claims: list[Claim]) -> str:
    """Markdown: all claims, published and of this run, and whether they hold."""
    words = {True: "yes", False: "**no**", None: "cannot be told"}
    rows = [
        (str(c.figure), c.text, c.published, c.measured, words[c.holds] + (f": {c.note}" if c.note else ""))
        for c in claims
    ]
    return _markdown(("figure", "claim", "published", "this run", "holds?"), rows)


def _markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


class Gallery:
    """The figures of a scale: from numbers that are kept under `root`, or made anew, to files under `out`.

    recompute: make the numbers anew where they are not of the checkpoints that are there. checkpoints, places, batch:
    of `Source`. command: what is noted as having made new numbers. Raises UserError for a scale or device that is not.
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

    def numbers(self, figure: Figure) -> FigureData:
        """The numbers of a figure. Raises UserError where they are neither kept nor can be made."""
        path = data_path(self.scale, figure.name, self.root)
        if path.exists() and not self.recompute:
            return load_numbers(path)
        return compute(figure, self.source, self.command, self.root)

    def make(self, number: int) -> tuple[FigureData, Canvas, list[Path]]:
        """A figure's numbers, the figure and its files, PDF and PNG. Raises RunError."""
        figure = FIGURES[number]
        numbers = self.numbers(figure)
        canvas = draw(figure, numbers, self._published(figure) if self.scale == "paper" else None)
        return numbers, canvas, save(canvas, self.folder, f"{number}_{figure.name}")

    def claims(self) -> list[Claim]:
        """The claims of all figures whose numbers are kept."""
        kept = [(figure, data_path(self.scale, figure.name, self.root)) for figure in FIGURES.values()]
        return [
            claim for figure, path in kept if path.exists() for claim in claims_of(figure.number, load_numbers(path))
        ]

    def show(self, number: int) -> None:
        """In a notebook: a figure, how its numbers were made, and the published ones if they are of another scale."""
        from IPython.display import Image, Markdown, display

        try:
            numbers, canvas, paths = self.make(number)
        except RunError as error:
            display(Markdown(f"**Figure {number} cannot be drawn.** {error}"))
            return
        picture = io.BytesIO()
        canvas.savefig(picture, format="png", dpi=100)
        display(Image(picture.getvalue()))
        made = numbers.provenance
        text = (
            f"Numbers of {len(made['experiments'])} experiments, made {made['date']} at commit "
            f"`{made['commit']}` by `{made['command']}`; saved as `{paths[0]}` and `.png`."
        )
        rows = [] if self.scale == "paper" else comparison(number, numbers, self._published(FIGURES[number]) or {})
        table = _markdown(("", "published", "this run"), rows) if rows else ""
        display(Markdown(f"{text}\n\n{table}"))

    def show_claims(self) -> None:
        """In a notebook: the table of all claims."""
        from IPython.display import Markdown, display

        display(Markdown(claims_table(self.claims())))

    def _published(self, figure):
        return load_published().get(figure.name)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m utils.figures", description="The paper's figures and its claims.")
    parser.add_argument("--scale", choices=SCALES, default="laptop", help="default: laptop")
    parser.add_argument(
        "--figure",
        nargs="+",
        type=int,
        metavar="N",
        choices=FIGURES,
        default=list(FIGURES),
        help="only these (default: all nine)",
    )
    parser.add_argument(
        "--recompute",
        action="store_true",
        help="make the numbers anew, unless they were made from the checkpoints that are there",
    )
    parser.add_argument("--checkpoints", default="checkpoints", metavar="DIR", help="where the runs are")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, mps or auto (default)")
    parser.add_argument("--data", metavar="DIR", help="ImageNet's folder, where it is not where training found it")
    parser.add_argument("--data-dir", metavar="DIR", help="where downloaded data sets live")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images at a time (default 128)")
    parser.add_argument("--numbers", default=ROOT, type=Path, metavar="DIR", help=f"where numbers are kept ({ROOT})")
    parser.add_argument("--out", default="figures", type=Path, metavar="DIR", help="where figures go (figures)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Draws the figures that are asked for and writes the table of claims; 2 where one could not be drawn."""
    args = parser().parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: at least 1")
    gallery = Gallery(
        args.scale,
        args.recompute,
        args.device,
        checkpoints=args.checkpoints,
        batch=args.batch_size,
        out=args.out,
        places={"data": args.data, "data_dir": args.data_dir},
        root=args.numbers,
        command="python -m utils.figures " + " ".join(sys.argv[1:] if argv is None else argv),
    )
    problems = 0
    for number in args.figure:
        print(f"figure {number}: {FIGURES[number].title}", flush=True)
        try:
            gallery.make(number)
        except RunError as error:
            problems += 1
            print(f"figures: error: {error}", file=sys.stderr)
    _write_claims(gallery)
    return 2 if problems else 0


def _write_claims(gallery):
    claims, path = gallery.claims(), gallery.folder / "claims.md"
    if not claims:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"# The paper's claims at the {gallery.scale} scale\n\n{claims_table(claims)}\n"
    atomic_write(path, lambda file: file.write(text.encode()))
    for claim in claims:
        if claim.holds is not True:
            print(f"figure {claim.figure}: does not hold here: {claim.text}: {claim.measured}")
    held = sum(claim.holds is True for claim in claims)
    print(f"{held} of {len(claims)} claims hold; figures are in {path.parent}, the table of claims is {path}")
