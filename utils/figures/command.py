"""Draw the paper's figures and check its claims: numbers first, drawing second.

Numbers are read from notebook_data/SCALE/, or kept in figures/numbers/SCALE/ with --recompute. Figures (PDF and PNG),
the table of claims and a report on one page (index.html) go to figures/SCALE/.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from utils.errors import RunError, UserError
from utils.experiments.registry import SCALES
from utils.figures.catalogue import FIGURES
from utils.figures.curves import draw_curves
from utils.figures.data import ROOT
from utils.figures.drawing import STYLES
from utils.figures.gallery import FORMATS, Gallery, claims_table, save
from utils.figures.pictures import write_pictures
from utils.figures.report import write_report
from utils.files import atomic_write
from utils.runs import values as to
from utils.runs.command import Parser

EXAMPLES = (
    "python -m utils.figures --scale laptop                  # draw all figures from this repository's numbers",
    "python -m utils.figures --scale laptop --recompute      # from the numbers of your own runs",
    "python -m utils.figures --figure 3 --format svg --style poster",
    "python -m utils.figures --curves digits                 # the training curves of the run digits",
)


def parser() -> Parser:
    """The command line."""
    parser = Parser("python -m utils.figures", "The paper's figures, its claims, and a report on one page.", EXAMPLES)
    add = parser.add_argument
    add("--scale", choices=SCALES, default="laptop", help="default: laptop")
    which = {"type": int, "metavar": "N", "choices": FIGURES, "default": list(FIGURES)}
    add("--figure", nargs="+", **which, help="figures to draw (default: all nine)")
    add("--recompute", action="store_true", help="recompute numbers whose checkpoints have changed")
    place = {"type": to.path, "metavar": "DIR"}
    add("--checkpoints", **place, default="checkpoints", help="folder of the runs (default: checkpoints)")
    add("--device", default="auto", help="cpu, cuda, cuda:N, mps or auto (default)")
    add("--data", **place, help="ImageNet's folder, if it has moved since training")
    add("--data-dir", **place, help="folder of downloaded data sets, if it has moved since training")
    add("--batch-size", type=int, default=128, metavar="N", help="images at a time (default: 128)")
    where = f"folder of the numbers (default: {ROOT}, this repository's; with --recompute the folder numbers in --out)"
    add("--numbers", type=to.folder, metavar="DIR", help=where)
    add("--curves", nargs="+", metavar="NAME", help="draw the training curves of these runs instead")
    add("--pictures", type=to.folder, metavar="DIR", help="write small PNGs of the figures for a page to DIR instead")
    formats = {"nargs": "+", "choices": ("pdf", "png", "svg"), "default": FORMATS, "metavar": "FORMAT"}
    add("--format", **formats, help="pdf, png, svg, or several of them (default: pdf png)")
    add("--style", choices=STYLES, default="paper", help="paper (default), or poster: larger letters, thicker lines")
    add("--out", default="figures", type=to.folder, metavar="DIR", help="folder of the figures (default: figures)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Draw the chosen figures, the table of claims and the report. Returns 2 if a figure could not be drawn, else 0."""
    args = parser().parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    look = {"formats": args.format, "style": args.style}
    if args.curves:
        canvas = draw_curves(Path(args.checkpoints), args.curves, args.style)
        print("curves:", *save(canvas, args.out, "curves", **look))
        return 0
    if args.pictures:
        print("pictures:", *write_pictures(args.scale, args.pictures, args.numbers or ROOT))
        return 0
    places = {"data": args.data, "data_dir": args.data_dir}
    options = {"checkpoints": args.checkpoints, "places": places, "batch": args.batch_size, "look": look}
    by = "python -m utils.figures " + " ".join(sys.argv[1:] if argv is None else argv)
    gallery = Gallery(args.scale, args.recompute, args.device, out=args.out, root=args.numbers, by=by, **options)
    return _draw(gallery, args.figure)


def _draw(gallery, numbers):
    failed, start = {}, time.monotonic()
    for number in numbers:
        print(f"figure {number}: {FIGURES[number].title}", flush=True)
        try:
            gallery.make(number)
        except RunError as error:
            failed[number] = str(error)
            print(f"figures: error: {error}", file=sys.stderr)
    _write_claims(gallery)
    if len(failed) < len(numbers):
        print(f"report: {write_report(gallery, failed, time.monotonic() - start)}")
    return 2 if failed else 0


def _write_claims(gallery):
    claims, path = gallery.claims(), gallery.folder / "claims.md"
    if not claims:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"# The paper's claims at the {gallery.scale} scale\n\n{claims_table(claims)}\n"
    atomic_write(path, lambda file: file.write(text.encode()))
    for claim in claims:
        if not claim.holds:
            print(f"figure {claim.figure}: does not hold here: {claim.text}: {claim.measured}")
    held = sum(claim.holds for claim in claims)
    print(f"{held} of {len(claims)} claims hold; the figures are in {path.parent}, the table of claims is {path}")
