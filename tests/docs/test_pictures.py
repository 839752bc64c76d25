"""The pictures of the documentation: all can be drawn, each is on a page, and each page's are drawn and committed."""

import re

import pytest
from PIL import Image

from benchmarks import ROOT, pictures
from benchmarks.pictures import plot as plot_page
from fmfa_losses import plot

DOCS = ROOT / "docs"
LARGEST = 120_000  # bytes, for who reads on a phone
NAMED = {
    name
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]
    for name in re.findall(r"!\[[^\]]+\]\([^)\s]*\bpictures/([\w.]+)\)", page.read_text(encoding="utf-8"))
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folders = {}
    for page, draw in pictures.pages().items():
        folders[page] = tmp_path_factory.mktemp(page)
        draw(folders[page])
    return {page: sorted(folder.iterdir()) for page, folder in folders.items()}


@pytest.mark.parametrize("page", sorted(pictures.pages()))
def test_pictures_of_a_page(page, drawn):
    assert drawn[page]
    for file in drawn[page]:
        with Image.open(file) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 100
        assert file.stat().st_size < LARGEST


def test_what_is_drawn_is_committed_and_on_a_page(drawn):
    names = [file.name for files in drawn.values() for file in files]
    assert len(set(names)) == len(names)
    assert set(names) == {file.name for file in (DOCS / "pictures").iterdir()}
    assert set(names) == NAMED


def test_the_page_of_figures_has_every_figure():
    assert set(plot_page.examples()) == {f"plot_{name}.png" for name in plot.__all__}
    for name in plot.__all__:
        assert f"plot.{name}(" in plot_page.examples()[f"plot_{name}.png"]
