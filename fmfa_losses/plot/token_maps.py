"""Figures of one token: its similarity to the patches, and the patches that EFA aggregates for it."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.aggregation import sparse_aggregate
from ..ops.checks import check_float, check_integer, describe
from ._inputs import check_all_finite, check_number, check_texts, image_array
from .figure import LARGE, PANEL, SMALL, VERMILION, Canvas, bare, figure_class, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["aggregated_patches", "similarity_maps"]

GAP, GROUP_GAP = 0.06, 0.3  # inches: between the two maps of a token, between tokens
BARS = 1.55  # inches, the width of the colour bars with their labels


def similarity_maps(
    image: Any,
    similarity: Tensor,
    *,
    tokens: Sequence[str],
    grid: tuple[int, int] = (24, 8),
    sparsity: float | None = None,
    tokens_per_row: int = 4,
) -> "Figure":
    """Each token's similarity to the patches, before and after sparsification (the paper's Figure 5).

        before: n_ij = (s_ij - min_k s_ik) / (max_k s_ik - min_k s_ik)
        after:  a_ij = m_ij / sum_k m_ik,  m_ij = n_ij if n_ij >= sparsity else 0

    The weight a is drawn in multiples of the uniform weight 1/N; dropped patches show the bare image.

    Args:
        image: [3, H, W] or [H, W, 3], uint8 or float in [0, 1], tensor, NumPy array or PIL image.
        similarity: [K, N], inner products of K chosen tokens with the N patches, any float dtype.
        tokens: the K tokens as text.
        grid: rows and columns of patches, rows * columns = N.
        sparsity: the threshold; default 1/N.
        tokens_per_row: tokens side by side.
    Raises:
        TypeError, ValueError: shapes or options that do not fit, a NaN or infinite similarity, an image outside [0, 1].
        ImportError: matplotlib is missing.
    Example:
        >>> image, similarity = torch.rand(3, 48, 16), torch.randn(2, 12)
        >>> figure = similarity_maps(image, similarity, tokens=["red", "shirt"], grid=(6, 2))
        >>> [text.get_text() for text in figure.texts]
        ['red', 'shirt']

    Reference: Yin et al., arXiv 2509.13754v2, Eq. 5-8 and Figure 5.
    """
    figure_class()
    tokens_per_row = check_integer("tokens_per_row", tokens_per_row, 1)
    picture = image_array("image", image)
    before, after = _sparse_weights(similarity, tokens, grid, sparsity)
    relative = after * after.shape[1]
    maps = (
        _Maps("before", "before: normalised similarity", before, 1.0),
        _Maps("after", "after: weight × N", relative.where(after > 0, math.nan), relative.max().item()),
    )
    layout = _layout(picture, tokens, tokens_per_row, title_width=2 * PANEL, below=0.3)
    left, group = 0.15, 2 * PANEL + GAP
    bars = left + PANEL + layout.per_row * (GROUP_GAP + group)
    canvas = Canvas(bars + BARS, layout.rows * layout.row_height + 0.1)
    for i, title in enumerate(layout.titles):
        y, column = layout.top(i), i % layout.per_row
        if column == 0:
            _draw_image(canvas.axes(left, y, PANEL, layout.height), picture)
        x = left + PANEL + GROUP_GAP + column * (group + GROUP_GAP)
        for j, shown in enumerate(maps):
            axes = canvas.axes(x + j * (PANEL + GAP), y, PANEL, layout.height)
            heat = _draw_map(axes, picture, shown, i, grid)
            if i == 0:
                _colour_bar(canvas.axes(bars + 0.2 + 0.75 * j, y, 0.11, layout.height), heat, shown.label)
        canvas.text(x + group / 2, y - 0.07, title, fontsize=LARGE, ha="center", va="bottom")
    return canvas.figure


def aggregated_patches(
    image: Any,
    similarity: Tensor,
    *,
    tokens: Sequence[str],
    grid: tuple[int, int] = (24, 8),
    sparsity: float | None = None,
    share: float = 0.5,
    tokens_per_row: int = 8,
) -> "Figure":
    """Which patches each token aggregated: kept ones in colour, dropped ones faded, the heaviest outlined.

    Outlined are the fewest patches that together hold `share` of the token's weight.

    Args:
        image: [3, H, W] or [H, W, 3], uint8 or float in [0, 1], tensor, NumPy array or PIL image.
        similarity: [K, N], inner products of K chosen tokens with the N patches, any float dtype.
        tokens: the K tokens as text.
        grid: rows and columns of patches, rows * columns = N.
        sparsity: the threshold of EFA; default 1/N.
        share: of the weight, in (0, 1].
        tokens_per_row: tokens side by side.
    Raises:
        TypeError, ValueError: shapes or options that do not fit, a NaN or infinite similarity, an image outside [0, 1].
        ImportError: matplotlib is missing.
    Example:
        >>> figure = aggregated_patches(torch.rand(3, 48, 16), torch.eye(12)[:1], tokens=["red"], grid=(6, 2))
        >>> figure.axes[0].get_xlabel()
        '1 of 12 kept\\n50 % in 1'

    Reference: Yin et al., arXiv 2509.13754v2, Eq. 5-8.
    """
    figure_class()
    check_number("share", share, math.ulp(0), 1)
    tokens_per_row = check_integer("tokens_per_row", tokens_per_row, 1)
    picture = image_array("image", image)
    _, weights = _sparse_weights(similarity, tokens, grid, sparsity)
    layout = _layout(picture, tokens, tokens_per_row, title_width=PANEL, below=0.45)
    gap, margin = 0.22, 0.2
    canvas = Canvas(2 * margin + layout.per_row * (PANEL + gap) - gap, layout.rows * layout.row_height + 0.1)
    for i, title in enumerate(layout.titles):
        x, y = margin + (i % layout.per_row) * (PANEL + gap), layout.top(i)
        axes = canvas.axes(x, y, PANEL, layout.height)
        heaviest = _heaviest(weights[i], share)
        kept = weights[i] > 0
        _draw_patches(axes, picture, kept.reshape(grid), heaviest.reshape(grid))
        held = f"{int(kept.sum())} of {kept.numel()} kept\n{share:.0%} in {int(heaviest.sum())}"
        bare(axes, held.replace("%", " %"))
        canvas.text(x + PANEL / 2, y - 0.07, title, fontsize=LARGE, ha="center", va="bottom")
    return canvas.figure


class _Maps(NamedTuple):
    """One map a token."""

    name: str
    label: str  # of the colour bar
    values: Tensor  # [K, N]
    limit: float  # of the colours


class _Layout(NamedTuple):
    """Titles over pictures, tokens side by side in rows; sizes in inches."""

    titles: list[str]
    rows: int
    per_row: int
    height: float  # of a picture
    title_height: float
    row_height: float

    def top(self, i: int) -> float:
        """Upper edge of the picture of token i."""
        return (i // self.per_row) * self.row_height + self.title_height + 0.05


def _layout(picture: Any, tokens: Sequence[str], tokens_per_row: int, *, title_width: float, below: float) -> _Layout:
    rows = math.ceil(len(tokens) / tokens_per_row)
    titles = [wrap(token.removesuffix("</w>"), title_width, LARGE) for token in tokens]  # as CLIP ends a word
    title_height = 0.12 + 0.17 * max(title.count("\n") + 1 for title in titles)
    height = PANEL * picture.shape[0] / picture.shape[1]
    per_row = math.ceil(len(tokens) / rows)
    return _Layout(titles, rows, per_row, height, title_height, title_height + height + below)


def _sparse_weights(
    similarity: Tensor, tokens: Sequence[str], grid: tuple[int, int], sparsity: float | None
) -> tuple[Tensor, Tensor]:
    """Normalised similarity n and EFA's aggregation weights a, both [K, N]; a constant row is uniform."""
    check_float("similarity", similarity, "K N")
    check_all_finite("similarity", similarity)
    check_texts("tokens", tokens)
    if not isinstance(grid, Sequence) or len(grid) != 2:
        raise ValueError(f"grid must be (rows, columns), got {grid!r}")
    for name, size in zip(("rows of grid", "columns of grid"), grid, strict=True):
        check_integer(name, size, 1)
    if similarity.shape[0] != len(tokens):
        raise ValueError(
            f"similarity [K, N] must have one row per token, got {describe(similarity)} and "
            f"{len(tokens)} tokens; take the rows of the chosen tokens"
        )
    if similarity.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"grid must hold all N patches, got {grid[0]} x {grid[1]} and {describe(similarity)}; "
            "leave [CLS] out, and give grid=(rows, columns)"
        )
    s = similarity.detach().double().cpu()
    low, high = s.amin(1, keepdim=True), s.amax(1, keepdim=True)
    n = torch.where(high > low, (s - low) / (high - low), 1.0)
    # Aggregating one-hot patches gives the weights themselves.
    patches = torch.eye(s.shape[1], dtype=s.dtype)
    return n, sparse_aggregate(patches[None], s[None], sparsity=sparsity, backend="torch")[0]


