"""Figure of the loss terms over the steps of a training run."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..ops.checks import describe
from ._inputs import check_number
from .figure import BLUE, LARGE, NORMAL, SMALL, VERMILION, figure_class, quiet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["loss_curves"]


def loss_curves(
    history: Mapping[str, Sequence[float]] | Sequence[Mapping[str, float]],
    *,
    smoothing: float = 0.95,
) -> "Figure":
    """Loss terms over the steps: the raw values pale, their exponential mean above.

    Args:
        history: term -> values, one per step; or one mapping per step, as `FMFALoss` returns `terms`.
        smoothing: weight of the past in the mean, in [0, 1); 0 draws the raw values alone.
    Raises:
        TypeError, ValueError: no step, terms of different length, or values that are no numbers.
        ImportError: matplotlib is missing.
    Example:
        >>> figure = loss_curves({"efa": [3.0, 2.0, 1.5], "asdm": [9.0, 5.0, 4.0]})
        >>> [axes.get_title() for axes in figure.axes]
        ['efa', 'asdm']
    """
    Figure = figure_class()
    check_number("smoothing", smoothing, 0, math.nextafter(1, 0))
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
        quiet(axes)
    if smoothing:
        figure.axes[0].legend(fontsize=SMALL, frameon=False, loc="upper right")
    return figure


def _by_term(
    history: Mapping[str, Sequence[float]] | Sequence[Mapping[str, float]],
) -> dict[str, list[float]]:
    if not isinstance(history, Mapping):
        steps = list(history) if isinstance(history, Iterable) else []
        if not all(isinstance(step, Mapping) for step in steps):
            wrong = next(step for step in steps if not isinstance(step, Mapping))
            raise TypeError(
                f"history must hold one mapping per step, got {describe(wrong)}; pass the terms of FMFALoss"
            )
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
            f"history must hold one number per step for {name!r}, got {describe(values)}; pass a list of numbers per "
            "term, or a list with one mapping per step"
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
