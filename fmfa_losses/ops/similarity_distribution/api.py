"""Row losses of softmax similarity distributions, Eq. 1-4: public function, checks, operator and choice of backend.

    divergence      w_i KL_i,   KL_i = sum_j p_ij (log p_ij - log(t_ij + eps)),   w_i = 1 + alpha gap_i    (A-SDM)
                    alpha = 0 is SDM
    cross_entropy   -sum_j t_ij log p_ij;   with ids that are all different InfoNCE, lse_i - z_ii           (ITC)

with p_i = softmax_j(s cos(q_i, k_j)). One pass over a row's logits gives a few statistics, and the gradient in
the logits is a formula of those statistics (`statistics.py`). So the [R, C] matrix exists only in blocks (`blocks.py`),
or on a GPU in tiles, and the backward recomputes them. A small batch on the CPU keeps it (`whole.py`).
"""

from typing import Any

import torch
from torch import Tensor

from ..backend import select_backend
from ..checks import check_float, check_ids, check_same, check_scale, refuse_capture
from ..operator import differentiable_once, never_compiled, operator, refusals
from ..options import Backend, Objective, Positive, Reduction
from ..precision import accumulation_dtype, full_precision
from . import blocks, whole
from .reference import RowLoss, similarity_distribution_loss_reference

__all__ = [
    "RowLoss",
    "row_loss",
    "similarity_distribution_loss",
    "similarity_distribution_loss_reference",
    "similarity_distribution_ring",
]