def _draw_image(axes: "Axes", picture: Any) -> None:
    axes.imshow(picture, aspect="auto")
    bare(axes, "image")


def _draw_map(axes: "Axes", picture: Any, shown: _Maps, i: int, grid: tuple[int, int]) -> Any:
    """Colours over a light grey picture, so that they are those of the map."""
    grey = picture @ [0.299, 0.587, 0.114]
    axes.imshow((0.25 + 0.75 * grey)[..., None].repeat(3, axis=2), aspect="auto")
    height, width = picture.shape[:2]
    bare(axes, shown.name)
    return axes.imshow(
        shown.values[i].reshape(grid).numpy(),
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        cmap="viridis",
        vmin=0,
        vmax=shown.limit,
        alpha=0.72,
        aspect="auto",
        interpolation="nearest",
    )


def _colour_bar(axes: "Axes", heat: Any, label: str) -> None:
    axes.figure.colorbar(heat, cax=axes)
    axes.set_ylabel(label, fontsize=SMALL)
    axes.tick_params(labelsize=SMALL, length=2, pad=1)


def _heaviest(weights: Tensor, share: float) -> Tensor:
    """The fewest patches that hold `share` of the weights [N]: bool [N]."""
    sorted_weights, order = weights.sort(descending=True)
    # A patch belongs as long as the heavier ones do not hold the share yet.
    needed = ((sorted_weights.cumsum(0) - sorted_weights) < share - 1e-6) & (sorted_weights > 0)
    return torch.zeros_like(needed).scatter(0, order, needed)


