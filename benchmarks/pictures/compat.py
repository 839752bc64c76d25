"""docs/compat.md: the weights of A-SDM in the paper and in the released code, on one batch."""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from fmfa_losses.plot.figure import BLUE, GREEN, LARGE, NORMAL, SMALL, VERMILION, figure_class, quiet

from ._people import people, save

__all__ = ["draw", "weights"]


def weights() -> tuple[Tensor, dict[str, Tensor]]:
    """Of the paper, [80], and of the two releases, for 80 pairs, two of each person, texts as queries."""
    image, text, pids = people().paired(80)
    cosines = F.normalize(text, dim=1) @ F.normalize(image, dim=1).T
    p = (cosines / 0.02).softmax(dim=1)
    paper = 1 + 10 * (p.amax(dim=1) - p.diagonal())
    first = (pids[:, None] == pids).int().argmax(dim=1, keepdim=True)  # of the person, in the batch
    gap = cosines.amax(dim=1) - cosines.gather(1, first).squeeze(1)
    return paper, {"2025-04: alpha 10": 1 + 10 * gap, "2025-08: alpha 0.1": 1 + 0.1 * gap}


def draw(folder: Path) -> None:
    """The three, heaviest pairs of the paper first."""
    paper, released = weights()
    order = paper.argsort(descending=True, stable=True)
    figure = figure_class()(figsize=(7.4, 3.4), layout="constrained")
    axes = figure.subplots()
    position = range(len(paper))
    axes.step(position, paper[order].numpy(), where="mid", color=BLUE, label="paper: alpha 10, probabilities")
    for (name, weight), colour, mark in zip(released.items(), (VERMILION, GREEN), "^s", strict=True):
        label = f"released {name}, cosines"
        axes.plot(position, weight[order].numpy(), mark, color=colour, markersize=3.5, label=label)
    axes.set_xlabel("pairs of a batch, those that the paper weighs most first", fontsize=NORMAL)
    axes.set_ylabel("weight of the pair", fontsize=NORMAL)
    axes.set_title("A-SDM: one batch, three weightings", fontsize=LARGE)
    axes.legend(fontsize=SMALL, frameon=False)
    quiet(axes)
    save(figure, folder / "compat_weights.png")
