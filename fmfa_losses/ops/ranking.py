"""The ranking of EFA, Eq. 11-12: of every pair's row and column, in both similarities, against its negatives.

    z_ij = (S_ij - S_ii + margin) / temperature,   loss_i = sum over S of log sum_{j negative} exp(z_ij)

for S in text_sim, image_sim and their transposes. With p_ij = exp(z_ij) / sum_{j negative} exp(z_ij) the gradient is

    dS_ij = g_i p_ij / temperature,   dS_ii = -sum_j dS_ij
    d(1 / temperature) = sum_ij g_i p_ij (S_ij - S_ii + margin)

A few numbers a row are all that it needs of the forward. Two launches replace some seventy of PyTorch's.
"""

import torch
from torch import Tensor

from .backend import select_backend
from .checks import check_finite, check_float, check_ids, check_same, check_scale, describe, refuse_capture
from .operator import differentiable_once, operator
from .options import Backend
from .precision import accumulation_dtype

__all__ = ["rank", "ranking", "ranking_reference", "ranking_term"]


def ranking_reference(
    text_sim: Tensor,
    image_sim: Tensor,
    pids: Tensor | None = None,
    *,
    margin: float = 0.0,
    logit_scale: float | Tensor = 1.0,
) -> Tensor:
    """The specification of `ranking`: one term after the other."""
    ids = torch.arange(len(text_sim), device=text_sim.device) if pids is None else pids
    excluded = ids.unsqueeze(1) == ids
    sims = (text_sim, text_sim.T, image_sim, image_sim.T)
    return torch.stack([ranking_term(sim, excluded, margin, logit_scale) for sim in sims]).sum(dim=0)


def ranking_term(
    sim: Tensor,
    excluded: Tensor,
    margin: float,
    scale: float | Tensor,
    offset: int = 0,
    levels: Tensor | None = None,
) -> Tensor:
    """log sum_{j not excluded} exp((S_ij - S_ii + margin) scale), [..., b]; 0 for a row without negatives.

    Row i of sim [..., b, B] belongs to column offset + i; excluded [b, B]. `levels` [..., b, B] are added to the
    differences; the largest one of a row, which may leave the others no digits, after the sum.
    """
    logits = sim - sim.diagonal(offset, -2, -1).unsqueeze(-1) + margin
    lowest, top = torch.finfo(sim.dtype).min, None
    if levels is not None:
        top = levels.masked_fill(excluded, lowest).amax(dim=-1, keepdim=True)
        logits = logits + (levels - top)
    # Finite, so that a row without negatives has a finite gradient for its last fill to stop.
    terms = (logits * scale).masked_fill(excluded, lowest).logsumexp(dim=-1)
    if top is not None:
        terms = terms + top.squeeze(-1) * scale
    return terms.masked_fill(excluded.all(dim=1), 0)


