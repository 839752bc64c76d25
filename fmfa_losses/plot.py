"""Figures of what the objectives do: where a token looks, which pairs are pulled harder, what is found.

Needs matplotlib: `pip install "fmfa-losses[plot]"`. Every function returns a `matplotlib.figure.Figure` made
without pyplot: nothing global changes, nothing has to be closed; `figure.savefig("maps.png")` writes it.
Colours are those of Okabe and Ito; where a colour means something, a mark or a line style says it too.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.aggregation import sparse_aggregate
from .ops.checks import (
    check_divisor,
    check_float,
    check_integer,
    check_nonnegative,
    check_same,
    describe,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["aggregated_patches", "asdm_weights", "loss_curves", "retrieval_strips", "similarity_maps"]

BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#595959"
SMALL, NORMAL, LARGE = 8, 9, 10.5  # points
PANEL = 0.95  # inches, the width of one image


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
        TypeError, ValueError: shapes or options that do not fit, a similarity that is not finite, an image outside
            [0, 1].
        ImportError: matplotlib is missing.
    Example:
        >>> image, similarity = torch.rand(3, 48, 16), torch.randn(2, 12)
        >>> figure = similarity_maps(image, similarity, tokens=["red", "shirt"], grid=(6, 2))
        >>> [text.get_text() for text in figure.texts]
        ['red', 'shirt']

    Reference: Yin et al., arXiv 2509.13754v2, Eq. 5-8 and Figure 5.
    """
    Figure = _figure_class()
    tokens_per_row = check_integer("tokens_per_row", tokens_per_row, 1)
    picture = _image("image", image)
    before, after = _sparse_weights(similarity, tokens, grid, sparsity)
    relative = after * after.shape[1]
    top = relative.max().item()

    height = PANEL * picture.shape[0] / picture.shape[1]
    rows = math.ceil(len(tokens) / tokens_per_row)
    per_row = math.ceil(len(tokens) / rows)
    titles = [_wrap(_clean(token), 2 * PANEL, LARGE) for token in tokens]
    title_height = 0.12 + 0.17 * max(title.count("\n") + 1 for title in titles)
    left, gap, group_gap, bars, under = 0.15, 0.06, 0.3, 1.55, 0.3
    group = 2 * PANEL + gap
    width = left + PANEL + per_row * (group_gap + group) + bars
    row_height = title_height + height + under
    figure = Figure(figsize=(width, rows * row_height + 0.1))
    place = _Inches(figure)

    for row in range(rows):
        y = row * row_height + title_height + 0.05
        axes = place(left, y, PANEL, height)
        axes.imshow(picture, aspect="auto")
        _bare(axes, "image")
        for i in range(row * per_row, min((row + 1) * per_row, len(tokens))):
            x = left + PANEL + group_gap + (i % per_row) * (group + group_gap)
            for offset, values, limit, name in (
                (0.0, before[i], 1.0, "before"),
                (PANEL + gap, relative[i].where(after[i] > 0, math.nan), top, "after"),
            ):
                axes = place(x + offset, y, PANEL, height)
                axes.imshow(_washed(picture), aspect="auto")
                size = picture.shape[:2]
                heat = axes.imshow(
                    values.reshape(grid).numpy(),
                    extent=(-0.5, size[1] - 0.5, size[0] - 0.5, -0.5),
                    cmap="viridis",
                    vmin=0,
                    vmax=limit,
                    alpha=0.72,
                    aspect="auto",
                    interpolation="nearest",
                )
                _bare(axes, name)
                if i == 0:
                    step = 0.75 * (name == "after")
                    x_bar = left + PANEL + per_row * (group_gap + group) + 0.2 + step
                    bar = place(x_bar, y, 0.11, height)
                    figure.colorbar(heat, cax=bar)
                    label = "before: normalised similarity" if name == "before" else "after: weight × N"
                    bar.set_ylabel(label, fontsize=SMALL)
                    bar.tick_params(labelsize=SMALL, length=2, pad=1)
            figure.text(*place.point(x + group / 2, y - 0.07), titles[i], **_centred(LARGE, "bottom"))
    return figure


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
        TypeError, ValueError: shapes or options that do not fit, a similarity that is not finite, an image outside
            [0, 1].
        ImportError: matplotlib is missing.
    Example:
        >>> figure = aggregated_patches(torch.rand(3, 48, 16), torch.eye(12)[:1], tokens=["red"], grid=(6, 2))
        >>> figure.axes[0].get_xlabel()
        '1 of 12 kept\\n50 % in 1'

    Reference: Yin et al., arXiv 2509.13754v2, Eq. 5-8.
    """
    Figure = _figure_class()
    from matplotlib.collections import LineCollection

    _check_number("share", share, math.ulp(0), 1)
    tokens_per_row = check_integer("tokens_per_row", tokens_per_row, 1)
    picture = _image("image", image)
    _, weights = _sparse_weights(similarity, tokens, grid, sparsity)
    height = PANEL * picture.shape[0] / picture.shape[1]
    rows = math.ceil(len(tokens) / tokens_per_row)
    per_row = math.ceil(len(tokens) / rows)
    titles = [_wrap(_clean(token), PANEL, LARGE) for token in tokens]
    title_height = 0.12 + 0.17 * max(title.count("\n") + 1 for title in titles)
    gap, margin, under = 0.22, 0.2, 0.45
    row_height = title_height + height + under
    figure = Figure(figsize=(2 * margin + per_row * (PANEL + gap) - gap, rows * row_height + 0.1))
    place = _Inches(figure)
    for i, title in enumerate(titles):
        x = margin + (i % per_row) * (PANEL + gap)
        y = (i // per_row) * row_height + title_height + 0.05
        axes = place(x, y, PANEL, height)
        kept = (weights[i] > 0).reshape(grid)
        heaviest, order = weights[i].sort(descending=True)
        # A patch belongs as long as the heavier ones do not hold the share yet.
        needed = int(((heaviest.cumsum(0) - heaviest) < share - 1e-6).logical_and(heaviest > 0).sum())
        outlined = torch.zeros(kept.numel(), dtype=torch.bool)
        outlined[order[:needed]] = True

        shown = picture.copy()
        rows_of, columns_of = _patch_of_pixel(picture, grid)
        dropped = ~kept.numpy()[rows_of[:, None], columns_of[None, :]]
        shown[dropped] = 0.12 * shown[dropped] + 0.88
        axes.imshow(shown, aspect="auto")
        edges = _outline(outlined.reshape(grid), picture.shape[0] / grid[0], picture.shape[1] / grid[1])
        for colour, line in (("white", 3.2), (VERMILION, 1.6)):
            axes.add_collection(
                LineCollection(edges, colors=colour, linewidths=line, capstyle="projecting", clip_on=False)
            )
        _bare(axes, f"{int(kept.sum())} of {kept.numel()} kept\n{share:.0%} in {needed}".replace("%", " %"))
        figure.text(*place.point(x + PANEL / 2, y - 0.07), title, **_centred(LARGE, "bottom"))
    return figure


def asdm_weights(
    image_features: Tensor,
    text_features: Tensor,
    *,
    temperature: float = 0.02,
    alpha: float = 10.0,
    named: int = 5,
) -> "Figure":
    """How much harder A-SDM pulls each pair of a batch, both directions.

        w_i = 1 + alpha (max_k p_ik - p_ii)

    Pairs are sorted by weight. Blue pairs rank their own partner first (weight 1); orange, hatched ones do
    not. The title names the heaviest by their index in the batch.

    Args:
        image_features: [B, D], any float dtype; need not be normalised.
        text_features: [B, D], row i belongs to image i.
        temperature: tau1 of ASDMLoss.
        alpha: of ASDMLoss.
        named: how many of the heaviest pairs are named by their index.
    Raises:
        TypeError, ValueError: shapes or options that do not fit, or features that are not finite.
        ImportError: matplotlib is missing.
    Example:
        >>> figure = asdm_weights(torch.eye(4), torch.eye(4).roll(1, 0))
        >>> print(figure.axes[0].get_title())
        t2i: 4 of 4 pairs pulled harder
        heaviest: 0, 1, 2, 3

    Reference: Yin et al., arXiv 2509.13754v2, Eq. 2.
    """
    Figure = _figure_class()
    check_float("image_features", image_features, "B D")
    check_float("text_features", text_features, "B D")
    check_same("image_features and text_features", image_features, text_features, dims=(("B", 0), ("D", 1)))
    temperature, alpha = check_divisor("temperature", temperature), check_nonnegative("alpha", alpha)
    named = check_integer("named", named, 0)
    _check_finite("image_features", image_features)
    _check_finite("text_features", text_features)
    image, text = (F.normalize(x.detach().double().cpu(), dim=1) for x in (image_features, text_features))
    logits = text @ image.T / temperature
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, z in zip(panels, ("t2i", "i2t"), (logits, logits.T), strict=True):
        p = z.softmax(dim=1)
        weight = 1 + alpha * (p.amax(1) - p.diagonal())
        weight, pair = weight.sort(descending=True, stable=True)
        harder = int((weight > 1).sum())
        place = torch.arange(len(weight))
        for part, colour, hatch, label in (
            (slice(0, harder), ORANGE, "////", "another one ranks first"),
            (slice(harder, None), BLUE, None, "own partner ranks first"),
        ):
            if len(weight[part]):
                axes.bar(
                    place[part].numpy(),
                    weight[part].numpy(),
                    width=1.0,
                    color=colour,
                    hatch=hatch,
                    edgecolor="white" if hatch else colour,
                    linewidth=0 if hatch else 0.5,
                    label=label,
                )
        mean = weight.mean().item()
        axes.axhline(mean, color=GREY, linestyle="--", linewidth=1, label=f"mean {mean:.2f}")
        heaviest = ", ".join(str(i) for i in pair[: min(named, harder)].tolist()) or "none"
        title = f"{name}: {harder} of {len(weight)} pairs pulled harder\nheaviest: {heaviest}"
        axes.set_title(title, fontsize=LARGE)
        axes.set_xlabel("pairs of the batch, by weight", fontsize=NORMAL)
        axes.set_xlim(-0.8, len(weight) - 0.2)
        axes.legend(fontsize=SMALL, frameon=False, loc="upper right")
        _quiet(axes)
    panels[0].set_ylabel(f"weight 1 + {alpha:g} · gap", fontsize=NORMAL)
    top = max(axes.dataLim.y1 for axes in panels)
    panels[0].set_ylim(0, 1.12 * top)
    return figure


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
        >>> images = torch.rand(1, 2, 3, 48, 16)
        >>> figure = retrieval_strips(["a man in red"], images, [[0.8, 0.7]], [[True, False]])
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['0.800', '0.700']

    Reference: Yin et al., arXiv 2509.13754v2, Figure 6.
    """
    Figure = _figure_class()
    from matplotlib.patches import Rectangle

    _check_texts("queries", queries)
    scores, correct = _matrix("scores", scores), _matrix("correct", correct)
    expected = [len(queries), len(images[0]) if len(images) else 0]
    for name, shape in (
        ("images", [len(images), *sorted({len(row) for row in images})]),
        ("scores", list(scores.shape)),
        ("correct", list(correct.shape)),
    ):
        if shape != expected or 0 in expected:
            raise ValueError(f"{name} must have shape [Q, k] = {expected}, one row a caption, got {shape}")

    pictures = [[_image("images", image) for image in row] for row in images]
    width = PANEL
    height = PANEL * max(p.shape[0] / p.shape[1] for row in pictures for p in row)
    caption_width, line, gap, margin, under, row_gap = 2.45, 0.155, 0.16, 0.15, 0.24, 0.12
    captions = [_wrap(query, caption_width, NORMAL) for query in queries]
    heights = [max(height, line * (caption.count("\n") + 1)) for caption in captions]
    figure = Figure(
        figsize=(
            2 * margin + caption_width + expected[1] * (width + gap),
            margin + 0.1 + sum(heights) + len(heights) * (under + row_gap),
        )
    )
    place = _Inches(figure)
    y = margin
    for caption, row, row_scores, row_correct, row_height in zip(
        captions, pictures, scores.tolist(), correct.tolist(), heights, strict=True
    ):
        figure.text(
            *place.point(margin, y + row_height / 2),
            caption,
            fontsize=NORMAL,
            va="center",
            ha="left",
            linespacing=1.2,
            parse_math=False,
        )
        for j, (picture, score, right) in enumerate(zip(row, row_scores, row_correct, strict=True)):
            own = PANEL * picture.shape[0] / picture.shape[1]
            x = margin + caption_width + gap + j * (width + gap)
            axes = place(x, y + (row_height - own) / 2, width, own)
            axes.imshow(picture, aspect="auto")
            _bare(axes, f"{score:.3f}")
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
                1 - 0.03 * width / own,
                "✓" if right else "✗",
                transform=axes.transAxes,
                color="white",
                fontsize=NORMAL,
                fontweight="bold",
                ha="right",
                va="top",
                bbox={"facecolor": colour, "edgecolor": "none", "boxstyle": "square,pad=0.15"},
            )
        y += row_height + under + row_gap
    return figure


