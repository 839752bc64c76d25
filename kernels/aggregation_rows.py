"""Backward of the aggregation where whole rows of scores are one tile (`takes`): scores are made once.

    backward(djoint [B, L, D] float32, image [B, N, D], text [B, L, D], image_mask [B, N] | None, row_sum [B, L],
             sparsity, strict, dimage, dtext, add)     called by aggregation.backward

    rows      one program for each block of tokens of one sample. One loop over D makes s and da = djoint . v of all
              patches; statistics stay in registers; a, ds and dtext are written.

                  patches ->  v_0 .. v_N
              tokens  t_0 [ s, da -> a, ds ]    dtext_l = sum_k ds_lk v_k,  chunk of D after chunk
                      t_1 [                ]

    dimage    one program for each block of patches of one sample and each chunk of D; it loops over tokens:

                  dimage_k = sum_l a_lk djoint_l + ds_lk t_l

    ds = (da - c) / sum u where kept, c = sum_k a_k da_k; the first minimum also gets -sum of those

In memory: a and ds, [B, L, N] each, bfloat16 beside bfloat16 tokens, else float32: float16 has neither the range that
ds needs nor, in the error budget of a gradient that is rounded once, a rounding to spare. Products are 5 times
2 B L N D operations, as few as the equations have.

djoint is float32 always. Beside bfloat16 tokens it is two bfloat16 halves in da and TF32 in a^T djoint; beside float16
tokens TF32 in both, which has all their digits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import BLACKWELL, LARGE, LDS, MEDIUM, SMALL, all_registers, choose, dot_precision, launch, precision
from ._scores import (
    ONE_TILE,
    TOKENS,
    add_patch_gradient,
    add_product,
    add_wide,
    block_of_rows,
    cutoff_of,
    extent,
    extremes,
    inverse_sums,
    kept,
    sample_and_block,
    score_gradient,
    store_gradient,
    threshold_of,
    tokens_end,
    tokens_of,
    weights_of,
)
from ._tile import load_columns, load_rows

BLOCK_L = 16  # tokens of a program of `rows`: 77 fill 80 rows


class Rows(NamedTuple):
    BLOCK_D: int  # of the products over D, as in the forward
    BLOCK_OUT: int  # columns of dtext's tile
    num_warps: int  # beside up to 256 patches; twice as many beside more
    num_stages: int


class Dimage(NamedTuple):
    BLOCK_N: int
    BLOCK_L: int  # tokens at once in the sum
    BLOCK_OUT: int
    num_warps: int
    num_stages: int


# By memory and precision. None: registers spill whatever the blocks, and tiles of long rows do it instead.
ROWS: dict[tuple[str, str], Rows | None] = {
    (LARGE, "half"): Rows(32, 64, 4, 3),
    (LARGE, "tf32"): Rows(16, 32, 4, 3),
    (LARGE, "ieee"): None,
    (BLACKWELL, "tf32"): Rows(16, 16, 4, 3),
    (MEDIUM, "half"): Rows(32, 64, 4, 2),
    (MEDIUM, "tf32"): Rows(16, 32, 4, 2),
    (MEDIUM, "ieee"): Rows(16, 16, 8, 2),
    (SMALL, "half"): Rows(32, 32, 4, 2),
    (SMALL, "tf32"): Rows(16, 16, 4, 2),
    (SMALL, "ieee"): Rows(16, 16, 8, 1),
    (LDS, "half"): Rows(16, 16, 4, 1),
    (LDS, "tf32"): Rows(16, 16, 4, 1),
    (LDS, "ieee"): Rows(16, 16, 8, 1),
}
DIMAGE = {
    (LARGE, "half"): Dimage(64, 16, 128, 4, 3),
    (LARGE, "tf32"): Dimage(64, 16, 128, 4, 3),
    (MEDIUM, "half"): Dimage(64, 16, 128, 4, 3),
    (MEDIUM, "tf32"): Dimage(64, 16, 128, 4, 3),
    (MEDIUM, "ieee"): Dimage(64, 16, 64, 4, 2),
    (SMALL, "half"): Dimage(64, 16, 128, 4, 2),
    (SMALL, "tf32"): Dimage(64, 16, 128, 4, 2),
    (SMALL, "ieee"): Dimage(64, 16, 64, 4, 2),
    (LDS, "half"): Dimage(64, 16, 64, 4, 1),
    (LDS, "tf32"): Dimage(64, 16, 64, 4, 1),
    (LDS, "ieee"): Dimage(64, 16, 64, 4, 1),
}


@triton.jit(do_not_specialize=["L"])
def _rows_kernel(
    djoint_ptr,  # [B, L, D] float32
    image_ptr,  # [B, N, D]
    text_ptr,  # [B, L, D]
    mask_ptr,  # [B, N] bool, or None
    row_sum_ptr,  # [B, L] float32
    a_ptr,  # [B, L, N]
    ds_ptr,  # [B, L, N]
    dtext_ptr,  # [B, L, D]
    sparsity,
    N,
    L,
    D,
    HAS_MASK: tl.constexpr,
    STRICT: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,  # >= N
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Grid (B x token blocks)."""
    b, block = sample_and_block(tl.cdiv(L, BLOCK_L))
    _l, rows, row_mask = block_of_rows(b, block * BLOCK_L, L, BLOCK_L)
    n, patches, exist = block_of_rows(b, 0, N, BLOCK_N)
    tokens = tokens_of(row_sum_ptr, rows, row_mask)
    constant, inverse = inverse_sums(row_sum_ptr, rows, row_mask)
    keep = kept(mask_ptr, patches, exist, N, HAS_MASK)
    # From the program's first token and the sample's first patch on, 32 bits reach: fewer registers than 64.
    l = tl.arange(0, BLOCK_L)
    row = b.to(tl.int64) * L + block * BLOCK_L
    text_ptr += row * D
    djoint_ptr += row * D
    dtext_ptr += row * D
    image_ptr += b.to(tl.int64) * N * D

    s = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    da = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    LEAVE_OUT: tl.constexpr = (text_ptr.dtype.element_ty != tl.float32) or (PRECISION != "ieee")
    width = D
    if LEAVE_OUT:  # in IEEE float32 registers would spill
        width = extent(tokens, D)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        v = load_columns(image_ptr, n, exist, d, D)
        s = add_product(load_rows(text_ptr, l, tokens, d, D), v, s, PRECISION)
        da = add_product(load_rows(djoint_ptr, l, tokens, d, D), v, da, PRECISION)

    low, high, first = extremes(s, n, keep)
    count = tl.sum(keep.to(tl.int32), 0)
    cutoff = cutoff_of(low, high, threshold_of(sparsity, count, STRICT))
    a, passed = weights_of(s, low, cutoff, inverse, keep)
    c = tl.sum(tl.where(passed, a * da, 0.0), 1)
    ds = score_gradient(da, c, inverse, passed)
    ds -= tl.where(n[None, :] == first[:, None], tl.sum(ds, 1)[:, None], 0.0)
    uniform = tl.where(constant, 1.0 / tl.maximum(count, 1), 0.0)
    a = tl.where(constant[:, None] & keep[None, :], uniform[:, None], a)
    at = l[:, None] * N + n[None, :]
    there = row_mask[:, None] & exist[None, :]
    tl.store(a_ptr + row * N + at, a.to(a_ptr.dtype.element_ty), mask=there)
    tl.store(ds_ptr + row * N + at, ds.to(ds_ptr.dtype.element_ty), mask=there)

    for start in range(0, width, BLOCK_OUT):
        d = start + tl.arange(0, BLOCK_OUT)
        v = load_rows(image_ptr, n, keep, d, D)
        dtext = add_wide(ds, v, tl.zeros((BLOCK_L, BLOCK_OUT), tl.float32), PRECISION)
        # A token that its mask leaves out has ds = 0, but a NaN among the patches would show there too.
        store_gradient(dtext_ptr, l, row_mask, d, D, tl.where(tokens[:, None], dtext, 0.0), ADD)
    if LEAVE_OUT and not ADD:
        for start in range(width, D, BLOCK_OUT):
            d = start + tl.arange(0, BLOCK_OUT)
            store_gradient(dtext_ptr, l, row_mask, d, D, tl.zeros((BLOCK_L, BLOCK_OUT), tl.float32), ADD)


