"""ITC: image-text contrast, InfoNCE (parameter-free).

    z_ij = cos(t_i, v_j) / tau,   L = 1/2 mean_i [ -sum_j q_ij log softmax_j z_ij ]  over texts and over images

The target q is the pair alone ("paired": CLIP, IRRA's compute_itc), or uniform over the samples of the same identity
("identity": the normalised contrast N-ITC of TBPS-CLIP), so that other images of the same person are not pushed away.
TBPS-CLIP and ALBEF mix soft labels into it, the similarities of a teacher: `softlabel_ratio`. Of TBPS-CLIP itself the
teacher is the model as it is, a second time without gradient. Then q - p = (1 - ratio) (y - p): its gradient is that of
the hard labels, times 1 - ratio, but for what dropout changes. ALBEF's teacher is a momentum encoder.
"""

from dataclasses import KW_ONLY
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..ops.options import MATCHINGS, Matching
from ._soft_distribution import Given, SoftDistributionLoss
from .loss import ScaledOptions, functional, hyperparameter
from .negatives_queue import NegativesQueue, QueueOptions
from .soft_targets import MomentumFeatures, SoftTargets

__all__ = ["ITCLoss", "itc_loss", "itc_loss_from_scores"]


class ITCLoss(SoftDistributionLoss):
    """Pulls each pair together and pushes it away from the other samples of the batch, as CLIP is trained.

        L = -1/2 mean_i [ log softmax_j z_ij at j = i   over texts,  plus the same over images ]

    Args:
        temperature: tau > 0; logits are cos / tau.
        targets: "paired", or "identity": uniform over the samples of the same identity, which needs pids.
        softlabel_ratio: r in [0, 1]; the target is (1 - r) of these labels and r of the teacher's similarities,
            softmax_j of its cosines / tau. May be set anew while training, as a ramp; torch.compile does
            not compile anew for each value.
        mutual_neighbors: k >= 0; a text and an image that are among each other's k nearest by the teacher's cosines
            count as positives, too. Of cosines that are equal up to 4e-6 (float64: 1e-12) the lowest index is nearest.
        reduction: "mean", "sum", or "none" for the per-sample mean of both directions, [B].
        backend: "auto", "triton" or "torch".

    Inputs:
        image_features, text_features: [B, D], any float dtype; need not be normalised.
        pids: [B] integer identities, for targets="identity"; "paired" does not use them and warns once.
        soft_targets: instead of labels, the targets themselves: [B, B] text x image, >= 0, whose rows (texts) and
            columns (images) are divided by their sums; or a pair of them, texts x images and images x texts. Or a
            function (scores [m, C], positive [m, C]) -> [m, C], >= 0, of the teacher's cosines and of labels as bool,
            which is called for some rows of either direction at a time, and once more in the backward. With gather a
            process passes its own rows, [b, B] each. No gradient passes through targets.
        momentum_features: features of a teacher, (image, text), [B, D'] each, without gradient; the own ones when None.
        queue: NegativesQueue whose samples are columns besides, with soft labels too; push the teacher's features into
            it, as ALBEF does. Not with mutual_neighbors, nor with soft_targets that are tensors.
        logit_scale: 1 / tau instead of `temperature`: a number, or a tensor with one element on any device, which
            receives its gradient.
        sample_weight: [B] weights >= 0 of the pairs; "mean" divides by their sum.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). B == 1 gives 0; a zero vector has
        cosine 0 with everything. A negative number in soft_targets, or a row or column of 0, raises, or gives NaN where
        the host cannot look. Memory beyond inputs and gradients: a block of rows of [B, B]; all of it for up to 1024
        pairs on the CPU, with soft labels for up to 2048 pairs.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit.

    Example:
        >>> import torch
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)       # every pair mismatched
        >>> ITCLoss()(image, text)
        tensor(50.)

    Reference: Radford et al., arXiv 2103.00020; Cao et al., arXiv 2308.10045 (targets by identity, soft labels); Li et
    al., arXiv 2107.07651, Eq. 6 (soft labels of a momentum encoder).
    """

    _: KW_ONLY
    targets: Matching = hyperparameter(default="paired", check=MATCHINGS)

    pids_option = ("targets", "identity", "paired", "to pull them too")

    direction_weight = 0.5

    def row_options(self) -> dict[str, Any]:
        return {"objective": "cross_entropy"}

    def rows(self, logits: Tensor, targets: Tensor) -> Tensor:
        return -(targets * logits.log_softmax(dim=1)).sum(dim=1)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        pids: Tensor | None = None,
        *,
        soft_targets: SoftTargets | None = None,
        momentum_features: MomentumFeatures | None = None,
        logit_scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
        queue: NegativesQueue | None = None,
    ) -> Tensor:
        given = Given(pids, None, soft_targets, momentum_features, logit_scale, sample_weight, queue)
        return self.of_pairs(image_features, text_features, given)

    def from_scores(  # type: ignore[override]
        self,
        scores: Tensor,
        pids: Tensor | None = None,
        *,
        soft_targets: SoftTargets | None = None,
        logit_scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return self.of_matrix(scores, Given(pids, None, soft_targets, None, logit_scale, sample_weight))


class ITCOptions(ScaledOptions, QueueOptions, total=False):
    targets: Matching
    softlabel_ratio: float
    mutual_neighbors: int
    soft_targets: SoftTargets | None
    momentum_features: MomentumFeatures | None


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
