"""TAL and TRL: triplet losses for noisy pairs, RDE (parameter-free).

    S_ij = cos(t_i, v_j),   S_i+ = sum_{j: same id} a_ij S_ij,   a_i = softmax over the positives of S_i / tau, constant

    TRL  L_i = [ m - S_i+ + max_{j: other id} S_ij ]_+                             the hardest negative alone
    TAL  L_i = [ m - S_i+ + tau log sum_{j: other id} exp(S_ij / tau) ]_+          all negatives: an upper bound of TRL
    L    = mean_i L_i over texts + the same over images                            RDE sums: reduction="sum"

No exponential is taken on its own here, so small temperatures and half precision stay finite. RDE's code overflows in
float32 once S > 88 tau (0.88 at tau 0.01), and sends NaN gradients where all samples share one identity. It also counts
positives as negatives of similarity 0 in TRL, so that the hardest negative is never below 0: `negatives="released"`.
"""

import torch
from torch import Tensor

from ..ops.checks import check_divisor, check_nonnegative, check_option
from ..ops.module import Module
from ..ops.options import REDUCTIONS, TRL_NEGATIVES, Reduction, TRLNegatives
from .scores import check_scores, cosine_scores, masked_logsumexp, reduce, same_identity

__all__ = ["TALLoss", "TRLLoss", "tal_loss", "tal_loss_from_scores", "trl_loss", "trl_loss_from_scores"]