def loss_curves(
    history: Mapping[str, Sequence[float]] | Sequence[Mapping[str, float]],
    *,
    smoothing: float = 0.95,
) -> "Figure":
    """Loss terms over the steps: the raw values pale, their exponential mean above.

    Args:
        history: term -> values, one a step; or one mapping a step, as `FMFALoss` returns `terms`.
        smoothing: weight of the past in the mean, in [0, 1); 0 draws the raw values alone.
    Raises:
        TypeError, ValueError: no step, terms of different length, or values that are no numbers.
        ImportError: matplotlib is missing.
    Example:
        >>> figure = loss_curves({"efa": [3.0, 2.0, 1.5], "asdm": [9.0, 5.0, 4.0]})
        >>> [axes.get_title() for axes in figure.axes]
        ['efa', 'asdm']
    """
    Figure = _figure_class()
    _check_number("smoothing", smoothing, 0, math.nextafter(1, 0))
    terms = _by_term(history)
    columns = min(len(terms), 2 if len(terms) in (2, 4) else 3)
    rows = math.ceil(len(terms) / columns)
    figure = Figure(figsize=(3.4 * columns + 0.3, 2.5 * rows + 0.2), layout="constrained")
    for i, (name, values) in enumerate(terms.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        steps = range(1, len(values) + 1)
        lost = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
        if smoothing:
            axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=0.8, label="raw")
        axes.plot(steps, _smooth(values, smoothing), color=BLUE, linewidth=1.8, label="smoothed")
        for step in lost:
            axes.axvline(step, color=VERMILION, linestyle=":", linewidth=1)
        note = f" ({len(lost)} of {len(values)} steps not finite)" if lost else ""
        axes.set_title(name + note, fontsize=LARGE, parse_math=False)
        if i >= len(terms) - columns:
            axes.set_xlabel("step", fontsize=NORMAL)
        _quiet(axes)
    if smoothing:
        figure.axes[0].legend(fontsize=SMALL, frameon=False, loc="upper right")
    return figure


