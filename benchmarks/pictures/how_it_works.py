"""The figures of docs/how_it_works.md: one tiny batch, carried through every step."""

from pathlib import Path

from ._aggregation import draw_aggregation
from ._matching import draw_matching, packed
from ._sums import draw_sums
from ._tiny import COSINES, IMAGE, MARGIN, TEXT, WORDS, Alignment, Statistics

__all__ = ["COSINES", "IMAGE", "MARGIN", "TEXT", "WORDS", "Alignment", "Statistics", "draw", "packed"]


def draw(folder: Path) -> None:
    draw_aggregation(folder)
    draw_matching(folder)
    draw_sums(folder)
