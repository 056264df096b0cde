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

from utils import figure_drawing as drawing
from utils import figure_numbers as numbers_of
from utils.checkpoints import atomic_write
from utils.claims import Claim, claims_of, comparison
from utils.device import pick_device
from utils.errors import RunError, UserError, run_main
from utils.experiments import SCALES
from utils.figure_data import (
    ROOT,
    FigureData,
    checkpoints_key,
    data_path,
    load_numbers,
    load_published,
    provenance,
    save_numbers,
)
from utils.figure_numbers import SHOWN
from utils.figure_source import Source

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
    return Figure(number, name, title, size, getattr(numbers_of, name), getattr(drawing, name),
                  panels if callable(panels) else lambda _: panels)


_NAMES = ("gaussian_histograms", "marchenko_pastur", "resampling_width", "activation_spectra", "alignment_convergence",
          "covariance_convergence", "imagenet_spectra", "clipping", "training_dynamics")  # fmt: skip

FIGURES = {figure.number: figure for figure in (
    _figure(1, "Whitened weights are Gaussian", (7, 5.2),
            lambda n: [[f"r{i} j{k}" for k in range(len(n["layers"]))] for i in range(len(n["ranks"]))]),
    _figure(2, "Spectra of coloured and of whitened weights", (7.5, 4), _grid(("coloured", "white"), "layers")),
    _figure(3, "Accuracy of rainbow networks", (4.6, 3.4), [["accuracy"]]),
    _figure(4, "Spectra of activations", (7.5, 3.4), [["widths", "layers"]]),
    _figure(5, "Activations converge with width", (7.5, 3.2), [["scattering", "resnet"]]),
    _figure(6, "Covariances converge with networks and with width", (7.5, 5.8),
            [["networks", "widths"], ["clipped", "errors"]]),
    _figure(7, "Spectra of large networks", (7.5, 6),
            [["scattering activations", "scattering weights"], ["resnet activations", "resnet weights"]]),
    _figure(8, "Clipped networks", (7.5, 4.4), _grid(("variance", "accuracy"), "layers")),
    _figure(9, "Training amplifies the weights", (7.5, 5.6),
            [["amplification"] * 3 + ["cosine"] * 3,
             ["plane 0"] * 2 + ["plane 1"] * 2 + ["plane 2"] * 2]),
)}  # fmt: skip


def compute(figure: Figure, source: Source, command: str, root: Path = ROOT) -> FigureData:
    """The numbers of a figure from the source's checkpoints: kept ones where they were made from the same, or new ones.

    Raises UserError where experiments are not finished, with the command that makes them.
    """
    source.require(figure.number)
    key = checkpoints_key(source.files(figure.number), f"{VERSION} {SHOWN[source.scale]}")
    path = data_path(source.scale, figure.name, root)
    if path.exists() and load_numbers(path).provenance.get("checkpoints") == key:
        return load_numbers(path)
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


def file_name(figure: Figure) -> str:
    """Name of a figure's files: its number first, so that they stand in order."""
    return f"{figure.number}_{figure.name}"


def published_for(figure: Figure, scale: str, root: Path = ROOT) -> dict | None:
    """The published numbers that may be drawn into a figure of a scale; None where scale or data differ."""
    return load_published(root).get(figure.name) if scale == "paper" else None


def comparison_table(figure: Figure, numbers: FigureData, root: Path = ROOT) -> str:
    """Markdown: the figure's published numbers beside this run's; "" where none were published."""
    rows = comparison(figure.number, numbers, load_published(root).get(figure.name, {}))
    return _markdown(("", "published", "this run"), rows) if rows else ""


def claims_table(claims: list[Claim]) -> str:
    """Markdown: all claims, published and of this run, and whether they hold."""
    words = {True: "yes", False: "**no**", None: "cannot be told"}
    rows = [(str(c.figure), c.text, c.published, c.measured, words[c.holds] + (f": {c.note}" if c.note else ""))
            for c in claims]
    return _markdown(("figure", "claim", "published", "this run", "holds?"), rows)


