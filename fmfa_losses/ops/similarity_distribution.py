"""What a row of the similarity distribution p_i = softmax_j(s cos(q_i, k_j)) pays against its labels, Eq. 1-4.

    divergence      w_i KL_i,   KL_i = sum_j p_ij (log p_ij - log(t_ij + eps)),   w_i = 1 + alpha gap_i    (A-SDM)
                    alpha = 0 is SDM
    cross_entropy   -sum_j t_ij log p_ij;   with ids that are all different InfoNCE, lse_i - z_ii           (ITC)

A row needs a handful of numbers that one pass over its logits finds, and the gradient in the logits is a formula in
those numbers; so the [R, C] matrix is only ever there in tiles, and the backward recomputes the tiles.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._backend import select_backend
from ._checks import check_float, check_ids, check_option, check_positive, check_same
from ._operator import operator
from ._precision import ZERO_NORM, accumulation_dtype, full_precision, unit_rows

__all__ = ["RowLoss", "similarity_distribution_loss", "similarity_distribution_loss_reference"]

OBJECTIVES = ("divergence", "cross_entropy")
GAPS = ("probability", "cosine")
POSITIVES = ("paired", "any", "first")
TARGETS = ("row", "column")
REDUCTIONS = ("mean", "sum", "none")


class RowLoss(NamedTuple):
    """What a row pays, in plain Python values, in the order of the operator's schema."""

    objective: str = "divergence"
    alpha: float = 0.0
    gap: str = "probability"
    positive: str = "paired"
    detach_weight: bool = False
    eps: float = 1e-8
    image_id_factor: float = 0.3
    target: str = "row"
    offset: int = 0
    both: bool = True
    reduction: str = "mean"

    def checked(self) -> "RowLoss":
        check_option("objective", self.objective, OBJECTIVES)
        check_option("gap", self.gap, GAPS)
        check_option("positive", self.positive, POSITIVES)
        check_option("target", self.target, TARGETS)
        check_option("reduction", self.reduction, REDUCTIONS)
        check_positive("eps", self.eps)
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha must be a finite number >= 0 (0 is SDM), got {self.alpha!r}")
        if not 0 <= self.image_id_factor <= 1:
            raise ValueError(f"image_id_factor must lie in [0, 1], got {self.image_id_factor!r}")
        return self

    @property
    def weighted(self) -> bool:
        return self.objective == "divergence" and self.alpha > 0

    @property
    def sides(self) -> int:
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
    cos = unit_rows(queries, dtype=dtype) @ unit_rows(keys, dtype=dtype).T
    rows = torch.arange(len(queries), device=pids.device) + spec.offset

    same = pids[rows, None] == pids
    y = same.to(dtype)
    column_sum = (pids[:, None] == pids).to(dtype).sum(dim=1)
    if image_ids is not None:
        f = spec.image_id_factor
        y = f * y + (1 - f) * (image_ids[rows, None] == image_ids).to(dtype)
        column_sum = f * column_sum + (1 - f) * (image_ids[:, None] == image_ids).to(dtype).sum(dim=1)
    target = y / (y.sum(dim=1, keepdim=True) if spec.target == "row" else column_sum)

    def per_row(cos: Tensor) -> Tensor:
        z = logit_scale * cos
        log_p = z.log_softmax(dim=1)
        if spec.objective == "cross_entropy":
            return -(target * log_p).sum(dim=1)
        p = log_p.exp()
        divergence = (p * (log_p - (target + spec.eps).log())).sum(dim=1)
        if spec.positive == "paired":
            positive = rows
        elif spec.positive == "first":
            positive = same.to(torch.uint8).argmax(dim=1)
        else:
            positive = z.masked_fill(~same, -torch.inf).argmax(dim=1)
        score = p if spec.gap == "probability" else cos
        gap = score.max(dim=1).values - score.gather(1, positive[:, None]).squeeze(1)
        weight = 1 + spec.alpha * gap
        return (weight.detach() if spec.detach_weight else weight) * divergence

    per_sample = per_row(cos) + per_row(cos.T) if spec.both else per_row(cos)
    return per_sample if spec.reduction == "none" else getattr(per_sample, spec.reduction)()


