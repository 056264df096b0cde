"""The report of a scale: one page of HTML with every figure, claim and experiment, which needs no other file."""

from __future__ import annotations

import base64
import dataclasses
import inspect
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy
import torch

from utils.experiments import registry, status
from utils.figures import drawing
from utils.figures.catalogue import FIGURES
from utils.figures.claims import Claim
from utils.figures.gallery import Gallery, small_png
from utils.files import atomic_write

TEMPLATE = "report.html.j2"


@dataclasses.dataclass(frozen=True)
class Section:
    """What the page shows of one figure. picture: a data URL, "" if there is none; missing: then why."""

    number: int
    title: str
    caption: str
    picture: str
    missing: str
    claims: Sequence[Claim]
    comparison: Sequence[tuple[str, str, str]]
    provenance: Mapping

    @property
    def alternative(self) -> str:
        """The figure in words, for a reader who does not see it."""
        return " ".join([f"{self.title}. {self.caption}", *(f"{c.text}: {c.measured}." for c in self.claims)])


def write_report(gallery: Gallery, missing: Mapping[int, str], seconds: float) -> Path:
    """Write index.html beside a gallery's figures and return its path. Raises UserError, WriteError.

    missing: by figure why it was not drawn. seconds: what drawing took.
    """
    folder = Path(__file__).parent
    options = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True, **options)
    sections = [_section(gallery, number, missing.get(number, "")) for number in FIGURES]
    rows = _experiment_rows(gallery)
    page = environment.get_template(TEMPLATE).render(
        scale=gallery.scale,
        sections=sections,
        claims=[claim for section in sections for claim in section.claims],
        experiments=rows,
        finished=sum(row["state"] == "finished" for row in rows),
        command=f"python run_exps.py --scale {gallery.scale}",
        facts=_facts(gallery, seconds),
    )
    path = gallery.folder / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: file.write(page.encode()))
    return path


def _section(gallery, number, missing):
    figure, numbers = FIGURES[number], gallery.numbers(number)
    url = "" if missing else _picture(gallery.folder / f"{number}_{figure.name}")
    caption = inspect.getdoc(getattr(drawing, figure.name)).split("\n\n")[0].partition(": ")[2]
    return Section(
        number=number,
        title=figure.title,
        caption=caption[:1].upper() + " ".join(caption[1:].split()),
        picture=url,
        missing=missing or ("" if url else "not drawn yet"),
        claims=figure.claims(numbers) if numbers else [],
        comparison=figure.comparison(numbers) if numbers else [],
        provenance=numbers.provenance if numbers else {},
    )


def _picture(path):
    """The data URL of a figure's file, PNG or else SVG, "" if there is neither."""
    for suffix, kind, read in ((".png", "png", small_png), (".svg", "svg+xml", Path.read_bytes)):
        if (file := path.with_suffix(suffix)).exists():
            return f"data:image/{kind};base64,{base64.b64encode(read(file)).decode()}"
    return ""


def _experiment_rows(gallery):
    """Of every experiment its name, state, accuracy and the published one, in words."""
    rows = []
    for experiment in registry.experiments(gallery.scale):
        state = status.read_state(gallery.source.root, experiment)
        reached, published = status.accuracies(experiment, state)
        rows.append({"name": experiment.name, "state": state.name, "reached": reached, "published": published})
    return rows


def _facts(gallery, seconds):
    """What the numbers were made on, with and at what cost."""
    listed = registry.experiments(gallery.scale)
    spent = sum(status.seconds_spent(gallery.source.root, experiment) for experiment in listed)
    device = gallery.source.device
    card = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return {
        "Machine": f"{_processor()}, {os.cpu_count()} cores{card}",
        "System": f"{platform.system()} {platform.release()}",
        "Versions": f"Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}",
        "Training": f"{status.duration(spent)} of processes" if spent else "not made here",
        "Figures": status.duration(seconds),
    }


def _processor():
    """The processor's name, as far as the system gives it away."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
