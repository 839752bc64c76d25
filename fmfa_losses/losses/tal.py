"""TAL and TRL: triplet losses for noisy pairs, RDE (parameter-free).

    S_ij = cos(t_i, v_j),   S_i+ = sum_{j: same id} a_ij S_ij,   a_i = softmax over the positives of S_i / tau, constant

    TRL  L_i = [ m - S_i+ + max_{j: other id} S_ij ]_+                             the hardest negative alone
    TAL  L_i = [ m - S_i+ + tau log sum_{j: other id} exp(S_ij / tau) ]_+          all negatives: an upper bound of TRL
    L    = mean_i L_i over texts + the same over images                            RDE sums: reduction="sum"

No exponential is taken on its own here, so small temperatures and half precision stay finite. RDE's code overflows in
float32 once S > 88 tau (0.88 at tau 0.01), and sends NaN gradients where all samples share one identity. It also counts
positives as negatives of similarity 0 in TRL, so that the hardest negative is never below 0: `negatives="released"`.
"""

from dataclasses import KW_ONLY

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..ops.checks import check_nonnegative
from ..ops.options import TRL_NEGATIVES, TRLNegatives
from .loss import ScaledOptions, functional, hyperparameter
from .negatives_queue import QueueOptions
from .score_loss import ScaledScoreLoss
from .scores import masked_logsumexp

__all__ = ["TALLoss", "TRLLoss", "tal_loss", "tal_loss_from_scores", "trl_loss", "trl_loss_from_scores"]


def _positive(scores: Tensor, same: Tensor, tau: float | Tensor) -> Tensor:
    """S_i+, [B]: the positives of a row, weighted by how similar they are; the weights carry no gradient."""
    weight = (scores / tau).detach().masked_fill(~same, -torch.inf).softmax(dim=1)
    return (weight * scores).sum(dim=1)


class TALLoss(ScaledScoreLoss):
    """The similarity to the positives exceeds a soft maximum over all negatives by a margin.

        L_i = [ margin - S_i+ + tau log sum_{j: other id} exp(S_ij / tau) ]_+    over texts, plus the same over images

    Args:
        temperature: tau > 0; the smaller, the closer the sum is to the hardest negative.
        margin: m >= 0.
        reduction: "mean", "sum" (as RDE trains), or "none" for the per-sample sum of both directions, [B].

    Inputs:
        image_features, text_features: [B, D], any float dtype; need not be normalised.
        pids: [B] integer identities.
        logit_scale: 1 / tau instead of `temperature`: a number, or a tensor with one element on any device.
        sample_weight: [B] weights >= 0 of the pairs, such as RDE's clean-pair labels; "mean" divides by their sum.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). A sample without negatives (B == 1, or
        all of one identity) counts 0; a zero vector has cosine 0 with everything. Memory: a few
        [B, B] for up to 2048 pairs, a block of their rows for more; whole ones where compiled or transformed.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit.

    Example:
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)       # every pair mismatched
        >>> TALLoss()(image, text, torch.arange(3))                   # 2 (0.1 - 0 + 1)
        tensor(2.2000)

    Reference: Qin et al., Noisy-Correspondence Learning for Text-to-Image Person Re-identification, arXiv 2308.09911.
    """

    margin: float = hyperparameter(default=0.1, check=check_nonnegative)

    def rows(self, scores: Tensor, same: Tensor, offset: int, scale: float | Tensor) -> Tensor:
        tau = 1 / scale
        none = same.all(dim=1)  # tau times their -inf would be a NaN in the gradient of tau
        hardness = (tau * masked_logsumexp(scores / tau, ~same).masked_fill(none, 0)).masked_fill(none, -torch.inf)
        return (self.margin - _positive(scores, same, tau) + hardness).clamp(min=0)


