"""R-ITC: reversed image-text contrast, TBPS-CLIP (parameter-free).

    z_ij = cos(t_i, v_j) / tau,   p_i = softmax_j z_ij,   q_ij = y_ij / sum_k y_ik,   y_ij = [pid_i == pid_j]
    L    = 1/2 [ mean_i KL(p_i || q_i + eps) over texts  +  the same over images ]

N-ITC (itc.py) pulls with KL(q || p), this one with the reverse, which punishes what p has where q has nothing. It is
SDM (sdm.py) with a larger eps, and half of it: log(eps) is the price of a wrong match, 1e-2 here and 1e-8 there.
"""

from torch import Tensor
from typing_extensions import Unpack

from .loss import functional
from .sdm import SDMLoss, SDMOptions

__all__ = ["RITCLoss", "ritc_loss", "ritc_loss_from_scores"]


class RITCLoss(SDMLoss):
    """Pulls each similarity distribution to that of the labels by the reversed divergence, KL(p || q).

        L = 1/2 mean_i KL(p_i || q_i + eps)    over texts, plus the same over images

    Args:
        temperature: tau > 0; logits are cos / tau.
        eps: added to the target inside the logarithm; TBPS-CLIP's ritc_eps.
        reduction: "mean", "sum", or "none" for the per-sample mean of both directions, [B].
        image_id_factor, softlabel_ratio, mutual_neighbors, backend: see SDMLoss.

    Inputs:
        image_features, text_features: [B, D], any float dtype; need not be normalised.
        pids: [B] integer identities.
        logit_scale: 1 / tau instead of `temperature`: a number, or a tensor with one element on any device.
        sample_weight: [B] weights >= 0 of the pairs; "mean" divides by their sum.
        image_ids, soft_targets, momentum_features, queue: see SDMLoss.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). As q + eps sums to more than 1, it may
        be as low as -log(1 + n eps), n positives; B == 1 gives that. Memory: see SDMLoss.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit.

    Example:
        >>> import torch
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)       # every pair mismatched
        >>> RITCLoss()(image, text, torch.arange(3))                  # log 100
        tensor(4.6052)

    Reference: Cao et al., An Empirical Study of CLIP for Text-based Person Search, arXiv 2308.10045, R-ITC.
    """

    eps: float = 1e-2

    direction_weight = 0.5


class RITCOptions(SDMOptions, total=False):
    pass


@functional(RITCLoss)
def ritc_loss(
    image_features: Tensor, text_features: Tensor, pids: Tensor | None = None, **options: Unpack[RITCOptions]
) -> Tensor:
    """Functional form of `RITCLoss`, which documents every argument.

    Example:
        >>> import torch
        >>> features = torch.eye(4)
        >>> ritc_loss(features, features, torch.arange(4))            # -log(1 + 1e-2)
        tensor(-0.0100)
    """
    return RITCLoss.of(image_features, text_features, pids, **options)


@functional(RITCLoss, "from_scores")
def ritc_loss_from_scores(scores: Tensor, pids: Tensor | None = None, **options: Unpack[RITCOptions]) -> Tensor:
    """`RITCLoss` on scores that exist already, [B, B] text x image, before the logit scale.

    Example:
        >>> import torch
        >>> ritc_loss_from_scores(torch.eye(4), torch.arange(4))
        tensor(-0.0100)
    """
    return RITCLoss.of_scores(scores, pids, **options)
