"""Pooling of matches: sim_ij over the tokens l of x_i, and in place of every maximum its weight in it.

    pool(matches [Bx, Be, P], x_mask [Bx, P] | None, counts [Be] | None, how, scale, save) -> sim [Bx, Be] float32

    how          sim_ij                                          weight p_ijl = dS_ij / dmax_ijl
    "lse"        (1 / scale) log sum_l exp(scale max_l)          exp(scale max_l) / sum: in [0, 1], they add up to 1
    "log_mean"   (1 / scale) log mean_l exp(scale max_l)         exp(scale (max_l - sim)), to be divided by the count
    "sum"        sum_l max_l                                     1
    "mean"       mean_l max_l                                    1, to be divided by the count

`matches` are those of match.py or, without weights to make (`save`), its maxima. "log_mean" is "lse" for a small scale:
in the limit the mean of the maxima, where log P / scale leaves "lse" no digits. A row or sample that has no token left
is not pooled, gets the match (0, -1), and a pair with nothing left has similarity 0. A similarity that is NaN has NaN
weights, so that it shows in the gradient.

A program pools BLOCK_J samples of e for one x. Up to 256 tokens are one tile, read once: written over from registers.
More are read again for their weights. Deterministic: see CONTRIBUTING.md, "A kernel file".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import all_registers, launch, on_device
from ._matches import pack, unpack
from ._tile import expm1_over, log1p_over

LOWEST = tl.constexpr(-3.0e38)  # a finite start of a running maximum: -inf - -inf would be NaN
# (BLOCK_J samples of e, BLOCK_P tokens, num_warps); up to P tokens, and beyond in several tiles.
POOL = {128: (16, 128, 4), 256: (8, 256, 4)}


@triton.jit
def _tile(matches_ptr, x_mask_ptr, i, base, matched, l, P, HAS_X_MASK: tl.constexpr):
    """Maxima, winners (0 where only maxima are given), and which are pooled, [J, l] each."""
    keep = l < P
    if HAS_X_MASK:
        keep = tl.load(x_mask_ptr + i * P + l, mask=keep, other=0).to(tl.int1)
    kept = matched[:, None] & keep[None, :]
    match = tl.load(matches_ptr + base[:, None] + l[None, :], mask=kept, other=0)
    if match.dtype.is_floating():
        best, winner = match.to(tl.float32), tl.zeros(match.shape, tl.int32)
    else:
        best, winner = unpack(match, match.dtype == tl.int64)
    return best, winner, kept


@triton.jit
def _add(best, kept, top, total, scale, POOL: tl.constexpr):
    """The running maximum and sum of "lse", relative to it; the running sum of the others."""
    if POOL == "lse":
        # The difference is exact, and so is its product with a large scale.
        new_top = tl.maximum(top, tl.max(tl.where(kept & (best == best), best, LOWEST), 1))
        terms = tl.where(kept, tl.exp(scale * (best - new_top[:, None])), 0.0)
        total = total * tl.exp(scale * (top - new_top)) + tl.sum(terms, 1)
        top = new_top
    elif POOL == "log_mean":
        total += tl.sum(expm1_over(best, scale), 1)
    else:
        total += tl.sum(best, 1)
    return top, total


@triton.jit
def _store_weights(
    matches_ptr, base, exists, l, P, best, winner, kept, top, total, sim, scale,
    POOL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    if POOL == "lse":
        weight = tl.exp(scale * (best - top[:, None])) * (1 / total)[:, None]
    elif POOL == "log_mean":
        weight = tl.exp(scale * (best - sim[:, None]))
    else:
        weight = 1 + tl.zeros_like(best) * sim[:, None]
    match = pack(tl.where(kept, weight, 0.0), tl.where(kept, winner, -1), WIDE)
    tl.store(matches_ptr + base[:, None] + l[None, :], match, mask=exists[:, None] & (l < P)[None, :])


@triton.jit(do_not_specialize=["x_mask_ptr", "Be", "P"])
def _pool_kernel(
    matches_ptr,  # [Bx, Be, P] int32 or int64; or maxima, float16 or float32
    x_mask_ptr,  # [Bx, P] bool, or None
    counts_ptr,  # [Be] int32: tokens of e that are left; or None
    sim_ptr,  # [Bx, Be] float32
    Be,
    P,
    scale,
    HAS_X_MASK: tl.constexpr,
    HAS_E_MASK: tl.constexpr,
    POOL: tl.constexpr,
    SAVE: tl.constexpr,
    SEVERAL: tl.constexpr,  # tiles of l
    BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid (Bx, blocks of e)."""
    WIDE: tl.constexpr = matches_ptr.dtype.element_ty == tl.int64
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    exists = j < Be
    matched = exists
    if HAS_E_MASK:
        matched &= tl.load(counts_ptr + j, mask=exists, other=0) > 0
    base = (i * Be + j) * P
    top = tl.full((BLOCK_J,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_J,), tl.float32)
    l = tl.arange(0, BLOCK_P)
    best, winner, kept = _tile(matches_ptr, x_mask_ptr, i, base, matched, l, P, HAS_X_MASK)
    top, total = _add(best, kept, top, total, scale, POOL)
    count = tl.sum(kept.to(tl.int32), 1)
    if SEVERAL:
        for start in range(BLOCK_P, P, BLOCK_P):
            more, _, pooled = _tile(matches_ptr, x_mask_ptr, i, base, matched, start + l, P, HAS_X_MASK)
            top, total = _add(more, pooled, top, total, scale, POOL)
            count += tl.sum(pooled.to(tl.int32), 1)
    divisor = tl.maximum(count, 1).to(tl.float32)
    sim = total
    if POOL == "lse":
        total = tl.where(count > 0, total, 1.0)
        sim = top + tl.log(total) / scale
    if POOL == "log_mean":
        sim = log1p_over(total / divisor, scale)
    if POOL == "mean":
        sim = total / divisor
    sim = tl.where(count > 0, sim, 0.0)
    tl.store(sim_ptr + i * Be + j, sim, mask=exists)
    if SAVE:
        _store_weights(
            matches_ptr, base, exists, l, P, best, winner, kept, top, total, sim, scale, POOL, WIDE
        )  # fmt: skip
        if SEVERAL:
            for start in range(BLOCK_P, P, BLOCK_P):
                more, others, pooled = _tile(matches_ptr, x_mask_ptr, i, base, matched, start + l, P, HAS_X_MASK)
                _store_weights(
                    matches_ptr, base, exists, start + l, P, more, others, pooled, top, total, sim, scale, POOL, WIDE
                )  # fmt: skip


def pool(matches: Tensor, x_mask: Tensor | None, counts: Tensor | None, how: str, scale: float, save: bool) -> Tensor:
    """sim; `matches` hold weights afterwards when `save`."""
    Bx, Be, P = matches.shape
    J, L, warps = next((block for most, block in POOL.items() if most >= P), POOL[max(POOL)])
    x_mask = None if x_mask is None else x_mask.contiguous()
    sim = torch.empty(Bx, Be, dtype=torch.float32, device=matches.device)
    with on_device(matches):
        launch(
            _pool_kernel, (Bx, triton.cdiv(Be, J)), matches, x_mask, counts, sim,
            Be, P, float(scale), HAS_X_MASK=x_mask is not None, HAS_E_MASK=counts is not None, POOL=how, SAVE=save,
            SEVERAL=P > L, BLOCK_J=J, BLOCK_P=L, num_warps=warps, **all_registers(matches.device),
        )  # fmt: skip
    return sim
