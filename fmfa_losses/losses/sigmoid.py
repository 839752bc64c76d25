"""Sigmoid pairwise loss, SigLIP (parameter-free; scale and bias come from the model or from the arguments).

    z_ij = s cos(t_i, v_j) + b,   L = -1/B sum_ij log sigmoid(y_ij z_ij),   y_ij = 1 for a positive pair, else -1

Every pair is a question of its own, so no softmax ties a row together. SigLIP knows one positive a row
(`positives="paired"`); by default all pairs of one identity are positive here, as other images of a person are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.checks import check_divisor, check_finite, check_option, check_unused_ids
from ..ops.module import Module
from ..ops.options import MATCHINGS, REDUCTIONS, Matching, Reduction
from .scores import check_scores, cosine_scores, reduce, resolve_scale, same_identity, scalar_like

__all__ = ["SigmoidLoss", "sigmoid_loss", "sigmoid_loss_from_scores"]


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    pids: Tensor | None = None,
    *,
    temperature: float = 0.1,
    bias: float = -10.0,
    positives: Matching = "identity",
    reduction: Reduction = "mean",
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Functional form of `SigmoidLoss`, which documents every argument.

    Example:
        >>> features = torch.eye(4)
        >>> sigmoid_loss(features, features, torch.arange(4))         # log 2 + 3 log(1 + e^-10)
        tensor(0.6933)
    """
    return sigmoid_loss_from_scores(
        cosine_scores(image_features, text_features),
        pids,
        temperature=temperature,
        bias=bias,
        positives=positives,
        reduction=reduction,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        sample_weight=sample_weight,
    )


def sigmoid_loss_from_scores(
    scores: Tensor,
    pids: Tensor | None = None,
    *,
    temperature: float = 0.1,
    bias: float = -10.0,
    positives: Matching = "identity",
    reduction: Reduction = "mean",
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """`SigmoidLoss` on scores that exist already, [B, B] text x image, before scale and bias.

    Example:
        >>> sigmoid_loss_from_scores(torch.zeros(2, 2), torch.arange(2), bias=0.0)    # 2 log 2
        tensor(1.3863)
    """
    check_option("positives", positives, MATCHINGS)
    scores = check_scores(scores)
    if positives == "paired":
        check_unused_ids("SigmoidLoss", pids, scores, 'positives="paired"', 'positives="identity" to pull them too')
        positive = torch.eye(scores.shape[0], dtype=torch.bool, device=scores.device)
    elif pids is None:
        raise ValueError('positives="identity" needs the identities: pass pids [B], or positives="paired"')
    else:
        positive = same_identity(pids, scores)
    logits = resolve_scale(logit_scale, temperature, scores) * scores + _resolve_bias(logit_bias, bias, scores)
    cost = F.softplus(torch.where(positive, -logits, logits))
    return reduce((cost.sum(dim=1) + cost.sum(dim=0)) / 2, reduction, sample_weight)


class SigmoidLoss(Module):
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
        everything. Memory: a few [B, B].

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

    temperature: float
    bias: float
    positives: Matching
    reduction: Reduction

    def __init__(
        self,
        temperature: float = 0.1,
        bias: float = -10.0,
        *,
        positives: Matching = "identity",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        temperature, bias = check_divisor("temperature", temperature), check_finite("bias", bias)
        check_option("positives", positives, MATCHINGS)
        check_option("reduction", reduction, REDUCTIONS)
        self.temperature, self.bias, self.positives, self.reduction = temperature, bias, positives, reduction

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        pids: Tensor | None = None,
        *,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return sigmoid_loss(
            image_features,
            text_features,
            pids,
            temperature=self.temperature,
            bias=self.bias,
            positives=self.positives,
            reduction=self.reduction,
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            sample_weight=sample_weight,
        )


def _resolve_bias(logit_bias: float | Tensor | None, bias: float, like: Tensor) -> float | Tensor:
    if isinstance(logit_bias, Tensor):
        return scalar_like("logit_bias", logit_bias, like)
    return check_finite("bias", bias) if logit_bias is None else check_finite("logit_bias", logit_bias)