def _draw_patches(axes: "Axes", picture: Any, kept: Tensor, outlined: Tensor) -> None:
    """Dropped patches faded, a line around the outlined ones; both [rows, columns]."""
    import numpy as np
    from matplotlib.collections import LineCollection

    (height, width), (rows, columns) = picture.shape[:2], kept.shape
    row_of, column_of = np.arange(height) * rows // height, np.arange(width) * columns // width  # of each pixel
    dropped = ~kept.numpy()[row_of[:, None], column_of[None, :]]
    shown = picture.copy()
    shown[dropped] = 0.12 * shown[dropped] + 0.88
    axes.imshow(shown, aspect="auto")
    edges = _outline(outlined, height / rows, width / columns)
    for colour, line in (("white", 3.2), (VERMILION, 1.6)):
        axes.add_collection(LineCollection(edges, colors=colour, linewidths=line, capstyle="projecting", clip_on=False))


def _outline(inside: Tensor, dy: float, dx: float) -> list[list[tuple[float, float]]]:
    """The border of a region of patches, as line segments in pixels."""
    padded = F.pad(inside, (1, 1, 1, 1))
    segments = []
    for r, c in (padded[1:, 1:-1] != padded[:-1, 1:-1]).nonzero().tolist():
        segments.append([(c * dx - 0.5, r * dy - 0.5), ((c + 1) * dx - 0.5, r * dy - 0.5)])
    for r, c in (padded[1:-1, 1:] != padded[1:-1, :-1]).nonzero().tolist():
        segments.append([(c * dx - 0.5, r * dy - 0.5), (c * dx - 0.5, (r + 1) * dy - 0.5)])
    return segments
