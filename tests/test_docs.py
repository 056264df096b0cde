"""The pages that people read: their links, the README's length, and pictures that show today's numbers."""

import re

import pytest

from tests.conftest import ROOT
from utils.figures.catalogue import FIGURES
from utils.figures.data import data_path, load_numbers
from utils.figures.pictures import digest, stamp, write_pictures

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("notebook_data/*.md")])
PICTURES = sorted(ROOT.glob("docs/pictures/*/*.png"))
README = (ROOT / "README.md").read_text()


def anchors(page):
    """The anchors of a page's headings, as they are made from their texts."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        target, _, anchor = link.partition("#")
        if not target.startswith("https://"):
            place = page.parent / target if target else page
            assert place.exists(), link
            assert not anchor or anchor in anchors(place), link


def test_the_readme_is_short_and_links_every_page():
    assert len(README.splitlines()) <= 200
    for page in ROOT.glob("docs/*.md"):
        assert f"(docs/{page.name})" in README


def test_the_readme_says_how_many_claims_hold():
    claims = [
        c for f in FIGURES.values() for c in f.claims(load_numbers(data_path("laptop", f.name, ROOT / "notebook_data")))
    ]
    assert f"{sum(claim.holds for claim in claims)} of {len(claims)} claims" in README


def test_pictures_show_the_numbers_of_the_repository():
    assert sum(picture.stat().st_size for picture in PICTURES) < 600_000
    shown = set(re.findall(r"\((docs/pictures/[^)]+)\)", README))
    assert shown == {str(picture.relative_to(ROOT)) for picture in PICTURES}
    for picture in PICTURES:
        numbers = data_path(picture.parent.name, picture.stem.partition("_")[2], ROOT / "notebook_data")
        remedy = f"python -m utils.figures --scale {picture.parent.name} --pictures docs/pictures"
        assert stamp(picture) == digest(numbers), f"{picture.name} is older than {numbers.name}: {remedy}"


def test_pictures_are_made_from_kept_numbers(tmp_path):
    made = write_pictures("laptop", tmp_path, ROOT / "notebook_data")
    assert [picture.name for picture in made] == [picture.name for picture in PICTURES]
    assert list(map(stamp, made)) == list(map(stamp, PICTURES))
