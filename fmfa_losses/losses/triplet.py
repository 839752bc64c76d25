"""Triplet ranking with the hardest negative of the batch, VSE++ (parameter-free).

    S_ij = cos(t_i, v_j),   L = mean_i [ m - S_ii + max_{j negative} S_ij ]_+ over texts  +  the same over images

VSE++ takes all other pairs as negatives; in a person-retrieval batch other images of the same person are none, so
`negatives="different_identity"` is the default and "all" is VSE++.
"""

import torch
from torch import Tensor

from ..ops.checks import check_nonnegative, check_option, check_unused_ids
from ..ops.module import Module
from ..ops.options import NEGATIVES, REDUCTIONS, Negatives, Reduction
from .scores import check_scores, cosine_scores, reduce, same_identity

__all__ = ["TripletLoss", "triplet_loss", "triplet_loss_from_scores"]


def triplet_loss(
    image_features: Tensor,
    text_features: Tensor,
    pids: Tensor | None = None,
    *,
    margin: float = 0.2,
    negatives: Negatives = "different_identity",
    reduction: Reduction = "mean",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Functional form of `TripletLoss`, which documents every argument.

    Example:
        >>> features = torch.eye(4)
        >>> triplet_loss(features, features, torch.arange(4))
        tensor(0.)
    """
    return triplet_loss_from_scores(
        cosine_scores(image_features, text_features),
        pids,
        margin=margin,
        negatives=negatives,
        reduction=reduction,
        sample_weight=sample_weight,
    )


def triplet_loss_from_scores(
    scores: Tensor,
    pids: Tensor | None = None,
    *,
    margin: float = 0.2,
    negatives: Negatives = "different_identity",
    reduction: Reduction = "mean",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """`TripletLoss` on scores that exist already, [B, B] text x image.

    Example:
        >>> triplet_loss_from_scores(torch.zeros(2, 2), torch.arange(2))
        tensor(0.4000)
    """
    margin = _check_hyperparameters(margin, negatives)
    scores = check_scores(scores)
    if negatives == "all":
        check_unused_ids("TripletLoss", pids, scores, 'negatives="all"', 'negatives="different_identity" to spare them')
        excluded = torch.eye(scores.shape[0], dtype=torch.bool, device=scores.device)
    elif pids is None:
        raise ValueError('negatives="different_identity" needs the identities: pass pids [B], or negatives="all"')
    else:
        excluded = same_identity(pids, scores)

    def direction(s: Tensor) -> Tensor:
        hardest = s.masked_fill(excluded, -torch.inf).max(dim=1).values
        return (margin - s.diagonal() + hardest).clamp(min=0)

    return reduce(direction(scores) + direction(scores.T), reduction, sample_weight)


class TripletLoss(Module):
    """Pulls each pair together until the hardest negative of text and image stands a margin behind.

        L_i = [ margin - S_ii + max_{j negative} S_ij ]_+    over texts, plus the same over images

    Args:
        margin: m >= 0.
        negatives: pairs of a "different_identity", which needs pids, or "all" other pairs (VSE++).
        reduction: "mean", "sum", or "none" for the per-sample sum of both directions, [B].

    Inputs:
        image_features, text_features: [B, D], any float dtype; need not be normalised.
        pids: [B] integer identities, for negatives="different_identity"; "all" does not use them and warns once.
        sample_weight: [B] weights >= 0 of the pairs; "mean" divides by their sum.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). A sample without negatives (B == 1, or
        all of one identity) counts 0; a zero vector has cosine 0 with everything. Memory: a few [B, B].

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit; pids that are missing.

    Example:
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)       # every pair mismatched
        >>> TripletLoss()(image, text, torch.arange(3))               # 2 (0.2 - 0 + 1)
        tensor(2.4000)

    Reference: Faghri et al., VSE++, arXiv 1707.05612, Eq. 6.
    """

    margin: float
    negatives: Negatives
    reduction: Reduction

    def __init__(
        self, margin: float = 0.2, *, negatives: Negatives = "different_identity", reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        margin = _check_hyperparameters(margin, negatives)
        check_option("reduction", reduction, REDUCTIONS)
        self.margin, self.negatives, self.reduction = margin, negatives, reduction

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        pids: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return triplet_loss(
            image_features,
            text_features,
            pids,
            margin=self.margin,
            negatives=self.negatives,
            reduction=self.reduction,
            sample_weight=sample_weight,
        )


def _check_hyperparameters(margin: float, negatives: Negatives) -> float:
    check_option("negatives", negatives, NEGATIVES)
    return check_nonnegative("margin", margin)
