"""CMPM: cross-modal projection matching (parameter-free).

    z_ij = t_i . v_j / |v_j|,   p_i = softmax_j z_ij,   q_ij = y_ij / sum_k y_ik,   y_ij = [pid_i == pid_j]
    L    = mean_i KL(p_i || q_i + eps) over texts  +  the same over images, with v_i . t_j / |t_j|

A feature is projected on the direction of the other modality's features: its own length is the inverse temperature.
IRRA's code divides the labels of a row by their L2 norm and not by their sum: `normalize="released"`.
"""

from dataclasses import KW_ONLY

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..ops.checks import check_positive, check_same
from ..ops.options import NORMALIZE, Normalize
from .loss import Options, functional, hyperparameter
from .negatives_queue import QueueOptions
from .score_loss import ScoreLoss
from .scores import check_scores, divergence

__all__ = ["CMPMLoss", "cmpm_loss", "cmpm_loss_from_scores"]


class CMPMLoss(ScoreLoss):
    """Pulls the distribution of a feature's projections on the other modality to the distribution of its labels.

        L = mean_i KL(softmax_j(t_i . v_j / |v_j|) || q_i + eps)    over texts, plus the same over images

    Args:
        normalize: labels are divided by their "sum", or by their L2 norm as IRRA's code does ("released").
        eps: added to the target inside the logarithm.
        reduction: "mean", "sum", or "none" for the per-sample sum of both directions, [B].

    Inputs:
        image_features, text_features: [B, D], any float dtype, not normalised: their length is part of the loss.
        pids: [B] integer identities.
        sample_weight: [B] weights >= 0 of the pairs; "mean" divides by their sum.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). B == 1 gives 0 up to eps; a zero
        vector projects to 0. With "released" a sample with n > 1 positives may have a loss below 0, down to -log(n)/2
        for each direction, as its target sums to sqrt(n). Memory: a few [B, B] for up to 2048 pairs, a block of
        their rows for more; whole ones where compiled or transformed.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit.

    Example:
        >>> image, text = torch.randn(4, 8), torch.randn(4, 8)
        >>> CMPMLoss()(image, text, torch.arange(4)).shape
        torch.Size([])

    Reference: Zhang and Lu, Deep Cross-Modal Projection Learning for Image-Text Matching, ECCV 2018, Eq. 1-4.
    """

    _: KW_ONLY
    normalize: Normalize = hyperparameter(default="sum", check=NORMALIZE)
    eps: float = hyperparameter(default=1e-8, check=check_positive)

    unit_queries = False

    def rows(self, scores: Tensor, positive: Tensor, offset: int) -> Tensor:
        y = positive.to(scores.dtype)
        norm = y.sum(dim=1) if self.normalize == "sum" else torch.linalg.vector_norm(y, dim=1)
        return divergence(scores, y / norm[:, None], self.eps)

    def from_scores(  # type: ignore[override]
        self, t2i_scores: Tensor, i2t_scores: Tensor, pids: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        t2i, i2t = check_scores(t2i_scores, "t2i_scores"), check_scores(i2t_scores, "i2t_scores")
        check_same("t2i_scores and i2t_scores", t2i, i2t, dims=[("B", 0)])
        return self._of_scores(t2i, i2t, pids, sample_weight)


class CMPMOptions(Options, QueueOptions, total=False):
    normalize: Normalize
    eps: float


@functional(CMPMLoss)
def cmpm_loss(image_features: Tensor, text_features: Tensor, pids: Tensor, **options: Unpack[CMPMOptions]) -> Tensor:
    """Functional form of `CMPMLoss`, which documents every argument.

    Example:
        >>> features = 100 * torch.eye(4)
        >>> cmpm_loss(features, features, torch.arange(4)) < 1e-6
        tensor(True)
    """
    return CMPMLoss.of(image_features, text_features, pids, **options)


@functional(CMPMLoss, "from_scores")
def cmpm_loss_from_scores(
    t2i_scores: Tensor, i2t_scores: Tensor, pids: Tensor, **options: Unpack[CMPMOptions]
) -> Tensor:
    """`CMPMLoss` on projections that exist already, [B, B] each: texts x images, and images x texts.

    The two are no transposes of each other: a projection is measured along the unit vector of its column.

    Example:
        >>> scores = 100 * torch.eye(4)
        >>> cmpm_loss_from_scores(scores, scores, torch.arange(4)) < 1e-6
        tensor(True)
    """
    return CMPMLoss.of_scores(t2i_scores, i2t_scores, pids, **options)