class TRLLoss(ScaledScoreLoss):
    """The similarity to the positives exceeds that of the hardest negative by a margin.

        L_i = [ margin - S_i+ + max_{j: other id} S_ij ]_+    over texts, plus the same over images

    Args:
        temperature: tau > 0 of the weights of the positives.
        margin: m >= 0.
        negatives: those of a "different_identity", or "released": a row's positives stand among them with similarity 0.
        reduction: "mean", "sum" (as RDE trains), or "none" for the per-sample sum of both directions, [B].

    Inputs:
        image_features, text_features: [B, D], any float dtype; need not be normalised.
        pids: [B] integer identities.
        logit_scale: 1 / tau instead of `temperature`: a number, or a tensor with one element on any device.
        sample_weight: [B] weights >= 0 of the pairs, such as RDE's clean-pair labels; "mean" divides by their sum.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). A sample without negatives (B == 1, or
        all of one identity) counts 0, with "released" [margin - S_i+]_+; a zero vector has cosine 0 with everything.
        Memory: a few [B, B] for up to 2048 pairs, a block of their rows for more; whole ones where compiled or
        transformed.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit.

    Example:
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)       # every pair mismatched
        >>> TRLLoss()(image, text, torch.arange(3))                   # 2 (0.2 - 0 + 1)
        tensor(2.4000)

    Reference: Qin et al., Noisy-Correspondence Learning for Text-to-Image Person Re-identification, arXiv 2308.09911.
    """

    margin: float = hyperparameter(default=0.2, check=check_nonnegative)
    _: KW_ONLY
    negatives: TRLNegatives = hyperparameter(default="different_identity", check=TRL_NEGATIVES)

    def rows(self, scores: Tensor, same: Tensor, offset: int, scale: float | Tensor) -> Tensor:
        hardest = scores.masked_fill(same, 0.0 if self.negatives == "released" else -torch.inf).max(dim=1).values
        return (self.margin - _positive(scores, same, 1 / scale) + hardest).clamp(min=0)


class TALOptions(ScaledOptions, QueueOptions, total=False):
    margin: float


class TRLOptions(TALOptions, total=False):
    negatives: TRLNegatives


@functional(TALLoss)
def tal_loss(image_features: Tensor, text_features: Tensor, pids: Tensor, **options: Unpack[TALOptions]) -> Tensor:
    """Functional form of `TALLoss`, which documents every argument.

    Example:
        >>> features = torch.eye(4)
        >>> tal_loss(features, features, torch.arange(4))
        tensor(0.)
    """
    return TALLoss.of(image_features, text_features, pids, **options)


@functional(TALLoss, "from_scores")
def tal_loss_from_scores(scores: Tensor, pids: Tensor, **options: Unpack[TALOptions]) -> Tensor:
    """`TALLoss` on scores that exist already, [B, B] text x image.

    Example:
        >>> tal_loss_from_scores(torch.zeros(2, 2), torch.arange(2))  # 2 (0.1 - 0 + 0)
        tensor(0.2000)
    """
    return TALLoss.of_scores(scores, pids, **options)


@functional(TRLLoss)
def trl_loss(image_features: Tensor, text_features: Tensor, pids: Tensor, **options: Unpack[TRLOptions]) -> Tensor:
    """Functional form of `TRLLoss`, which documents every argument.

    Example:
        >>> features = torch.eye(4)
        >>> trl_loss(features, features, torch.arange(4))
        tensor(0.)
    """
    return TRLLoss.of(image_features, text_features, pids, **options)


@functional(TRLLoss, "from_scores")
def trl_loss_from_scores(scores: Tensor, pids: Tensor, **options: Unpack[TRLOptions]) -> Tensor:
    """`TRLLoss` on scores that exist already, [B, B] text x image.

    Example:
        >>> trl_loss_from_scores(torch.zeros(2, 2), torch.arange(2))  # 2 (0.2 - 0 + 0)
        tensor(0.4000)
    """
    return TRLLoss.of_scores(scores, pids, **options)