def tal_loss(
    image_features: Tensor,
    text_features: Tensor,
    pids: Tensor,
    *,
    temperature: float = 0.02,
    margin: float = 0.1,
    reduction: Reduction = "mean",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Functional form of `TALLoss`, which documents every argument.

    Example:
        >>> features = torch.eye(4)
        >>> tal_loss(features, features, torch.arange(4))
        tensor(0.)
    """
    return tal_loss_from_scores(
        cosine_scores(image_features, text_features),
        pids,
        temperature=temperature,
        margin=margin,
        reduction=reduction,
        sample_weight=sample_weight,
    )


def tal_loss_from_scores(
    scores: Tensor,
    pids: Tensor,
    *,
    temperature: float = 0.02,
    margin: float = 0.1,
    reduction: Reduction = "mean",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """`TALLoss` on scores that exist already, [B, B] text x image.

    Example:
        >>> tal_loss_from_scores(torch.zeros(2, 2), torch.arange(2))  # 2 (0.1 - 0 + 0)
        tensor(0.2000)
    """
    temperature, margin = _check_hyperparameters(temperature, margin)
    scores = check_scores(scores)
    same = same_identity(pids, scores)

    def direction(s: Tensor) -> Tensor:
        hardness = temperature * masked_logsumexp(s / temperature, ~same)
        return (margin - _positive(s, same, temperature) + hardness).clamp(min=0)

    return reduce(direction(scores) + direction(scores.T), reduction, sample_weight)


def trl_loss(
    image_features: Tensor,
    text_features: Tensor,
    pids: Tensor,
    *,
    temperature: float = 0.02,
    margin: float = 0.2,
    negatives: TRLNegatives = "different_identity",
    reduction: Reduction = "mean",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Functional form of `TRLLoss`, which documents every argument.

    Example:
        >>> features = torch.eye(4)
        >>> trl_loss(features, features, torch.arange(4))
        tensor(0.)
    """
    return trl_loss_from_scores(
        cosine_scores(image_features, text_features),
        pids,
        temperature=temperature,
        margin=margin,
        negatives=negatives,
        reduction=reduction,
        sample_weight=sample_weight,
    )


def trl_loss_from_scores(
    scores: Tensor,
    pids: Tensor,
    *,
    temperature: float = 0.02,
    margin: float = 0.2,
    negatives: TRLNegatives = "different_identity",
    reduction: Reduction = "mean",
    sample_weight: Tensor | None = None,
) -> Tensor:
    """`TRLLoss` on scores that exist already, [B, B] text x image.

    Example:
        >>> trl_loss_from_scores(torch.zeros(2, 2), torch.arange(2))  # 2 (0.2 - 0 + 0)
        tensor(0.4000)
    """
    temperature, margin = _check_hyperparameters(temperature, margin)
    check_option("negatives", negatives, TRL_NEGATIVES)
    scores = check_scores(scores)
    same = same_identity(pids, scores)

    def direction(s: Tensor) -> Tensor:
        hardest = s.masked_fill(same, 0.0 if negatives == "released" else -torch.inf).max(dim=1).values
        return (margin - _positive(s, same, temperature) + hardest).clamp(min=0)

    return reduce(direction(scores) + direction(scores.T), reduction, sample_weight)


def _positive(scores: Tensor, same: Tensor, temperature: float) -> Tensor:
    """S_i+, [B]: the positives of a row, weighted by how similar they are; the weights carry no gradient."""
    weight = (scores.detach() / temperature).masked_fill(~same, -torch.inf).softmax(dim=1)
    return (weight * scores).sum(dim=1)


class TALLoss(Module):
    """Pulls each text and image to its positives until all negatives together stand a margin behind.

        L_i = [ margin - S_i+ + tau log sum_{j: other id} exp(S_ij / tau) ]_+    over texts, plus the same over images

    Args:
        temperature: tau > 0; the smaller, the closer the sum is to the hardest negative.
        margin: m >= 0.
        reduction: "mean", "sum" (as RDE trains), or "none" for the per-sample sum of both directions, [B].

    Inputs:
        image_features, text_features: [B, D], any float dtype; need not be normalised.
        pids: [B] integer identities.
        sample_weight: [B] weights >= 0 of the pairs, such as RDE's clean-pair labels; "mean" divides by their sum.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). A sample without negatives (B == 1, or
        all of one identity) counts 0; a zero vector has cosine 0 with everything. Memory: a few [B, B].

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit.

    Example:
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)       # every pair mismatched
        >>> TALLoss()(image, text, torch.arange(3))                   # 2 (0.1 - 0 + 1)
        tensor(2.2000)

    Reference: Qin et al., Noisy-Correspondence Learning for Text-to-Image Person Re-identification, arXiv 2308.09911.
    """

    temperature: float
    margin: float
    reduction: Reduction

    def __init__(self, temperature: float = 0.02, margin: float = 0.1, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        temperature, margin = _check_hyperparameters(temperature, margin)
        check_option("reduction", reduction, REDUCTIONS)
        self.temperature, self.margin, self.reduction = temperature, margin, reduction

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        pids: Tensor,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return tal_loss(
            image_features,
            text_features,
            pids,
            temperature=self.temperature,
            margin=self.margin,
            reduction=self.reduction,
            sample_weight=sample_weight,
        )


class TRLLoss(Module):
    """Pulls each text and image to its positives until the hardest negative stands a margin behind.

        L_i = [ margin - S_i+ + max_{j: other id} S_ij ]_+    over texts, plus the same over images

    Args:
        temperature: tau > 0 of the weights of the positives.
        margin: m >= 0.
        negatives: those of a "different_identity", or "released": a row's positives stand among them with similarity 0.
        reduction: "mean", "sum" (as RDE trains), or "none" for the per-sample sum of both directions, [B].

    Inputs:
        image_features, text_features: [B, D], any float dtype; need not be normalised.
        pids: [B] integer identities.
        sample_weight: [B] weights >= 0 of the pairs, such as RDE's clean-pair labels; "mean" divides by their sum.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). A sample without negatives (B == 1, or
        all of one identity) counts 0, with "released" [margin - S_i+]_+; a zero vector has cosine 0 with everything.
        Memory: a few [B, B].

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit.

    Example:
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)       # every pair mismatched
        >>> TRLLoss()(image, text, torch.arange(3))                   # 2 (0.2 - 0 + 1)
        tensor(2.4000)

    Reference: Qin et al., Noisy-Correspondence Learning for Text-to-Image Person Re-identification, arXiv 2308.09911.
    """

    temperature: float
    margin: float
    negatives: TRLNegatives
    reduction: Reduction

    def __init__(
        self,
        temperature: float = 0.02,
        margin: float = 0.2,
        *,
        negatives: TRLNegatives = "different_identity",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        temperature, margin = _check_hyperparameters(temperature, margin)
        check_option("negatives", negatives, TRL_NEGATIVES)
        check_option("reduction", reduction, REDUCTIONS)
        self.temperature, self.margin, self.negatives, self.reduction = temperature, margin, negatives, reduction

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        pids: Tensor,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return trl_loss(
            image_features,
            text_features,
            pids,
            temperature=self.temperature,
            margin=self.margin,
            negatives=self.negatives,
            reduction=self.reduction,
            sample_weight=sample_weight,
        )


def _check_hyperparameters(temperature: float, margin: float) -> tuple[float, float]:
    return check_divisor("temperature", temperature), check_nonnegative("margin", margin)
