"""A-SDM: adaptive similarity distribution matching, Eq. 1-4 (parameter-free).

    z_ij = cos(t_i, v_j) / tau,   p_i = softmax_j z_ij,   q_ij = y_ij / sum_k y_ik,   y_ij = [pid_i == pid_j]
    KL_i = sum_j p_ij (log p_ij - log(q_ij + eps)),       w_i = 1 + alpha (max_k p_ik - p_ii)
    L    = mean_i w_i KL_i over texts (t2i)  +  the same over images (i2t)

alpha = 0 is IRRA's SDM loss. The released code measures the gap in cosines, to the first positive of the batch:
`fmfa_losses.compat`.
"""

# torch.compile of 2.6 cannot make the types of a nested function.
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distributed.handshake import handshake
from ..distributed.peers import Peers
from ..ops.backend import select_backend
from ..ops.checks import check_divisor, check_flag, check_ids, check_option, check_scale
from ..ops.module import Module
from ..ops.options import BACKENDS, GATHER, REDUCTIONS, Backend, Gather, Positive, Reduction
from ..ops.similarity_distribution.api import RowLoss, similarity_distribution_loss, similarity_distribution_ring
from .scores import check_features

__all__ = ["ASDMLoss", "asdm_loss"]

# Attributes of ASDMLoss that must be the same on all ranks.
SETTINGS = ("temperature", "reduction", "alpha", "positive", "detach_weight", "eps", "image_id_factor")


