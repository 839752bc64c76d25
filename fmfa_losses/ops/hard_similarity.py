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
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from .backend import select_backend
from .checks import check_divisor, check_float, check_mask, check_option, check_same
from .operator import differentiable_once, operator
from .options import POOLS, Backend, Pool
from .precision import accumulation_dtype, full_precision, unit_rows
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
INT16 = torch.iinfo(torch.int16).max  # the largest index of a token that int16 holds
EXPONENTIAL = ("lse", "log_mean")  # pools whose weights are not 1


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
    sim: Tensor = _match_and_pool(
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


@operator("token_lists(Tensor mask) -> Tensor")
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
# integer, weights [Bx, Be, P], and leave winners empty; the torch path leaves weights empty where all of them are 1.
# The kernels make the lists of a mask that comes without them.


@operator(
    "match_and_pool(Tensor x, Tensor e, Tensor? x_mask, Tensor? e_mask, str pool, float pool_scale, bool save,"
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
    with full_precision(x):
        return _forward_torch(x, e, x_mask, e_mask, pool, pool_scale, save)


@operator(
    "match_and_pool_backward(Tensor dsim, Tensor weights, Tensor winners, Tensor x, Tensor e, Tensor? x_mask,"
    " Tensor? e_mask, str pool, str backend, Tensor? x_lists=None, Tensor? e_lists=None) -> (Tensor, Tensor)",
)
def hard_similarity_backward_op(  # type: ignore[no-untyped-def]
    dsim, weights, winners, x, e, x_mask, e_mask, pool, backend, x_lists=None, e_lists=None
):
    if backend == "triton":
        from fmfa_losses.kernels import hard_similarity as kernels

        masks, lists = (x_mask, e_mask), (x_lists, e_lists)
        return kernels.backward(dsim, weights, x.contiguous(), e.contiguous(), *masks, pool, *lists)
    return _backward_torch(dsim, weights, winners, x, e, x_mask, pool)


def matches_like(x: Tensor, shape: tuple[int, int, int], Q: int, save: bool) -> Tensor:
    """What the kernels save for tokens x [Bx, P, D] and samples of Q tokens, kernels/_matches.py: empty memory."""
    # A Q that is only known when it runs: the kernels are not traced, torch.compile asks here.
    dtype = torch.int64 if x.dtype == torch.float32 or Q > INT16 else torch.int32
    return x.new_empty(shape if save else (0,), dtype=dtype)


@torch.library.register_fake(hard_similarity_op)
def _fake(  # type: ignore[no-untyped-def]
    x, e, x_mask, e_mask, pool, pool_scale, save, backend, x_lists=None, e_lists=None
):
    pairs = (x.shape[0], e.shape[0])
    matches = (*pairs, x.shape[1])
    acc = accumulation_dtype(x)
    if backend == "triton":
        weights = matches_like(x, matches, e.shape[1], save)
        return x.new_empty(pairs, dtype=acc), weights, weights.new_empty(0)
    return (
        x.new_empty(pairs, dtype=acc),
        x.new_empty(matches if save and pool in EXPONENTIAL else (0,), dtype=acc),
        x.new_empty(matches if save else (0,), dtype=torch.int16 if e.shape[1] <= INT16 else torch.int32),
    )


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
    dx, de = _match_and_pool_backward(dsim, *tensors, ctx.pool, ctx.backend, x_lists, e_lists)
    return dx, de, *(None,) * 8


_match_and_pool, _match_and_pool_backward = differentiable_once(
    hard_similarity_op, hard_similarity_backward_op, _backward, _setup_context, "hard_similarity", "EFA"
)


# The torch path: one matrix product a tile of x rows and whole e samples, reduced before the next one starts.


# Similarities in one block: 2 MiB of float32 stay in a CPU's cache; larger blocks mean fewer launches on a GPU.
TILE_ELEMENTS = {"cpu": 2**19, "accelerator": 2**26}


def _forward_torch(
    x: Tensor,
    e: Tensor,
    x_mask: Tensor | None,
    e_mask: Tensor | None,
    pool: str,
    pool_scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (Bx, P, D), (Be, Q, _) = x.shape, e.shape
    step_e = min(Be, max(1, 640 // Q))  # about 640 columns make an efficient product
    step_x = min(Bx, max(1, TILE_ELEMENTS["cpu" if x.device.type == "cpu" else "accelerator"] // (step_e * P * Q)))
    sim = x.new_empty(Bx, Be)
    weights = x.new_empty((Bx, Be, P) if save and pool in EXPONENTIAL else (0,))
    winners = x.new_empty((Bx, Be, P) if save else (0,), dtype=torch.int16 if Q <= INT16 else torch.int32)
    for first_x in range(0, Bx, step_x):
        i = slice(first_x, min(first_x + step_x, Bx))
        rows = x[i].reshape(-1, D)
        for first_e in range(0, Be, step_e):
            j = slice(first_e, min(first_e + step_e, Be))
            cos = (rows @ e[j].reshape(-1, D).T).view(rows.shape[0], -1, Q)  # [i l, j, k]
            if e_mask is not None:
                cos.masked_fill_(~e_mask[j], -torch.inf)
            best, winner = cos.max(dim=-1)
            best = rearrange(best, "(i l) j -> i j l", l=P)
            if x_mask is not None:
                best = best.masked_fill(~x_mask[i].unsqueeze(1), -torch.inf)
            sim[i, j], weight = _pool(best, pool, pool_scale)
            if save:
                winner = rearrange(winner, "(i l) j -> i j l", l=P)
                winners[i, j] = winner.to(winners.dtype).masked_fill(best == -torch.inf, -1)
                if pool in EXPONENTIAL:
                    weights[i, j] = weight
    return sim, weights, winners


def _pool(best: Tensor, pool: str, pool_scale: float) -> tuple[Tensor, Tensor]:
    """[i, j, l] -> [i, j], and the weights [i, j, l] of an exponential; -inf marks what is masked out.

    A pair with nothing left gives 0. Weights where something is masked out are anything.
    """
    gone = best == -torch.inf
    if pool == "lse":
        top = best.amax(dim=-1)
        # The difference is exact, and so is its product with a large scale.
        terms = (best - top.unsqueeze(-1)).mul_(pool_scale).exp_()
        total = terms.sum(dim=-1)
        sim = total.log().div_(pool_scale).add_(top).masked_fill_(gone.all(dim=-1), 0)
        return sim, terms.div_(total.unsqueeze(-1))
    kept = (torch.expm1(pool_scale * best) if pool == "log_mean" else best).masked_fill(gone, 0)
    total = kept.sum(dim=-1)
    if pool == "sum":
        return total, best
    mean = total / (~gone).sum(dim=-1).clamp(min=1)
    if pool == "mean":
        return mean, best
    sim = torch.log1p(mean) / pool_scale
    return sim, torch.exp(pool_scale * (best - sim.unsqueeze(-1)))


def _backward_torch(
    dsim: Tensor,
    weights: Tensor,
    winners: Tensor,
    x: Tensor,
    e: Tensor,
    x_mask: Tensor | None,
    pool: str,
) -> tuple[Tensor, Tensor]:
    """dx_il = sum_j w_ijl e_jk*,  de_jk = sum over the (i, l) that k won of w_ijl x_il, with w = dsim * dS/dmax."""
    (Bx, P, D), (Be, Q, _) = x.shape, e.shape
    dx, de = (torch.empty_like(tokens, memory_format=torch.contiguous_format) for tokens in (x, e))
    if pool in ("mean", "log_mean"):
        count = P if x_mask is None else x_mask.sum(dim=1, keepdim=True).clamp(min=1)
        dsim = dsim / count

    def matches(i: slice, j: slice) -> tuple[Tensor, Tensor]:
        """Weights w_ijl and rows j Q + k* of e for a block of pairs, [i, j, l] each."""
        winner = winners[i, j].to(torch.int64)
        weight = dsim[i, j].unsqueeze(-1).to(x.dtype)
        if pool in EXPONENTIAL:
            weight = weight * weights[i, j]
        weight = weight.expand(winner.shape).masked_fill(winner < 0, 0)
        first = torch.arange(winner.shape[1], device=x.device).unsqueeze(-1) * Q
        return weight, winner.clamp(min=0) + first

    entries = (
        TILE_ELEMENTS["cpu" if x.device.type == "cpu" else "accelerator"] // 2
    )  # matches in one block; each costs about 50 bytes
    step = max(1, entries // (Be * P))
    for i in (slice(i, min(i + step, Bx)) for i in range(0, Bx, step)):
        weight, row = (rearrange(t, "i j l -> (i l) j") for t in matches(i, slice(None)))
        dx[i] = F.embedding_bag(row, e.reshape(-1, D), mode="sum", per_sample_weights=weight.contiguous()).view(
            -1, P, D
        )

    # The same sum for e: sorting the matches by the row that they chose puts those of each row next to each other.
    step = max(1, entries // (Bx * P))
    for j in (slice(j, min(j + step, Be)) for j in range(0, Be, step)):
        weight, row = (rearrange(t, "i j l -> (i l j)") for t in matches(slice(None), j))
        row, order = row.sort(stable=True)
        J = j.stop - j.start
        runs = torch.searchsorted(row, torch.arange(J * Q, device=x.device))
        de[j] = F.embedding_bag(order // J, x.reshape(-1, D), runs, mode="sum", per_sample_weights=weight[order]).view(
            -1, Q, D
        )
    return dx, de
