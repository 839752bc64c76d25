"""Best match of every token of x among the tokens of e, pooled; no [Bx, Be, P, Q] anywhere.

    forward(x [Bx, P, D], e [Be, Q, D], x_mask [Bx, P] | None, e_mask [Be, Q] | None, pool, pool_scale, save)
        -> sim [Bx, Be] float32, maxima [Bx, Be, P], winners [Bx, Be, P]
    backward(dsim [Bx, Be], sim, maxima, winners, x, e, x_mask, e_mask, pool, pool_scale, gather=True)
        -> dx, de, in the inputs' dtype
    Inputs: unit rows (or zeros), contiguous, one dtype, finite where masked out. Both take x_lists and e_lists, what
    token_lists.make(mask) gave; without them they make them.

    match    a matrix product whose result never leaves registers. Rows are the tokens of x, one after the other across
             samples; a tile's columns hold as many whole samples of e as fit, each in UNIT columns: 32, 80 or 128 by
             its class of width (77 tokens: 3 x 80 of 256). Columns beyond a sample's last token hold that token again:
             a copy changes no maximum and, as the lowest of equals wins, no winner. Every sample's columns are reduced
             to maximum and winner, which are written.

                            e_j        e_j+1      e_j+2
                 x_i,l   [ k k k k k | k k k k k | k k k k k | . ]  ->  maxima, winners [i, j..j+2, l]

    cosine   IEEE float32 alone, for the pools with an exponential: the winners' cosines once more, summed as a tree.
    pool     sim_ij over the maxima of l: 1/Q of the bytes a [Bx, Be, P, Q] would take, read once. Pools are "sum" and
             "mean"; "lse", (1 / scale) log sum_l exp(scale max_l); and for a small scale "log_mean", with the mean over
             l in place of the sum: in the limit the mean of the maxima, where log P / scale leaves "lse" no digits.
    dx       a row gathers the e_jk* that it chose, sample after sample: Q times fewer operations than the match.
             gather=False multiplies with tiles of winners instead, as below.
    de       tiles of winners become tiles of weights in registers: de_j [Q, D] += W^T [Q, rows] x [rows, D].
    TF32     products read copies rounded to it (_tile.operands); the gather of dx reads e as it is.

Masked-out tokens cost nothing: rows and columns come from lists of the tokens that are left (token_lists.py); e is
sorted by length and matched in classes of width. Memory: Bx Be P maxima and winners. Sums are float32. Deterministic:
see CONTRIBUTING.md, "A kernel file".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import token_lists
from ._launch import BLACKWELL, LARGE, LDS, MEDIUM, SMALL, all_registers, choose, dot_precision, launch, on_device
from ._tile import (
    BIG,
    expm1_over,
    load_columns,
    load_rows,
    log1p_over,
    max_or_nan,
    nearest_tf32,
    operands,
    row_max,
)
from .token_lists import SHORT, TokenLists

LOWEST = tl.constexpr(-3.0e38)  # a finite start of a running maximum: -inf - -inf would be NaN
EXPONENTIAL = ("lse", "log_mean")
# Beyond this scale exp(scale (max_l - sim)) adds up to 1 over l no longer: sim has 24 bits, half maxima fewer.
SHARP = {torch.float32: 1, torch.float16: 32, torch.bfloat16: 32}

# Blocks by memory of the chip and precision.
# (BLOCK_M rows of x, BLOCK_N columns of e, BLOCK_D, num_warps, num_stages): 128 x 256 halves the reads of 128 x 128.
MATCH = {
    (LARGE, "half"): (128, 256, 64, 8, 4),
    (LARGE, "tf32"): (128, 256, 32, 8, 3),
    (LARGE, "ieee"): (64, 256, 16, 8, 2),
    (MEDIUM, "half"): (128, 256, 64, 8, 3),
    (MEDIUM, "tf32"): (128, 256, 32, 8, 3),
    (MEDIUM, "ieee"): (64, 256, 16, 8, 2),
    (SMALL, "half"): (128, 256, 32, 8, 3),
    (SMALL, "tf32"): (128, 256, 16, 8, 3),
    (SMALL, "ieee"): (64, 256, 16, 8, 3),
    (LDS, "half"): (128, 256, 32, 8, 2),
    (LDS, "tf32"): (128, 256, 16, 8, 2),
    (LDS, "ieee"): (64, 256, 16, 8, 1),
}
# Lists of tokens take registers, which spill where accumulators come back from tensor memory.
MATCH_LISTED = MATCH | {(BLACKWELL, "half"): (64, 256, 64, 8, 3), (BLACKWELL, "tf32"): (64, 256, 32, 8, 3)}
# (BLOCK_OWN rows of the gradient, BLOCK_SUM of the sum, BLOCK_OUT of D, num_warps, num_stages)
DE = {
    (LARGE, "half"): (128, 64, 256, 8, 3),
    (LARGE, "tf32"): (128, 32, 128, 8, 3),
    (LARGE, "ieee"): (64, 32, 128, 8, 2),
    (MEDIUM, "half"): (128, 32, 256, 8, 3),
    (MEDIUM, "tf32"): (128, 32, 128, 8, 2),
    (MEDIUM, "ieee"): (64, 32, 64, 8, 2),
    (SMALL, "half"): (128, 32, 256, 8, 3),
    (SMALL, "tf32"): (128, 32, 128, 8, 2),
    (SMALL, "ieee"): (64, 32, 64, 8, 2),
    (LDS, "half"): (128, 32, 128, 8, 2),
    (LDS, "tf32"): (64, 16, 128, 8, 2),
    (LDS, "ieee"): (64, 16, 64, 8, 1),
}
# gather=True: (BLOCK_OWN, BLOCK_OUT, num_warps, num_stages). With all of D in one program, weights are made once.
DX = {
    (LARGE, "half"): (2, 512, 1, 1),
    (LARGE, "tf32"): (2, 512, 1, 1),
    (LARGE, "ieee"): (2, 512, 1, 1),
}
COSINE = (2, 512, 1)  # (BLOCK_OWN rows of x, BLOCK_D, num_warps)
POOL = (16, 64, 4)  # (BLOCK_J, BLOCK_P, num_warps)
# Columns of one sample of e in a tile that holds several. With few classes of width, no kernel is compiled for a Q.
# Samples of e that a mask leaves no more tokens than SHORT are a class of their own.
UNITS = (SHORT, 80, 128)
# Of float32 products so many terms are summed on their own: one chain over a large batch would lose a digit.
CHAIN = 16  # samples in dx, blocks of rows in de
SUPER = 8  # row tiles that go through the column tiles together, so that both stay in L2


@triton.jit
def _listed_rows(list_ptr, count_ptr, start, total, P, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """A block of tokens of x: row in [Bx P], sample i, its token l, and which exist."""
    row = start + tl.arange(0, BLOCK)
    if LISTED:
        row_mask = row < tl.load(count_ptr)
        row = tl.load(list_ptr + row, mask=row_mask, other=0)
    else:
        row_mask = row < total
    i = row // P
    return row.to(tl.int64), i.to(tl.int64), row - i * P, row_mask


@triton.jit(do_not_specialize=["Bx", "Be", "P", "Q", "row_tiles", "column_tiles"])
def _match_kernel(
    x_ptr,  # [Bx P, D]
    e_ptr,  # [Be, Q, D]
    rows_ptr,  # [Bx P] int32: the tokens of x that are left, first; or None
    row_count_ptr,  # [1] int32: how many; or None
    tokens_ptr,  # [Be, Q] int32: the tokens of each e that are left, first, in order; or None
    counts_ptr,  # [Be] int32: how many; or None
    order_ptr,  # [Be] int32: samples of e by count; or None
    bounds_ptr,  # [3] int32: where the classes begin in that order; or None
    maxima_ptr,  # [Bx, Be, P]
    winners_ptr,  # [Bx, Be, P] int16 or int32, or None
    Bx,
    Be,
    P,
    Q,
    D,
    row_tiles,
    column_tiles,
    CLASS: tl.constexpr,
    LIST_X: tl.constexpr,
    LIST_E: tl.constexpr,
    SAVE: tl.constexpr,
    UNIT: tl.constexpr,  # columns that a sample of e has in a tile
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUPER: tl.constexpr,
):
    """Grid (row tiles x column tiles): SUPER row tiles go through the column tiles together."""
    SAMPLES: tl.constexpr = BLOCK_N // UNIT
    program = tl.program_id(0)
    group = program // (SUPER * column_tiles)
    height = tl.minimum(row_tiles - group * SUPER, SUPER)
    inside = program - group * SUPER * column_tiles
    row_tile = group * SUPER + inside % height
    column_tile = inside // height

    first, last = column_tile * SAMPLES, Be
    if LIST_E:
        first += tl.load(bounds_ptr + CLASS)
        last = tl.load(bounds_ptr + CLASS + 1)
    row_total = Bx * P
    if LIST_X:
        row_total = tl.load(row_count_ptr)
    if (first < last) & (row_tile * BLOCK_M < row_total):
        row, i, l, row_mask = _listed_rows(rows_ptr, row_count_ptr, row_tile * BLOCK_M, Bx * P, P, LIST_X, BLOCK_M)
        out = i * Be * P + l
        c = tl.arange(0, BLOCK_N)
        widest = Q
        if SAMPLES > 1:
            widest = 1  # one iteration
        elif LIST_E:
            widest = tl.load(counts_ptr + tl.load(order_ptr + first))

        running = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        running_index = tl.zeros((BLOCK_M,), tl.int32)
        for start in range(0, widest, BLOCK_N):
            # Columns: sample `first + c // UNIT` and its token `start + c % UNIT`, or its last one.
            sample = first + c // UNIT
            k = start + c % UNIT
            col_mask = (sample < last) & (c < SAMPLES * UNIT)
            j = sample
            if LIST_E:
                j = tl.load(order_ptr + sample, mask=col_mask, other=0)
                k = tl.minimum(k, tl.load(counts_ptr + j, mask=col_mask, other=1) - 1)
                k = tl.load(tokens_ptr + j.to(tl.int64) * Q + k, mask=col_mask, other=0)
            else:
                k = tl.minimum(k, Q - 1)
            column = j.to(tl.int64) * Q + k

            cos = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start_d in range(0, D, BLOCK_D):
                d = start_d + tl.arange(0, BLOCK_D)
                x = load_rows(x_ptr, row, row_mask, d, D)
                e = load_columns(e_ptr, column, col_mask, d, D)
                cos = tl.dot(x, e, cos, input_precision=PRECISION)

            for g in tl.static_range(SAMPLES):
                if first + g < last or SAMPLES == 1:  # known where it can be: TMEM of Triton 3.6 needs it
                    j_g = first + g
                    count = Q
                    if LIST_E:
                        j_g = tl.load(order_ptr + first + g)
                        count = tl.load(counts_ptr + j_g)
                    # Which sample a column belongs to is known when compiling: other columns cost nothing.
                    index_c = c - g * UNIT
                    mine = (index_c >= 0) & (index_c < UNIT)
                    best = row_max(tl.where(mine[None, :], cos, -float("inf")))
                    index_g = tl.zeros((BLOCK_M,), tl.int32)
                    if SAVE:
                        # Not below rather than equal: where the best is NaN, all columns are, and the first one wins.
                        ties = tl.where(mine[None, :] & ((cos < best[:, None]) == 0), index_c[None, :], BIG)
                        index_g = start + tl.min(ties, 1)  # the lowest k
                    if SAMPLES == 1:
                        index_g = tl.where(best > running, index_g, running_index)
                        best = max_or_nan(best, running)
                        running, running_index = best, index_g
                    if start + BLOCK_N >= count or SAMPLES > 1:
                        at = out + j_g.to(tl.int64) * P
                        tl.store(maxima_ptr + at, best.to(maxima_ptr.dtype.element_ty), mask=row_mask)
                        if SAVE:
                            # A product may give equal columns unequal last digits: a copy that won is the last token.
                            index_g = tl.minimum(index_g, count - 1)
                            if LIST_E:
                                index_g = tl.load(tokens_ptr + j_g.to(tl.int64) * Q + index_g, mask=row_mask, other=0)
                            tl.store(winners_ptr + at, index_g.to(winners_ptr.dtype.element_ty), mask=row_mask)


@triton.jit(do_not_specialize=["Bx", "Be", "P", "Q"])
def _cosine_kernel(
    maxima_ptr,  # [Bx, Be, P]
    winners_ptr,  # [Bx, Be, P]
    x_ptr,  # [Bx P, D]
    e_ptr,  # [Be, Q, D]
    rows_ptr,  # [Bx P] int32, or None
    row_count_ptr,  # [1] int32, or None
    Bx,
    Be,
    P,
    Q,
    D,
    LIST_X: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (row blocks): the cosine of every winner once more, summed as a tree; NaN stays."""
    row, i, l, row_mask = _listed_rows(
        rows_ptr, row_count_ptr, tl.program_id(0) * BLOCK_OWN, Bx * P, P, LIST_X, BLOCK_OWN
    )
    samples = Be
    if LIST_X:
        samples = tl.where(tl.program_id(0) * BLOCK_OWN < tl.load(row_count_ptr), Be, 0)
    for j in range(samples):
        at = (i * Be + j) * P + l
        winner = tl.load(winners_ptr + at, mask=row_mask, other=-1).to(tl.int64)
        best = tl.load(maxima_ptr + at, mask=row_mask, other=0.0)
        cos = tl.zeros((BLOCK_OWN,), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            x = load_rows(x_ptr, row, row_mask, d, D)
            cos += tl.sum(x * load_rows(e_ptr, tl.cast(j, tl.int64) * Q + winner, winner >= 0, d, D), 1)
        tl.store(maxima_ptr + at, tl.where(best == best, cos, best), mask=winner >= 0)


@triton.jit(do_not_specialize=["x_mask_ptr", "sim_ptr", "out_ptr", "Be", "P"])
def _pool_kernel(
    maxima_ptr,  # [Bx, Be, P]
    x_mask_ptr,  # [Bx, P] bool, or None
    counts_ptr,  # [Be] int32: tokens of e that are left; or None
    sim_ptr,  # [Bx, Be] float32: what POOL "weights" reads, or None
    out_ptr,  # [Bx, Be] float32
    Be,
    P,
    scale,
    HAS_X_MASK: tl.constexpr,
    HAS_E_MASK: tl.constexpr,
    POOL: tl.constexpr,  # or "weights", with sim in place of out: sum_l exp(scale (max_l - sim)), 1 but for rounding
    BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid (Bx, blocks of e): one pass over l, for "lse" with sums relative to the running maximum."""
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    matched = j < Be
    if HAS_E_MASK:
        matched &= tl.load(counts_ptr + j, mask=matched, other=0) > 0
    base = (i * Be + j) * P
    top = tl.full((BLOCK_J,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_J,), tl.float32)
    count = tl.zeros((BLOCK_J,), tl.float32)
    for start in range(0, P, BLOCK_P):
        l = start + tl.arange(0, BLOCK_P)
        keep = l < P
        if HAS_X_MASK:
            keep = tl.load(x_mask_ptr + i * P + l, mask=keep, other=0).to(tl.int1)
        kept = matched[:, None] & keep[None, :]
        best = tl.load(maxima_ptr + base[:, None] + l[None, :], mask=kept, other=0.0).to(tl.float32)
        count += tl.sum(kept.to(tl.float32), 1)
        if POOL == "lse":
            # The difference is exact, and so is its product with a large scale.
            new_top = tl.maximum(top, tl.max(tl.where(kept & (best == best), best, LOWEST), 1))
            terms = tl.where(kept, tl.exp(scale * (best - new_top[:, None])), 0.0)
            total = total * tl.exp(scale * (top - new_top)) + tl.sum(terms, 1)
            top = new_top
        elif POOL == "log_mean":
            total += tl.sum(expm1_over(best, scale), 1)
        elif POOL == "weights":
            terms = tl.exp(scale * (best - tl.load(sim_ptr + i * Be + j, mask=matched, other=0.0)[:, None]))
            total += tl.sum(tl.where(kept, terms, 0.0), 1)
        else:
            total += tl.sum(best, 1)
    sim = total
    if POOL == "lse":
        sim = top + tl.log(tl.where(count > 0, total, 1.0)) / scale
    if POOL == "log_mean":
        sim = log1p_over(total / tl.maximum(count, 1.0), scale)
    if POOL == "mean":
        sim = total / tl.maximum(count, 1.0)
    tl.store(out_ptr + i * Be + j, tl.where(count > 0, sim, 0.0), mask=j < Be)


@triton.jit
def _weights(dsim_ptr, sim_ptr, maxima_ptr, winners_ptr, i, j, l, row_mask, Be, P, scale, POOL: tl.constexpr):
    """w_ijl = dsim_ij dS_ij/dmax_ijl, and the winners; zero and -1 where nothing won."""
    pair = i * Be + j
    at = pair * P + l
    winner = tl.load(winners_ptr + at, mask=row_mask, other=-1).to(tl.int32)
    w = tl.load(dsim_ptr + pair, mask=row_mask, other=0.0)
    sim = tl.load(sim_ptr + pair, mask=row_mask, other=0.0)
    if POOL == "lse":
        best = tl.load(maxima_ptr + at, mask=row_mask, other=0.0).to(tl.float32)
        w *= tl.exp(scale * (best - sim))
    else:
        w += sim - sim  # a similarity that is NaN shows in the gradient, too
    return tl.where(winner >= 0, w, 0.0), winner


@triton.jit(do_not_specialize=["dsim_ptr", "sim_ptr", "Bx", "Be", "P", "Q"])
def _dx_kernel(
    dsim_ptr,  # [Bx, Be] float32
    sim_ptr,  # [Bx, Be] float32
    maxima_ptr,  # [Bx, Be, P], or anything
    winners_ptr,  # [Bx, Be, P]
    e_ptr,  # [Be, Q, D]
    rows_ptr,  # [Bx P] int32, or None
    row_count_ptr,  # [1] int32, or None
    unscale_ptr,  # [Bx] float32: rows of dsim are multiplied by its inverse; or None
    dx_ptr,  # [Bx P, D]
    Bx,
    Be,
    P,
    Q,
    D,
    scale,
    LIST_X: tl.constexpr,
    POOL: tl.constexpr,
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """Grid (row blocks, chunks of D): dx_il = sum_j w_ijl e_jk*."""
    row, i, l, row_mask = _listed_rows(
        rows_ptr, row_count_ptr, tl.program_id(0) * BLOCK_OWN, Bx * P, P, LIST_X, BLOCK_OWN
    )
    d = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    dx = tl.zeros((BLOCK_OWN, BLOCK_OUT), tl.float32)
    total = tl.zeros((BLOCK_OWN, BLOCK_OUT), tl.float32)
    IEEE: tl.constexpr = GATHER and e_ptr.dtype.element_ty == tl.float32 and PRECISION == "ieee"
    samples = Be
    if LIST_X:
        samples = tl.where(tl.program_id(0) * BLOCK_OWN < tl.load(row_count_ptr), Be, 0)
    for j in range(samples):
        w, winner = _weights(dsim_ptr, sim_ptr, maxima_ptr, winners_ptr, i, j, l, row_mask, Be, P, scale, POOL)
        if not GATHER and PRECISION == "tf32":
            w = nearest_tf32(w)
        first = tl.cast(j, tl.int64) * Q
        if GATHER:
            dx += w[:, None] * load_rows(e_ptr, first + winner, winner >= 0, d, D).to(tl.float32)
        else:
            for start in range(0, Q, BLOCK_SUM):
                k = start + tl.arange(0, BLOCK_SUM)
                e = load_rows(e_ptr, first + k, k < Q, d, D)
                weights = tl.where(winner[:, None] == k[None, :], w[:, None], 0.0).to(e.dtype)
                dx = tl.dot(weights, e, dx, input_precision=PRECISION)
        if IEEE:  # noqa: SIM102, settled when compiled
            if (j + 1) % CHAIN == 0:
                total += dx
                dx = tl.zeros((BLOCK_OWN, BLOCK_OUT), tl.float32)
    if IEEE:
        dx += total
    if unscale_ptr is not None:
        dx *= tl.load(unscale_ptr + i, mask=row_mask, other=0.0)[:, None]
    out = dx_ptr + row[:, None] * D + d[None, :]
    tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=row_mask[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["dsim_ptr", "sim_ptr", "Bx", "Be", "P", "Q"])
def _de_kernel(
    dsim_ptr,  # [Bx, Be] float32
    sim_ptr,  # [Bx, Be] float32
    maxima_ptr,  # [Bx, Be, P], or anything
    winners_ptr,  # [Bx, Be, P]
    x_ptr,  # [Bx P, D]
    rows_ptr,  # [Bx P] int32, or None
    row_count_ptr,  # [1] int32, or None
    tokens_ptr,  # [Be, Q] int32, or None
    counts_ptr,  # [Be] int32, or None
    unscale_ptr,  # [Be] float32: columns of dsim are multiplied by its inverse; or None
    de_ptr,  # [Be, Q, D]
    Bx,
    Be,
    P,
    Q,
    D,
    scale,
    LIST_X: tl.constexpr,
    LIST_E: tl.constexpr,
    POOL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """Grid (Be, token blocks, chunks of D): de_jk = sum over the (i, l) that chose k of w_ijl x_il."""
    j = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    count = Q
    if LIST_E:
        count = tl.load(counts_ptr + j)
    if tl.program_id(1) * BLOCK_OWN < count:
        k = index
        if LIST_E:
            k = tl.load(tokens_ptr + j * Q + index, mask=index < count, other=-2)
        d = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        row_total = Bx * P
        if LIST_X:
            row_total = tl.load(row_count_ptr)
        de = tl.zeros((BLOCK_OWN, BLOCK_OUT), tl.float32)
        total = tl.zeros((BLOCK_OWN, BLOCK_OUT), tl.float32)
        IEEE: tl.constexpr = x_ptr.dtype.element_ty == tl.float32 and PRECISION == "ieee"
        for start in range(0, row_total, BLOCK_SUM):
            row, i, l, row_mask = _listed_rows(rows_ptr, row_count_ptr, start, Bx * P, P, LIST_X, BLOCK_SUM)
            w, winner = _weights(dsim_ptr, sim_ptr, maxima_ptr, winners_ptr, i, j, l, row_mask, Be, P, scale, POOL)
            if PRECISION == "tf32":
                w = nearest_tf32(w)
            x = load_rows(x_ptr, row, row_mask, d, D)
            weights = tl.where(winner[None, :] == k[:, None], w[None, :], 0.0).to(x.dtype)
            de = tl.dot(weights, x, de, input_precision=PRECISION)
            if IEEE:  # noqa: SIM102, settled when compiled
                if (start // BLOCK_SUM + 1) % CHAIN == 0:
                    total += de
                    de = tl.zeros((BLOCK_OWN, BLOCK_OUT), tl.float32)
        if IEEE:
            de += total
        if unscale_ptr is not None:
            de *= tl.load(unscale_ptr + j)
        out = de_ptr + (j * Q + k)[:, None] * D + d[None, :]
        tl.store(out, de.to(de_ptr.dtype.element_ty), mask=(index < count)[:, None] & (d < D)[None, :])


def forward(
    x: Tensor,
    e: Tensor,
    x_mask: Tensor | None,
    e_mask: Tensor | None,
    pool: str,
    pool_scale: float,
    save: bool,
    x_lists: Tensor | None = None,
    e_lists: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """sim, maxima (kept for "lse", "log_mean" and `save`), winners (kept for `save`)."""
    (Bx, P, D), (Be, Q, _) = x.shape, e.shape
    x_mask = None if x_mask is None else x_mask.contiguous()
    *_, rows, row_count = _lists(x_mask, x_lists)
    tokens, counts, order, bounds, *_ = _lists(e_mask, e_lists)
    # Half inputs: float16 holds a cosine as exactly as its inputs allow, and gradients are those of what was pooled.
    maxima_dtype = torch.float32 if x.dtype == torch.float32 else torch.float16
    winner_dtype = torch.int16 if torch.iinfo(torch.int16).max >= Q else torch.int32
    maxima = torch.empty(Bx, Be, P, dtype=maxima_dtype, device=x.device)
    # An IEEE product sums D terms in one chain, whose error a scale multiplies: winners get a better one.
    again = pool in EXPONENTIAL and x.dtype == torch.float32 and dot_precision(x.dtype) == "ieee"
    winners = torch.empty((Bx, Be, P) if save or again else (0,), dtype=winner_dtype, device=x.device)
    if x_mask is not None or e_mask is not None:
        winners.fill_(-1)
        maxima.zero_()
    sim = torch.empty(Bx, Be, dtype=torch.float32, device=x.device)

    M, N, BLOCK_D, warps, stages = choose(MATCH if rows is None and tokens is None else MATCH_LISTED, x)
    with on_device(x):
        x, e = operands(x, e)
        for number, width in enumerate((SHORT, Q) if counts is not None and Q > SHORT else (Q,)):
            columns, unit = _columns(width, N)
            tiles = triton.cdiv(Bx * P, M), triton.cdiv(Be, columns // unit)
            launch(
                _match_kernel, (tiles[0] * tiles[1],),
                x, e, rows, row_count, tokens, counts, order, bounds, maxima,
                winners if save or again else None,
                Bx, Be, P, Q, D, *tiles,
                CLASS=number, LIST_X=rows is not None, LIST_E=counts is not None, SAVE=save or again,
                UNIT=unit,
                PRECISION=dot_precision(x.dtype), BLOCK_M=M, BLOCK_N=columns, BLOCK_D=BLOCK_D, SUPER=SUPER,
                num_warps=warps, num_stages=stages, **all_registers(x.device),
            )  # fmt: skip
        if again:
            own, width, warps = COSINE
            launch(
                _cosine_kernel, (triton.cdiv(Bx * P, own),), maxima, winners, x, e, rows, row_count, Bx, Be, P, Q, D,
                LIST_X=rows is not None, BLOCK_OWN=own, BLOCK_D=min(width, triton.next_power_of_2(D)), num_warps=warps,
            )  # fmt: skip
        _pool(maxima, x_mask, counts, None, sim, pool, pool_scale)
    return (
        sim,
        maxima if save and pool in EXPONENTIAL else maxima.new_empty(0),
        winners if save else winners.new_empty(0),
    )


def _pool(
    maxima: Tensor,
    x_mask: Tensor | None,
    counts: Tensor | None,
    sim: Tensor | None,
    out: Tensor,
    pool: str,
    pool_scale: float,
) -> None:
    (Bx, Be, P), (J, L, warps) = maxima.shape, POOL
    launch(
        _pool_kernel, (Bx, triton.cdiv(Be, J)), maxima, x_mask, counts, sim, out, Be, P, float(pool_scale),
        HAS_X_MASK=x_mask is not None, HAS_E_MASK=counts is not None, POOL=pool, BLOCK_J=J, BLOCK_P=L, num_warps=warps,
        **all_registers(maxima.device),
    )  # fmt: skip


def backward(
    dsim: Tensor,
    sim: Tensor,
    maxima: Tensor,
    winners: Tensor,
    x: Tensor,
    e: Tensor,
    x_mask: Tensor | None,
    e_mask: Tensor | None,
    pool: str,
    pool_scale: float,
    gather: bool = True,
    x_lists: Tensor | None = None,
    e_lists: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx, de; `gather=False` makes dx from tiles of weights as well."""
    (Bx, P, D), (Be, Q, _) = x.shape, e.shape
    _, x_counts, _, _, rows, row_count = _lists(x_mask, x_lists)
    tokens, counts, *_ = _lists(e_mask, e_lists)
    dx = (torch.empty_like if rows is None else torch.zeros_like)(x, memory_format=torch.contiguous_format)
    de = (torch.empty_like if tokens is None else torch.zeros_like)(e, memory_format=torch.contiguous_format)
    dsim = dsim.to(torch.float32)
    if pool in ("mean", "log_mean"):
        dsim = dsim / (P if x_counts is None else x_counts.clamp(min=1).unsqueeze(-1))
    if pool == "lse" and pool_scale > SHARP[x.dtype]:
        weights = torch.empty_like(sim)
        with on_device(x):
            _pool(maxima, None if x_mask is None else x_mask.contiguous(), counts, sim, weights, "weights", pool_scale)
        dsim = torch.where(weights == 0, 0, dsim / weights)  # 0: a pair with nothing left
    dsim = dsim.contiguous()

    own, block_sum, out, warps, stages = choose(DE, x)
    sizes = (Bx, Be, P, Q, D, float(pool_scale))
    # Of a log mean as of "lse": what is different has been divided by.
    flags = {
        "LIST_X": rows is not None,
        "POOL": "lse" if pool in EXPONENTIAL else pool,
        "PRECISION": dot_precision(x.dtype),
    }
    saved = (sim, maxima, winners)
    with on_device(x):
        dx_sum = 1 if gather else min(block_sum, 32)
        in_range, unscale = (dsim, None) if gather else _into_range(dsim, 1, e, counts)
        if gather:
            dx_own, dx_out, dx_warps, dx_stages = choose(DX, x)
            dx_out = min(dx_out, triton.next_power_of_2(D))
        else:
            # Rows are spread over samples here: their addresses take the registers of half of the tile.
            dx_own, dx_out, dx_warps, dx_stages = own, out // 2, warps, min(stages, 2)
        launch(
            _dx_kernel, (triton.cdiv(Bx * P, dx_own), triton.cdiv(D, dx_out)),
            in_range, *saved, *((e,) if gather else operands(e)), rows, row_count, unscale, dx, *sizes,
            GATHER=gather, BLOCK_OWN=dx_own, BLOCK_SUM=dx_sum, BLOCK_OUT=dx_out, CHAIN=CHAIN,
            **flags,
            num_warps=dx_warps, num_stages=dx_stages, **(all_registers(x.device) if x.dtype != torch.float32 else {}),
        )  # fmt: skip
        if pool not in EXPONENTIAL:
            block_sum = min(block_sum, 32)  # where no maxima are read, Triton 3.9 spills 8 bytes of 64 rows
        if own > 64 and (Q <= SHORT or tokens is not None):
            own, warps = own // 2, warps // 2  # short samples leave whole blocks of tokens out
        in_range, unscale = _into_range(dsim, 0, x, x_counts)
        launch(
            _de_kernel, (Be, triton.cdiv(Q, own), triton.cdiv(D, out)),
            in_range, *saved, *operands(x), rows, row_count, tokens, counts, unscale, de, *sizes,
            LIST_E=tokens is not None, BLOCK_OWN=own, BLOCK_SUM=block_sum, BLOCK_OUT=out, CHAIN=CHAIN, **flags,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return dx, de


def _columns(width: int, BLOCK_N: int) -> tuple[int, int]:
    """Columns of a tile, and of a sample in it. A sample too wide to share a tile gets tiles of half the width."""
    unit = next((unit for unit in UNITS if width <= unit and 2 * unit <= BLOCK_N), BLOCK_N // 2)
    return (BLOCK_N if width <= unit else BLOCK_N // 2), unit


def _lists(mask: Tensor | None, buffer: Tensor | None) -> TokenLists | tuple[None, ...]:
    if mask is None:
        return (None,) * len(TokenLists._fields)
    return token_lists.sections(token_lists.make(mask) if buffer is None else buffer, *mask.shape)


def _into_range(dsim: Tensor, dim: int, tokens: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """dsim with the largest entry along `dim` in [1/2, 1), and the factors that undo it; float16 alone needs it.

    A gradient is a sum of `tokens` [B, T, D] along `dim`, weighted by dsim in their dtype. Samples without a token left
    or with zero vectors alone add nothing to it, and their dsim, which may be large without bound, counts as 0.
    """
    if tokens.dtype != torch.float16:
        return dsim, None
    nothing = torch.linalg.vector_norm(tokens, torch.inf, dim=(1, 2)) == 0
    if counts is not None:
        nothing |= counts == 0
    dsim = dsim.masked_fill(nothing.unsqueeze(1 - dim) & dsim.isfinite(), 0)
    largest = dsim.nan_to_num(0, 0, 0).abs().amax(dim, keepdim=True)
    exponent = torch.frexp(largest)[1].clamp(-120, 120)
    one = torch.ones_like(largest)
    return dsim * torch.ldexp(one, -exponent), torch.ldexp(one, exponent)
