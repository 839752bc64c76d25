"""A board for figures of boxes, numbers and arrows, in inches from the upper left corner, for narrow screens."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from PIL import Image

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "PALE", "VERMILION", "WHITE", "Board"]

BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#595959"
PALE, WHITE, INK = "#EEF1F4", "#FFFFFF", "#1B1F24"
WIDTH = 5.0  # inches: 600 pixels, of which a phone shows some 370


def shade(colour: str, strength: float) -> tuple[float, float, float]:
    """From white (0) to the colour (1)."""
    r, g, b = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return tuple(1 - min(max(strength, 0.0), 1.0) * (1 - c) for c in (r, g, b))  # type: ignore[return-value]


class Board:
    def __init__(self, height: float, title: str, width: float = WIDTH) -> None:
        self.figure = Figure(figsize=(width, height), facecolor=WHITE)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")
        self.width = width
        self.text(0.15, 0.25, title, size=12.5, bold=True)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 11,
        align: str = "left",
        colour: str = INK,
        bold: bool = False,
    ) -> None:
        self.axes.text(
            x, y, text, fontsize=size, ha=align, va="center", color=colour, weight="bold" if bold else "normal",
            parse_math=False, linespacing=1.35,
        )  # fmt: skip

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        text: str = "",
        *,
        fill: object = WHITE,
        edge: str = "#C4CAD1",
        line: float = 0.8,
        size: float = 10.5,
        colour: str = INK,
        bold: bool = False,
    ) -> None:
        self.axes.add_patch(
            Rectangle(
                (x, y), width, height, facecolor=fill, edgecolor=edge, linewidth=line, zorder=3 if line > 1 else 1
            )
        )
        if text:
            self.axes.text(
                x + width / 2, y + height / 2, text, fontsize=size, ha="center", va="center", color=colour,
                weight="bold" if bold else "normal", parse_math=False, zorder=4, linespacing=1.25,
            )  # fmt: skip

    def arrow(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        colour: str = GREY,
        line: float = 1.6,
        bend: float = 0,
    ) -> None:
        self.axes.add_patch(
            FancyArrowPatch(
                start,
                end,
                arrowstyle="-|>",
                mutation_scale=11,
                color=colour,
                linewidth=line,
                shrinkA=0,
                shrinkB=0,
                connectionstyle=f"arc3,rad={bend}",
                zorder=5,
            )
        )

    def table(
        self,
        x: float,
        y: float,
        cells: Sequence[Sequence[str]],
        *,
        cell: tuple[float, float] = (0.56, 0.34),
        rows: Sequence[str] = (),
        columns: Sequence[str] = (),
        strength: Sequence[Sequence[float]] | None = None,
        colour: str = BLUE,
        outlined: Sequence[tuple[int, int]] = (),
        faint: Sequence[tuple[int, int]] = (),
        size: float = 10.5,
    ) -> None:
        """Numbers in boxes; `strength` (0 to 1) colours them, outlined ones stand out, faint ones step back."""
        width, height = cell
        for c, name in enumerate(columns):
            self.text(x + (c + 0.5) * width, y - 0.14, name, size=size - 1, align="center", colour=GREY)
        for r, row in enumerate(cells):
            if rows:
                self.text(x - 0.1, y + (r + 0.5) * height, rows[r], size=size, align="right")
            for c, text in enumerate(row):
                power = 0.0 if strength is None else 0.8 * strength[r][c]
                ink = "#A0A7AE" if (r, c) in faint else WHITE if power > 0.6 else INK
                self.box(
                    x + c * width, y + r * height, width, height, text,
                    fill=shade(colour, power), size=size, colour=ink, bold=(r, c) in outlined,
                )  # fmt: skip
        for r, c in outlined:
            self.box(x + c * width, y + r * height, width, height, fill="none", edge=VERMILION, line=2.2)

    def save(self, folder: Path, name: str) -> None:
        """In 96 colours, a third of the bytes."""
        canvas = FigureCanvasAgg(self.figure)
        self.figure.dpi = 120
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        picture.quantize(96, dither=Image.Dither.NONE).save(folder / f"{name}.png", optimize=True)
