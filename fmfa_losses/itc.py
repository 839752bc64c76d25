"""ITC: image-text contrast, InfoNCE (parameter-free).

    z_ij = cos(t_i, v_j) / tau,   L = 1/2 mean_i [ -sum_j q_ij log softmax_j z_ij ]  over texts and over images

The target q is the pair alone ("paired": CLIP, IRRA's compute_itc), or uniform over the samples of the same identity
("identity": the normalised contrast of TBPS-CLIP without its soft labels), so that other images of the same person are
not pushed away.
"""

import torch
from torch import Tensor, nn

from ._pairwise import (
    REDUCTIONS,
    check_features,
    check_scores,
    cosine_scores,
    reduce,
    resolve_scale,
    same_identity,
    soft_targets,
)
from .ops._checks import check_option, check_positive
from .ops._precision import accumulation_dtype, unit_rows
from .ops.similarity_distribution import Labels, row_statistics

__all__ = ["ITCLoss", "itc_loss", "itc_loss_from_scores"]

TARGETS = ("paired", "identity")


def itc_loss(
    image_features: Tensor,
    text_features: Tensor,
    pids: Tensor | None = None,
    *,
    temperature: float = 0.02,
    targets: str = "paired",
    reduction: str = "mean",
    logit_scale: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Functional form of `ITCLoss`, which documents every argument.

    Example:
        >>> features = torch.eye(4)
        >>> itc_loss(features, features) < 1e-6
        tensor(True)
    """
    check_option("targets", targets, TARGETS)
    if targets == "identity":
        scores = cosine_scores(image_features, text_features)
        return itc_loss_from_scores(
            scores,
            pids,
            temperature=temperature,
            targets=targets,
            reduction=reduction,
            logit_scale=logit_scale,
            sample_weight=sample_weight,
        )
    check_features(image_features, text_features)
    dtype = accumulation_dtype(image_features, text_features)
    image, text = unit_rows(image_features, dtype=dtype), unit_rows(text_features, dtype=dtype)
    scale = resolve_scale(logit_scale, temperature, image)
    pairs = torch.arange(len(image), device=image.device)
    labels = Labels(row_pids=pairs, column_pids=pairs, paired=pairs)
    t2i, i2t = (row_statistics(q * scale, k, labels).log_positive for q, k in ((text, image), (image, text)))
    return reduce(-(t2i + i2t) / 2, reduction, sample_weight)


def itc_loss_from_scores(
    scores: Tensor,
    pids: Tensor | None = None,
    *,
    temperature: float = 0.02,
    targets: str = "paired",
    reduction: str = "mean",
    logit_scale: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """`ITCLoss` on scores that exist already, [B, B] text x image, before the logit scale.

    Example:
        >>> itc_loss_from_scores(torch.zeros(4, 4))                   # log 4
        tensor(1.3863)
    """
    check_option("targets", targets, TARGETS)
    scores = check_scores(scores)
    logits = resolve_scale(logit_scale, temperature, scores) * scores
    t2i, i2t = logits.log_softmax(dim=1), logits.T.log_softmax(dim=1)
    if targets == "paired":
        log_p = t2i.diagonal() + i2t.diagonal()
    elif pids is None:
        raise ValueError('targets="identity" needs the identities: pass pids [B]')
    else:
        log_p = (soft_targets(same_identity(pids, scores), None, 1.0, "row", scores) * (t2i + i2t)).sum(dim=1)
    return reduce(-log_p / 2, reduction, sample_weight)


class ITCLoss(nn.Module):
    """Pulls each pair together and pushes it away from the other samples of the batch, as CLIP is trained.

        L = -1/2 mean_i [ log softmax_j z_ij at j = i   over texts,  plus the same over images ]

    Args:
        temperature: tau > 0; logits are cos / tau.
        targets: "paired", or "identity": uniform over the samples of the same identity, which needs pids.
        reduction: "mean", "sum", or "none" for the per-sample mean of both directions, [B].

    Inputs:
        image_features, text_features: [B, D], any float dtype; need not be normalised.
        pids: [B] integer identities, for targets="identity".
        logit_scale: 1 / tau instead of `temperature`: a number, or a tensor with one element on any device, which
            receives its gradient.
        sample_weight: [B] weights of the pairs; "mean" divides by their sum.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). B == 1 gives 0; a zero vector has
        cosine 0 with everything. With "paired" targets a block of rows is all the memory, never [B, B].

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit.

    Example:
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)       # every pair mismatched
        >>> ITCLoss()(image, text)
        tensor(50.)

    Reference: Radford et al., arXiv 2103.00020; Cao et al., arXiv 2308.10045 (targets by identity).
    """

    def __init__(self, temperature: float = 0.02, *, targets: str = "paired", reduction: str = "mean") -> None:
        super().__init__()
        check_positive("temperature", temperature)
        check_option("targets", targets, TARGETS)
        check_option("reduction", reduction, REDUCTIONS)
        self.temperature, self.targets, self.reduction = temperature, targets, reduction

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        pids: Tensor | None = None,
        *,
        logit_scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return itc_loss(
            image_features,
            text_features,
            pids,
            temperature=self.temperature,
            targets=self.targets,
            reduction=self.reduction,
            logit_scale=logit_scale,
            sample_weight=sample_weight,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, targets={self.targets!r}, reduction={self.reduction!r}"
