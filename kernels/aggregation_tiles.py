"""Backward of the aggregation where rows of scores are not one tile (aggregation_rows.takes): scores are made again.

    backward(djoint [B, L, D] float32, image [B, N, D], text [B, L, D], image_mask [B, N] | None, row_sum [B, L],
             sparsity, strict, dimage, dtext, add)     called by aggregation.backward

    statistics   one program for each block of tokens: minimum, cutoff, ..., O(B L) numbers
    dtext        one program for each block of tokens and chunk of D; it loops over patches
    dimage       one program for each block of patches and chunk of D; it loops over tokens

Each makes tiles of s and da = djoint . v again, so that nothing of [B, L, N] is in memory:

    ds = (da - c) / sum u where kept, c = sum_k a_k da_k; the first minimum also gets -sum of those
    dtext_l = sum_k ds_lk v_k           dimage_k = sum_l a_lk djoint_l + ds_lk t_l
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import LARGE, LDS, MEDIUM, SMALL, all_registers, choose, dot_precision, launch
from ._scores import (
    SCORE_TILES,
    TOKENS,
    add_patch_gradient,
    add_wide,
    block_of_rows,
    cutoff_of,
    extent,
    inverse_sums,
    kept,
    row_extremes,
    sample_and_block,
    score_gradient,
    scores,
    store_gradient,
    threshold_of,
    tokens_end,
    tokens_of,
    weights_of,
)
from ._tile import load_rows

STATISTICS = 6  # per row: minimum, cutoff, 1 / sum u, uniform weight, c, what ds at the minimum is reduced by
STATISTICS_L = 16  # the statistics kernel loops over patches twice and keeps more registers


class Backward(NamedTuple):
    BLOCK_D: int  # of the products over D
    BLOCK_OUT: int  # columns of a gradient's tile
    num_warps: int
    num_stages: int


# By memory and precision.
BACKWARD = {
    (LARGE, "half"): Backward(32, 128, 8, 3),
    (LARGE, "tf32"): Backward(32, 128, 8, 3),
    (LARGE, "ieee"): Backward(16, 128, 8, 2),
    (MEDIUM, "half"): Backward(32, 128, 8, 2),
    (MEDIUM, "tf32"): Backward(32, 128, 8, 2),
    (MEDIUM, "ieee"): Backward(16, 64, 8, 2),
    (SMALL, "half"): Backward(32, 128, 8, 2),
    (SMALL, "tf32"): Backward(16, 64, 8, 2),
    (SMALL, "ieee"): Backward(16, 64, 8, 2),
    (LDS, "half"): Backward(32, 32, 8, 1),
    (LDS, "tf32"): Backward(16, 32, 8, 1),
    (LDS, "ieee"): Backward(16, 64, 8, 1),
}


@triton.jit(do_not_specialize=["L", "BL"])
def _statistics_kernel(
    djoint_ptr,  # [B, L, D] float32
    image_ptr,  # [B, N, D]
    text_ptr,  # [B, L, D]
    mask_ptr,  # [B, N] bool, or None
    row_sum_ptr,  # [B, L] float32
    statistics_ptr,  # [STATISTICS, B, L] float32
    first_ptr,  # [B, L] int32: the first minimum
    sparsity,
    N,
    L,
    D,
    BL,  # B * L
    HAS_MASK: tl.constexpr,
    STRICT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (B x token blocks): all that a row must know before its gradients can be recomputed tile by tile."""
    b, block = sample_and_block(tl.cdiv(L, BLOCK_L))
    _l, rows, row_mask = block_of_rows(b, block * BLOCK_L, L, BLOCK_L)
    tokens = tokens_of(row_sum_ptr, rows, row_mask)
    constant, inverse = inverse_sums(row_sum_ptr, rows, row_mask)

    depth = extent(tokens, N)
    low, high, first, count = row_extremes(
        text_ptr, rows, tokens, image_ptr, mask_ptr, b, depth, N, D, HAS_MASK, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D
    )
    cutoff = cutoff_of(low, high, threshold_of(sparsity, count, STRICT))
    c = tl.zeros((BLOCK_L,), tl.float32)
    kept_da = tl.zeros((BLOCK_L,), tl.float32)
    many = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(0, depth, BLOCK_N):
        _n, patches, exist = block_of_rows(b, start, N, BLOCK_N)
        keep = kept(mask_ptr, patches, exist, N, HAS_MASK)
        s = scores(text_ptr, rows, tokens, image_ptr, patches, exist, D, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
        da = scores(djoint_ptr, rows, tokens, image_ptr, patches, exist, D, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
        a, passed = weights_of(s, low, cutoff, inverse, keep)
        c += tl.sum(tl.where(passed, a * da, 0.0), 1)
        kept_da += tl.sum(tl.where(passed, da, 0.0), 1)
        many += tl.sum(passed.to(tl.float32), 1)

    out = statistics_ptr + rows
    BL = BL.to(tl.int64)
    tl.store(out, tl.where(inverse == 0, 0.0, low), mask=row_mask)
    tl.store(out + BL, cutoff, mask=row_mask)
    tl.store(out + 2 * BL, inverse, mask=row_mask)
    tl.store(out + 3 * BL, tl.where(constant, 1.0 / tl.maximum(count, 1), 0.0), mask=row_mask)
    tl.store(out + 4 * BL, c, mask=row_mask)
    tl.store(out + 5 * BL, (kept_da - many * c) * inverse, mask=row_mask)
    tl.store(first_ptr + rows, first, mask=row_mask)


@triton.jit
def _of_rows(s, da, n, keep, rows, row_mask, statistics_ptr, first_ptr, BL):
    """Tiles of a and ds from tiles of s and da and the statistics of their rows."""
    at = statistics_ptr + rows
    low = tl.load(at, mask=row_mask, other=0.0)
    cutoff = tl.load(at + BL, mask=row_mask, other=0.0)
    inverse = tl.load(at + 2 * BL, mask=row_mask, other=0.0)
    uniform = tl.load(at + 3 * BL, mask=row_mask, other=0.0)
    c = tl.load(at + 4 * BL, mask=row_mask, other=0.0)
    at_minimum = tl.load(at + 5 * BL, mask=row_mask, other=0.0)
    first = tl.load(first_ptr + rows, mask=row_mask, other=-1)
    a, passed = weights_of(s, low, cutoff, inverse, keep)
    a = tl.where(passed, a, tl.where(keep[None, :], uniform[:, None], 0.0))
    ds = score_gradient(da, c, inverse, passed)
    ds -= tl.where(n[None, :] == first[:, None], at_minimum[:, None], 0.0)
    return a, ds


@triton.jit(do_not_specialize=["L", "BL"])
def _dtext_kernel(
    djoint_ptr,  # [B, L, D] float32
    image_ptr,  # [B, N, D]
    text_ptr,  # [B, L, D]
    mask_ptr,  # [B, N] bool, or None
    row_sum_ptr,  # [B, L] float32
    statistics_ptr,  # [STATISTICS, B, L] float32
    first_ptr,  # [B, L] int32
    dtext_ptr,  # [B, L, D]
    N,
    L,
    D,
    BL,
    HAS_MASK: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Grid (B x token blocks, chunks of D): dtext_l = sum_k ds_lk v_k, tile of patches after tile."""
    b, block = sample_and_block(tl.cdiv(L, BLOCK_L))
    _l, rows, row_mask = block_of_rows(b, block * BLOCK_L, L, BLOCK_L)
    tokens = tokens_of(row_sum_ptr, rows, row_mask)
    d = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    dtext = tl.zeros((BLOCK_L, BLOCK_OUT), tl.float32)
    for start in range(0, extent(tokens, N), BLOCK_N):
        n, patches, exist = block_of_rows(b, start, N, BLOCK_N)
        s = scores(text_ptr, rows, tokens, image_ptr, patches, exist, D, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
        da = scores(djoint_ptr, rows, tokens, image_ptr, patches, exist, D, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
        keep = kept(mask_ptr, patches, exist, N, HAS_MASK)  # before the products it spills registers
        _a, ds = _of_rows(s, da, n, keep, rows, row_mask, statistics_ptr, first_ptr, BL.to(tl.int64))
        dtext = add_wide(ds, load_rows(image_ptr, patches, keep, d, D), dtext, PRECISION)
    # A token that its mask leaves out has ds = 0, but a NaN among the patches would show there too.
    store_gradient(dtext_ptr, rows, row_mask, d, D, tl.where(tokens[:, None], dtext, 0.0), ADD)


@triton.jit(do_not_specialize=["L", "BL"])
def _dimage_kernel(
    djoint_ptr,  # [B, L, D] float32
    image_ptr,  # [B, N, D]
    text_ptr,  # [B, L, D]
    mask_ptr,  # [B, N] bool, or None
    row_sum_ptr,  # [B, L] float32
    statistics_ptr,  # [STATISTICS, B, L] float32
    first_ptr,  # [B, L] int32
    dimage_ptr,  # [B, N, D]
    N,
    L,
    D,
    BL,
    HAS_MASK: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Grid (B x patch blocks, chunks of D): dimage_k = sum_l a_lk djoint_l + ds_lk t_l, tile of tokens after tile."""
    b, block = sample_and_block(tl.cdiv(N, BLOCK_N))
    n, patches, exist = block_of_rows(b, block * BLOCK_N, N, BLOCK_N)
    keep = kept(mask_ptr, patches, exist, N, HAS_MASK)
    d = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    dimage = tl.zeros((BLOCK_N, BLOCK_OUT), tl.float32)
    for start in range(0, tokens_end(row_sum_ptr, b, L, TOKENS), BLOCK_L):
        _l, rows, row_mask = block_of_rows(b, start, L, BLOCK_L)
        tokens = tokens_of(row_sum_ptr, rows, row_mask)
        s = scores(text_ptr, rows, tokens, image_ptr, patches, exist, D, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
        da = scores(djoint_ptr, rows, tokens, image_ptr, patches, exist, D, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
        a, ds = _of_rows(s, da, n, keep, rows, row_mask, statistics_ptr, first_ptr, BL.to(tl.int64))
        djoint = load_rows(djoint_ptr, rows, tokens, d, D)
        text = load_rows(text_ptr, rows, tokens, d, D)
        dimage = add_patch_gradient(tl.trans(a), djoint, tl.trans(ds), text, dimage, PRECISION)
    # Patches that the mask leaves out are written too: their gradient is zero.
    dimage = tl.where(keep[:, None], dimage, 0.0)  # 0 times a NaN of a token is none
    store_gradient(dimage_ptr, patches, exist, d, D, dimage, ADD)


def backward(
    djoint: Tensor,
    image: Tensor,
    text: Tensor,
    image_mask: Tensor | None,
    row_sum: Tensor,
    sparsity: float,
    strict: bool,
    dimage: Tensor,
    dtext: Tensor,
    add: tuple[bool, bool],
) -> None:
    """Writes dimage and dtext, or adds to them: `add`. All tensors are contiguous; operands are rounded."""
    (B, N, D), L = image.shape, text.shape[1]
    statistics = torch.empty(STATISTICS, B, L, dtype=torch.float32, device=image.device)
    first = torch.empty(B, L, dtype=torch.int32, device=image.device)
    blocks = choose(BACKWARD, image)
    flags = {
        "HAS_MASK": image_mask is not None, "PRECISION": dot_precision(image.dtype),
        **SCORE_TILES, "BLOCK_D": blocks.BLOCK_D, "num_warps": blocks.num_warps, "num_stages": blocks.num_stages,
        **all_registers(image.device),
    }  # fmt: skip
    inputs = djoint, image, text, image_mask, row_sum, statistics, first
    sizes = N, L, D, B * L
    out, chunks = {"BLOCK_OUT": blocks.BLOCK_OUT}, triton.cdiv(D, blocks.BLOCK_OUT)
    tokens, patches = B * triton.cdiv(L, SCORE_TILES["BLOCK_L"]), B * triton.cdiv(N, SCORE_TILES["BLOCK_N"])
    launch(
        _statistics_kernel, (B * triton.cdiv(L, STATISTICS_L),), *inputs, sparsity, *sizes,
        STRICT=strict, **flags | {"BLOCK_L": STATISTICS_L},
    )  # fmt: skip
    launch(_dtext_kernel, (tokens, chunks), *inputs, dtext, *sizes, ADD=add[1], **out, **flags)
    launch(_dimage_kernel, (patches, chunks), *inputs, dimage, *sizes, ADD=add[0], TOKENS=TOKENS, **out, **flags)
