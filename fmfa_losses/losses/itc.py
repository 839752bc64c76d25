"""ITC: image-text contrast, InfoNCE (parameter-free).

    z_ij = cos(t_i, v_j) / tau,   L = 1/2 mean_i [ -sum_j q_ij log softmax_j z_ij ]  over texts and over images

The target q is the pair alone ("paired": CLIP, IRRA's compute_itc), or uniform over the samples of the same identity
("identity": the normalised contrast of TBPS-CLIP without its soft labels), so that other images of the same person are
not pushed away.
"""

from dataclasses import KW_ONLY
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..ops.options import MATCHINGS, Matching
from ._distribution import DistributionLoss
from .loss import ScaledOptions, functional, hyperparameter
from .scores import check_scores, resolve_scale, same_identity, soft_targets

__all__ = ["ITCLoss", "itc_loss", "itc_loss_from_scores"]


class ITCLoss(DistributionLoss):
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
        cosine 0 with everything. Memory beyond inputs and
        gradients: a block of rows of [B, B]; all of it for up to 1024 pairs on the CPU.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit.

    Example:
        >>> import torch
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)       # every pair mismatched
        >>> ITCLoss()(image, text)
        tensor(50.)

    Reference: Radford et al., arXiv 2103.00020; Cao et al., arXiv 2308.10045 (targets by identity).
    """

    _: KW_ONLY
    targets: Matching = hyperparameter(default="paired", check=MATCHINGS)

    pids_option = ("targets", "identity", "paired", "to pull them too")

    def row_options(self) -> dict[str, Any]:
        return {"objective": "cross_entropy"}

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        pids: Tensor | None = None,
        *,
        logit_scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return self._of_features(image_features, text_features, pids, None, logit_scale, sample_weight) / 2

    def from_scores(
        self,
        scores: Tensor,
        pids: Tensor | None = None,
        *,
        logit_scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        alone, scores = self.alone(), check_scores(scores)
        ids, logits = self.check_pids(pids, scores), resolve_scale(logit_scale, self.temperature, scores) * scores
        log_p = logits.log_softmax(dim=1), logits.T.log_softmax(dim=1)
        if ids is None:
            of_targets = log_p[0].diagonal() + log_p[1].diagonal()
        else:
            of_targets = (soft_targets(same_identity(ids, scores), None, 1.0, scores) * sum(log_p)).sum(dim=1)
        return self.reduce(-of_targets / 2, sample_weight, alone)


class ITCOptions(ScaledOptions, total=False):
    targets: Matching


@functional(ITCLoss)
def itc_loss(
    image_features: Tensor, text_features: Tensor, pids: Tensor | None = None, **options: Unpack[ITCOptions]
) -> Tensor:
    """Functional form of `ITCLoss`, which documents every argument.

    Example:
        >>> import torch
        >>> features = torch.eye(4)
        >>> itc_loss(features, features) < 1e-6
        tensor(True)
    """
    return ITCLoss.of(image_features, text_features, pids, **options)


@functional(ITCLoss, "from_scores")
def itc_loss_from_scores(scores: Tensor, pids: Tensor | None = None, **options: Unpack[ITCOptions]) -> Tensor:
    """`ITCLoss` on scores that exist already, [B, B] text x image, before the logit scale.

    Example:
        >>> import torch
        >>> itc_loss_from_scores(torch.zeros(4, 4))                   # log 4
        tensor(1.3863)
    """
    return ITCLoss.of_scores(scores, pids, **options)
