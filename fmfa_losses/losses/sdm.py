"""SDM: similarity distribution matching, IRRA (parameter-free).

    z_ij = cos(t_i, v_j) / tau,   p_i = softmax_j z_ij,   q_ij = y_ij / sum_k y_ik,   y_ij = [pid_i == pid_j]
    L    = mean_i KL(p_i || q_i + eps) over texts (t2i)  +  the same over images (i2t)

It is A-SDM (asdm.py) with alpha = 0. IRRA's code divides soft labels by the sum of their column's label row, which is
the same for hard labels: `fmfa_losses.compat.irra.compute_sdm`.
"""

from dataclasses import KW_ONLY

from torch import Tensor
from typing_extensions import Unpack

from ..ops.checks import check_fraction, check_positive
from ._soft_distribution import SoftDistributionLoss
from .loss import ScaledOptions, functional, hyperparameter
from .negatives_queue import QueueOptions
from .scores import divergence
from .soft_targets import MomentumFeatures, SoftTargets

__all__ = ["SDMLoss", "sdm_loss", "sdm_loss_from_scores"]


class SDMLoss(SoftDistributionLoss):
    """Pulls each text's and image's similarity distribution to the distribution of its labels.

        L = mean_i KL(p_i || q_i + eps)    over texts, plus the same over images

    Args:
        temperature: tau > 0; logits are cos / tau.
        eps: added to the target inside the logarithm.
        reduction: "mean", "sum", or "none" for the per-sample sum of both directions, [B].
        image_id_factor: weight of a shared identity against a shared image where image_ids are given, in [0, 1].
        softlabel_ratio, mutual_neighbors: soft labels of a teacher in q: see ITCLoss.
        backend: "auto", "triton" or "torch".

    Inputs:
        image_features, text_features: [B, D], any float dtype; need not be normalised.
        pids: [B] integer identities; may be left out with soft_targets that are tensors.
        image_ids: [B] integer ids of the images, for soft labels y = factor [same pid] + (1 - factor) [same image].
        soft_targets, momentum_features, queue: instead of labels; the teacher; further columns: see ITCLoss.
        logit_scale: 1 / tau instead of `temperature`: a number, or a tensor with one element on any device.
        sample_weight: [B] weights >= 0 of the pairs; "mean" divides by their sum.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). B == 1 gives 0 up to eps; a zero
        vector has cosine 0 with everything. Memory beyond inputs and gradients: a block of rows of [B, B]; all of it
        for up to 1024 pairs on the CPU, with soft labels for up to 2048 pairs.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit.

    Example:
        >>> import torch
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)       # every pair mismatched
        >>> round(SDMLoss()(image, text, torch.arange(3)).item(), 1)
        36.8

    Reference: Jiang and Ye, arXiv 2303.12501, Eq. 2-4.
    """

    _: KW_ONLY
    eps: float = hyperparameter(default=1e-8, check=check_positive)
    image_id_factor: float = hyperparameter(default=0.3, check=check_fraction)

    moved = ("target",)

    def rows(self, logits: Tensor, targets: Tensor) -> Tensor:
        return divergence(logits, targets, self.eps)


class SDMOptions(ScaledOptions, QueueOptions, total=False):
    eps: float
    image_id_factor: float
    image_ids: Tensor | None
    softlabel_ratio: float
    mutual_neighbors: int
    soft_targets: SoftTargets | None
    momentum_features: MomentumFeatures | None


@functional(SDMLoss)
def sdm_loss(
    image_features: Tensor, text_features: Tensor, pids: Tensor | None = None, **options: Unpack[SDMOptions]
) -> Tensor:
    """Functional form of `SDMLoss`, which documents every argument.

    Example:
        >>> import torch
        >>> features = torch.eye(4)
        >>> sdm_loss(features, features, torch.arange(4)) < 1e-6
        tensor(True)
    """
    return SDMLoss.of(image_features, text_features, pids, **options)


@functional(SDMLoss, "from_scores")
def sdm_loss_from_scores(scores: Tensor, pids: Tensor | None = None, **options: Unpack[SDMOptions]) -> Tensor:
    """`SDMLoss` on scores that exist already, [B, B] text x image, before the logit scale.

    Example:
        >>> import torch
        >>> sdm_loss_from_scores(torch.eye(4), torch.arange(4)) < 1e-6
        tensor(True)
    """
    return SDMLoss.of_scores(scores, pids, **options)
