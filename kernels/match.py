"""The best match of every token of x among the tokens of e; no [Bx, Be, P, Q] anywhere.

    match(x [Bx, P, D], e [Be, Q, D], x_lists, e_lists, save, exponential) -> [Bx, Be, P]
        with `save` matches (_matches.py: maxima and winners), without it maxima: float16 of 16-bit tokens, float32 of
        float32 tokens. Where winners' cosines are made once more (below) they are matches all the same
    Inputs: unit rows (or zeros), contiguous, one dtype, finite where masked out. x_lists and e_lists: the lists of
    the masks (token_lists.py), or tuples of None. Rows and samples that have no token left are not written.

    match    a matrix product whose result never leaves registers. Rows are the tokens of x, one after the other across
             samples; a tile's columns hold as many whole samples of e as fit, each in UNIT columns: 32, 80 or 128 by
             its class of width (77 tokens: 3 x 80 of 256). Columns beyond a sample's last token hold that token again:
             a copy changes no maximum and, as the lowest of equals wins, no winner. Every sample's columns are reduced
             to maximum and winner, which are written.

                            e_j        e_j+1      e_j+2
                 x_i,l   [ k k k k k | k k k k k | k k k k k | . ]  ->  matches [i, j..j+2, l]

    cosine   float32 alone: the winners' cosines once more, summed as a tree. In IEEE the match adds D terms in one
             chain, whose error an exponential multiplies; from three TF32 products it is a little larger in any pool.
    TF32     products read copies rounded to it (_tile.operands). For three of them, x e = high high + high low + low
             high, a copy has both parts, rows of 2 D, and a product is 3 D long; low low is beyond a float32's digits.

Masked-out tokens cost nothing: rows and columns come from lists of the tokens that are left. Samples of e of up to
PACKED tokens share tiles, each with columns for the tokens that it has (packed_match.py), or e is sorted by length and
matched in two classes of width. Deterministic: see CONTRIBUTING.md, "A kernel file".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    BLACKWELL,
    LARGE,
    LDS,
    MEDIUM,
    SMALL,
    all_registers,
    choose,
    launch,
    match_precision,
    on_device,
)
from ._matches import Lists, listed_rows, matches_dtype, pack, unpack
from ._tile import best_column, cosines, load_rows, max_or_nan, nearest_tf32, operands, tile_of
from .packed_match import LAYOUT, packed_match
from .persistent_match import persistent_match
from .token_lists import PACKED, SHORT

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
# Lists of tokens take registers, which spill where accumulators come back from tensor memory, or many loads are made.
MATCH_LISTED = MATCH | {
    (BLACKWELL, "half"): (64, 256, 64, 8, 3),
    (BLACKWELL, "tf32"): (64, 256, 32, 8, 3),
    (LARGE, "ieee"): (32, 256, 16, 8, 2),
    (MEDIUM, "half"): (128, 256, 32, 8, 4),
    (MEDIUM, "tf32"): (128, 256, 16, 8, 4),
}
PERSISTENT = False  # 16-bit tokens without lists in persistent_match.py instead; not measured
COSINE = (2, 512, 1)  # (BLOCK_OWN rows of x, BLOCK_D, num_warps)
# Columns of one sample of e in a tile that holds several. With few classes of width, no kernel is compiled for a Q.
UNITS = (SHORT, 80, 128)
SUPER = 8  # row tiles that go through the column tiles together


@triton.jit(do_not_specialize=["Bx", "Be", "P", "Q", "row_tiles", "column_tiles"])
def _match_kernel(
    x_ptr,  # [Bx P, D]; with SPLIT [Bx P, 2, D]: high and low parts
    e_ptr,  # [Be, Q, D], or [Be, Q, 2, D]
    rows_ptr,  # [Bx P] int32: the tokens of x that are left, first; or None
    row_count_ptr,  # [1] int32: how many; or None
    tokens_ptr,  # [Be, Q] int32: the tokens of each e that are left, first, in order; or None
    counts_ptr,  # [Be] int32: how many; or None
    order_ptr,  # [Be] int32: samples of e by count; or None
    bounds_ptr,  # [4] int32: where classes begin in that order; or None
    out_ptr,  # [Bx, Be, P]: matches with SAVE, maxima without
    Bx,
    Be,
    P,
    Q,
    D,
    row_tiles,
    column_tiles,
    FIRST: tl.constexpr,  # of a class, in bounds
    LAST: tl.constexpr,
    LIST_X: tl.constexpr,
    LIST_E: tl.constexpr,
    SAVE: tl.constexpr,
    UNIT: tl.constexpr,  # columns that a sample of e has in a tile
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUPER: tl.constexpr,
):
    """Grid (row tiles x column tiles), in the order of tile_of."""
    SAMPLES: tl.constexpr = BLOCK_N // UNIT
    row_tile, column_tile = tile_of(tl.program_id(0), row_tiles, column_tiles, SUPER)

    first, last = column_tile * SAMPLES, Be
    if LIST_E:
        first += tl.load(bounds_ptr + FIRST)
        last = tl.load(bounds_ptr + LAST)
    row_total = Bx * P
    if LIST_X:
        row_total = tl.load(row_count_ptr)
    if (first < last) & (row_tile * BLOCK_M < row_total):
        row, i, l, row_mask = listed_rows(rows_ptr, row_count_ptr, row_tile * BLOCK_M, Bx * P, P, LIST_X, BLOCK_M)
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

            cos = cosines(x_ptr, e_ptr, row, row_mask, column, col_mask, D, PRECISION, SPLIT, BLOCK_M, BLOCK_N, BLOCK_D)
            for g in tl.static_range(SAMPLES):
                if first + g < last or SAMPLES == 1:  # known where it can be: TMEM of Triton 3.6 needs it
                    j_g = first + g
                    count = Q
                    if LIST_E:
                        j_g = tl.load(order_ptr + first + g)
                        count = tl.load(counts_ptr + j_g)
                    best, index_g = best_column(cos, c - g * UNIT, UNIT, SAVE)
                    index_g += start
                    if SAMPLES == 1:
                        index_g = tl.where(best > running, index_g, running_index)
                        best = max_or_nan(best, running)
                        running, running_index = best, index_g
                    if start + BLOCK_N >= count or SAMPLES > 1:
                        if SAVE:
                            # A product may give equal columns unequal last digits: a copy that won is the last token.
                            index_g = tl.minimum(index_g, count - 1)
                            if LIST_E:
                                index_g = tl.load(tokens_ptr + j_g.to(tl.int64) * Q + index_g, mask=row_mask, other=0)
                            match = pack(best, index_g, out_ptr.dtype.element_ty == tl.int64)
                        else:
                            match = best.to(out_ptr.dtype.element_ty)
                        tl.store(out_ptr + (out + j_g.to(tl.int64) * P), match, mask=row_mask)


@triton.jit(do_not_specialize=["n"])
def _split_kernel(x_ptr, out_ptr, n, D, BLOCK: tl.constexpr):
    """Grid (blocks of all elements)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    high = nearest_tf32(x)
    out = out_ptr + at + at // D * D
    tl.store(out, high, mask=at < n)
    tl.store(out + D, nearest_tf32(x - high), mask=at < n)