def asdm_loss(
    image_features: Tensor,
    text_features: Tensor,
    pids: Tensor,
    *,
    temperature: float = 0.02,
    alpha: float = 10.0,
    positive: Positive = "paired",
    detach_weight: bool = False,
    eps: float = 1e-8,
    reduction: Reduction = "mean",
    image_ids: Tensor | None = None,
    image_id_factor: float = 0.3,
    logit_scale: float | Tensor | None = None,
    gather: Gather = False,
    process_group: Any = None,
    equal_batches: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Functional form of `ASDMLoss`, which documents every argument.

    Example:
        >>> features = torch.eye(4)
        >>> asdm_loss(features, features, torch.arange(4)) < 1e-6
        tensor(True)
    """
    row_loss: dict[str, Any] = {
        "alpha": alpha,
        "positive": positive,
        "detach_weight": detach_weight,
        "eps": eps,
        "image_id_factor": image_id_factor,
    }

    def checked() -> tuple[float | Tensor, Tensor, Tensor | None]:
        ids = check_asdm_inputs(image_features, text_features, pids, image_ids, gather=gather, backend=backend)
        return check_scale(logit_scale, temperature), *ids

    peers, (scale, pids, image_ids) = handshake(
        gather,
        process_group,
        {"image_features": image_features, "text_features": text_features, "pids": pids, "image_ids": image_ids},
        loss="asdm_loss",
        settings={"logit_scale": logit_scale, "temperature": temperature, "reduction": reduction, **row_loss},
        equal_batches=equal_batches,
        check=checked,
    )
    if not gather:
        return similarity_distribution_loss(
            image_features,
            text_features,
            pids,
            logit_scale=scale,
            image_ids=image_ids,
            reduction=reduction,
            backend=backend,
            **row_loss,
        )

    check_option("reduction", reduction, REDUCTIONS)
    ids = torch.stack([x.long() for x in (pids, image_ids) if x is not None], dim=1)
    every_id = peers.gather(ids).T.contiguous()  # [1 or 2, B]
    if peers.ring:
        per_sample = similarity_distribution_ring(
            torch.stack([image_features, text_features], dim=1),
            *(every_id if image_ids is not None else (every_id[0], None)),
            logit_scale=scale,
            ring=peers,
            backend=select_backend(backend, image_features, text_features),
            spec=RowLoss(**row_loss).checked(),
        )
    else:

        def direction(queries: Tensor, keys: Tensor) -> Tensor:
            """w_i KL_i of the own queries against everybody's keys, [b]. Raw features travel, in their own dtype."""
            return similarity_distribution_loss(
                queries,
                peers.gather(keys),
                every_id[0],
                logit_scale=scale,
                image_ids=None if image_ids is None else every_id[1],
                offset=peers.offset,
                both=False,
                reduction="none",
                backend=backend,
                **row_loss,
            )

        per_sample = direction(text_features, image_features) + direction(image_features, text_features)
    if reduction == "mean":
        return peers.mean(per_sample)
    return per_sample.sum() if reduction == "sum" else per_sample


class ASDMLoss(Module):
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
            whose features are gathered; "ring" does so without any process holding all of them, through PyTorch on
            every device. The mean over the ranks is the loss of one process on the concatenated batch, and so is the
            gradient under DistributedDataParallel; "sum" and "none" are this rank's part of it. docs/distributed.md.
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
        peers: of a handshake that has already been made for this call; FMFALoss makes one for all its terms.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). B == 1 gives 0 up to eps; a zero
        vector has cosine 0 with everything. Memory beyond inputs and gradients: a block of rows, never [B, B].

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit, here or between processes.
        RuntimeError: gather without torch.distributed, or a process that died or did not arrive in time.

    Example:
        >>> loss = ASDMLoss(alpha=10.0)
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)       # every pair mismatched
        >>> round(loss(image, text, torch.arange(3)).item(), 1)
        405.3

    Reference: Yin et al., arXiv 2509.13754v2, Eq. 1-4; Jiang and Ye, arXiv 2303.12501 (SDM).
    """

    temperature: float
    alpha: float
    positive: Positive
    detach_weight: bool
    eps: float
    reduction: Reduction
    image_id_factor: float
    gather: Gather
    equal_batches: bool
    backend: Backend

    def __init__(
        self,
        temperature: float = 0.02,
        alpha: float = 10.0,
        *,
        positive: Positive = "paired",
        detach_weight: bool = False,
        eps: float = 1e-8,
        reduction: Reduction = "mean",
        image_id_factor: float = 0.3,
        gather: Gather = False,
        process_group: Any = None,
        equal_batches: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        temperature = check_divisor("temperature", temperature)
        check_option("backend", backend, BACKENDS)
        check_option("gather", gather, GATHER)
        spec = RowLoss(
            alpha=alpha,
            positive=positive,
            detach_weight=detach_weight,
            eps=eps,
            image_id_factor=image_id_factor,
            reduction=reduction,
        ).checked()
        self.temperature, self.alpha, self.positive = temperature, spec.alpha, positive
        self.detach_weight, self.eps, self.reduction = spec.detach_weight, spec.eps, reduction
        self.image_id_factor, self.backend = spec.image_id_factor, backend
        self.gather, self.process_group = gather, process_group
        self.equal_batches = check_flag("equal_batches", equal_batches)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        pids: Tensor,
        *,
        image_ids: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
        peers: Peers | None = None,
    ) -> Tensor:
        return asdm_loss(
            image_features,
            text_features,
            pids,
            temperature=self.temperature,
            alpha=self.alpha,
            positive=self.positive,
            detach_weight=self.detach_weight,
            eps=self.eps,
            reduction=self.reduction,
            image_ids=image_ids,
            image_id_factor=self.image_id_factor,
            logit_scale=logit_scale,
            gather=self.gather,
            process_group=self.process_group if peers is None else peers,
            equal_batches=self.equal_batches,
            backend=self.backend,
        )


def check_asdm_inputs(
    image_features: Tensor,
    text_features: Tensor,
    pids: Tensor,
    image_ids: Tensor | None,
    *,
    gather: Gather,
    backend: Backend,
) -> tuple[Tensor, Tensor | None]:
    """The ids to go on with."""
    check_features(image_features, text_features)
    pids = check_ids("pids", pids, image_features.shape[0], image_features.device)
    if image_ids is not None:
        image_ids = check_ids("image_ids", image_ids, image_features.shape[0], image_features.device)
    if gather:  # what cannot run here must be known before the others wait for it
        select_backend(backend, image_features, text_features)
    return pids, image_ids
