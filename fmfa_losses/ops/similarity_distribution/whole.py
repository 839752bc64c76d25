"""The row loss of a small batch: all of [B, B] at once, kept for the backward.

A step of a few dozen pairs is bound by the number of operations and not by their size. So both directions are rows of
[z, z^T], labels are computed once, and the backward finds the logits where the forward left them: two products instead
of three. The algebra is that of `statistics.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import on_host
from ..operator import refusals
from ..precision import USUAL, accumulation_dtype, divide_by_norms, full_precision, row_norms
from .blocks import plain_scale, through_norms
from .reference import RowLoss
from .statistics import Final, Labels, dlogits, finalize, of

__all__ = ["MOST_PAIRS", "takes", "whole_row_loss"]

MOST_PAIRS = 1024  # their logits in both directions are 8 MiB in float32

_refuse_second, _refuse_forward = refusals("similarity_distribution_loss", "A-SDM, SDM and ITC")


def takes(queries: Tensor, keys: Tensor, spec: RowLoss) -> bool:
    """Whether it is the better way: a small batch on the CPU, eager. What traces or transforms sees the operator."""
    if not spec.both or queries.shape[0] > MOST_PAIRS or not (on_host(queries) and on_host(keys)):
        return False
    return not _transformed(queries)


def _transformed(x: Tensor) -> bool:
    """Whether torch.func, forward mode or a batched gradient is at work."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return bool(torch._C._functorch.is_legacy_batchedtensor(x))


def whole_row_loss(
    queries: Tensor, keys: Tensor, pids: Tensor, image_ids: Tensor | None, scale: float | Tensor, spec: RowLoss
) -> Tensor:
    """Scalar or [B], as `similarity_distribution_loss`; arguments are checked already."""
    loss: Tensor = _WholeRowLoss.apply(queries, keys, scale, pids, image_ids, spec)  # type: ignore[no-untyped-call]
    return loss


class _Known(NamedTuple):
    """`Labels` whose targets are there already, and equal in both directions."""

    same: Tensor
    value: Tensor  # log(t + eps) of a divergence, t of a cross-entropy

    def target(self, total: Tensor) -> Tensor:
        return self.value

    def log_target(self, total: Tensor) -> Tensor:
        return self.value


def _labels(pids: Tensor, image_ids: Tensor | None, spec: RowLoss, dtype: torch.dtype) -> _Known:
    same = pids[:, None] == pids
    total = same.sum(dim=1, keepdim=True, dtype=dtype)
    same_image = None if image_ids is None else image_ids[:, None] == image_ids
    if same_image is not None:
        f = spec.image_id_factor
        total = f * total + (1 - f) * same_image.sum(dim=1, keepdim=True, dtype=dtype)
    labels = Labels(same, same_image, spec.image_id_factor, spec.eps)
    return _Known(same, labels.target(total) if spec.objective == "cross_entropy" else labels.log_target(total))


def _unit_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The unit vectors of x and 1 / |x|, [B, 1]. Rows of usual length, which the host looks at, take two operations."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    lowest, highest = (end.item() for end in norm.aminmax())
    if 1 / USUAL[dtype] <= lowest and highest <= USUAL[dtype]:
        inverse = norm.reciprocal()
        return x * inverse, inverse
    norms = row_norms(x, dtype, backend="torch")
    return divide_by_norms(x, norms), norms[1] / norms[0]


class _WholeRowLoss(torch.autograd.Function):
    jvp = staticmethod(_refuse_forward)

    @staticmethod
    def forward(ctx, queries, keys, scale, pids, image_ids, spec):  # type: ignore[no-untyped-def]
        B, dtype = queries.shape[0], accumulation_dtype(queries, keys)
        unit, inverse = _unit_rows(torch.cat([queries, keys]), dtype)
        with full_precision(queries):
            z = torch.mm(unit[:B], unit[B:].T).mul_(plain_scale(scale, dtype))
        labels = _labels(pids, image_ids, spec, dtype)
        z = torch.stack([z, z.T])
        running = of(z, labels, inverse, spec, dim=-1)
        loss, final = finalize(running, spec)
        ctx.spec, ctx.scale = spec, None if isinstance(scale, Tensor) else scale
        scale = scale if ctx.scale is None else None
        ctx.save_for_backward(queries, keys, scale, pids, image_ids, z, unit, inverse, *labels, *running[5:], *final)
        if spec.reduction == "none":
            return loss.sum(dim=0)
        return loss.sum() / B if spec.reduction == "mean" else loss.sum()

    @staticmethod
    def backward(ctx, dloss):  # type: ignore[no-untyped-def]
        queries, keys, scale, pids, image_ids, *saved = ctx.saved_tensors
        if _transformed(dloss):
            gradients = _by_operator(dloss, queries, keys, scale, pids, image_ids, ctx)  # type: ignore[no-untyped-call]
            return *gradients, None, None, None
        scale = scale if ctx.scale is None else ctx.scale
        if torch.is_grad_enabled():  # create_graph: a second derivative is refused, when it is taken
            gradients = _Gradient.apply(  # type: ignore[no-untyped-call]
                dloss, queries, keys, scale, ctx.needs_input_grad[2], ctx.spec, *saved
            )
        else:
            gradients = _gradient(dloss, queries, keys, scale, ctx.needs_input_grad[2], ctx.spec, *saved)
        return *gradients, None, None, None


def _by_operator(dloss, queries, keys, scale, pids, image_ids, ctx):  # type: ignore[no-untyped-def]
    """The gradients of a backward that is transformed itself: batched gradients, or tangents, which are refused."""
    arguments = queries, keys, pids, image_ids, None if scale is None else scale.detach(), ctx.scale or 0.0
    _, *saved = torch.ops.fmfa_losses.similarity_distribution(*arguments, "torch", *ctx.spec)
    dqueries, dkeys, dscale = torch.ops.fmfa_losses.similarity_distribution_backward(
        dloss, *saved, *arguments, ctx.needs_input_grad[2], "torch", *ctx.spec
    )
    return dqueries, dkeys, None if scale is None else dscale.to(scale.device, scale.dtype)


class _Gradient(torch.autograd.Function):
    jvp, backward = staticmethod(_refuse_forward), staticmethod(_refuse_second)

    @staticmethod
    def forward(ctx, *arguments):  # type: ignore[no-untyped-def]
        return _gradient(*arguments)


def _gradient(
    dloss: Tensor,
    queries: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    scale_gradient: bool,
    spec: RowLoss,
    z: Tensor,
    unit: Tensor,
    inverse: Tensor,
    same: Tensor,
    label_value: Tensor,
    top_index: Tensor,
    positive_index: Tensor,
    *final: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of queries, keys and scale."""
    B = queries.shape[0]
    g = (dloss / B if spec.reduction == "mean" else dloss).expand(2, B)
    index = top_index, positive_index
    both = dlogits(z, _Known(same, label_value), inverse, Final(*final), index, g, spec, dim=-1)
    dz, dunit = both[0].add_(both[1].T), torch.empty_like(unit)
    with full_precision(queries):
        torch.mm(dz, unit[B:], out=dunit[:B])
        torch.mm(dz.T, unit[:B], out=dunit[B:])
        along = through_norms(dunit, unit, inverse, plain_scale(scale, inverse.dtype))
    # Every logit belongs to one query.
    dscale = along[:B].sum().to(scale.device, scale.dtype) if scale_gradient and isinstance(scale, Tensor) else None
    return dunit[:B].to(queries.dtype), dunit[B:].to(keys.dtype), dscale
