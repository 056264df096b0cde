"""The paper's nine figures: number, name, title, size and panels. A figure's name is that of its functions.

`numbers.NAME` computes its numbers, `drawing.NAME` draws them, `claims.NAME` checks the paper's claims against them,
and `comparison.NAME` lists the published numbers beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import matplotlib.style
from matplotlib.figure import Figure as Canvas

from utils.figures import claims, comparison, drawing, numbers
from utils.figures.claims import Claim
from utils.figures.data import FigureData, published_numbers
from utils.figures.source import Source


@dataclass(frozen=True)
class Figure:
    """One figure of the paper. size: inches; panels: names of its axes in rows, a function of its numbers."""

    number: int
    name: str
    title: str
    size: tuple[float, float]
    panels: Callable[[FigureData], list[list[str]]]

    def compute(self, source: Source) -> dict:
        """Its numbers, arrays by name, from the source's networks. Raises UserError."""
        return getattr(numbers, self.name)(source, numbers.SHOWN[source.scale])

    def draw(self, data: FigureData, published: FigureData | None = None, style: str = "paper") -> Canvas:
        """The figure, in a style of `drawing.STYLES`, with the published numbers drawn in it if they are given."""
        with matplotlib.style.context(drawing.STYLES[style]):
            larger = matplotlib.rcParams["font.size"] / 9
            canvas = Canvas(figsize=[larger * length for length in self.size], layout="constrained")
            getattr(drawing, self.name)(canvas.subplot_mosaic(self.panels(data)), data, published)
            canvas.draw_without_rendering()
        return canvas

    def claims(self, data: FigureData) -> list[Claim]:
        """The paper's claims, checked against its numbers."""
        found = getattr(claims, self.name)(data, published_numbers(self.name))
        return [Claim(self.number, text, known, own, bool(holds)) for text, known, own, holds in found]

    def comparison(self, data: FigureData) -> list[tuple[str, str, str]]:
        """Rows (what, published, this run) of the numbers published with it; [] if only a plot was."""
        published = published_numbers(self.name)
        return list(getattr(comparison, self.name)(data, published)) if published else []


def _fixed(*rows):
    return lambda data: [row.split() for row in rows]


def _by_layer(*rows):
    return lambda data: [[f"{row}_{k}" for k in range(len(data["layers"]))] for row in rows]


def _by_rank_and_layer(data):
    return _by_layer(*range(len(data["ranks"])))(data)


_SPECTRA = _fixed("scattering_activations scattering_weights", "resnet_activations resnet_weights")
_DYNAMICS = _fixed("amplification " * 3 + "cosine " * 3, "plane_0 " * 2 + "plane_1 " * 2 + "plane_2 " * 2)
_COVARIANCES = "Covariances converge with networks and with width"

FIGURES = {
    figure.number: figure
    for figure in (
        Figure(1, "gaussian_histograms", "Whitened weights are Gaussian", (7, 5.2), _by_rank_and_layer),
        Figure(
            2, "marchenko_pastur", "Spectra of coloured and whitened weights", (7.5, 4), _by_layer("coloured", "white")
        ),
        Figure(3, "resampling_width", "Accuracy of rainbow networks", (4.6, 3.4), _fixed("accuracy")),
        Figure(4, "activation_spectra", "Spectra of activations", (7.5, 3.4), _fixed("widths layers")),
        Figure(5, "alignment_convergence", "Activations converge with width", (7.5, 3.2), _fixed("scattering resnet")),
        Figure(6, "covariance_convergence", _COVARIANCES, (7.5, 5.8), _fixed("networks widths", "clipped errors")),
        Figure(7, "imagenet_spectra", "Spectra of large networks", (7.5, 6), _SPECTRA),
        Figure(8, "clipping", "Clipped networks", (7.5, 4.4), _by_layer("variance", "accuracy")),
        Figure(9, "training_dynamics", "Training amplifies the weights", (7.5, 5.6), _DYNAMICS),
    )
}