@triton.jit(do_not_specialize=["L"])
def _dimage_product_kernel(
    djoint_ptr,  # [B, L, D] float32
    text_ptr,  # [B, L, D]
    mask_ptr,  # [B, N] bool, or None
    row_sum_ptr,  # [B, L] float32
    a_ptr,  # [B, L, N]
    ds_ptr,  # [B, L, N]
    dimage_ptr,  # [B, N, D]
    N,
    L,
    D,
    HAS_MASK: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Grid (B x patch blocks, chunks of D)."""
    b, block = sample_and_block(tl.cdiv(N, BLOCK_N))
    n, patches, exist = block_of_rows(b, block * BLOCK_N, N, BLOCK_N)
    d = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    dimage = tl.zeros((BLOCK_N, BLOCK_OUT), tl.float32)
    for start in range(0, tokens_end(row_sum_ptr, b, L, TOKENS), BLOCK_L):
        _l, rows, row_mask = block_of_rows(b, start, L, BLOCK_L)
        at = n[:, None] + rows[None, :] * N
        there = exist[:, None] & row_mask[None, :]
        a = tl.load(a_ptr + at, mask=there, other=0.0)
        ds = tl.load(ds_ptr + at, mask=there, other=0.0)
        # djoint and text of tokens that are left out meet zeros here, but may be NaN.
        tokens = tokens_of(row_sum_ptr, rows, row_mask)
        djoint = load_rows(djoint_ptr, rows, tokens, d, D)
        text = load_rows(text_ptr, rows, tokens, d, D)
        dimage = add_patch_gradient(a, djoint, ds, text, dimage, PRECISION)
    # Patches that the mask leaves out are written too: their gradient is zero.
    keep = kept(mask_ptr, patches, exist, N, HAS_MASK)
    dimage = tl.where(keep[:, None], dimage, 0.0)  # 0 times a NaN of a token is none
    store_gradient(dimage_ptr, patches, exist, d, D, dimage, ADD)


def takes(image: Tensor) -> bool:
    """Whether rows of this many patches are one tile, on this chip."""
    return image.shape[1] <= ONE_TILE[precision(image.dtype)] and choose(ROWS, image) is not None


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
    dtype = torch.bfloat16 if image.dtype == torch.bfloat16 else torch.float32
    a, ds = (torch.empty(B, L, N, dtype=dtype, device=image.device) for _ in range(2))
    blocks, of_dimage = choose(ROWS, image), choose(DIMAGE, image)
    BLOCK_N = max(16, triton.next_power_of_2(N))
    num_warps = blocks.num_warps * (2 if BLOCK_N > 256 else 1)
    flags = {"PRECISION": dot_precision(image.dtype)}
    launch(
        _rows_kernel, (B * triton.cdiv(L, BLOCK_L),),
        djoint, image, text, image_mask, row_sum, a, ds, dtext, sparsity, N, L, D,
        HAS_MASK=image_mask is not None, STRICT=strict, ADD=add[1], BLOCK_L=BLOCK_L, BLOCK_N=BLOCK_N,
        BLOCK_D=blocks.BLOCK_D, BLOCK_OUT=blocks.BLOCK_OUT,
        num_warps=num_warps, num_stages=blocks.num_stages, **all_registers(image.device, num_warps), **flags,
    )  # fmt: skip
    launch(
        _dimage_product_kernel, (B * triton.cdiv(N, of_dimage.BLOCK_N), triton.cdiv(D, of_dimage.BLOCK_OUT)),
        djoint, text, image_mask, row_sum, a, ds, dimage, N, L, D,
        HAS_MASK=image_mask is not None, ADD=add[0], TOKENS=TOKENS, **of_dimage._asdict(), **flags,
        **all_registers(image.device),
    )  # fmt: skip