def _markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def all_claims(scale: str, root: Path = ROOT) -> list[Claim]:
    """The claims of all figures whose numbers are kept."""
    kept = [(figure, data_path(scale, figure.name, root)) for figure in FIGURES.values()]
    return [claim for figure, path in kept if path.exists() for claim in claims_of(figure.number, load_numbers(path))]


def show(number: int, scale: str, recompute: bool = False, device: str = "auto", checkpoints: str = "checkpoints",
         out: str = "figures", root: Path = ROOT) -> None:
    """In a notebook: a figure, how its numbers were made, and the published ones beside them. Saves it, too."""
    from IPython.display import Image, Markdown, display

    figure = FIGURES[number]
    try:
        if recompute:
            command = f"paper_figs.ipynb with SCALE = {scale!r}, RECOMPUTE = True"
            numbers = compute(figure, Source(scale, checkpoints, pick_device(device)), command, root)
        else:
            numbers = load_numbers(data_path(scale, figure.name, root))
    except UserError as error:
        display(Markdown(f"**Figure {number} cannot be drawn.** {error}"))
        return
    canvas = draw(figure, numbers, published_for(figure, scale, root))
    paths = save(canvas, Path(out) / scale, file_name(figure))
    picture = io.BytesIO()
    canvas.savefig(picture, format="png", dpi=100)
    display(Image(picture.getvalue()))
    made = numbers.provenance
    text = (f"Numbers of {len(made['experiments'])} experiments, made {made['date']} at commit `{made['commit']}` by "
            f"`{made['command']}`; saved as `{paths[0]}` and `.png`.")
    table = comparison_table(figure, numbers, root) if scale != "paper" else ""
    display(Markdown(text + ("\n\n" + table if table else "")))


def show_claims(scale: str, root: Path = ROOT) -> None:
    """In a notebook: the table of all claims."""
    from IPython.display import Markdown, display

    display(Markdown(claims_table(all_claims(scale, root))))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m utils.figures", description="The paper's figures and its claims.")
    parser.add_argument("--scale", choices=SCALES, default="laptop", help="default: laptop")
    parser.add_argument("--figure", nargs="+", type=int, metavar="N", choices=FIGURES, default=list(FIGURES),
                        help="only these (default: all nine)")
    parser.add_argument("--recompute", action="store_true",
                        help="make the numbers anew, unless they were made from the checkpoints that are there")
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
    places = {"data": args.data, "data_dir": args.data_dir}
    source = Source(args.scale, args.checkpoints, pick_device(args.device), places, args.batch_size)
    command = "python -m utils.figures " + " ".join(sys.argv[1:] if argv is None else argv)
    problems = 0
    for number in args.figure:
        figure = FIGURES[number]
        print(f"figure {number}: {figure.title}", flush=True)
        try:
            path = data_path(args.scale, figure.name, args.numbers)
            kept = not args.recompute and path.exists()
            numbers = load_numbers(path) if kept else compute(figure, source, command, args.numbers)
            canvas = draw(figure, numbers, published_for(figure, args.scale, args.numbers))
            save(canvas, args.out / args.scale, file_name(figure))
        except RunError as error:
            problems += 1
            print(f"figures: error: {error}", file=sys.stderr)
    _write_claims(args)
    return 2 if problems else 0


def _write_claims(args):
    claims = all_claims(args.scale, args.numbers)
    if not claims:
        return
    path = args.out / args.scale / "claims.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"# The paper's claims at the {args.scale} scale\n\n"
    atomic_write(path, lambda file: file.write((title + claims_table(claims) + "\n").encode()))
    held = sum(claim.holds is True for claim in claims)
    for claim in claims:
        if claim.holds is not True:
            print(f"figure {claim.figure}: does not hold here: {claim.text}: {claim.measured}")
    print(f"{held} of {len(claims)} claims hold; figures are in {path.parent}, the table of claims is {path}")


if __name__ == "__main__":
    run_main(main)
