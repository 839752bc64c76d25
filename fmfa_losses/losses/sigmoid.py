"""Sigmoid pairwise loss, SigLIP (parameter-free; scale and bias come from the model or from the arguments).

    z_ij = s cos(t_i, v_j) + b,   L = -1/B sum_ij log sigmoid(y_ij z_ij),   y_ij = 1 for a positive pair, else -1

Every pair is a question of its own, so no softmax ties a row together. SigLIP knows one positive per row
(`positives="paired"`); by default all pairs of one identity are positive here, as other images of a person are.
"""

from dataclasses import KW_ONLY
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from ..ops.checks import check_divisor, check_finite
from ..ops.options import MATCHINGS, Matching
from .loss import ScaledOptions, functional, hyperparameter
from .negatives_queue import NegativesQueue, QueueOptions
from .score_loss import ScaledScoreLoss
from .scores import check_scores, scalar_like

__all__ = ["SigmoidLoss", "sigmoid_loss", "sigmoid_loss_from_scores"]


class SigmoidLoss(ScaledScoreLoss):
    """Pulls positive pairs together and pushes every other pair of the batch apart, each on its own.

        L = 1/B sum_ij softplus(-y_ij (s cos(t_i, v_j) + b)),   y_ij = 1 for a positive pair, else -1

    Args:
        temperature: 1 / s > 0; SigLIP starts its learned scale at 10.
        bias: b; SigLIP starts at -10, so that the many negatives cost little at first.
        positives: all pairs of one "identity", which needs pids, or the "paired" ones alone (SigLIP).
        reduction: "mean", "sum", or "none" for a sample's half of its row and of its column, [B], which sum to the sum.

    Inputs:
        image_features, text_features: [B, D], any float dtype; need not be normalised.
        pids: [B] integer identities, for positives="identity"; "paired" does not use them and warns once.
        logit_scale: s instead of `temperature`: a number, or a tensor with one element, which receives its gradient.
        logit_bias: b instead of `bias`, likewise.
        sample_weight: [B] weights >= 0 of the pairs; "mean" divides by their sum.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). A zero vector has cosine 0 with
        everything. Memory: a few [B, B] for up to 2048 pairs, a block of their rows for more; whole ones where compiled
        or transformed.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit; pids that are missing.

    Example:
        >>> logit_scale, logit_bias = (torch.nn.Parameter(torch.tensor(x)) for x in (10.0, -10.0))
        >>> image, text = torch.eye(3), torch.eye(3)
        >>> loss = SigmoidLoss()(image, text, torch.arange(3), logit_scale=logit_scale, logit_bias=logit_bias)
        >>> loss.backward()
        >>> logit_bias.grad                                           # -1/2 + 2 sigmoid(-10)
        tensor(-0.4999)

    Reference: Zhai et al., Sigmoid Loss for Language Image Pre-Training, arXiv 2303.15343, Eq. 3.
    """

    temperature: float = hyperparameter(default=0.1, check=check_divisor)
    bias: float = hyperparameter(default=-10.0, check=check_finite)
    _: KW_ONLY
    positives: Matching = hyperparameter(default="identity", check=MATCHINGS)

    pids_option = ("positives", "identity", "paired", "to pull them too")

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        pids: Tensor | None = None,
        *,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
        queue: NegativesQueue | None = None,
    ) -> Tensor:
        given = {"logit_scale": logit_scale, "logit_bias": logit_bias}
        return self._of_features(image_features, text_features, pids, sample_weight, queue, **given)

    def from_scores(
        self,
        scores: Tensor,
        pids: Tensor | None = None,
        *,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        given = {"logit_scale": logit_scale, "logit_bias": logit_bias}
        return self._of_scores(check_scores(scores), None, pids, sample_weight, **given)

    def arguments(self, like: Tensor, **given: Any) -> dict[str, Any]:
        bias = given.pop("logit_bias")
        if isinstance(bias, Tensor):
            bias = scalar_like("logit_bias", bias, like)
        else:
            bias = self.bias if bias is None else check_finite("logit_bias", bias)
        return {"bias": bias, **super().arguments(like, **given)}

    def cost(self, scores: Tensor, positive: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor:
        """-log sigmoid(y_ij z_ij), [m, C]."""
        logits = scale * scores + bias
        return F.softplus(torch.where(positive, -logits, logits))

    def rows(
        self, scores: Tensor, positive: Tensor, offset: int, scale: float | Tensor, bias: float | Tensor
    ) -> Tensor:
        return self.cost(scores, positive, scale, bias).sum(dim=1) / 2

    def both(self, t2i: Tensor, i2t: Tensor | None, positive: Tensor, offset: int, **given: Any) -> Tensor:
        """A transposed matrix has the same costs."""
        if i2t is not None:
            return super().both(t2i, i2t, positive, offset, **given)
        cost = self.cost(t2i, positive, **given)
        return (cost.sum(dim=1) + cost.sum(dim=0)) / 2


class SigmoidOptions(ScaledOptions, QueueOptions, total=False):
    bias: float
    logit_bias: float | Tensor | None
    positives: Matching


@functional(SigmoidLoss)
def sigmoid_loss(
    image_features: Tensor, text_features: Tensor, pids: Tensor | None = None, **options: Unpack[SigmoidOptions]
) -> Tensor:
    """Functional form of `SigmoidLoss`, which documents every argument.

    Example:
        >>> features = torch.eye(4)
        >>> sigmoid_loss(features, features, torch.arange(4))         # log 2 + 3 log(1 + e^-10)
        tensor(0.6933)
    """
    return SigmoidLoss.of(image_features, text_features, pids, **options)


@functional(SigmoidLoss, "from_scores")
def sigmoid_loss_from_scores(scores: Tensor, pids: Tensor | None = None, **options: Unpack[SigmoidOptions]) -> Tensor:
    """`SigmoidLoss` on scores that exist already, [B, B] text x image, before scale and bias.

    Example:
        >>> sigmoid_loss_from_scores(torch.zeros(2, 2), torch.arange(2), bias=0.0)    # 2 log 2
        tensor(1.3863)
    """
    return SigmoidLoss.of_scores(scores, pids, **options)