def _figure_class() -> "type[Figure]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('fmfa_losses.plot needs matplotlib; pip install "fmfa-losses[plot]"') from error
    return Figure


def _sparse_weights(
    similarity: Tensor, tokens: Sequence[str], grid: tuple[int, int], sparsity: float | None
) -> tuple[Tensor, Tensor]:
    """Normalised similarity n and EFA's aggregation weights a, both [K, N]; a constant row is uniform."""
    check_float("similarity", similarity, "K N")
    _check_finite("similarity", similarity)
    _check_texts("tokens", tokens)
    if not isinstance(grid, Sequence) or len(grid) != 2:
        raise ValueError(f"grid must be (rows, columns), got {grid!r}")
    for name, size in zip(("rows of grid", "columns of grid"), grid, strict=True):
        check_integer(name, size, 1)
    if similarity.shape[0] != len(tokens):
        raise ValueError(
            f"similarity [K, N] must have one row a token, got {describe(similarity)} and "
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


def _image(name: str, image: Any) -> Any:
    """float64 [H, W, 3] in [0, 1]."""
    import numpy as np

    if isinstance(image, Tensor):
        image = image.detach().cpu()
        array = (image.double() if image.is_floating_point() else image).numpy()  # NumPy has no bfloat16
    else:
        array = np.asarray(image)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be a picture as numbers, got {describe(image)}; open a file with PIL.Image.open")
    if array.ndim == 3 and array.shape[0] == 3 and (array.shape[2] != 3 or isinstance(image, Tensor)):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"{name} must be [3, H, W] or [H, W, 3], got {list(array.shape)}; drop the batch dimension")
    if array.size == 0:
        raise ValueError(f"{name} must not be empty, got {list(array.shape)}")
    array = array / 255 if array.dtype == np.uint8 else array.astype("float64")
    low, high = array.min(), array.max()
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(
            f"{name} must be uint8 or lie in [0, 1], got values from {low:.3g} to {high:.3g}; "
            "undo the normalisation first: image * std + mean"
        )
    return array.clip(0, 1)


