"""The notebooks: committed as run, and run again."""

import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT
from utils.figures.catalogue import FIGURES


def code_cells(name):
    """The code cells of a notebook in the repository."""
    return [cell for cell in nbformat.read(ROOT / name, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name, pictures", [("tutorial.ipynb", 10), ("paper_figs.ipynb", len(FIGURES))])
def test_notebooks_are_committed_as_run(name, pictures):
    path, cells = ROOT / name, code_cells(name)
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert path.stat().st_size < 700_000
    assert book.metadata.kernelspec.name == "python3"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= pictures
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    text = re.sub(r'"image/png": "[^"]*"', "", path.read_text())
    assert not re.search(r"/(home|Users|root|tmp|work|usr|opt|var)/|[A-Z]:\\\\", text)


def test_the_figures_are_committed_at_laptop_scale():
    sources = [cell.source for cell in code_cells("paper_figs.ipynb")]
    assert [source for source in sources if source.startswith("gallery.show(")] == [
        f"gallery.show({number})" for number in FIGURES
    ]
    assert 'SCALE = "laptop"' in sources[0] and "RECOMPUTE = False" in sources[0]


def test_the_figures_are_drawn_from_the_kept_numbers():
    book = nbformat.read(ROOT / "paper_figs.ipynb", as_version=4)
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell in book.cells:
        if "gallery.show(" in cell.source:
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), f"{cell.source} draws nothing"
