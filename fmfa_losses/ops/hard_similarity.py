"""Hard coding and pooling: S_ij = pool_l max_k cos(x_il, e_jk), Eq. 9 and 10.

Every token of x_i takes its best match among the tokens of e_j (hard coding); the matches are pooled over x_i's tokens.
The gradient passes through the winning k alone, so the backward is a gather and a scatter over Bx Be P winners,
and nothing of size Bx Be P Q ever exists.

    (1/lambda) log sum_l exp(lambda m_l) = (1/lambda) log n + (1/lambda) log (1/n) sum_l exp(lambda m_l)

For a small lambda the first term, the level, is so large that the second one, the log mean, is rounded away. So the
operator computes the log mean there, and a caller that needs only differences of similarities leaves the level out.
"""

import math
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor

from .backend import select_backend
from .checks import check_divisor, check_float, check_mask, check_option, check_same
from .operator import differentiable_once, operator
from .options import POOLS, Backend, Pool
from .precision import accumulation_dtype, unit_rows
from .rows.layout import layout
from .rows.match import EXPONENTIAL, INT16, in_order, match, match_gradients
from .threads import on_threads
from .unit_tokens import unit_tokens

__all__ = [
    "FLAT",
    "UnitTokens",
    "hard_similarity",
    "hard_similarity_reference",
    "product_dtype",
    "token_lists",
    "unit_similarity",
]

# A scale below is small: cosines times it stay within what the series of the kernels are good for.
FLAT = 0.25
# Beyond, float64 cannot tell "lse" from the maximum, and a log mean from the mean; float32 can still hold the number.
SCALES = (1e-20, 1e30)


def hard_similarity_reference(
    x: Tensor,
    e: Tensor,
    *,
    x_mask: Tensor | None = None,
    e_mask: Tensor | None = None,
    pool: Pool = "lse",
    pool_scale: float = 1.0,
) -> Tensor:
    """The specification of `hard_similarity`: the equation as it stands, with the whole [Bx, Be, P, Q] in memory."""
    cos = einsum(
        unit_rows(x, x_mask, backend="torch"), unit_rows(e, e_mask, backend="torch"), "i l d, j k d -> i j l k"
    )
    if e_mask is not None:
        cos = cos.masked_fill(~rearrange(e_mask, "j k -> 1 j 1 k"), -torch.inf)
    best = cos.max(dim=-1).values  # ties: the lowest k
    x_keep = x.new_ones(x.shape[:2], dtype=torch.bool) if x_mask is None else x_mask
    e_any = e.new_ones(e.shape[0], dtype=torch.bool) if e_mask is None else e_mask.any(dim=1)
    keep = rearrange(x_keep, "i l -> i 1 l") & rearrange(e_any, "j -> 1 j 1")
    if pool == "lse":
        # A pair with nothing left has similarity 0; the inner fill keeps its gradient finite.
        logits = (pool_scale * best).masked_fill(~keep, -torch.inf)
        logits = logits.masked_fill(~keep.any(dim=-1, keepdim=True), 0)
        return (logits.logsumexp(dim=-1) / pool_scale).masked_fill(~keep.any(dim=-1), 0)
    total = best.masked_fill(~keep, 0).sum(dim=-1)
    return total if pool == "sum" else total / keep.sum(dim=-1).clamp(min=1)