def _washed(picture: Any) -> Any:
    """The picture in light grey, so that the colours above it are those of the map."""
    grey = picture @ [0.299, 0.587, 0.114]
    return (0.25 + 0.75 * grey)[..., None].repeat(3, axis=2)


def _patch_of_pixel(picture: Any, grid: tuple[int, int]) -> tuple[Any, Any]:
    """The patch row of every pixel row, the patch column of every pixel column."""
    import numpy as np

    height, width = picture.shape[:2]
    return np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width


def _outline(inside: Tensor, dy: float, dx: float) -> list[list[tuple[float, float]]]:
    """The border of a region of patches, as line segments in pixels."""
    padded = F.pad(inside, (1, 1, 1, 1))
    segments = []
    for r, c in (padded[1:, 1:-1] != padded[:-1, 1:-1]).nonzero().tolist():
        segments.append([(c * dx - 0.5, r * dy - 0.5), ((c + 1) * dx - 0.5, r * dy - 0.5)])
    for r, c in (padded[1:-1, 1:] != padded[1:-1, :-1]).nonzero().tolist():
        segments.append([(c * dx - 0.5, r * dy - 0.5), (c * dx - 0.5, (r + 1) * dy - 0.5)])
    return segments


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= float(value) <= high:
        raise ValueError(f"{name} must be a finite number in [{low:g}, {high:g}], got {value!r}")


