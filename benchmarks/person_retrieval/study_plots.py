"""Pictures of studies: every run is a point, means are lines or bars."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .outputs import writing

__all__ = ["draw_starts", "draw_sweep", "draw_variants"]

COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")
GREY = "#595959"
Record = dict[str, Any]


def draw_variants(file: Path, records: Sequence[Record], names: Sequence[str], title: str) -> None:
    """R1 and mAP of every variant; the runs of a seed are joined, so that paired differences are seen."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    for number, metric in enumerate(("R1", "mAP")):
        axes = figure.add_subplot(1, 2, number + 1)
        for seed in sorted({record["seed"] for record in records}):
            values = [_values(records, name, metric, seed)[0] for name in names]
            label = "one seed" if seed == records[0]["seed"] else None
            axes.plot(
                range(len(names)), values, color="0.8", linewidth=0.9, marker="o", markersize=3, zorder=1, label=label
            )
        means = [statistics.fmean(_values(records, name, metric)) for name in names]
        axes.plot(
            range(len(names)), means, color=COLORS[0], linewidth=0, marker="_", markersize=26, markeredgewidth=2.5,
            label="mean",
        )  # fmt: skip
        for place, mean in enumerate(means):
            axes.annotate(f"{mean:.1f}", (place, mean), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        axes.axhline(_before(records[0], metric), color=GREY, linestyle=":", linewidth=1, label="before training")
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xticks(range(len(names)), [name.replace(" (", "\n(") for name in names], fontsize=8)
        _finish(axes, f"text to image {metric}, %")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    _save(figure, file)


def draw_sweep(file: Path, records: Sequence[Record], names: Sequence[str], what: str, dataset: str) -> None:
    """R1 against the values of one hyperparameter, as Figure 4: equal steps between them."""
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(names):
        values = _values(records, name, "R1")
        axes.plot([place] * len(values), values, color="0.7", linewidth=0, marker="o", markersize=3)
    axes.plot(
        [statistics.fmean(_values(records, name, "R1")) for name in names], color=COLORS[0], marker="o", linewidth=1.6
    )
    axes.axhline(_before(records[0], "R1"), color=GREY, linestyle=":", linewidth=1, label="before training")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel(what, fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    count = len(_values(records, names[0], "R1"))
    axes.set_title(f"{dataset}, {f'mean of {count} seeds' if count > 1 else 'one seed'}", fontsize=10)
    _finish(axes, "text to image R1, %")
    _save(figure, file)


def draw_starts(file: Path, records: Sequence[Record], starts: Sequence[str], names: Sequence[str]) -> None:
    """R1 after training against R1 before, and what A-SDM adds to SDM."""
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    after, gain = figure.subplots(1, 2)
    found = {(start, name): _values(records, f"{name} from {start}", "R1") for start in starts for name in names}
    before = [next(_before(r, "R1") for r in records if r["variant"] == f"{names[0]} from {start}") for start in starts]
    for color, name in zip(COLORS, names, strict=False):
        means = [statistics.fmean(found[start, name]) for start in starts]
        after.plot(before, means, color=color, marker="o", linewidth=1.6, label=name)
        if name == names[0]:
            continue
        gains = [[a - b for a, b in zip(found[start, name], found[start, names[0]], strict=True)] for start in starts]
        gain.plot(before, [statistics.fmean(one) for one in gains], color=color, marker="o", linewidth=1.6, label=name)
        for x, one in zip(before, gains, strict=True):
            gain.plot([x] * len(one), one, color=color, linewidth=0, marker="o", markersize=3, alpha=0.5)
    after.plot(before, before, color=GREY, linestyle=":", linewidth=1, label="before training")
    gain.axhline(0, color=GREY, linewidth=1)
    for axes, label in ((after, "R1 after training, %"), (gain, f"R1 less that of {names[0]}, seed by seed")):
        axes.set_xlabel("R1 before training, %", fontsize=9)
        axes.legend(fontsize=8, frameon=False)
        _finish(axes, label)
    _save(figure, file)


def _values(records: Sequence[Record], variant: str, metric: str, seed: int | None = None) -> list[float]:
    return [r["t2i"][metric] for r in records if r["variant"] == variant and seed in (None, r["seed"])]


def _before(record: Record, metric: str) -> float:
    return float(record["before"]["t2i"][metric])


def _finish(axes: Axes, label: str) -> None:
    axes.set_ylabel(label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Figure, file: Path) -> None:
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=130)
