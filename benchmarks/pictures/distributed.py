"""docs/distributed.md: what a process holds and receives, from the formulas of `benchmarks.distributed`."""

from pathlib import Path

from fmfa_losses.plot.figure import BLUE, LARGE, NORMAL, ORANGE, SMALL, figure_class, quiet

from ..distributed import columns, received
from ._people import save

__all__ = ["draw"]

RANKS = [2**k for k in range(11)]
SIZES = {"b": 64, "L": 77, "D": 512, "size": 4}


def draw(folder: Path) -> None:
    """Columns in memory, and bytes received in a step, of EFA and of A-SDM with 64 pairs a process."""
    figure = figure_class()(figsize=(8.2, 3.5), layout="constrained")
    held, travelled = figure.subplots(1, 2, sharey=True)
    for term, name, line in (("efa", "EFA", "-"), ("asdm", "A-SDM", "--")):
        for gather, colour, mark in ((True, BLUE, "o"), ("ring", ORANGE, "s")):
            style = {"color": colour, "marker": mark, "markersize": 4, "label": f"{name}, gather={gather!r}"}
            held.plot(RANKS, [columns(term, gather, n, **SIZES) for n in RANKS], line, **style)
            both = [sum(received(term, gather, n, **SIZES)) for n in RANKS[1:]]
            travelled.plot(RANKS[1:], both, line, **style)
    held.set_title("columns that a process holds", fontsize=LARGE)
    travelled.set_title("received in a step, both passes", fontsize=LARGE)
    for axes in (held, travelled):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(RANKS[::2], [str(n) for n in RANKS[::2]])
        axes.set_yticks([1e5, 1e6, 1e7, 1e8, 1e9, 1e10], ["0.1 MB", "1 MB", "10 MB", "100 MB", "1 GB", "10 GB"])
        axes.minorticks_off()
        axes.set_xlabel("processes of 64 pairs", fontsize=NORMAL)
        quiet(axes)
    held.legend(fontsize=SMALL, frameon=False)
    save(figure, folder / "distributed_bytes.png")