def _check_texts(name: str, texts: object) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a sequence of texts, got {describe(texts)}; wrap a single one in a list")


def _check_finite(name: str, tensor: Tensor) -> None:
    """A NaN has no colour and no height: what it would be drawn as is another value's."""
    lost = tensor.numel() - int(tensor.detach().double().isfinite().sum())
    if lost:
        raise ValueError(
            f"{name} must be finite, got {lost} of {tensor.numel()} values that are NaN or infinite; find where they "
            "come from, or leave their rows out"
        )


def _matrix(name: str, rows: object) -> Tensor:
    try:
        return torch.as_tensor(rows).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must have shape [Q, k], one row a caption, got rows that are no matrix") from error


def _by_term(
    history: Mapping[str, Sequence[float]] | Sequence[Mapping[str, float]],
) -> dict[str, list[float]]:
    if not isinstance(history, Mapping):
        steps = list(history) if isinstance(history, Iterable) else []
        if not all(isinstance(step, Mapping) for step in steps):
            wrong = next(step for step in steps if not isinstance(step, Mapping))
            raise TypeError(f"history must hold one mapping a step, got {describe(wrong)}; pass the terms of FMFALoss")
        if any(set(step) != set(steps[0]) for step in steps):
            raise ValueError("every step of history must hold the same terms; fill a missing one with float('nan')")
        history = {name: [step[name] for step in steps] for name in (steps[0] if steps else ())}
    terms = {str(name): _numbers(str(name), values) for name, values in history.items()}
    lengths = {name: len(values) for name, values in terms.items()}
    if not terms or 0 in lengths.values() or len(set(lengths.values())) > 1:
        raise ValueError(f"history must hold at least one step, as many for every term, got lengths {lengths}")
    return terms


def _numbers(name: str, values: object) -> list[float]:
    try:
        numbers = values.detach().tolist() if isinstance(values, Tensor) else values
        return [float(v.detach() if isinstance(v, Tensor) else v) for v in numbers]  # type: ignore[attr-defined]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"history must hold one number a step for {name!r}, got {describe(values)}; pass a list of numbers a term, "
            "or a list with one mapping a step"
        ) from error


def _smooth(values: Sequence[float], smoothing: float) -> list[float]:
    """Exponential mean without a bias of the first steps towards zero; leaves out what is not finite."""
    total = weight = 0.0
    smoothed = []
    for value in values:
        if math.isfinite(value):
            total = smoothing * total + (1 - smoothing) * value
            weight = smoothing * weight + (1 - smoothing)
        smoothed.append(total / weight if weight else math.nan)
    return smoothed


def _wrap(text: str, inches: float, points: float) -> str:
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


def _clean(token: str) -> str:
    """A token of CLIP's vocabulary as a reader wants it."""
    return token.removesuffix("</w>")


def _centred(size: float, vertical: str) -> dict[str, Any]:
    return {"fontsize": size, "ha": "center", "va": vertical, "parse_math": False}


def _bare(axes: "Axes", label: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(label, fontsize=SMALL, labelpad=4, color=GREY)


def _quiet(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


class _Inches:
    """Places axes and points on a figure in inches from the upper left corner."""

    def __init__(self, figure: "Figure") -> None:
        self.figure = figure
        self.width, self.height = figure.get_size_inches().tolist()

    def __call__(self, x: float, y: float, width: float, height: float) -> "Axes":
        bottom = self.height - y - height
        return self.figure.add_axes((x / self.width, bottom / self.height, width / self.width, height / self.height))

    def point(self, x: float, y: float) -> tuple[float, float]:
        return x / self.width, 1 - y / self.height