@triton.jit(do_not_specialize=["Bx", "Be", "P", "Q"])
def _cosine_kernel(
    matches_ptr,  # [Bx, Be, P] int64
    x_ptr,  # [Bx P, D]
    e_ptr,  # [Be, Q, D]
    rows_ptr,  # [Bx P] int32, or None
    row_count_ptr,  # [1] int32, or None
    counts_ptr,  # [Be] int32: tokens of e that are left; or None
    Bx,
    Be,
    P,
    Q,
    D,
    LIST_X: tl.constexpr,
    LIST_E: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (row blocks): the cosine of every winner once more, summed as a tree; NaN stays."""
    row, i, l, row_mask = listed_rows(
        rows_ptr, row_count_ptr, tl.program_id(0) * BLOCK_OWN, Bx * P, P, LIST_X, BLOCK_OWN
    )
    samples = Be
    if LIST_X:
        samples = tl.where(tl.program_id(0) * BLOCK_OWN < tl.load(row_count_ptr), Be, 0)
    for j in range(samples):
        won = row_mask
        if LIST_E:
            won &= tl.load(counts_ptr + j + 0 * l) > 0  # a vector: the interpreter takes no scalar here
        at = matches_ptr + (i * Be + j) * P + l
        best, winner = unpack(tl.load(at, mask=won, other=0), True)
        first = tl.cast(j, tl.int64) * Q
        cos = tl.zeros((BLOCK_OWN,), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            x = load_rows(x_ptr, row, won, d, D)
            cos += tl.sum(x * load_rows(e_ptr, first + winner, won, d, D), 1)
        tl.store(at, pack(tl.where(best == best, cos, best), winner, True), mask=won)


def match(x: Tensor, e: Tensor, x_lists: Lists, e_lists: Lists, save: bool, exponential: bool) -> Tensor:
    """Matches or maxima, see above; `exponential` says whether an exponential multiplies their error."""
    (Bx, P, D), (Be, Q, _) = x.shape, e.shape
    *_, rows, row_count = x_lists
    tokens, counts, order, bounds, *_ = e_lists
    kind = match_precision(x)
    again = kind == "tf32x3" or (kind == "ieee" and exponential)
    save |= again
    maxima_dtype = torch.float32 if x.dtype == torch.float32 else torch.float16
    out = torch.empty(Bx, Be, P, dtype=matches_dtype(x, Q) if save else maxima_dtype, device=x.device)

    blocks = "tf32" if kind == "tf32x3" else kind
    M, N, BLOCK_D, warps, stages = choose(MATCH if rows is None and tokens is None else MATCH_LISTED, x, blocks)
    with on_device(x):
        a, b = (_split(x), _split(e)) if kind == "tf32x3" else operands(x, e)
        how = {"PRECISION": "tf32" if blocks == "tf32" else "ieee", "SPLIT": kind == "tf32x3"}
        layout = choose(LAYOUT, x, blocks)
        if counts is not None and layout is not None:
            packed_match(a, b, out, save, x_lists, e_lists, Q, layout, (M, N, BLOCK_D, SUPER, warps, stages), **how)
        for width, first, last in _classes(Q, counts is not None, layout is not None):
            columns, unit = _columns(width, N)
            if PERSISTENT and kind == "half" and rows is None and counts is None and columns // unit > 1:
                persistent_match(a, b, out, save, unit, (M, columns, BLOCK_D, SUPER, warps, stages))
                continue
            tiles = triton.cdiv(Bx * P, M), triton.cdiv(Be, columns // unit)
            launch(
                _match_kernel, (tiles[0] * tiles[1],),
                a, b, rows, row_count, tokens, counts, order, bounds, out, Bx, Be, P, Q, D, *tiles,
                FIRST=first, LAST=last, LIST_X=rows is not None, LIST_E=counts is not None, SAVE=save, UNIT=unit, **how,
                BLOCK_M=M, BLOCK_N=columns, BLOCK_D=BLOCK_D, SUPER=SUPER,
                num_warps=warps, num_stages=stages, **all_registers(x.device),
            )  # fmt: skip
        if again:
            own, width, warps = COSINE
            launch(
                _cosine_kernel, (triton.cdiv(Bx * P, own),), out, x, e, rows, row_count, counts, Bx, Be, P, Q, D,
                LIST_X=rows is not None, LIST_E=counts is not None,
                BLOCK_OWN=own, BLOCK_D=min(width, triton.next_power_of_2(D)), num_warps=warps,
            )  # fmt: skip
    return out


def _classes(Q: int, listed: bool, packed: bool) -> list[tuple[int, int, int]]:
    """Widths of samples of e, and where they begin and end in `bounds`. With `packed` all but wide ones are matched."""
    if not listed:
        return [(Q, 0, 0)]
    if packed:
        return [(Q, 2, 3)] if Q > PACKED else []
    return [(SHORT, 0, 1), (Q, 1, 3)] if Q > SHORT else [(Q, 0, 1)]


def _split(x: Tensor) -> Tensor:
    """x [..., D] -> [..., 2, D]: x rounded to TF32, and what is left of it."""
    out = torch.empty(*x.shape[:-1], 2, x.shape[-1], dtype=x.dtype, device=x.device)
    launch(_split_kernel, (triton.cdiv(x.numel(), 1024),), x, out, x.numel(), x.shape[-1], BLOCK=1024, num_warps=4)
    return out


def _columns(width: int, BLOCK_N: int) -> tuple[int, int]:
    """Columns of a tile, and of a sample in it. A sample too wide to share a tile gets tiles of half the width."""
    unit = next((unit for unit in UNITS if width <= unit and 2 * unit <= BLOCK_N), BLOCK_N // 2)
    return (BLOCK_N if width <= unit else BLOCK_N // 2), unit
