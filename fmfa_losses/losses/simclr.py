"""SimCLR: contrast of two augmented views of the same images, NT-Xent; SS of TBPS-CLIP (parameter-free).

    z(x, y) = cos(x, y) / tau
    L = 1/2 mean_i [ -log e^z(a_i, b_i) / (sum_j e^z(a_i, b_j) + sum_{j != i} e^z(a_i, a_j)) ]  +  a and b exchanged

The positive of a_i is b_i; its negatives are all other samples in both views. No identity is looked at: other images of
the same person count as negatives, as in the published code.
"""

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..ops.checks import check_divisor
from .loss import ScaledOptions, functional, hyperparameter
from .scores import resolve_scale
from .two_views import TwoViewLoss

__all__ = ["SimCLRLoss", "simclr_loss"]


class SimCLRLoss(TwoViewLoss):
    """Pulls the two views of a sample together, and pushes them away from both views of all others.

        L = 1/2 mean_i [ log( sum_j e^z(a_i, b_j) + sum_{j != i} e^z(a_i, a_j) ) - z(a_i, b_i) ]  +  a and b exchanged

    Args:
        temperature: tau > 0; z is the cosine / tau.
        reduction: "mean", "sum", or "none" for the per-sample mean of both views, [B].
        gather, process_group, equal_batches: see ASDMLoss.

    Inputs:
        first_view, second_view: [B, D], any float dtype, in the usual recipe after a projection head that is thrown
            away later (TBPS-CLIP: Linear, ReLU, Linear of widths 512, 128, 512); need not be normalised.
        logit_scale: 1 / tau instead of `temperature`: a number, or a tensor with one element on any device.
        sample_weight: [B] weights >= 0 of the samples; "mean" divides by their sum.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). 0 for B == 1; a zero vector has cosine
        0 with everything. Memory: a few [B, B] for up to 1448 samples, a block of their rows for more; whole ones
        where compiled or transformed.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit.

    Example:
        >>> import torch
        >>> view = torch.eye(3)
        >>> SimCLRLoss(temperature=1.0)(view, view)                   # log(e + 4) - 1
        tensor(0.9048)

    Reference: Chen et al., arXiv 2002.05709, Eq. 1; Cao et al., arXiv 2308.10045, SS-I.
    """

    temperature: float = hyperparameter(default=0.1, check=check_divisor)

    def queries(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a, b

    def keys(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Of sample j column 2 j is the other view, 2 j + 1 the same one."""
        return torch.stack([b, a], dim=1).flatten(0, 1), torch.stack([a, b], dim=1).flatten(0, 1)

    def rows(self, way: int, scores: Tensor, first: int, scale: float | Tensor) -> Tensor:  # type: ignore[override]
        pair = 2 * (first + torch.arange(scores.shape[0], device=scores.device)).unsqueeze(1)
        logits = scale * scores
        others = logits.scatter(1, pair + 1, -torch.inf)
        return (others.logsumexp(dim=1) - logits.gather(1, pair).squeeze(1)) / 2

    def arguments(self, like: Tensor, **given: float | Tensor | None) -> dict[str, float | Tensor]:
        return {"scale": resolve_scale(given["logit_scale"], self.temperature, like)}

    def forward(
        self,
        first_view: Tensor,
        second_view: Tensor,
        *,
        logit_scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        names = ("first_view", "second_view")
        return self.of_views(names, first_view, second_view, sample_weight, logit_scale=logit_scale)


class SimCLROptions(ScaledOptions, total=False):
    pass


@functional(SimCLRLoss)
def simclr_loss(first_view: Tensor, second_view: Tensor, **options: Unpack[SimCLROptions]) -> Tensor:
    """Functional form of `SimCLRLoss`, which documents every argument.

    Example:
        >>> import torch
        >>> view = torch.eye(4)
        >>> simclr_loss(view, view) < 1e-3
        tensor(True)
    """
    return SimCLRLoss.of(first_view, second_view, **options)
