"""What all figures share: colours, sizes, text that fits, axes in inches."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#595959"
SMALL, NORMAL, LARGE = 8, 9, 10.5  # points
PANEL = 0.95  # inches, the width of one image


def figure_class() -> "type[Figure]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('fmfa_losses.plot needs matplotlib; pip install "fmfa-losses[plot]"') from error
    return Figure


def wrap(text: str, inches: float, points: float) -> str:
    """Lines that are no wider than `inches`, as the font sets them; a word that is wider is broken."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=points)

    def fits(line: str) -> bool:
        width: float = text_to_path.get_text_width_height_descent(line, font, ismath=False)[0]
        return width <= 0.95 * 72 * inches  # the screen rounds each letter to pixels

    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if fits(joined):
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if not fits(lines[-1] + letter):
                lines.append("")
            lines[-1] += letter
    return "\n".join(lines)


def centred(size: float, vertical: str) -> dict[str, Any]:
    return {"fontsize": size, "ha": "center", "va": vertical, "parse_math": False}


def bare(axes: "Axes", label: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(label, fontsize=SMALL, labelpad=4, color=GREY)


def quiet(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


class Canvas:
    """A figure measured in inches from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.figure: Figure = figure_class()(figsize=(width, height))
        self.width, self.height = width, height

    def axes(self, x: float, y: float, width: float, height: float) -> "Axes":
        bottom = self.height - y - height
        return self.figure.add_axes((x / self.width, bottom / self.height, width / self.width, height / self.height))

    def text(self, x: float, y: float, text: str, **options: Any) -> None:
        self.figure.text(x / self.width, 1 - y / self.height, text, parse_math=False, **options)
