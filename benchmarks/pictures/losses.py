"""docs/losses.md: how hard each loss pulls at a wrong image."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fmfa_losses import ASDMLoss, ITCLoss, SDMLoss, SigmoidLoss, TALLoss, TRLLoss
from fmfa_losses.plot.figure import BLUE, GREEN, GREY, NORMAL, ORANGE, SMALL, VERMILION, figure_class, quiet

from ._people import save

__all__ = ["COSINES", "LOSSES", "draw", "pull"]

PAIRS = 16
OWN, OTHERS = 0.5, 0.1  # cosine of a text with its own image, and with all wrong ones but one
COSINES = torch.linspace(0.1, 0.75, 131, dtype=torch.float64).tolist()  # of a text with one wrong image
LOSSES: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "A-SDM, alpha 10": (ASDMLoss(reduction="sum"), VERMILION, "-"),
    "SDM": (SDMLoss(reduction="sum"), BLUE, "-"),
    "ITC": (ITCLoss(targets="identity", reduction="sum"), GREY, "-"),
    "TAL": (TALLoss(reduction="sum"), GREEN, "--"),
    "TRL": (TRLLoss(reduction="sum"), ORANGE, "-."),
    "sigmoid, scale 10": (SigmoidLoss(reduction="sum"), "black", ":"),
}


def draw(folder: Path) -> None:
    """The pull at one wrong image, as its cosine rises from below the others' to above that of the own image."""
    figure = figure_class()(figsize=(6.6, 3.7), layout="constrained")
    axes = figure.subplots()
    for name, (loss, colour, line) in LOSSES.items():
        axes.plot(COSINES, [pull(loss, cosine) for cosine in COSINES], line, color=colour, label=name, linewidth=1.8)
    axes.axvline(OWN, color=GREY, linewidth=1)
    axes.text(OWN - 0.008, 1.03, "as similar as the own image", transform=axes.get_xaxis_transform(), ha="center",
              fontsize=SMALL, color=GREY)  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(1e-3, 1e4)
    axes.set_xlabel("cosine of a text with one wrong image", fontsize=NORMAL)
    axes.set_ylabel("gradient of that cosine", fontsize=NORMAL)
    axes.legend(fontsize=SMALL, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    quiet(axes)
    save(figure, folder / "losses_pull.png")


def pull(loss: Callable[..., Tensor], cosine: float) -> float:
    """dL / d cosine of text 0 with image 1, from both directions; every other cosine stays as it is."""
    wrong = torch.tensor(cosine, dtype=torch.float64, requires_grad=True)
    image = torch.eye(PAIRS, 2 * PAIRS, dtype=torch.float64)
    text = OTHERS + (OWN - OTHERS) * torch.eye(PAIRS, dtype=torch.float64)
    text = torch.where(torch.arange(PAIRS * PAIRS).view(PAIRS, PAIRS) == 1, wrong, text)
    # A dimension of its own makes each text a unit vector, so that its products with the images are cosines.
    rest = torch.diag((1 - text.square().sum(dim=1)).sqrt())
    value = loss(image, torch.cat([text, rest], dim=1), torch.arange(PAIRS))
    return torch.autograd.grad(value, wrong)[0].item()
