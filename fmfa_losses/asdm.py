"""A-SDM: adaptive similarity distribution matching, Eq. 1-4 (parameter-free).

    z_ij = cos(t_i, v_j) / tau,   p_i = softmax_j z_ij,   q_ij = y_ij / sum_k y_ik,   y_ij = [pid_i == pid_j]
    KL_i = sum_j p_ij (log p_ij - log(q_ij + eps)),       w_i = 1 + alpha (max_k p_ik - p_ii)
    L    = mean_i w_i KL_i over texts (t2i)  +  the same over images (i2t)

alpha = 0 is IRRA's SDM loss. The released code differs from the paper, reachable by name:

    gap="cosine", positive="first"   the gap is taken in cosines, against the first positive of the batch;
                                     alpha 0.1 in the 2025-08 version, 10 in the 2025-04 version
    target="column"                  soft labels are divided by the sum of their column's label row instead of their own
"""

import torch
from torch import Tensor, nn

from .ops._checks import check_float, check_ids, check_option, check_positive, check_same
from .ops._precision import accumulation_dtype, unit_rows
from .ops.similarity_distribution import POSITIVES, Labels, RowStatistics, row_statistics

__all__ = ["ASDMLoss", "asdm_loss"]

GAPS = ("probability", "cosine")
REDUCTIONS = ("mean", "sum", "none")
TARGETS = ("row", "column")


