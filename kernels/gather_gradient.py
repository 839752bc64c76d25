"""dx of a match: every token of x gathers the tokens that won for it; with tokens given, through the normalisation.

    dx(dsim [Bx, Be] float32, matches [Bx, Be, P], e [Be, Q, D], rows, row_count, out [Bx, P, D], tokens, inverse)

    dx_il = sum_j w_ijl e_jk*,   w_ijl = dsim_ij p_ijl,   p and the winner k* from `matches` (pool.py made them)

With the tokens t [Bx, P, D] of which x = t / |t| are the unit rows, and `inverse` [Bx, P] = 1 / |t|, the result is the
gradient of t: (dx - x (x . dx)) / |t|, with x in float32 (unit_rows.py says why).
rows, row_count: tokens of x that a mask leaves (token_lists.py), or None; the others get zeros.

A row gathers one e_jk* a sample: Q times fewer operations than the match. A program has all of D of its rows, so that
a match is read once and the normalisation is an epilogue: two rows of 512 numbers or one of 1024 in a warp, a wider
one in several. Sums are float32, of float32 tokens CHAIN samples at a time: one chain over a large batch would lose a
digit. Deterministic: see CONTRIBUTING.md, "A kernel file".
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import LARGE, all_registers, choose, launch, on_device
from ._matches import listed_rows, unpack
from ._tile import load_rows

# (BLOCK_OWN rows of dx, their numbers BLOCK_D, num_warps, UNROLL samples whose loads are made together)
DX = {
    (LARGE, "half"): (1, 512, 1, 2),
    (LARGE, "tf32"): (2, 512, 1, 1),
    (LARGE, "ieee"): (2, 512, 1, 1),
}
WIDE_ROW = 1024  # numbers of a row of more than BLOCK_D that one warp has; a row is a program's
MOST_WARPS = 16
CHAIN = 16  # samples whose float32 sum is made on its own


@triton.jit(do_not_specialize=["dsim_ptr", "Bx", "Be", "P", "Q"])
def _dx_kernel(
    dsim_ptr,  # [Bx, Be] float32
    matches_ptr,  # [Bx, Be, P] int32 or int64
    e_ptr,  # [Be, Q, D]
    rows_ptr,  # [Bx P] int32: the tokens that are left first, then the others; or None
    row_count_ptr,  # [1] int32: how many are left; or None
    tokens_ptr,  # [Bx P, D], or None
    inverse_ptr,  # [Bx P] float32, or None
    dx_ptr,  # [Bx P, D]
    Bx,
    Be,
    P,
    Q,
    D: tl.constexpr,  # addresses are a third of the instructions, half of them where it is known
    LIST_X: tl.constexpr,
    NORMALISED: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """Grid (row blocks): dx_il = sum_j w_ijl e_jk*."""
    WIDE: tl.constexpr = matches_ptr.dtype.element_ty == tl.int64
    CHAINED: tl.constexpr = e_ptr.dtype.element_ty == tl.float32
    start = tl.program_id(0) * BLOCK_OWN
    row, i, l, row_mask = listed_rows(rows_ptr, row_count_ptr, start, Bx * P, P, LIST_X, BLOCK_OWN)
    d = tl.arange(0, BLOCK_D)
    dx = tl.zeros((BLOCK_OWN, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_OWN, BLOCK_D), tl.float32)
    inside = None
    other = None
    if D < BLOCK_D:  # a sum over all of a row follows: what is beyond it must not be NaN
        inside = (d < D)[None, :]
        other = 0.0
    samples = Be
    if LIST_X:
        samples = tl.where(start < tl.load(row_count_ptr), Be, 0)
    pair = dsim_ptr + i * Be
    match = matches_ptr + i * Be * P + l
    tokens = e_ptr
    for j in tl.range(0, samples, loop_unroll_factor=UNROLL):
        weight, winner = unpack(tl.load(match, mask=row_mask, other=-1), WIDE)
        # Where nothing won any token stands in: it is finite, or the row gets zeros. A mask would cost an instruction
        # for every four numbers.
        token = tl.maximum(winner, 0).to(tl.int64)[:, None] * D + d[None, :]
        e = tl.load(tokens + token, mask=inside, other=other).to(tl.float32)
        w = tl.where(winner >= 0, tl.load(pair, mask=row_mask, other=0.0) * weight, 0.0)
        dx += w[:, None] * e
        match += P
        pair += 1
        tokens += tl.cast(Q, tl.int64) * D
        if CHAINED:  # noqa: SIM102, settled when compiled
            if (j + 1) % CHAIN == 0:
                total += dx
                dx = tl.zeros((BLOCK_OWN, BLOCK_D), tl.float32)
    if CHAINED:
        dx += total
    if NORMALISED:
        inverse = tl.load(inverse_ptr + row, mask=row_mask, other=0.0)[:, None]
        unit = load_rows(tokens_ptr, row, row_mask, d, D).to(tl.float32) * inverse
        dx -= unit * tl.sum(unit * dx, 1)[:, None]
        dx *= inverse
    if LIST_X:  # the others get zeros: whatever token stood in, it may have been NaN
        dx = tl.where(row_mask[:, None], dx, 0.0)
        exists = start + tl.arange(0, BLOCK_OWN) < Bx * P
        row = tl.load(rows_ptr + start + tl.arange(0, BLOCK_OWN), mask=exists, other=0).to(tl.int64)
        row_mask = exists
    out = dx_ptr + row[:, None] * D + d[None, :]
    tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=row_mask[:, None] & (d < D)[None, :])


def dx(
    dsim: Tensor,
    matches: Tensor,
    e: Tensor,
    rows: Tensor | None,
    row_count: Tensor | None,
    out: Tensor,
    tokens: Tensor | None = None,
    inverse: Tensor | None = None,
) -> Tensor:
    """Writes all of `out`."""
    (Bx, Be, P), (_, Q, D) = matches.shape, e.shape
    own, width, warps, unroll = choose(DX, e)
    if D <= width:
        width = min(width, triton.next_power_of_2(D))
    else:
        own, width = 1, triton.next_power_of_2(D)
        warps = min(max(1, width // WIDE_ROW), MOST_WARPS)
    with on_device(e):
        launch(
            _dx_kernel, (triton.cdiv(Bx * P, own),),
            dsim, matches, e, rows, row_count, tokens, inverse, out, Bx, Be, P, Q,
            D=D, LIST_X=rows is not None, NORMALISED=tokens is not None, BLOCK_OWN=own, BLOCK_D=width, UNROLL=unroll,
            CHAIN=CHAIN, num_warps=warps, **(all_registers(e.device) if e.element_size() == 2 else {}),
        )  # fmt: skip
    return out
