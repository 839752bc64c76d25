"""Figure of the weights that A-SDM gives to the pairs of a batch."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.checks import check_divisor, check_float, check_integer, check_nonnegative, check_same
from ._inputs import check_all_finite
from .figure import BLUE, GREY, LARGE, NORMAL, ORANGE, SMALL, figure_class, quiet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["asdm_weights"]


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
    Figure = figure_class()
    check_float("image_features", image_features, "B D")
    check_float("text_features", text_features, "B D")
    check_same("image_features and text_features", image_features, text_features, dims=(("B", 0), ("D", 1)))
    temperature, alpha = check_divisor("temperature", temperature), check_nonnegative("alpha", alpha)
    named = check_integer("named", named, 0)
    check_all_finite("image_features", image_features)
    check_all_finite("text_features", text_features)
    image, text = (F.normalize(x.detach().double().cpu(), dim=1) for x in (image_features, text_features))
    logits = text @ image.T / temperature
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, direction, z in zip(panels, ("t2i", "i2t"), (logits, logits.T), strict=True):
        p = z.softmax(dim=1)
        weight, pair = (1 + alpha * (p.amax(1) - p.diagonal())).sort(descending=True, stable=True)
        harder = int((weight > 1).sum())
        heaviest = ", ".join(str(i) for i in pair[: min(named, harder)].tolist()) or "none"
        title = f"{direction}: {harder} of {len(weight)} pairs pulled harder\nheaviest: {heaviest}"
        _draw_weights(axes, weight, harder, title)
    panels[0].set_ylabel(f"weight 1 + {alpha:g} · gap", fontsize=NORMAL)
    panels[0].set_ylim(0, 1.12 * max(axes.dataLim.y1 for axes in panels))
    return figure


def _draw_weights(axes: "Axes", weight: Tensor, harder: int, title: str) -> None:
    """A bar a pair, [B] in descending order; those of the `harder` pairs are hatched."""
    position = torch.arange(len(weight))
    for part, colour, hatch, label in (
        (slice(0, harder), ORANGE, "////", "another one ranks first"),
        (slice(harder, None), BLUE, None, "own partner ranks first"),
    ):
        if len(weight[part]):
            axes.bar(
                position[part].numpy(),
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
    axes.set_title(title, fontsize=LARGE)
    axes.set_xlabel("pairs of the batch, by weight", fontsize=NORMAL)
    axes.set_xlim(-0.8, len(weight) - 0.2)
    axes.legend(fontsize=SMALL, frameon=False, loc="upper right")
    quiet(axes)
