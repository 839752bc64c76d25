"""Plots of the GPU benchmark: time and memory against the batch, and the share of the roof."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from ..cases import Case
from ..providers import AUTOTUNED, PEERS, REFERENCE, TORCH, TRITON
from ..results import ceilings_of, of_kind
from .plan import toy
from .roofline import share_of_roof

__all__ = ["draw_gpu", "gpu_figures"]

# One colour a provider in all plots; distinguishable without colour by the marker.
STYLES = {
    REFERENCE: {"color": "#777777", "marker": "o"},
    AUTOTUNED: {"color": "#D55E00", "marker": "s"},
    TORCH: {"color": "#56B4E9", "marker": "^"},
    TRITON: {"color": "#0072B2", "marker": "D"},
    **{name: {"color": color, "marker": "v"} for name, color in zip(PEERS, ("#009E73", "#CC79A7"), strict=True)},
}
PAPER = Case("efa", 128)  # the paper's tokens; all batches of it, and the roof at this one
PRECISIONS = ("bf16", "fp16", "tf32", "tf32x3", "fp32")


def gpu_figures(result: dict[str, Any]) -> dict[str, Figure]:
    """ "time", "memory" and "roof"; those that compare two providers at least."""
    shown = toy(PAPER) if result.get("dry_run") else PAPER
    rows = [row for row in of_kind(result, "figure") if row["status"] == "ok" and row["mode"] == "eager"]
    efa = [row for row in rows if row["op"] == "efa" and (row["L"], row["N"], row["D"]) == (shown.L, shown.N, shown.D)]
    efa = [row for row in efa if "mean_length" not in row]
    device = result["machine"].get("gpu", "no GPU")
    title = f"Whole EFA loss, L {shown.L}, N {shown.N}, D {shown.D}, on {device}"
    same = [row for row in rows if row["B"] == shown.B]
    figures = {
        "time": _against_batch(efa, title, "forward and backward, ms", lambda row: row["both"]["median"]),
        "memory": _against_batch(efa, title, "peak above inputs and gradients, MiB", lambda row: row["above_mib"]),
        "roof": _roof(same, device, ceilings) if (ceilings := ceilings_of(result)) else None,
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def draw_gpu(result: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """STEM_time.png, STEM_memory.png and STEM_roof.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in gpu_figures(result).items():
        written.append(folder / f"{stem}_{name}.png")
        figure.savefig(written[-1], dpi=120)
    return written


def _against_batch(rows: Sequence[dict[str, Any]], title: str, label: str, value: Any) -> Figure | None:
    shown = [precision for precision in PRECISIONS if any(row["dtype"] == precision for row in rows)]
    if len({row["provider"] for row in rows}) < 2:
        return None
    figure = Figure(figsize=(max(6.4, 1 + 3.2 * len(shown)), 4.8), layout="constrained")
    figure.suptitle(title)
    for axes, precision in zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True):
        for provider, style in STYLES.items():
            chosen = [row for row in rows if row["dtype"] == precision and row["provider"] == provider]
            points = sorted((row["B"], max(value(row), 1e-3)) for row in chosen)
            if points:
                axes.plot(*zip(*points, strict=True), label=provider, linewidth=1.6, markersize=6, **style)
        _log_batch_axis(axes, sorted({row["B"] for row in rows}))
        axes.set_title(precision)
    figure.axes[0].set_ylabel(label)
    _legend(figure)
    return figure


def _log_batch_axis(axes: Axes, batches: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    # Within one power of ten a log axis has no label of its own.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks(batches, [str(B) for B in batches])
    axes.minorticks_off()
    axes.set_xlabel("pairs in the batch")
    axes.grid(alpha=0.3)


def _legend(figure: Figure) -> None:
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)


def _roof(rows: Sequence[dict[str, Any]], device: str, ceilings: dict[str, float]) -> Figure | None:
    """Bars of forward and backward for ours and the reference, at the batch that everything is measured at."""
    chosen = [row for row in rows if row["provider"] in (REFERENCE, TRITON)]
    chosen = [row for row in chosen if share_of_roof(row, "both", ceilings) is not None]
    cases = list(dict.fromkeys(row["case"] for row in chosen))
    keys = [(case, dtype) for case in cases for dtype in PRECISIONS]
    keys = [key for key in keys if any((row["case"], row["dtype"]) == key for row in chosen)]
    if len({row["provider"] for row in chosen}) < 2:
        return None
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(keys)), layout="constrained")
    figure.suptitle(f"Share of the roof (counted work at the measured ceilings) on {device}")
    panels = figure.subplots(1, 2, sharey=True)
    panels[0].set_ylim(len(keys) - 0.4, -0.6)
    for axes, part in zip(panels, ("forward", "backward"), strict=True):
        for offset, provider in ((-0.2, TRITON), (0.2, REFERENCE)):
            positions, shares = [], []
            for position, key in enumerate(keys):
                for row in chosen:
                    if (row["case"], row["dtype"]) == key and row["provider"] == provider:
                        positions.append(position + offset)
                        shares.append(100 * (share_of_roof(row, part, ceilings) or 0))
            bars = axes.barh(positions, shares, height=0.38, color=STYLES[provider]["color"], label=provider)
            axes.bar_label(bars, fmt="%.0f %%", padding=2, fontsize=8)
        axes.set_yticks(range(len(keys)), [f"{case}\n{dtype}" for case, dtype in keys], fontsize=8)
        axes.set_xlim(0, 115)
        axes.set_xlabel("% of the roof")
        axes.set_title(part)
        axes.grid(axis="x", alpha=0.3)
    _legend(figure)
    return figure
