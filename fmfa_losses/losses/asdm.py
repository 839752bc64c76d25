"""A-SDM: adaptive similarity distribution matching, Eq. 1-4 (parameter-free).

    z_ij = cos(t_i, v_j) / tau,   p_i = softmax_j z_ij,   q_ij = y_ij / sum_k y_ik,   y_ij = [pid_i == pid_j]
    KL_i = sum_j p_ij (log p_ij - log(q_ij + eps)),       w_i = 1 + alpha (max_k p_ik - p_ii)
    L    = mean_i w_i KL_i over texts (t2i)  +  the same over images (i2t)

alpha = 0 is IRRA's SDM loss. The released code measures the gap in cosines, to the first positive of the batch:
`fmfa_losses.compat`.
"""

from dataclasses import KW_ONLY

from torch import Tensor
from typing_extensions import Unpack

from ..ops.checks import check_flag, check_fraction, check_nonnegative, check_positive
from ..ops.options import POSITIVES, Positive
from ._distribution import DistributionLoss
from .loss import ScaledOptions, functional, hyperparameter
from .negatives_queue import QueueOptions

__all__ = ["ASDMLoss", "asdm_loss"]


class ASDMLoss(DistributionLoss):
    """Pulls each text's and image's similarity distribution to its labels, harder where a wrong match leads.

        L = mean_i (1 + alpha gap_i) KL(p_i || q_i + eps)    over texts, plus the same over images

    Args:
        temperature: tau > 0; logits are cos / tau.
        alpha: weight of the gap max_k p_ik - p_i,positive, >= 0; 0 is SDM. The paper: 10, RSTPReid 1.
        positive: which positive the gap is measured to: the "paired" sample (the paper), or the best of "any" sample
            of the same identity.
        detach_weight: keep the weight out of the graph.
        eps: added to the target inside the logarithm.
        reduction: "mean", "sum", or "none" for the per-sample sum of both directions, [B].
        image_id_factor: weight of a shared identity against a shared image where image_ids are given, in [0, 1].
        gather: False matches within this process's batch. True matches its pairs against the batch of all processes,
            whose features are gathered; "ring" does so without any process holding all of them. The mean over the
            ranks is the loss of one process on the concatenated batch, and so is the gradient under
            DistributedDataParallel; "sum" and "none" are this rank's part of it. docs/distributed.md.
        process_group: the processes that share the batch; all when None.
        equal_batches: promises that all of them have equally many pairs at every call, which saves the exchange of
            sizes that the host would wait for.
        backend: "auto", "triton" or "torch".

    Inputs:
        image_features, text_features: [B, D], any float dtype; need not be normalised.
        pids: [B] integer identities.
        image_ids: [B] integer ids of the images, for soft labels y = factor [same pid] + (1 - factor) [same image].
        logit_scale: 1 / tau instead of `temperature`: a number, or a tensor with one element on any device, which
            receives its gradient.
        sample_weight: [B] weights >= 0 of the pairs; "mean" divides by their sum, over all ranks with gather.
        peers: of a handshake that has already been made for this call; FMFALoss makes one for all its terms.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). B == 1 gives 0 up to eps; a zero
        vector has cosine 0 with everything. Memory beyond inputs and
        gradients: a block of rows of [B, B]; all of it for up to 1024 pairs on the CPU.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit, here or between processes.
        RuntimeError: gather without torch.distributed, or a process that died or did not arrive in time.

    Example:
        >>> import torch
        >>> loss = ASDMLoss(alpha=10.0)
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)       # every pair mismatched
        >>> round(loss(image, text, torch.arange(3)).item(), 1)
        405.3

    Reference: Yin et al., arXiv 2509.13754v2, Eq. 1-4; Jiang and Ye, arXiv 2303.12501 (SDM).
    """

    alpha: float = hyperparameter(default=10.0, check=check_nonnegative)
    _: KW_ONLY
    positive: Positive = hyperparameter(default="paired", check=POSITIVES)
    detach_weight: bool = hyperparameter(default=False, check=check_flag)
    eps: float = hyperparameter(default=1e-8, check=check_positive)
    image_id_factor: float = hyperparameter(default=0.3, check=check_fraction)

    moved = ("gap", "target")


class ASDMOptions(ScaledOptions, QueueOptions, total=False):
    alpha: float
    positive: Positive
    detach_weight: bool
    eps: float
    image_id_factor: float
    image_ids: Tensor | None


@functional(ASDMLoss)
def asdm_loss(image_features: Tensor, text_features: Tensor, pids: Tensor, **options: Unpack[ASDMOptions]) -> Tensor:
    """Functional form of `ASDMLoss`, which documents every argument.

    Example:
        >>> import torch
        >>> features = torch.eye(4)
        >>> asdm_loss(features, features, torch.arange(4)) < 1e-6
        tensor(True)
    """
    return ASDMLoss.of(image_features, text_features, pids, **options)
