"""Figure of the first images that each caption finds, right and wrong."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ._inputs import check_texts, image_array, matrix
from .figure import GREEN, NORMAL, PANEL, VERMILION, Canvas, bare, figure_class, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["retrieval_strips"]

CAPTION_WIDTH, LINE = 2.45, 0.155  # inches, of a caption and from line to line
GAP, MARGIN = 0.16, 0.15
BELOW, ROW_GAP = 0.24, 0.12  # for the score under an image, between captions


def retrieval_strips(
    queries: Sequence[str],
    images: Sequence[Sequence[Any]],
    scores: Sequence[Sequence[float]] | Tensor,
    correct: Sequence[Sequence[bool]] | Tensor,
) -> "Figure":
    """The top-k images of each caption, best first (the paper's Figure 6).

    Right ones stand in a solid green frame with a ✓, wrong ones in a dashed red one with a ✗; scores below.

    Args:
        queries: Q captions; long ones wrap, and the strip grows with them.
        images: Q sequences of k images: [3, H, W] or [H, W, 3], uint8 or float in [0, 1], or PIL images.
        scores: [Q, k], as `fmfa_losses.retrieval.search` returns them.
        correct: [Q, k], whether the image shows the person.
    Raises:
        TypeError, ValueError: shapes that do not fit, or an image outside [0, 1].
        ImportError: matplotlib is missing.
    Example:
        >>> import torch
        >>> images = torch.rand(1, 2, 3, 48, 16)
        >>> figure = retrieval_strips(["a man in red"], images, [[0.8, 0.7]], [[True, False]])
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['0.800', '0.700']

    Reference: Yin et al., arXiv 2509.13754v2, Figure 6.
    """
    figure_class()
    check_texts("queries", queries)
    scores, correct = matrix("scores", scores), matrix("correct", correct)
    k = _check_shapes(queries, images, scores, correct)
    pictures = [[image_array("images", image) for image in row] for row in images]
    height = max(_height(picture) for row in pictures for picture in row)
    captions = [wrap(query, CAPTION_WIDTH, NORMAL) for query in queries]
    heights = [max(height, LINE * (caption.count("\n") + 1)) for caption in captions]
    canvas = Canvas(
        2 * MARGIN + CAPTION_WIDTH + k * (PANEL + GAP), MARGIN + 0.1 + sum(heights) + len(heights) * (BELOW + ROW_GAP)
    )
    y = MARGIN
    for i, (caption, row_height) in enumerate(zip(captions, heights, strict=True)):
        middle = y + row_height / 2
        canvas.text(MARGIN, middle, caption, fontsize=NORMAL, va="center", ha="left", linespacing=1.2)
        for j, picture in enumerate(pictures[i]):
            x, own = MARGIN + CAPTION_WIDTH + GAP + j * (PANEL + GAP), _height(picture)
            axes = canvas.axes(x, middle - own / 2, PANEL, own)
            axes.imshow(picture, aspect="auto")
            bare(axes, f"{scores[i, j]:.3f}")
            _mark(axes, bool(correct[i, j]), own)
        y += row_height + BELOW + ROW_GAP
    return canvas.figure


def _check_shapes(queries: Sequence[str], images: Sequence[Sequence[Any]], scores: Tensor, correct: Tensor) -> int:
    """k, which all have."""
    expected = [len(queries), len(images[0]) if len(images) else 0]
    for name, shape in (
        ("images", [len(images), *sorted({len(row) for row in images})]),
        ("scores", list(scores.shape)),
        ("correct", list(correct.shape)),
    ):
        if shape != expected or 0 in expected:
            raise ValueError(f"{name} must have shape [Q, k] = {expected}, one row per caption, got {shape}")
    return expected[1]


def _height(picture: Any) -> float:
    """In inches, of a picture PANEL wide."""
    return float(PANEL * picture.shape[0] / picture.shape[1])


def _mark(axes: "Axes", right: bool, height: float) -> None:
    """A solid green frame with a check mark, or a dashed red one with a cross."""
    from matplotlib.patches import Rectangle

    colour = GREEN if right else VERMILION
    axes.add_patch(
        Rectangle(
            (0, 0),
            1,
            1,
            transform=axes.transAxes,
            fill=False,
            edgecolor=colour,
            linewidth=3,
            linestyle="-" if right else (0, (3, 1.2)),
            clip_on=False,
        )
    )
    axes.text(
        0.97,
        1 - 0.03 * PANEL / height,
        "✓" if right else "✗",
        transform=axes.transAxes,
        color="white",
        fontsize=NORMAL,
        fontweight="bold",
        ha="right",
        va="top",
        bbox={"facecolor": colour, "edgecolor": "none", "boxstyle": "square,pad=0.15"},
    )
