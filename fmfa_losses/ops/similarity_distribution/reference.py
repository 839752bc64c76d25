"""The row loss of a similarity distribution, Eq. 1-4: its hyperparameters, and its specification on whole matrices."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_flag, check_fraction, check_integer, check_nonnegative, check_option, check_positive
from ..options import OBJECTIVES, POSITIVES, REDUCTIONS, Objective, Positive, Reduction
from ..precision import accumulation_dtype, unit_rows

__all__ = ["RowLoss", "similarity_distribution_loss_reference"]


class RowLoss(NamedTuple):
    """Hyperparameters of a row's loss, plain Python values, in the order of the operator's schema."""

    objective: Objective = "divergence"
    alpha: float = 0.0
    positive: Positive = "paired"
    detach_weight: bool = False
    eps: float = 1e-8
    image_id_factor: float = 0.3
    offset: int = 0
    both: bool = True
    reduction: Reduction = "mean"

    def checked(self) -> "RowLoss":
        check_option("objective", self.objective, OBJECTIVES)
        check_option("positive", self.positive, POSITIVES)
        check_option("reduction", self.reduction, REDUCTIONS)
        return RowLoss(  # torch.compile of torch 2.6 does not take _replace
            objective=self.objective,
            alpha=check_nonnegative("alpha", self.alpha),
            positive=self.positive,
            detach_weight=check_flag("detach_weight", self.detach_weight),
            eps=check_positive("eps", self.eps),
            image_id_factor=check_fraction("image_id_factor", self.image_id_factor),
            offset=check_integer("offset", self.offset),
            both=check_flag("both", self.both),
            reduction=self.reduction,
        )

    @property
    def weighted(self) -> bool:
        return self.objective == "divergence" and self.alpha > 0

    @property
    def directions(self) -> int:
        return 2 if self.both else 1


def similarity_distribution_loss_reference(
    queries: Tensor,
    keys: Tensor,
    pids: Tensor,
    *,
    logit_scale: float | Tensor,
    image_ids: Tensor | None = None,
    **row_loss: object,
) -> Tensor:
    """The specification of `similarity_distribution_loss`: whole [R, C] matrices, and autograd."""
    spec = RowLoss(**row_loss)  # type: ignore[arg-type]
    dtype = accumulation_dtype(queries, keys)
    q, k = (unit_rows(x, dtype=dtype, backend="torch") for x in (queries, keys))
    cos = q @ k.T
    rows = torch.arange(queries.shape[0], device=pids.device) + spec.offset

    same = pids[rows, None] == pids
    y = same.to(dtype)
    if image_ids is not None:
        f = spec.image_id_factor
        y = f * y + (1 - f) * (image_ids[rows, None] == image_ids).to(dtype)
    target = y / y.sum(dim=1, keepdim=True)

    def per_row(cos: Tensor) -> Tensor:
        z = logit_scale * cos
        log_p = z.log_softmax(dim=1)
        if spec.objective == "cross_entropy":
            return -(target * log_p).sum(dim=1)
        p = log_p.exp()
        divergence = (p * (log_p - (target + spec.eps).log())).sum(dim=1)
        positive = rows if spec.positive == "paired" else z.masked_fill(~same, -torch.inf).argmax(dim=1)
        gap = p.max(dim=1).values - p.gather(1, positive[:, None]).squeeze(1)
        weight = 1 + spec.alpha * gap
        return (weight.detach() if spec.detach_weight else weight) * divergence

    per_sample = per_row(cos) + per_row(cos.T) if spec.both else per_row(cos)
    return per_sample if spec.reduction == "none" else getattr(per_sample, spec.reduction)()