def similarity_distribution_loss(
    queries: Tensor,
    keys: Tensor,
    pids: Tensor,
    *,
    logit_scale: float | Tensor,
    image_ids: Tensor | None = None,
    objective: Objective = "divergence",
    alpha: float = 0.0,
    positive: Positive = "paired",
    detach_weight: bool = False,
    eps: float = 1e-8,
    image_id_factor: float = 0.3,
    offset: int = 0,
    both: bool = True,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
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
        positive: what the gap p_i,top - p_i,positive is measured to, the "paired" key or the best of "any" of its pid.
        detach_weight: keep the factor out of the graph.
        eps: added to the target inside the logarithm.
        image_id_factor: weight of a shared identity against a shared image, in [0, 1].
        offset: the key that query 0 is paired with; the queries may be a slice of the batch that the keys hold.
        both: add the losses of the keys as rows; needs R == C.
        reduction: "mean", "sum", or "none" for [R].
        backend: "auto", "triton" or "torch".

    Returns:
        Scalar, or [R] with reduction="none"; float32 (float64 when an input is). Memory beyond inputs and gradients:
        one block of logits, or on the CPU up to 1024 pairs all. A zero vector has cosine 0. Differentiable once.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or options that do not fit.
        RuntimeError: backend="triton" cannot run, or a CUDA graph is being captured and logit_scale is a tensor on the
            CPU; the message says why.

    Example:
        >>> image = text = torch.eye(4)
        >>> pairs = torch.arange(4)                                        # all different: InfoNCE, both directions
        >>> loss = similarity_distribution_loss(image, text, pairs, logit_scale=1.0, objective="cross_entropy")
        >>> round(loss.item(), 4)
        1.4873

    Reference: Yin et al., arXiv 2509.13754v2, Eq. 1-4; Jiang and Ye, arXiv 2303.12501 (SDM, ITC).
    """
    spec = RowLoss(objective, alpha, positive, detach_weight, eps, image_id_factor, offset, both, reduction).checked()
    pids, image_ids = _check_inputs(queries, keys, pids, image_ids, spec)
    return row_loss(queries, keys, pids, image_ids, check_scale(logit_scale), spec, backend)


def row_loss(
    queries: Tensor,
    keys: Tensor,
    pids: Tensor,
    image_ids: Tensor | None,
    scale: float | Tensor,
    spec: RowLoss,
    backend: Backend,
) -> Tensor:
    """`similarity_distribution_loss` of arguments that are checked already."""
    chosen = select_backend(backend, queries, keys)
    if chosen == "torch" and whole.takes(queries, keys, spec):
        return whole.whole_row_loss(queries, keys, pids, image_ids, scale, spec)
    tensor, number = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    loss: Tensor = _similarity_distribution(queries, keys, pids, image_ids, tensor, number, chosen, *spec)[0]
    return loss


def _check_inputs(
    queries: Tensor, keys: Tensor, pids: Tensor, image_ids: Tensor | None, spec: RowLoss
) -> tuple[Tensor, Tensor | None]:
    check_float("queries", queries, "R D")
    check_float("keys", keys, "C D")
    check_same("queries and keys", queries, keys, dims=[("D", 1)])
    R, C = queries.shape[0], keys.shape[0]
    pids = check_ids("pids", pids, C, keys.device)
    if image_ids is not None:
        image_ids = check_ids("image_ids", image_ids, C, keys.device)
    if spec.both and (spec.offset != 0 or R != C):
        raise ValueError(
            f"both=True needs as many queries as keys and offset 0, got {R} queries, {C} keys, offset {spec.offset}; "
            "pass both=False and call once per direction"
        )
    if spec.offset < 0 or spec.offset + R > C:
        raise ValueError(
            f"queries must be paired with keys offset ... offset + R - 1 < C, got offset {spec.offset}, R {R}, C {C}"
        )
    return pids, image_ids


# The operator: one schema, one fake kernel, one gradient formula for both backends. S directions: queries as rows, and
# with `both` keys as rows. What the backward needs of the forward, besides the inputs:
#   final      [S, 3 or 4, R]  the fields of `statistics.Final`; four where a gap weighs
#   index      [S, 2, R]       columns of the top and of the positive, where a gap weighs
#   norms      [2, R + C]      |f x| and f of the queries, then of the keys (`row_norms`)
#   label_sum  [R]             sum_k y_ik of the queries

_ROW_LOSS = (
    "str objective, float alpha, str positive, bool detach_weight, float eps, float image_id_factor,"
    " SymInt offset, bool both, str reduction"
)


@operator(
    "similarity_distribution(Tensor queries, Tensor keys, Tensor pids, Tensor? image_ids, Tensor? logit_scale,"
    f" float scale, str backend, {_ROW_LOSS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def similarity_distribution_op(  # type: ignore[no-untyped-def]
    queries, keys, pids, image_ids, logit_scale, scale, backend, *row_loss
):
    refuse_capture(logit_scale, queries)
    spec, (tiles, block_backend) = RowLoss(*row_loss), _implementation(backend, queries, keys)
    if tiles is not None:
        return tiles.forward(queries, keys, pids, image_ids, logit_scale, scale, spec)
    with full_precision(queries):
        scale = scale if logit_scale is None else logit_scale.to(accumulation_dtype(queries, keys))
        return blocks.forward(queries, keys, pids, image_ids, scale, spec, block_backend)


@operator(
    "similarity_distribution_backward(Tensor dloss, Tensor final, Tensor index, Tensor norms,"
    " Tensor label_sum, Tensor queries, Tensor keys, Tensor pids, Tensor? image_ids, Tensor? logit_scale, float scale,"
    f" bool scale_gradient, str backend, {_ROW_LOSS}) -> (Tensor, Tensor, Tensor)",
)
def similarity_distribution_backward_op(  # type: ignore[no-untyped-def]
    dloss, final, index, norms, label_sum, queries, keys, pids, image_ids, logit_scale, scale, scale_gradient,
    backend, *row_loss
):  # fmt: skip
    refuse_capture(logit_scale, queries)
    spec, (tiles, block_backend) = RowLoss(*row_loss), _implementation(backend, queries, keys)
    arguments = (dloss, final, index, norms, label_sum, queries, keys, pids, image_ids)
    if tiles is not None:
        return tiles.backward(*arguments, logit_scale, scale, scale_gradient, spec)
    with full_precision(queries):
        scale = scale if logit_scale is None else logit_scale.to(norms.dtype)
        return blocks.backward(*arguments, scale, scale_gradient, spec, block_backend)


def _implementation(backend: str, queries: Tensor, keys: Tensor) -> tuple[Any, Any]:
    """Kernels that do all of it in tiles, or None; and the backend of blocks."""
    if backend == "torch":
        return None, blocks.torch_blocks
    from fmfa_losses.kernels import asdm_blocks, asdm_tiles

    return asdm_tiles if asdm_tiles.takes(queries, keys) else None, asdm_blocks


@torch.library.register_fake(similarity_distribution_op)
def _fake(queries, keys, pids, image_ids, logit_scale, scale, backend, *row_loss):  # type: ignore[no-untyped-def]
    spec, R, C = RowLoss(*row_loss), queries.shape[0], keys.shape[0]
    dtype = accumulation_dtype(queries, keys)
    return (
        queries.new_empty((R,) if spec.reduction == "none" else (), dtype=dtype),
        queries.new_empty((spec.directions, 4 if spec.weighted else 3, R), dtype=dtype),
        queries.new_empty((spec.directions, 2, R) if spec.weighted else (0,), dtype=torch.int32),
        queries.new_empty((2, R + C), dtype=dtype),
        queries.new_empty((R,), dtype=dtype),
    )


@torch.library.register_fake(similarity_distribution_backward_op)
def _backward_fake(dloss, final, index, norms, label_sum, queries, keys, *arguments):  # type: ignore[no-untyped-def]
    scale_gradient = arguments[4]
    return (
        torch.empty_like(queries, memory_format=torch.contiguous_format),
        torch.empty_like(keys, memory_format=torch.contiguous_format),
        norms.new_empty(() if scale_gradient else (0,)),
    )


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    queries, keys, pids, image_ids, logit_scale, *ctx.plain = inputs
    ctx.save_for_backward(*output[1:], queries, keys, pids, image_ids, logit_scale)
    ctx.set_materialize_grads(False)  # no zeros for the statistics, of which nobody takes a gradient


def _backward(ctx, dloss, *_):  # type: ignore[no-untyped-def]
    *saved, logit_scale = ctx.saved_tensors
    scale, backend, *row_loss = ctx.plain
    if dloss is None:
        return (None,) * (7 + len(row_loss))
    scale_gradient = ctx.needs_input_grad[4]
    dqueries, dkeys, dscale = _similarity_distribution_backward(
        dloss, *saved, logit_scale, scale, scale_gradient, backend, *row_loss
    )
    # A scale that the user keeps on the CPU gets its gradient there.
    dscale = dscale.to(logit_scale.device, logit_scale.dtype) if scale_gradient else None
    return dqueries, dkeys, None, None, dscale, *[None] * (2 + len(row_loss))


_similarity_distribution, _similarity_distribution_backward = differentiable_once(
    similarity_distribution_op,
    similarity_distribution_backward_op,
    _backward,
    _setup_context,
    "similarity_distribution_loss",
    "A-SDM, SDM and ITC",
)


# The ring: the same row losses of one rank's pairs, while the features of all ranks travel from rank to rank.


@never_compiled
def similarity_distribution_ring(
    features: Tensor,
    pids: Tensor,
    image_ids: Tensor | None,
    *,
    logit_scale: float | Tensor,
    ring: blocks.Ring,
    backend: str,
    spec: RowLoss,
    queued: Tensor | None = None,
) -> Tensor:
    """w_i KL_i of the own texts and images, [b], differentiable once. Arguments are checked already.

    Args:
        features: [b, 2, D] own images and texts, in any float dtype, in which they travel.
        pids, image_ids: [B] of the pairs of all ranks, [B + Q] with a queue.
        queued: [Q, 2, D], constants that are keys after those of all ranks.
        ring: the ranks, and how they exchange blocks.
        backend: "triton" or "torch".
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            'gather="ring" cannot run inside of torch.func.grad, vjp, jvp or vmap; use backward() or '
            "torch.autograd.grad, or gather=True"
        )
    spec = RowLoss(**spec._asdict() | {"offset": ring.offset, "both": False})
    block_backend = _implementation(backend, features, features)[1]
    loss: Tensor = _Ring.apply(features, logit_scale, pids, image_ids, spec, ring, block_backend, queued)  # type: ignore[no-untyped-call]
    return loss


