"""The pictures of the documentation: all can be drawn, each is on a page, and each page's are drawn and committed."""

import re

import pytest
from PIL import Image

from benchmarks import ROOT, pictures
from benchmarks.pictures import compat, fine_grained, losses
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


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def test_numbers_beside_the_picture_of_losses():
    near = [cosine for cosine in losses.COSINES if 0.49 < cosine < 0.54]  # that of the own image is 0.5
    sdm, asdm = (
        max(losses.pull(losses.LOSSES[name][0], cosine) for cosine in near) for name in ("SDM", "A-SDM, alpha 10")
    )
    assert f"the own one, {sdm:.0f}," in page("losses")
    assert f"then up to {asdm:.0f}," in page("losses")


def test_numbers_beside_the_picture_of_compat():
    paper, released = compat.weights()
    first, second = (weight.max().item() for weight in released.values())
    assert 10.9 < paper.max() <= 11
    assert f"{first:.1f} at most" in page("compat")
    assert 1.04 < second < 1.05
    assert "above 1.05" in page("compat")


def test_how_many_patches_pass():
    usual, half = (f"{fine_grained.passing(sparsity):.0%}".replace("%", " %") for sparsity in (1 / 48, 0.5))
    assert f"{usual} of the patches pass, and {half} at `sparsity=0.5`" in page("fine_grained")


def test_the_page_of_figures_has_every_figure():
    assert set(plot_page.examples()) == {f"plot_{name}.png" for name in plot.__all__}
    for name in plot.__all__:
        assert f"plot.{name}(" in plot_page.examples()[f"plot_{name}.png"]