def asdm_loss(
    image_features: Tensor,
    text_features: Tensor,
    pids: Tensor,
    *,
    temperature: float = 0.02,
    alpha: float = 10.0,
    gap: str = "probability",
    positive: str = "paired",
    detach_weight: bool = False,
    eps: float = 1e-8,
    reduction: str = "mean",
    image_ids: Tensor | None = None,
    image_id_factor: float = 0.3,
    target: str = "row",
    logit_scale: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Functional form of `ASDMLoss`, which documents every argument.

    Example:
        >>> features = torch.eye(4)
        >>> asdm_loss(features, features, torch.arange(4)) < 1e-6
        tensor(True)
    """
    _check_hyperparameters(temperature, alpha, gap, positive, eps, reduction, target, image_id_factor)
    _check_inputs(image_features, text_features, pids, image_ids)
    acc = accumulation_dtype(image_features, text_features)
    image, text = unit_rows(image_features, dtype=acc), unit_rows(text_features, dtype=acc)
    scale = _logit_scale(logit_scale, temperature, image)
    labels = Labels(
        row_pids=pids,
        column_pids=pids,
        paired=torch.arange(len(pids), device=pids.device),
        row_image_ids=image_ids,
        column_image_ids=image_ids,
        factor=image_id_factor,
    )
    if target == "column":
        labels = labels._replace(column_sum=labels.weights(slice(None), acc)[1].sum(dim=1))

    def direction(queries: Tensor, keys: Tensor) -> Tensor:
        """w_i KL_i of every query, [B]."""
        row = row_statistics(queries * scale, keys, labels, positive=positive, eps=eps)
        weight = 1 + alpha * _gap(row, gap, scale)
        return (weight.detach() if detach_weight else weight) * row.divergence

    per_sample = direction(text, image) + direction(image, text)
    return per_sample if reduction == "none" else getattr(per_sample, reduction)()


def _gap(row: RowStatistics, gap: str, scale: float | Tensor) -> Tensor:
    """How far the positive stands behind the top of its row, [R]."""
    if gap == "cosine":
        return (row.log_top - row.log_positive) / scale
    return row.log_top.exp() - row.log_positive.exp()


class ASDMLoss(nn.Module):
    """Pulls each text's and image's similarity distribution to its labels, harder where a wrong match leads.

        L = mean_i (1 + alpha gap_i) KL(p_i || q_i + eps)    over texts, plus the same over images

    Args:
        temperature: tau > 0; logits are cos / tau.
        alpha: weight of the gap, >= 0; 0 is SDM. The paper: 10, RSTPReid 1.
        gap: "probability" (max_k p_ik - p_i,positive, the paper) or "cosine" (the released code).
        positive: which positive the gap is measured to: the "paired" sample (the paper), the best of "any" sample of
            the same identity, or the "first" of them in the batch (the released code).
        detach_weight: keep the weight out of the graph.
        eps: added to the target inside the logarithm.
        reduction: "mean", "sum", or "none" for the per-sample sum of both directions, [B].
        image_id_factor: weight of a shared identity against a shared image where image_ids are given, in [0, 1].
        target: soft labels are normalised over their "row", or by the "column" as the released code does.
        backend: "auto", "triton" or "torch".

    Inputs:
        image_features, text_features: [B, D], any float dtype; need not be normalised.
        pids: [B] integer identities.
        image_ids: [B] integer ids of the images, for soft labels y = factor [same pid] + (1 - factor) [same image].
        logit_scale: 1 / tau instead of `temperature`: a number, or a tensor with one element on any device, which
            receives its gradient.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). B == 1 gives 0 up to eps; a zero
        vector has cosine 0 with everything. Memory beyond inputs and gradients: a block of rows, never [B, B].

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or hyperparameters that do not fit.

    Example:
        >>> loss = ASDMLoss(alpha=10.0)
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)       # every pair mismatched
        >>> round(loss(image, text, torch.arange(3)).item(), 1)
        405.3

    Reference: Yin et al., arXiv 2509.13754v2, Eq. 1-4; Jiang and Ye, arXiv 2303.12501 (SDM).
    """

    def __init__(
        self,
        temperature: float = 0.02,
        alpha: float = 10.0,
        *,
        gap: str = "probability",
        positive: str = "paired",
        detach_weight: bool = False,
        eps: float = 1e-8,
        reduction: str = "mean",
        image_id_factor: float = 0.3,
        target: str = "row",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_hyperparameters(temperature, alpha, gap, positive, eps, reduction, target, image_id_factor)
        self.temperature, self.alpha, self.gap, self.positive = temperature, alpha, gap, positive
        self.detach_weight, self.eps, self.reduction = detach_weight, eps, reduction
        self.image_id_factor, self.target, self.backend = image_id_factor, target, backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        pids: Tensor,
        *,
        image_ids: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor:
        return asdm_loss(
            image_features,
            text_features,
            pids,
            temperature=self.temperature,
            alpha=self.alpha,
            gap=self.gap,
            positive=self.positive,
            detach_weight=self.detach_weight,
            eps=self.eps,
            reduction=self.reduction,
            image_ids=image_ids,
            image_id_factor=self.image_id_factor,
            target=self.target,
            logit_scale=logit_scale,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, alpha={self.alpha}, gap={self.gap!r}, positive={self.positive!r}, "
            f"reduction={self.reduction!r}"
        )


def _check_hyperparameters(
    temperature: float,
    alpha: float,
    gap: str,
    positive: str,
    eps: float,
    reduction: str,
    target: str,
    image_id_factor: float,
) -> None:
    check_positive("temperature", temperature)
    check_positive("eps", eps)
    if not 0 <= alpha < float("inf"):
        raise ValueError(f"alpha must be a finite number >= 0 (0 is SDM), got {alpha!r}")
    if not 0 <= image_id_factor <= 1:
        raise ValueError(f"image_id_factor must lie in [0, 1], got {image_id_factor!r}")
    check_option("gap", gap, GAPS)
    check_option("positive", positive, POSITIVES)
    check_option("reduction", reduction, REDUCTIONS)
    check_option("target", target, TARGETS)


def _check_inputs(image_features: Tensor, text_features: Tensor, pids: Tensor, image_ids: Tensor | None) -> None:
    check_float("image_features", image_features, "B D")
    check_float("text_features", text_features, "B D")
    check_same("image_features and text_features", image_features, text_features, dims=[("B", 0), ("D", 1)])
    check_ids("pids", pids, len(image_features), image_features.device)
    if image_ids is not None:
        check_ids("image_ids", image_ids, len(image_features), image_features.device)


def _logit_scale(logit_scale: float | Tensor | None, temperature: float, like: Tensor) -> float | Tensor:
    """1 / tau as a number or a 0-dim tensor in `like`'s dtype; a CPU scalar may meet accelerator tensors as it is."""
    if logit_scale is None:
        return 1 / temperature
    if not isinstance(logit_scale, Tensor):
        check_positive("logit_scale", logit_scale)
        return logit_scale
    if logit_scale.numel() != 1 or not logit_scale.is_floating_point():
        raise ValueError(
            f"logit_scale must be a number or a floating-point tensor with one element, got shape "
            f"{list(logit_scale.shape)} {logit_scale.dtype}; pass 1 / temperature"
        )
    device = like.device if like.device.type == "cpu" or logit_scale.device.type != "cpu" else None
    return logit_scale.reshape(()).to(device=device, dtype=like.dtype)
