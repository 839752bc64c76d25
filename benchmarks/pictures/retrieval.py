"""docs/retrieval.md: Rank-k for every k, with mAP and mINP beside it."""

from pathlib import Path

from fmfa_losses.plot.figure import BLUE, LARGE, NORMAL, SMALL, VERMILION, figure_class, quiet
from fmfa_losses.retrieval import retrieval_metrics

from ._people import people, save

__all__ = ["draw"]

SHOWN = 20


def draw(folder: Path) -> None:
    """160 captions and 80 images of 40 people."""
    seen = people()
    features, pids = (seen.text_features, seen.image_features), (seen.text_pids, seen.image_pids)
    metrics = retrieval_metrics(*features, *pids, ranks=range(1, SHOWN + 1))
    figure = figure_class()(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    labels = []
    for short, name, one, colour, line in (
        ("t2i", "text to image", metrics.t2i, BLUE, "-o"),
        ("i2t", "image to text", metrics.i2t, VERMILION, "--s"),
    ):
        axes.plot(list(one.cmc), list(one.cmc.values()), line, color=colour, markersize=3, label=name)
        for what, value, style in (("mAP", one.mAP, "-"), ("mINP", one.mINP, ":")):
            axes.axhline(value, color=colour, linestyle=style, linewidth=0.8)
            labels.append((value, f"{what} {short} {value:.1f}", colour))
    height = 0.0
    for value, text, colour in sorted(labels):  # one above the other where lines are close
        height = max(value, height + 2.2)
        axes.text(SHOWN + 0.3, height, text, color=colour, fontsize=SMALL, va="center")
    axes.set_xticks([1, 5, 10, 15, 20])
    axes.set_xlim(0.5, SHOWN)
    axes.set_xlabel("k", fontsize=NORMAL)
    axes.set_ylabel("Rank-k, percent", fontsize=NORMAL)
    axes.set_title("Queries with a match among the first k", fontsize=LARGE)
    axes.legend(fontsize=SMALL, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.12))
    quiet(axes)
    save(figure, folder / "retrieval_ranks.png")