def ranking(
    text_sim: Tensor,
    image_sim: Tensor,
    pids: Tensor | None = None,
    *,
    margin: float = 0.0,
    logit_scale: float | Tensor = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """How far every pair's similarities exceed those of its negatives, in four terms.

        loss_i = sum over S of log sum_{j negative of i} exp((S_ij - S_ii + margin) logit_scale)

    Args:
        text_sim, image_sim: [B, B] S of texts and of images (rows) with joint embeddings, any float dtype.
        pids: [B] integer identities: pairs of another one are the negatives. All other pairs when None.
        margin: added to every difference.
        logit_scale: 1 / temperature, a number or a tensor with one element on any device, which receives its gradient.
        backend: "auto", "triton" or "torch".

    Returns:
        [B], float32 (float64 when an input is); 0 for a pair without negatives. Differentiable once.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or numbers that do not fit.
        RuntimeError: backend="triton" cannot run; the message says why.

    Example:
        >>> ranking(torch.eye(3), torch.eye(3), margin=0.1)                # 4 (log 2 - 1 + 0.1)
        tensor([-0.8274, -0.8274, -0.8274])

    Reference: Yin et al., arXiv 2509.13754v2, Eq. 11-12.
    """
    check_float("text_sim", text_sim, "B B")
    check_float("image_sim", image_sim, "B B")
    check_same("text_sim and image_sim", text_sim, image_sim, dims=[("B", 0), ("B", 1)])
    if text_sim.shape[0] != text_sim.shape[1]:
        raise ValueError(
            f"text_sim must be square, one text and one joint embedding per pair [B, B], got {describe(text_sim)}; "
            "pass the pairs of one batch"
        )
    if pids is not None:
        pids = check_ids("pids", pids, len(text_sim), text_sim.device)
    margin, scale = check_finite("margin", margin), check_scale(logit_scale)
    acc = accumulation_dtype(text_sim, image_sim)
    text_sim, image_sim = text_sim.to(acc), image_sim.to(acc)
    return rank(text_sim, image_sim, pids, margin, scale, select_backend(backend, text_sim, image_sim))


def rank(
    text_sim: Tensor, image_sim: Tensor, pids: Tensor | None, margin: float, scale: float | Tensor, backend: str
) -> Tensor:
    """`ranking` of checked inputs, similarities of one dtype, float32 or float64; `backend` is "triton" or "torch"."""
    tensor, number = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    loss: Tensor = _ranking(text_sim, image_sim, pids, tensor, margin, number, backend)[0]
    return loss


# The operator: one schema, one fake kernel, one gradient formula for both backends. What the backward needs besides the
# inputs:
#   statistics  [2, 4, B]  largest logit and sum of exp(logit - largest), of the rows and columns of text_sim, then of
#                          image_sim; the dtype's lowest number and 1 where there is no negative
#   moment      [B]        sum over the four terms of sum_j p_ij (S_ij - S_ii + margin), where the scale is a tensor


@operator(
    "ranking(Tensor text_sim, Tensor image_sim, Tensor? pids, Tensor? logit_scale, float margin, float scale,"
    " str backend) -> (Tensor, Tensor, Tensor)",
)
def ranking_op(text_sim, image_sim, pids, logit_scale, margin, scale, backend):  # type: ignore[no-untyped-def]
    if logit_scale is not None:
        refuse_capture(logit_scale, text_sim)
    if backend == "triton":
        from fmfa_losses.kernels import ranking as kernels

        return kernels.forward(text_sim, image_sim, pids, logit_scale, margin, scale)
    differences, logits, excluded = _terms(text_sim, image_sim, pids, logit_scale, margin, scale)
    none, top = excluded.all(dim=1), logits.amax(dim=2)
    finite = top.masked_fill(top == torch.inf, 0)
    e = (logits - finite.unsqueeze(2)).exp()
    total = e.sum(dim=2)
    loss = (finite + total.log()).sum(dim=0).masked_fill(none, 0)
    moment = loss.new_empty(0)
    if logit_scale is not None:
        moments = (e * differences).masked_fill(excluded, 0).sum(dim=2) / total
        moment = moments.sum(dim=0).masked_fill(none, 0)
    top, total = top.masked_fill(none, torch.finfo(top.dtype).min), total.masked_fill(none, 1)
    return loss, torch.stack([top, total]), moment


@operator(
    "ranking_backward(Tensor dper_sample, Tensor statistics, Tensor moment, Tensor text_sim, Tensor image_sim,"
    " Tensor? pids, Tensor? logit_scale, float margin, float scale, bool scale_gradient, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
def ranking_backward_op(  # type: ignore[no-untyped-def]
    dper_sample, statistics, moment, text_sim, image_sim, pids, logit_scale, margin, scale, scale_gradient, backend
):
    if logit_scale is not None:
        refuse_capture(logit_scale, text_sim)
    if backend == "triton":
        from fmfa_losses.kernels import ranking as kernels

        return kernels.backward(
            dper_sample, statistics, moment, text_sim, image_sim, pids, logit_scale, margin, scale, scale_gradient
        )
    _, logits, excluded = _terms(text_sim, image_sim, pids, logit_scale, margin, scale)
    scale = scale if logit_scale is None else logit_scale.to(statistics.dtype)
    top, total = statistics
    p = (logits - top.unsqueeze(2)).exp() / total.unsqueeze(2)
    dsims = p.masked_fill(excluded, 0) * dper_sample.unsqueeze(1)
    # The sum of p: 1 in a row that has negatives, unless its largest logit is not finite.
    share = torch.where(top <= torch.finfo(top.dtype).min, 0, 1 / total) * total
    dsims.diagonal(0, 1, 2).sub_(share * dper_sample)
    dsims *= scale
    dscale = (dper_sample * moment).sum() if scale_gradient else moment.new_empty(0)
    return dsims[0] + dsims[1].T, dsims[2] + dsims[3].T, dscale


@torch.library.register_fake(ranking_op)
def _fake(text_sim, image_sim, pids, logit_scale, margin, scale, backend):  # type: ignore[no-untyped-def]
    B = text_sim.shape[0]
    return text_sim.new_empty(B), text_sim.new_empty(2, 4, B), text_sim.new_empty(0 if logit_scale is None else B)


@torch.library.register_fake(ranking_backward_op)
def _backward_fake(  # type: ignore[no-untyped-def]
    dper_sample, statistics, moment, text_sim, image_sim, pids, logit_scale, margin, scale, scale_gradient, backend
):
    return (
        torch.empty_like(text_sim, memory_format=torch.contiguous_format),
        torch.empty_like(image_sim, memory_format=torch.contiguous_format),
        moment.new_empty(() if scale_gradient else (0,)),
    )


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    text_sim, image_sim, pids, logit_scale, *ctx.plain = inputs
    ctx.save_for_backward(*output[1:], text_sim, image_sim, pids, logit_scale)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dper_sample, *_):  # type: ignore[no-untyped-def]
    if dper_sample is None:
        return (None,) * 7
    *saved, logit_scale = ctx.saved_tensors
    margin, scale, backend = ctx.plain
    scale_gradient = ctx.needs_input_grad[3]
    dtext, dimage, dscale = _ranking_backward(dper_sample, *saved, logit_scale, margin, scale, scale_gradient, backend)
    # A scale that the user keeps on the CPU gets its gradient there.
    dscale = dscale.to(logit_scale.device, logit_scale.dtype) if scale_gradient else None
    return dtext, dimage, None, dscale, None, None, None


_ranking, _ranking_backward = differentiable_once(
    ranking_op, ranking_backward_op, _backward, _setup_context, "ranking", "EFA"
)


def _terms(
    text_sim: Tensor,
    image_sim: Tensor,
    pids: Tensor | None,
    logit_scale: Tensor | None,
    margin: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """S_ij - S_ii + margin and z of the four terms, [4, B, B] each, and which pairs are no negatives, [B, B].

    z is finite there: a row without negatives, or whose negatives are all at -inf, has a sum, too.
    """
    sims = torch.stack([text_sim, text_sim.T, image_sim, image_sim.T])
    if pids is None:
        pids = torch.arange(len(text_sim), device=text_sim.device)
    excluded = pids.unsqueeze(1) == pids
    differences = sims - sims.diagonal(0, 1, 2).unsqueeze(2) + margin
    logits = differences * (scale if logit_scale is None else logit_scale.to(sims.dtype))
    return differences, logits.masked_fill_(excluded, torch.finfo(sims.dtype).min), excluded