def similarity_distribution_loss(
    queries: Tensor,
    keys: Tensor,
    pids: Tensor,
    *,
    logit_scale: float | Tensor,
    image_ids: Tensor | None = None,
    objective: str = "divergence",
    alpha: float = 0.0,
    gap: str = "probability",
    positive: str = "paired",
    detach_weight: bool = False,
    eps: float = 1e-8,
    image_id_factor: float = 0.3,
    target: str = "row",
    offset: int = 0,
    both: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Pulls every row's similarity distribution to its labels, from raw features to the reduced loss.

        z_ij = logit_scale cos(q_i, k_j),   p_i = softmax_j z_ij,   t_ij = y_ij / sum_k y_ik,   y_ij = [same pid]

    Args:
        queries: [R, D], any float dtype; need not be normalised.
        keys: [C, D], any float dtype. Query i is the pair of key `offset` + i.
        pids: [C] integer identities of the pairs, for queries and keys alike.
        logit_scale: a number, or a tensor with one element on any device, which receives its gradient.
        image_ids: [C] integer ids of the images, for y = factor [same pid] + (1 - factor) [same image].
        objective: "divergence", sum_j p (log p - log(t + eps)), or "cross_entropy", -sum_j t log p.
        alpha: weight of the gap in the divergence's factor 1 + alpha gap, >= 0.
        gap: distance from the row's top to its positive as "probability" or "cosine".
        positive: the "paired" key, the best of "any" key of the same pid, or the "first" of them.
        detach_weight: keep the factor out of the graph.
        eps: added to the target inside the logarithm.
        image_id_factor: weight of a shared identity against a shared image, in [0, 1].
        target: y is divided by the sum of its "row", or by that of its "column"'s labels as IRRA's code does.
        offset: the key that query 0 is paired with; the queries may be a slice of the batch that the keys hold.
        both: add what the keys pay as rows; needs R == C.
        reduction: "mean", "sum", or "none" for [R].
        backend: "auto", "triton" or "torch".

    Returns:
        Scalar, or [R] with reduction="none"; float32 (float64 when an input is). Memory beyond inputs and gradients:
        O(R + C) and one tile of logits. A zero vector has cosine 0 with everything. Differentiable once.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or options that do not fit.
        RuntimeError: backend="triton" cannot run; the message says why.

    Example:
        >>> image = text = torch.eye(4)
        >>> pairs = torch.arange(4)                                        # all different: InfoNCE, both directions
        >>> loss = similarity_distribution_loss(image, text, pairs, logit_scale=1.0, objective="cross_entropy")
        >>> round(loss.item(), 4)
        1.4873

    Reference: Yin et al., arXiv 2509.13754v2, Eq. 1-4; Jiang and Ye, arXiv 2303.12501 (SDM, ITC).
    """
    spec = RowLoss(
        objective, float(alpha), gap, positive, detach_weight, eps, image_id_factor, target, offset, both, reduction
    ).checked()
    _check_inputs(queries, keys, pids, image_ids, spec)
    scale = _checked_scale(logit_scale)
    tensor, number = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    chosen = select_backend(backend, queries, keys)
    loss: Tensor = similarity_distribution_op(queries, keys, pids, image_ids, tensor, number, chosen, *spec)[0]
    return loss


def _check_inputs(queries: Tensor, keys: Tensor, pids: Tensor, image_ids: Tensor | None, spec: RowLoss) -> None:
    check_float("queries", queries, "R D")
    check_float("keys", keys, "C D")
    check_same("queries and keys", queries, keys, dims=[("D", 1)])
    R, C = queries.shape[0], keys.shape[0]
    check_ids("pids", pids, C, keys.device)
    if image_ids is not None:
        check_ids("image_ids", image_ids, C, keys.device)
    if spec.both and (spec.offset != 0 or R != C):
        raise ValueError(
            f"both=True needs as many queries as keys and offset 0, got {R} queries, {C} keys, offset {spec.offset}; "
            "pass both=False and call once a direction"
        )
    if spec.offset < 0 or spec.offset + R > C:
        raise ValueError(
            f"queries must be paired with keys offset ... offset + R - 1 < C, got offset {spec.offset}, R {R}, C {C}"
        )


def _checked_scale(logit_scale: float | Tensor) -> float | Tensor:
    if not isinstance(logit_scale, Tensor):
        check_positive("logit_scale", logit_scale)
        return float(logit_scale)
    if logit_scale.numel() != 1 or not logit_scale.is_floating_point():
        raise ValueError(
            f"logit_scale must be a number or a floating-point tensor with one element, got shape "
            f"{list(logit_scale.shape)} {logit_scale.dtype}; pass 1 / temperature"
        )
    return logit_scale.reshape(())


# The operator: one schema, one fake kernel, one gradient formula for both backends. S sides: queries as rows, and with
# `both` keys as rows. What the backward needs of the forward, besides the inputs:
#   statistics [S, 3 or 4, R]  top; log sum_j e^(z - top); the divergence, or the mass of a cross-entropy's target;
#                              the gap, where it weighs
#   places     [S, 2, R]       columns of the top and of the positive, where the gap weighs
#   norms      [R + C]         of the queries, then of the keys
#   label_sum  [R] or [C]      sum_k y_ik of the queries, or of the keys with target="column"

_ROW_LOSS = (
    "str objective, float alpha, str gap, str positive, bool detach_weight, float eps, float image_id_factor,"
    " str target, SymInt offset, bool both, str reduction"
)


@operator(
    "similarity_distribution_loss(Tensor queries, Tensor keys, Tensor pids, Tensor? image_ids, Tensor? logit_scale,"
    f" float scale, str backend, {_ROW_LOSS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def similarity_distribution_op(  # type: ignore[no-untyped-def]
    queries, keys, pids, image_ids, logit_scale, scale, backend, *row_loss
):
    if backend == "triton":
        from fmfa_losses.kernels import similarity_distribution as kernels

        return kernels.forward(queries, keys, pids, image_ids, logit_scale, scale, RowLoss(*row_loss))
    with full_precision(queries):
        return _forward_torch(queries, keys, pids, image_ids, logit_scale, scale, RowLoss(*row_loss))


@operator(
    "similarity_distribution_loss_backward(Tensor dloss, Tensor statistics, Tensor places, Tensor norms,"
    " Tensor label_sum, Tensor queries, Tensor keys, Tensor pids, Tensor? image_ids, Tensor? logit_scale, float scale,"
    f" bool scale_gradient, str backend, {_ROW_LOSS}) -> (Tensor, Tensor, Tensor)",
)
def similarity_distribution_backward_op(  # type: ignore[no-untyped-def]
    dloss, statistics, places, norms, label_sum, queries, keys, pids, image_ids, logit_scale, scale, scale_gradient,
    backend, *row_loss
):  # fmt: skip
    arguments = (dloss, statistics, places, norms, label_sum, queries, keys, pids, image_ids, logit_scale, scale)
    if backend == "triton":
        from fmfa_losses.kernels import similarity_distribution as kernels

        return kernels.backward(*arguments, scale_gradient, RowLoss(*row_loss))
    with full_precision(queries):
        return _backward_torch(*arguments, scale_gradient, RowLoss(*row_loss))


@torch.library.register_fake(similarity_distribution_op)
def _(queries, keys, pids, image_ids, logit_scale, scale, backend, *row_loss):  # type: ignore[no-untyped-def]
    spec, R, C = RowLoss(*row_loss), queries.shape[0], keys.shape[0]
    dtype = accumulation_dtype(queries, keys)
    return (
        queries.new_empty((R,) if spec.reduction == "none" else (), dtype=dtype),
        queries.new_empty((spec.sides, 4 if spec.weighted else 3, R), dtype=dtype),
        queries.new_empty((spec.sides, 2, R) if spec.weighted else (0,), dtype=torch.int32),
        queries.new_empty((R + C,), dtype=dtype),
        queries.new_empty((R if spec.target == "row" else C,), dtype=dtype),
    )


@torch.library.register_fake(similarity_distribution_backward_op)
def _(dloss, statistics, places, norms, label_sum, queries, keys, *arguments):  # type: ignore[no-untyped-def]
    scale_gradient = arguments[4]
    return (
        torch.empty_like(queries, memory_format=torch.contiguous_format),
        torch.empty_like(keys, memory_format=torch.contiguous_format),
        norms.new_empty(() if scale_gradient else (0,)),
    )


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    queries, keys, pids, image_ids, logit_scale, *ctx.plain = inputs
    ctx.save_for_backward(*output[1:], queries, keys, pids, image_ids, logit_scale)


def _backward(ctx, dloss, *_):  # type: ignore[no-untyped-def]
    *saved, logit_scale = ctx.saved_tensors
    scale, backend, *row_loss = ctx.plain
    scale_gradient = ctx.needs_input_grad[4]
    dqueries, dkeys, dscale = similarity_distribution_backward_op(
        dloss, *saved, logit_scale, scale, scale_gradient, backend, *row_loss
    )
    # A scale that the user keeps on the CPU gets its gradient there.
    dscale = dscale.to(logit_scale.device, logit_scale.dtype) if scale_gradient else None
    return dqueries, dkeys, None, None, dscale, *[None] * (2 + len(row_loss))


torch.library.register_autograd(similarity_distribution_op, _backward, setup_context=_setup_context)


# The torch path: blocks of rows against all columns; the backward visits each block once for both sides.

# A block of logits holds this many numbers; about six temporaries of its size are alive at once.
BLOCK_ELEMENTS = 2**22


def _row_blocks(R: int, C: int) -> list[slice]:
    step = max(1, BLOCK_ELEMENTS // C)
    return [slice(i, min(i + step, R)) for i in range(0, R, step)]


class _Labels(NamedTuple):
    """Labels of one block, [rows, C] each; `total`, what their y is divided by, is [rows, 1] or [C]."""

    same: Tensor
    same_image: Tensor | None
    factor: float
    eps: float

    def pick(self, both: Tensor, pid: Tensor, image: Tensor, neither: Tensor) -> Tensor:
        """One of four values an entry, by what its row and column share."""
        if self.same_image is None:
            return torch.where(self.same, both, neither)
        return torch.where(
            self.same, torch.where(self.same_image, both, pid), torch.where(self.same_image, image, neither)
        )

    def target(self, total: Tensor) -> Tensor:
        return self.pick(1 / total, self.factor / total, (1 - self.factor) / total, total.new_zeros(()))

    def log_target(self, total: Tensor) -> Tensor:
        """log(target + eps): logarithms of vectors, never of the matrix."""
        values = (1 / total, self.factor / total, (1 - self.factor) / total, total.new_zeros(()))
        return self.pick(*((value + self.eps).log() for value in values))


def _block_labels(pids: Tensor, image_ids: Tensor | None, rows: slice, spec: RowLoss) -> _Labels:
    samples = slice(rows.start + spec.offset, rows.stop + spec.offset)
    same_image = None if image_ids is None else image_ids[samples, None] == image_ids
    return _Labels(pids[samples, None] == pids, same_image, spec.image_id_factor, spec.eps)


def _label_sum(pids: Tensor, image_ids: Tensor | None, R: int, spec: RowLoss, dtype: torch.dtype) -> Tensor:
    """sum_k y_ik of the queries, or of the keys where the target is divided by columns."""
    samples = slice(spec.offset, spec.offset + R) if spec.target == "row" else slice(None)

    def count(ids: Tensor) -> Tensor:
        """How often the sample's id occurs among all."""
        ordered, wanted = ids.sort().values, ids[samples].contiguous()
        return (torch.searchsorted(ordered, wanted, right=True) - torch.searchsorted(ordered, wanted)).to(dtype)

    if image_ids is None:
        return count(pids)
    return spec.image_id_factor * count(pids) + (1 - spec.image_id_factor) * count(image_ids)


def _divisor(norm: Tensor) -> Tensor:
    return torch.where(norm <= ZERO_NORM, torch.ones_like(norm), norm).unsqueeze(1)


def _forward_torch(
    queries: Tensor,
    keys: Tensor,
    pids: Tensor,
    image_ids: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
    spec: RowLoss,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    R, C, S, dtype = queries.shape[0], keys.shape[0], spec.sides, accumulation_dtype(queries, keys)
    s = scale if logit_scale is None else logit_scale.to(dtype)
    norms = torch.cat([torch.linalg.vector_norm(x, dim=1, dtype=dtype) for x in (queries, keys)])
    label_sum = _label_sum(pids, image_ids, R, spec, dtype)
    q, k = queries / _divisor(norms[:R]), keys / _divisor(norms[R:])
    loss = norms.new_empty(S, R)
    statistics = norms.new_empty(S, 4 if spec.weighted else 3, R)
    places = torch.empty((S, 2, R) if spec.weighted else (0,), dtype=torch.int32, device=pids.device)
    for side, (x, y) in enumerate([(q, k), (k, q)][:S]):
        for rows in _row_blocks(R, C):
            z = (x[rows] @ y.T).mul_(s)
            labels = _block_labels(pids, image_ids, rows, spec)
            total = label_sum[rows, None] if spec.target == "row" else label_sum
            top, top_place = z.max(dim=1)
            # lse in two parts: z - top is exact where p is large, top + log_sum would round that away.
            below = z.sub_(top[:, None])
            p = below.exp()
            log_sum = p.sum(dim=1).log_()
            statistics[side, 0, rows], statistics[side, 1, rows] = top, log_sum
            if spec.objective == "cross_entropy":
                target = labels.target(total)
                statistics[side, 2, rows] = target.sum(dim=1)
                loss[side, rows] = target.mul_(log_sum[:, None] - below).sum(dim=1)
                continue
            if spec.weighted:
                place = _positive_place(below, labels.same, rows, spec)
                behind = below.gather(1, place[:, None]).squeeze(1)
                gap = (-log_sum).exp() - (behind - log_sum).exp() if spec.gap == "probability" else -behind / s
                statistics[side, 3, rows] = gap
                places[side, 0, rows], places[side, 1, rows] = top_place, place
            p.mul_((-log_sum).exp_()[:, None])
            divergence = below.sub_(log_sum[:, None]).sub_(labels.log_target(total)).mul_(p).sum(dim=1)
            statistics[side, 2, rows] = divergence
            loss[side, rows] = divergence * (1 + spec.alpha * gap) if spec.weighted else divergence
    per_sample = loss.sum(dim=0)
    if spec.reduction != "none":
        per_sample = getattr(per_sample, spec.reduction)()
    return per_sample, statistics, places, norms, label_sum


def _positive_place(z: Tensor, same: Tensor, rows: slice, spec: RowLoss) -> Tensor:
    if spec.positive == "paired":
        return torch.arange(rows.start, rows.stop, device=z.device) + spec.offset
    if spec.positive == "first":
        return same.to(torch.uint8).argmax(dim=1)
    return z.masked_fill(~same, -torch.inf).argmax(dim=1)


def _backward_torch(
    dloss: Tensor,
    statistics: Tensor,
    places: Tensor,
    norms: Tensor,
    label_sum: Tensor,
    queries: Tensor,
    keys: Tensor,
    pids: Tensor,
    image_ids: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
    scale_gradient: bool,
    spec: RowLoss,
) -> tuple[Tensor, Tensor, Tensor]:
    R, C = queries.shape[0], keys.shape[0]
    s = scale if logit_scale is None else logit_scale.to(norms.dtype)
    q_norm, k_norm = _divisor(norms[:R]), _divisor(norms[R:])
    q, k = queries / q_norm, keys / k_norm
    g = (dloss / R if spec.reduction == "mean" else dloss).expand(R)
    dq, dk = torch.empty_like(q), torch.zeros_like(k)
    for rows in _row_blocks(R, C):
        z = (q[rows] @ k.T).mul_(s)
        labels = _block_labels(pids, image_ids, rows, spec)
        # Totals that divide the labels of the block's rows, and those of its columns as rows of the other side.
        totals = (label_sum[rows, None], label_sum) if spec.target == "row" else (label_sum, label_sum[rows, None])
        own, own_places = statistics[0, :, rows, None], places[0, :, rows, None] if spec.weighted else places
        dz = _dlogits(z, labels, totals[0], own, own_places, g[rows, None], s, spec, 1, 0)
        if spec.both:
            other, other_places = statistics[1, :, None], places[1, :, None] if spec.weighted else places
            dz += _dlogits(z, labels, totals[1], other, other_places, g, s, spec, 0, rows.start)
        dq[rows] = dz @ k
        dk.addmm_(dz.T, q[rows])
    dq, dk = dq.mul_(s), dk.mul_(s)

    # Along a unit vector its gradient is sum_j z_ij dz_ij: what normalising takes out is what the scale receives.
    dq_along, dk_along = (q * dq).sum(dim=1, keepdim=True), (k * dk).sum(dim=1, keepdim=True)
    dscale = norms.new_empty(0)
    if scale_gradient:
        dscale = dq_along.sum()
        if spec.weighted and spec.gap == "cosine" and not spec.detach_weight:  # a cosine gap does not see the scale
            dscale -= spec.alpha * (g * statistics[:, 2] * statistics[:, 3]).sum()
        dscale /= s
    for unit, along, norm, dx in ((q, dq_along, norms[:R], dq), (k, dk_along, norms[R:], dk)):
        dx.sub_(unit * along * (norm > ZERO_NORM).unsqueeze(1)).div_(_divisor(norm))
    return dq.to(queries.dtype), dk.to(keys.dtype), dscale


def _dlogits(
    z: Tensor,
    labels: _Labels,
    total: Tensor,
    statistics: Tensor,
    places: Tensor,
    g: Tensor,
    s: float | Tensor,
    spec: RowLoss,
    dim: int,
    start: int,
) -> Tensor:
    """Gradient in a block of logits of what its rows pay (dim = 1), or its columns (dim = 0, from row `start` on).

    g p [w (log p - log(t + eps) - KL) + alpha KL ([top] - [positive] - gap)]     with the probability gap
    g (p w (log p - log(t + eps) - KL) + alpha KL ([top] - [positive]) / s)       with the cosine gap
    g (mass p - t)                                                                  cross-entropy
    """
    top, log_sum, third, *gap = statistics.unbind()
    excess = (z - top).sub_(log_sum)
    p = excess.exp()
    if spec.objective == "cross_entropy":
        return p.mul_(third).sub_(labels.target(total)).mul_(g)
    excess.sub_(labels.log_target(total)).sub_(third)
    if not spec.weighted:
        return excess.mul_(p).mul_(g)
    push = spec.alpha * g * third * (not spec.detach_weight)
    excess.mul_(g * (1 + spec.alpha * gap[0]))
    if spec.gap == "cosine":
        excess.mul_(p)
        push = push / s
    else:
        excess.sub_(push * gap[0])
    for place, sign in zip(places.unbind(), (1, -1), strict=True):
        index = place.to(torch.int64) - start
        here = (index >= 0) & (index < z.shape[dim])
        excess.scatter_add_(dim, index.clamp(0, z.shape[dim] - 1), torch.where(here, sign * push, 0))
    return excess if spec.gap == "cosine" else excess.mul_(p)