def hard_similarity(
    x: Tensor,
    e: Tensor,
    *,
    x_mask: Tensor | None = None,
    e_mask: Tensor | None = None,
    pool: Pool = "lse",
    pool_scale: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """Similarity of every x with every e: the best match of each token of x, pooled over the tokens of x.

        S_ij = (1/lambda) log sum_l exp(lambda max_k cos(x_il, e_jk))      pool="lse", lambda = pool_scale
        S_ij = sum_l max_k cos(x_il, e_jk)                                 pool="sum" (MaxSim), or its mean

    Args:
        x: [Bx, P, D], any float dtype; need not be normalised.
        e: [Be, Q, D], any float dtype; the batch may differ from x's.
        x_mask: [Bx, P] bool, True = keep; masked-out tokens are not pooled.
        e_mask: [Be, Q] bool, True = keep; masked-out tokens are no candidates.
        pool: "lse", "sum" or "mean".
        pool_scale: lambda > 0 of "lse"; the larger, the closer to the maximum.
        backend: "auto", "triton" or "torch".

    Returns:
        [Bx, Be], float32 (float64 when an input is). Ties go to the lowest k. Where x_i or e_j has no token left the
        similarity is 0, with zero gradient. A zero vector has cosine 0 with everything. Memory beyond inputs,
        gradients and result: O(Bx Be P), no [Bx, Be, P, Q]. Differentiable once.

    Raises:
        TypeError, ValueError: rank, width, dtype, device or mask do not fit; pool or pool_scale unknown.
        RuntimeError: backend="triton" cannot run; the message says why.

    Example:
        >>> x = torch.eye(2).unsqueeze(0)                       # one sample, two orthogonal tokens
        >>> hard_similarity(x, torch.cat([x, -x]), pool="sum")
        tensor([[2., 0.]])

    Reference: CHAN (hard coding), SCAN (LSE pooling); Yin et al., arXiv 2509.13754v2, Eq. 9-10.
    """
    check_float("x", x, "Bx P D")
    check_float("e", e, "Be Q D")
    check_same("x and e", x, e, dims=[("D", 2)])
    check_mask("x_mask", x_mask, x)
    check_mask("e_mask", e_mask, e)
    check_option("pool", pool, POOLS)
    pool_scale = check_divisor("pool_scale", pool_scale)
    chosen = select_backend(backend, x, e)
    product = product_dtype(x, e, chosen)
    units = unit_tokens if chosen == "triton" else unit_rows
    x_units, e_units = (
        UnitTokens(units(tokens, mask, dtype=product, backend=chosen), mask, token_lists(mask, chosen))
        for tokens, mask in ((x, x_mask), (e, e_mask))
    )
    return unit_similarity(x_units, e_units, pool=pool, pool_scale=pool_scale, backend=chosen)


class UnitTokens(NamedTuple):
    """Tokens as `hard_similarity_op` takes them, of one or of several similarities."""

    rows: Tensor  # [B, T, D], of length 1 or 0; finite where masked out
    mask: Tensor | None  # [B, T]
    lists: Tensor | None  # token_lists(mask)


def product_dtype(x: Tensor, e: Tensor, backend: str) -> torch.dtype:
    """The tensor cores multiply in the lower of the two precisions and accumulate in float32."""
    if backend == "triton":
        lower = [t.dtype for t in (x, e) if t.dtype != torch.float32]  # torch.compile of torch 2.6 does not take next
        return lower[0] if lower else torch.float32
    return accumulation_dtype(x, e)


def unit_similarity(x: UnitTokens, e: UnitTokens, *, pool: str, pool_scale: float, backend: str) -> Tensor:
    """`hard_similarity` of tokens that are unit rows already; `backend` is "triton" or "torch".

    pool="log_mean" is "lse" without its level, for a pool_scale < FLAT; a pair with nothing left has 0.
    """
    leveled = pool == "lse" and pool_scale < FLAT
    scale = min(max(float(pool_scale), SCALES[0]), SCALES[1])
    sim: Tensor = _hard_matches(
        x.rows, e.rows, x.mask, e.mask, "log_mean" if leveled else pool, scale, False, backend, x.lists, e.lists
    )[0]
    if not leveled:
        return sim
    if x.mask is None:
        level = sim.new_full((1, 1), math.log(x.rows.shape[1])) / pool_scale
    else:
        level = x.mask.sum(dim=1, keepdim=True).clamp(min=1).to(sim.dtype).log() / pool_scale
    return sim + (level if e.mask is None else torch.where(e.mask.any(dim=1), level, 0))


def token_lists(mask: Tensor | None, backend: str) -> Tensor | None:
    """Lists of the tokens that a mask [B, T] keeps, which the kernels want: one for all that have this mask."""
    if mask is None or backend == "torch":
        return None
    lists: Tensor = token_lists_op(mask)
    return lists


@operator("kept_lists(Tensor mask) -> Tensor")
def token_lists_op(mask):  # type: ignore[no-untyped-def]
    from fmfa_losses.kernels import token_lists as kernels

    return kernels.make(mask)


@torch.library.register_fake(token_lists_op)
def _token_lists_fake(mask):  # type: ignore[no-untyped-def]
    from fmfa_losses.kernels import token_lists as kernels

    return mask.new_empty(kernels.size(*mask.shape), dtype=torch.int32)


# The operator: one schema, one fake kernel, one gradient formula for both backends.
# pool is one of POOLS or "log_mean". With `save`, which is True where the gradient is wanted, each x_il and e_j leave a
# weight dS_ij / dmax_ijl (of the means: times the count) and the k that won (-1: none). The kernels put both in one
# integer, weights [Bx, Be, P], and leave winners empty; what the torch path keeps, rows/match.py says.
# The kernels make the lists of a mask that comes without them.


@operator(
    "hard_matches(Tensor x, Tensor e, Tensor? x_mask, Tensor? e_mask, str pool, float pool_scale, bool save,"
    " str backend, Tensor? x_lists=None, Tensor? e_lists=None) -> (Tensor sim, Tensor weights, Tensor winners)",
)
def hard_similarity_op(  # type: ignore[no-untyped-def]
    x, e, x_mask, e_mask, pool, pool_scale, save, backend, x_lists=None, e_lists=None
):
    if backend == "triton":
        from fmfa_losses.kernels import hard_similarity as kernels

        masks, lists = (x_mask, e_mask), (x_lists, e_lists)
        sim, matches = kernels.forward(x.contiguous(), e.contiguous(), *masks, pool, pool_scale, save, *lists)
        return sim, matches, matches.new_empty(0)
    xs, es = layout(x, x_mask), layout(e, e_mask)
    found = match(xs.pack(x, x.dtype), es.pack(e, e.dtype), xs, es, pool, pool_scale, save)
    on_threads(found.tasks, x.device)
    return in_order(found.sim, xs, es), found.weights, found.winners


@operator(
    "hard_matches_backward(Tensor dsim, Tensor weights, Tensor winners, Tensor x, Tensor e, Tensor? x_mask,"
    " Tensor? e_mask, str pool, str backend, Tensor? x_lists=None, Tensor? e_lists=None) -> (Tensor, Tensor)",
)
def hard_similarity_backward_op(  # type: ignore[no-untyped-def]
    dsim, weights, winners, x, e, x_mask, e_mask, pool, backend, x_lists=None, e_lists=None
):
    if backend == "triton":
        from fmfa_losses.kernels import hard_similarity as kernels

        masks, lists = (x_mask, e_mask), (x_lists, e_lists)
        return kernels.backward(dsim, weights, x.contiguous(), e.contiguous(), *masks, pool, *lists)
    xs, es = layout(x, x_mask), layout(e, e_mask)
    found = match_gradients(dsim, weights, winners, xs.pack(x, x.dtype), es.pack(e, e.dtype), xs, es, pool)
    on_threads(found.tasks, x.device)
    return xs.unpack(found.dx, x.dtype), es.unpack(found.de, e.dtype)


def matches_like(x: Tensor, shape: tuple[int, int, int], Q: int, save: bool) -> Tensor:
    """What the kernels save for tokens x [Bx, P, D] and samples of Q tokens, kernels/_matches.py: empty memory."""
    # A Q that is only known when it runs: the kernels are not traced, torch.compile asks here.
    dtype = torch.int64 if x.dtype == torch.float32 or Q > INT16 else torch.int32
    return x.new_empty(shape if save else (0,), dtype=dtype)


def saved_like(
    x: Tensor, shape: tuple[int, int, int], Q: int, pool: str, save: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weights and winners as rows/match.py saves them, where it computes in dtype: empty memory."""
    return (
        x.new_empty(shape if save and pool in EXPONENTIAL else (0,), dtype=dtype),
        x.new_empty(shape if save else (0,), dtype=torch.int16 if Q <= INT16 else torch.int32),
    )


@torch.library.register_fake(hard_similarity_op)
def _fake(  # type: ignore[no-untyped-def]
    x, e, x_mask, e_mask, pool, pool_scale, save, backend, x_lists=None, e_lists=None
):
    pairs = (x.shape[0], e.shape[0])
    acc = accumulation_dtype(x)
    if backend == "triton":
        weights = matches_like(x, (*pairs, x.shape[1]), e.shape[1], save)
        return x.new_empty(pairs, dtype=acc), weights, weights.new_empty(0)
    saved = saved_like(x, (e.shape[0], x.shape[0], x.shape[1]), e.shape[1], pool, save, acc)
    return x.new_empty(pairs, dtype=acc), *saved


@torch.library.register_fake(hard_similarity_backward_op)
def _backward_fake(  # type: ignore[no-untyped-def]
    dsim, weights, winners, x, e, x_mask, e_mask, pool, backend, x_lists=None, e_lists=None
):
    # Both backends write contiguous gradients, whatever the strides of the tokens.
    dx, de = (torch.empty_like(tokens, memory_format=torch.contiguous_format) for tokens in (x, e))
    return dx, de


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)  # or autograd fills zeros for weights and winners
    x, e, x_mask, e_mask, ctx.pool, _, _, ctx.backend, x_lists, e_lists = inputs
    ctx.save_for_backward(*output[1:], x, e, x_mask, e_mask, x_lists, e_lists)


def _backward(ctx, dsim, dweights, dwinners):  # type: ignore[no-untyped-def]
    if dsim is None:
        return (None,) * 10
    *tensors, x_lists, e_lists = ctx.saved_tensors
    dx, de = _hard_matches_backward(dsim, *tensors, ctx.pool, ctx.backend, x_lists, e_lists)
    return dx, de, *(None,) * 8


_hard_matches, _hard_matches_backward = differentiable_once(
    hard_similarity_op, hard_similarity_backward_op, _backward, _setup_context, "hard_similarity", "EFA"
)
