"""de of a match: every token of e adds up the tokens of x that it won, times their weights.

    de(dsim [Bx, Be] float32, matches [Bx, Be, P], x [Bx, P, D], x_lists, e_lists, Q, out [Be, Q, D], accumulate)

    de_jk = sum over the (i, l) that chose k of w_ijl x_il,   w_ijl = dsim_ij p_ijl; `out` may be float32 or x's dtype

Tiles of winners become tiles of weights in registers: de_j [Q, D] += W^T [Q, rows] x [rows, D].
x_lists, e_lists: buffers of token_lists.make, or None.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import token_lists
from ._launch import LARGE, LDS, MEDIUM, SMALL, choose, dot_precision, launch, on_device
from ._matches import listed_rows, unpack
from ._tile import load_rows, nearest_tf32, operands
from .token_lists import SHORT, TokenLists

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
CHAIN = 16  # blocks of rows whose float32 sum is made on its own


@triton.jit(do_not_specialize=["dsim_ptr", "Bx", "Be", "P", "Q"])
def _de_kernel(
    dsim_ptr,  # [Bx, Be] float32
    matches_ptr,  # [Bx, Be, P] int32 or int64
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
    LIST_X: tl.constexpr,
    LIST_E: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """Grid (Be, token blocks, chunks of D): de_jk = sum over the (i, l) that chose k of w_ijl x_il."""
    WIDE: tl.constexpr = matches_ptr.dtype.element_ty == tl.int64
    j = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    count = Q
    if LIST_E:
        count = tl.load(counts_ptr + j)
    k = index
    if LIST_E:
        k = tl.load(tokens_ptr + j * Q + index, mask=index < Q, other=-2)
    d = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row_total = Bx * P
    if LIST_X:
        row_total = tl.load(row_count_ptr)
    row_total = tl.where(tl.program_id(1) * BLOCK_OWN < count, row_total, 0)
    de = tl.zeros((BLOCK_OWN, BLOCK_OUT), tl.float32)
    total = tl.zeros((BLOCK_OWN, BLOCK_OUT), tl.float32)
    IEEE: tl.constexpr = x_ptr.dtype.element_ty == tl.float32 and PRECISION == "ieee"
    for start in range(0, row_total, BLOCK_SUM):
        row, i, l, row_mask = listed_rows(rows_ptr, row_count_ptr, start, Bx * P, P, LIST_X, BLOCK_SUM)
        weight, winner = unpack(tl.load(matches_ptr + (i * Be + j) * P + l, mask=row_mask, other=-1), WIDE)
        w = tl.where(winner >= 0, weight * tl.load(dsim_ptr + i * Be + j, mask=row_mask, other=0.0), 0.0)
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
    mask = (index < Q)[:, None] & (d < D)[None, :]
    if ACCUMULATE:
        de += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, de.to(de_ptr.dtype.element_ty), mask=mask)


def de(
    dsim: Tensor,
    matches: Tensor,
    x: Tensor,
    x_lists: Tensor | None,
    e_lists: Tensor | None,
    Q: int,
    out: Tensor,
    accumulate: bool,
) -> None:
    """Writes all of `out`, zeros where masked out, or adds to it."""
    (Bx, Be, P), D = matches.shape, x.shape[-1]
    none: tuple[None, ...] = (None,) * len(TokenLists._fields)
    _, x_counts, _, _, rows, row_count = none if x_lists is None else token_lists.sections(x_lists, Bx, P)
    tokens, counts, *_ = none if e_lists is None else token_lists.sections(e_lists, Be, Q)
    own, block_sum, width, warps, stages = choose(DE, x)
    if own > 64 and (Q <= SHORT or tokens is not None):
        own, warps = own // 2, warps // 2  # short samples leave whole blocks of tokens out
    with on_device(x):
        in_range, unscale = _into_range(dsim, x, x_counts)
        launch(
            _de_kernel, (Be, triton.cdiv(Q, own), triton.cdiv(D, width)),
            in_range.contiguous(), matches, *operands(x), rows, row_count, tokens, counts, unscale, out,
            Bx, Be, P, Q, D,
            LIST_X=rows is not None, LIST_E=tokens is not None, ACCUMULATE=accumulate,
            PRECISION=dot_precision(x.dtype), BLOCK_OWN=own, BLOCK_SUM=block_sum, BLOCK_OUT=width, CHAIN=CHAIN,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


def _into_range(dsim: Tensor, tokens: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """dsim with the largest entry of each column in [1/2, 1), and the factors that undo it; float16 alone needs it.

    A gradient is a sum of `tokens` [Bx, T, D], weighted by dsim in their dtype. Samples without a token left
    or with zero vectors alone add nothing to it, and their dsim, which may be large without bound, counts as 0.
    """
    if tokens.dtype != torch.float16:
        return dsim, None
    nothing = torch.linalg.vector_norm(tokens, torch.inf, dim=(1, 2)) == 0
    if counts is not None:
        nothing |= counts == 0
    dsim = dsim.masked_fill(nothing.unsqueeze(1) & dsim.isfinite(), 0)
    largest = dsim.nan_to_num(0, 0, 0).abs().amax(0, keepdim=True)
    exponent = torch.frexp(largest)[1].clamp(-120, 120)
    one = torch.ones_like(largest)
    return dsim * torch.ldexp(one, -exponent), torch.ldexp(one, exponent)
