"""ITC: image-text contrast, InfoNCE (parameter-free).

    z_ij = cos(t_i, v_j) / tau,   L = 1/2 mean_i [ -sum_j q_ij log softmax_j z_ij ]  over texts and over images

The target q is the pair alone ("paired": CLIP, IRRA's compute_itc), or uniform over the samples of the same identity
("identity": the normalised contrast of TBPS-CLIP without its soft labels), so that other images of the same person are
not pushed away.
"""

import torch
from torch import Tensor

from ..ops.checks import check_divisor, check_ids, check_option, check_scale, check_unused_ids
from ..ops.module import Module
from ..ops.options import BACKENDS, MATCHINGS, REDUCTIONS, Backend, Matching, Reduction
from ..ops.similarity_distribution.api import similarity_distribution_loss
from .scores import (
    check_features,
    check_scores,
    reduce,
    resolve_scale,
    same_identity,
    soft_targets,
)

__all__ = ["ITCLoss", "itc_loss", "itc_loss_from_scores"]


def itc_loss(
    image_features: Tensor,
    text_features: Tensor,
    pids: Tensor | None = None,
    *,
    temperature: float = 0.02,
    targets: Matching = "paired",
    reduction: Reduction = "mean",
    logit_scale: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Functional form of `ITCLoss`, which documents every argument.

    Example:
        >>> features = torch.eye(4)
        >>> itc_loss(features, features) < 1e-6
        tensor(True)
    """
    check_option("targets", targets, MATCHINGS)
    scale = check_scale(logit_scale, temperature)
    check_features(image_features, text_features)
    _check_pids(pids, targets, text_features)
    if targets == "paired":  # InfoNCE is the cross-entropy of identities that are all different
        pids = torch.arange(text_features.shape[0], device=text_features.device)
    assert pids is not None
    per_sample = similarity_distribution_loss(
        text_features,
        image_features,
        pids,
        logit_scale=scale,
        objective="cross_entropy",
        reduction="none",
        backend=backend,
    )
    return reduce(per_sample / 2, reduction, sample_weight)


def itc_loss_from_scores(
    scores: Tensor,
    pids: Tensor | None = None,
    *,
    temperature: float = 0.02,
    targets: Matching = "paired",
    reduction: Reduction = "mean",
    logit_scale: float | Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """`ITCLoss` on scores that exist already, [B, B] text x image, before the logit scale.

    Example:
        >>> itc_loss_from_scores(torch.zeros(4, 4))                   # log 4
        tensor(1.3863)
    """
    check_option("targets", targets, MATCHINGS)
    scores = check_scores(scores)
    _check_pids(pids, targets, scores)
    logits = resolve_scale(logit_scale, temperature, scores) * scores
    t2i, i2t = logits.log_softmax(dim=1), logits.T.log_softmax(dim=1)
    if targets == "paired":
        log_p = t2i.diagonal() + i2t.diagonal()
    else:
        assert pids is not None
        log_p = (soft_targets(same_identity(pids, scores), None, 1.0, scores) * (t2i + i2t)).sum(dim=1)
    return reduce(-log_p / 2, reduction, sample_weight)


def _check_pids(pids: Tensor | None, targets: Matching, like: Tensor) -> None:
    if targets == "paired":
        check_unused_ids("ITC", pids, like, 'targets="paired"', 'targets="identity" to pull them too')
    elif pids is None:
        raise ValueError('targets="identity" needs the identities: pass pids [B]')
    else:
        check_ids("pids", pids, like.shape[0], like.device)


class ITCLoss(Module):
    """Pulls each pair together and pushes it away from the other samples of the batch, as CLIP is trained.

        L = -1/2 mean_i [ log softmax_j z_ij at j = i   over texts,  plus the same over images ]

    Args:
        temperature: tau > 0; logits are cos / tau.
        targets: "paired", or "identity": uniform over the samples of the same identity, which needs pids.
        reduction: "mean", "sum", or "none" for the per-sample mean of both directions, [B].
        backend: "auto", "triton" or "torch".

    Inputs:
        image_features, text_features: [B, D], any float dtype; need not be normalised.
        pids: [B] integer identities, for targets="identity"; "paired" does not use them and warns once.
        logit_scale: 1 / tau instead of `temperature`: a number, or a tensor with one element on any device, which
            receives its gradient.
        sample_weight: [B] weights >= 0 of the pairs; "mean" divides by their sum.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). B == 1 gives 0; a zero vector has
        cosine 0 with everything. Memory beyond inputs and gradients: a block of rows, never [B, B].

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit.

    Example:
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)       # every pair mismatched
        >>> ITCLoss()(image, text)
        tensor(50.)

    Reference: Radford et al., arXiv 2103.00020; Cao et al., arXiv 2308.10045 (targets by identity).
    """

    temperature: float
    targets: Matching
    reduction: Reduction
    backend: Backend

    def __init__(
        self,
        temperature: float = 0.02,
        *,
        targets: Matching = "paired",
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        temperature = check_divisor("temperature", temperature)
        check_option("backend", backend, BACKENDS)
        check_option("targets", targets, MATCHINGS)
        check_option("reduction", reduction, REDUCTIONS)
        self.temperature, self.targets = temperature, targets
        self.reduction, self.backend = reduction, backend

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
            backend=self.backend,
        )
