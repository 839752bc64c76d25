"""docs/measuring.md: every CPU case of the library against its reference, wins and losses, from the results file."""

from pathlib import Path

from fmfa_losses.plot.figure import BLUE, GREY, LARGE, NORMAL, SMALL, VERMILION, figure_class, quiet

from .. import ROOT, results
from ..providers import REFERENCE, TORCH
from ._people import save

__all__ = ["draw"]


def draw(folder: Path) -> None:
    """Time and memory above inputs of the reference over those of the library, forward and backward."""
    records = results.read(ROOT / "benchmarks/results/micro_cpu.json")["records"]
    by_case: dict[str, dict[str, dict]] = {}
    for record in records:
        if record["status"] == "ok" and "both" in record:
            by_case.setdefault(record["case"], {})[record["provider"]] = record
    compared = {case: rows for case, rows in by_case.items() if {REFERENCE, TORCH} <= set(rows)}
    figure = figure_class()(figsize=(7.6, 0.36 * len(compared) + 1), layout="constrained")
    axes = figure.subplots()
    for y, rows in enumerate(compared.values()):
        for shift, value, colour in (
            (-0.19, rows[REFERENCE]["both"]["median"] / rows[TORCH]["both"]["median"], BLUE),
            (0.19, rows[REFERENCE]["process_mib"] / rows[TORCH]["process_mib"], VERMILION),
        ):
            axes.barh(y + shift, value, 0.36, color=colour)
            axes.text(value + 0.05, y + shift, f"{value:.1f}", fontsize=SMALL - 1, va="center")
    axes.set_yticks(range(len(compared)), list(compared), fontsize=SMALL)
    axes.invert_yaxis()
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_xlabel(
        "reference over library, forward and backward (1: equal, more: the library is ahead)", fontsize=NORMAL
    )
    handles = [axes.barh(0, 0, color=colour) for colour in (BLUE, VERMILION)]
    axes.legend(handles, ["time", "memory of the process"], fontsize=SMALL, frameon=False, loc="lower right")
    axes.set_title("Two threads of an AMD EPYC, float32", fontsize=LARGE)
    quiet(axes)
    axes.grid(False, axis="y")
    save(figure, folder / "measuring_cases.png")