_refuse_second, _refuse_forward = refusals('gather="ring"', "all losses")


class _Ring(torch.autograd.Function):
    jvp = staticmethod(_refuse_forward)

    @staticmethod
    def forward(ctx, features, scale, pids, image_ids, *route):  # type: ignore[no-untyped-def]
        number = blocks.plain_scale(scale, accumulation_dtype(features))
        with full_precision(features):
            loss, *saved = blocks.ring_forward(features, pids, image_ids, number, *route)
        ctx.route, ctx.number = route, None if isinstance(scale, Tensor) else scale
        ctx.save_for_backward(*saved, features, scale if ctx.number is None else None, pids, image_ids)
        return loss

    @staticmethod
    def backward(ctx, dloss):  # type: ignore[no-untyped-def]
        *saved, scale, pids, image_ids = ctx.saved_tensors
        scale = scale if ctx.number is None else ctx.number
        gradients = _RingGradient.apply(dloss, *saved, pids, image_ids, scale, *ctx.route)  # type: ignore[no-untyped-call]
        return gradients[0], gradients[1] if ctx.needs_input_grad[1] else None, *[None] * 6


class _RingGradient(torch.autograd.Function):
    jvp, backward = staticmethod(_refuse_forward), staticmethod(_refuse_second)

    @staticmethod
    def forward(ctx, dloss, final, index, norms, label_sum, features, pids, image_ids, scale, *route):  # type: ignore[no-untyped-def]
        saved = dloss, final, index, norms, label_sum, features, pids, image_ids
        number = blocks.plain_scale(scale, accumulation_dtype(features))
        with full_precision(features):
            dfeatures, dscale = blocks.ring_backward(*saved, number, *route)
        return dfeatures, dscale.to(scale.device, scale.dtype) if isinstance(scale, Tensor) else dscale
