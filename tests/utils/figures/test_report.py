"""The report of a scale: one page that stands by itself."""

import shutil
from html.parser import HTMLParser

import pytest

from tests.conftest import ROOT
from utils.experiments import registry
from utils.figures.catalogue import FIGURES
from utils.figures.command import main


class Page(HTMLParser):
    """A page's elements as (tag, attributes), and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += " ".join(data.split()) + "\n"

    def all(self, tag, attribute):
        return [attributes.get(attribute) for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("figures")
    flags = ["--scale", "laptop", "--figure", "3", "9", "--out", str(out), "--checkpoints", str(out / "none")]
    assert main([*flags, "--numbers", str(ROOT / "notebook_data")]) == 0
    return Page((out / "laptop" / "index.html").read_text(encoding="utf-8"))


def test_the_report_needs_no_other_file(drawn):
    assert not drawn.all("script", "src") and not drawn.all("link", "href")
    assert all(source.startswith("data:image/png;base64,") for source in drawn.all("img", "src"))
    ids = {attributes["id"] for _, attributes in drawn.elements if "id" in attributes}
    anchors = [link for link in drawn.all("a", "href") if link.startswith("#")]
    assert len(anchors) > len(FIGURES) and {link[1:] for link in anchors} <= ids


def test_the_report_says_everything_of_figures_claims_and_experiments(drawn):
    assert len(drawn.all("img", "src")) == 2 and all(len(text) > 60 for text in drawn.all("img", "alt"))
    for number, figure in FIGURES.items():
        assert f"Figure {number}: {figure.title}" in drawn.text
    assert drawn.text.count("not drawn yet") == len(FIGURES) - 2
    assert "✓ holds" in drawn.text and "claims hold" in drawn.text
    names = {experiment.name for experiment in registry.experiments("laptop")}
    assert names <= set(drawn.text.splitlines()) and "python run_exps.py --scale laptop" in drawn.text


def test_the_report_says_why_a_figure_is_missing(tmp_path, capsys):
    numbers = tmp_path / "numbers" / "laptop"
    numbers.mkdir(parents=True)
    shutil.copy(ROOT / "notebook_data" / "laptop" / "resampling_width.npz", numbers)
    folders = ["--out", str(tmp_path), "--numbers", str(numbers.parent), "--checkpoints", str(tmp_path / "none")]
    assert main(["--scale", "laptop", "--figure", "3", "4", *folders]) == 2
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {tmp_path / 'laptop' / 'index.html'}"
    page = Page((tmp_path / "laptop" / "index.html").read_text(encoding="utf-8"))
    assert "are not finished" in page.text and "run_exps.py --scale laptop --figure 4" in page.text
