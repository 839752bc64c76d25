"""Triplet ranking with the hardest negative of the batch, VSE++ (parameter-free).

    S_ij = cos(t_i, v_j),   L = mean_i [ m - S_ii + max_{j negative} S_ij ]_+ over texts  +  the same over images

VSE++ takes all other pairs as negatives; in a person-retrieval batch other images of the same person are none, so
`negatives="different_identity"` is the default and "all" is VSE++.
"""

from dataclasses import KW_ONLY

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..ops.checks import check_nonnegative
from ..ops.options import NEGATIVES, Negatives
from .loss import Options, functional, hyperparameter
from .negatives_queue import QueueOptions
from .score_loss import ScoreLoss

__all__ = ["TripletLoss", "triplet_loss", "triplet_loss_from_scores"]


class TripletLoss(ScoreLoss):
    """Each pair's similarity exceeds that of the hardest negative of its text and of its image by a margin.

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
        all of one identity) counts 0; a zero vector has cosine 0 with everything. Memory: a few
        [B, B] for up to 2048 pairs, a block of their rows for more; whole ones where compiled or transformed.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit; pids that are missing.

    Example:
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)       # every pair mismatched
        >>> TripletLoss()(image, text, torch.arange(3))               # 2 (0.2 - 0 + 1)
        tensor(2.4000)

    Reference: Faghri et al., VSE++, arXiv 1707.05612, Eq. 6.
    """

    margin: float = hyperparameter(default=0.2, check=check_nonnegative)
    _: KW_ONLY
    negatives: Negatives = hyperparameter(default="different_identity", check=NEGATIVES)

    pids_option = ("negatives", "different_identity", "all", "to spare them")

    def rows(self, scores: Tensor, positive: Tensor, offset: int) -> Tensor:
        hardest = scores.masked_fill(positive, -torch.inf).max(dim=1).values
        return (self.margin - scores.diagonal(offset) + hardest).clamp(min=0)


class TripletOptions(Options, QueueOptions, total=False):
    margin: float
    negatives: Negatives


@functional(TripletLoss)
def triplet_loss(
    image_features: Tensor, text_features: Tensor, pids: Tensor | None = None, **options: Unpack[TripletOptions]
) -> Tensor:
    """Functional form of `TripletLoss`, which documents every argument.

    Example:
        >>> features = torch.eye(4)
        >>> triplet_loss(features, features, torch.arange(4))
        tensor(0.)
    """
    return TripletLoss.of(image_features, text_features, pids, **options)


@functional(TripletLoss, "from_scores")
def triplet_loss_from_scores(scores: Tensor, pids: Tensor | None = None, **options: Unpack[TripletOptions]) -> Tensor:
    """`TripletLoss` on scores that exist already, [B, B] text x image.

    Example:
        >>> triplet_loss_from_scores(torch.zeros(2, 2), torch.arange(2))
        tensor(0.4000)
    """
    return TripletLoss.of_scores(scores, pids, **options)
