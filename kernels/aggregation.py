"""Sparse token-patch aggregation: [B, L, N] scores, weights and their gradients exist in registers only.

    forward(image_tokens [B, N, D], text_tokens [B, L, D], image_mask [B, N] | None, threshold [B] float32)
        -> joint [B, L, D], row_min [B, L], row_sum [B, L], all float32
    backward(djoint [B, L, D] float32, image_tokens, text_tokens, image_mask, threshold, row_min, row_sum)
        -> dimage_tokens, dtext_tokens, in the inputs' dtype

    s = t . v    u = s - min s where (s - min s) / (max s - min s) >= threshold, else 0    joint = sum_k u_k v_k / sum u

    forward      one program for each block of tokens of one sample. Up to 512 patches (256 in IEEE float32) whole rows
                 of scores are one tile. With more, one loop over tiles of patches finds minimum and maximum, and a
                 second one aggregates a chunk of D.

                     patches ->  v_0 .. v_N        d chunk
                 tokens  t_0 [ s -> u       ]  @  [ v ]  ->  joint
                         t_1 [              ]

    backward     statistics of every row, O(B L) numbers. Then one launch for each gradient, one program for each block
                 of dtext (it loops over patches) or of dimage (over tokens); both recompute s and da = djoint . v:

                     ds = (da - c) / sum u where kept, c = sum_k a_k da_k; the first minimum also gets -sum of those
                     dtext_l = sum_k ds_lk v_k           dimage_k = sum_l a_lk djoint_l + ds_lk t_l

    grid         axis 0: blocks of tokens or patches, sample after sample, as it may have 2^31 - 1 programs and axis 1
                 only 65535. Axis 1: chunks of D.

Deterministic: see CONTRIBUTING.md, "A kernel file". A row whose range is rounding noise is constant: uniform weights,
no gradient through s; row_sum = 0 marks it. A NaN or an infinity among its scores, or a range or a sum that overflows,
makes this row NaN and no other. Image tokens that the mask leaves out must be finite.

The launchers take tensors of any strides and make them contiguous; results are contiguous. Kernels read image_mask as
int32: with loads of 8 bits Triton chooses a layout in which the products take twice the instructions. L and B L vary
from batch to batch and are not specialised: another caption length compiles nothing new.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import LARGE, LDS, MEDIUM, SMALL, all_registers, choose, dot_precision, launch, on_device, precision
from ._tile import BIG, dot_wide, load_columns, load_rows, operands

NOISE = tl.constexpr(8 * 1.1920929e-07)  # a range of up to 8 roundings of the largest entry is noise
LARGEST_SUM = tl.constexpr(2.0**126)  # the inverse of a larger one is no normal number
STATISTICS = 6  # per row: minimum, cutoff, 1 / sum u, uniform weight, c, what ds at the minimum is reduced by
# Patches whose scores fit into one tile; without tensor cores a product takes more registers.
ONE_TILE = {"half": 512, "tf32": 512, "ieee": 256}

# Tiles of scores [BLOCK_L, BLOCK_N] have fewer than 64 rows, so that all of them come from the same matrix instruction.
SCORE_TILES = {"BLOCK_L": 32, "BLOCK_N": 64}
STATISTICS_L = 16  # the statistics kernel loops over patches twice and keeps more registers


class Forward(NamedTuple):
    BLOCK_D: int  # of the products over D
    WHOLE_OUT: int  # BLOCK_OUT, the columns of a result's tile, beside whole rows of scores
    TILES_OUT: int  # BLOCK_OUT beside tiles of scores
    num_warps: int
    num_stages: int


class Backward(NamedTuple):
    BLOCK_D: int  # of the products over D
    BLOCK_OUT: int  # columns of a gradient's tile
    num_warps: int
    num_stages: int


# By memory and precision.
FORWARD = {
    (LARGE, "half"): Forward(64, 64, 128, 8, 3),
    (LARGE, "tf32"): Forward(32, 32, 128, 8, 3),
    (LARGE, "ieee"): Forward(16, 32, 128, 8, 2),
    (MEDIUM, "half"): Forward(64, 64, 128, 8, 2),
    (MEDIUM, "tf32"): Forward(32, 32, 128, 8, 2),
    (MEDIUM, "ieee"): Forward(16, 32, 64, 8, 2),
    (SMALL, "half"): Forward(32, 32, 128, 8, 2),
    (SMALL, "tf32"): Forward(16, 16, 64, 8, 2),
    (SMALL, "ieee"): Forward(16, 32, 64, 8, 2),
    (LDS, "half"): Forward(32, 16, 64, 8, 1),
    (LDS, "tf32"): Forward(16, 16, 64, 8, 1),
    (LDS, "ieee"): Forward(16, 16, 64, 8, 1),
}
BACKWARD = {
    (LARGE, "half"): Backward(64, 128, 4, 3),
    (LARGE, "tf32"): Backward(32, 128, 8, 3),
    (LARGE, "ieee"): Backward(16, 128, 8, 2),
    (MEDIUM, "half"): Backward(64, 128, 8, 2),
    (MEDIUM, "tf32"): Backward(32, 128, 8, 2),
    (MEDIUM, "ieee"): Backward(16, 64, 8, 2),
    (SMALL, "half"): Backward(32, 128, 8, 2),
    (SMALL, "tf32"): Backward(16, 64, 8, 2),
    (SMALL, "ieee"): Backward(16, 64, 8, 2),
    (LDS, "half"): Backward(32, 32, 8, 1),
    (LDS, "tf32"): Backward(16, 32, 8, 1),
    (LDS, "ieee"): Backward(16, 64, 8, 1),
}


def score_tile(N: int, kind: str) -> dict[str, int]:
    """[BLOCK_L, BLOCK_N] that holds whole rows of N <= ONE_TILE scores."""
    BLOCK_N = max(16, triton.next_power_of_2(N))
    return {"BLOCK_L": 32 if 2 * BLOCK_N <= ONE_TILE[kind] else 16, "BLOCK_N": BLOCK_N}


@triton.jit
def _products(
    a_ptr,  # [., D]
    a_rows,  # [BLOCK_L] int64
    a_mask,  # [BLOCK_L]
    v_ptr,  # [., D]
    v_rows,  # [BLOCK_N] int64
    v_mask,  # [BLOCK_N]
    D,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_L, BLOCK_N] of a . v. One order of summation everywhere: what is recomputed is what was computed."""
    s = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a = load_rows(a_ptr, a_rows, a_mask, d, D)
        v = load_columns(v_ptr, v_rows, v_mask, d, D)
        if a.dtype == v.dtype:
            s = tl.dot(a, v, s, input_precision=PRECISION)
        else:
            s = dot_wide(a, v, s, PRECISION)
    return s


@triton.jit
def _sample_and_block(blocks):
    """Which sample, and which of its blocks, a program of axis 0 has: the blocks of one sample are neighbours."""
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks


@triton.jit
def _patches(b, start, N, BLOCK_N: tl.constexpr):
    """Indices of a tile of patches, their rows among all patches, and which exist."""
    n = start + tl.arange(0, BLOCK_N)
    return n, b.to(tl.int64) * N + n, n < N


@triton.jit
def _kept(mask_ptr, patches, exist, HAS_MASK: tl.constexpr):
    """Which patches are kept. All that exist are loaded: the tokens do not wait for the mask."""
    keep = exist
    if HAS_MASK:
        keep = tl.load(mask_ptr + patches, mask=exist, other=0) != 0
    return keep


@triton.jit
def _extremes(s, n, keep):
    """Minimum, maximum and first minimum of every row. Both pass over a NaN, which shows in sums of s - minimum."""
    low = tl.min(tl.where(keep[None, :], s, float("inf")), 1)
    high = tl.max(tl.where(keep[None, :], s, -float("inf")), 1)
    first = tl.min(tl.where((s == low[:, None]) & keep[None, :], n[None, :], BIG), 1)
    return low, high, first


@triton.jit
def _row_extremes(
    text_ptr, text_rows, text_mask, image_ptr, mask_ptr, b, N, D,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`_extremes` of whole rows, tile after tile, and the number of patches kept."""
    low = tl.full((BLOCK_L,), float("inf"), tl.float32)
    high = tl.full((BLOCK_L,), -float("inf"), tl.float32)
    first = tl.full((BLOCK_L,), BIG, tl.int32)
    count = tl.zeros((BLOCK_L,), tl.int32)
    for start in range(0, N, BLOCK_N):
        n, rows, exist = _patches(b, start, N, BLOCK_N)
        keep = _kept(mask_ptr, rows, exist, HAS_MASK)
        s = _products(text_ptr, text_rows, text_mask, image_ptr, rows, exist, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
        tile_low, tile_high, tile_first = _extremes(s, n, keep)
        first = tl.where(tile_low < low, tile_first, first)
        low = tl.minimum(low, tile_low)
        high = tl.maximum(high, tile_high)
        count += tl.sum(keep.to(tl.int32), 0)
    return low, high, first, count


@triton.jit
def _is_constant(low, high):
    """The range is rounding noise, or there is no patch at all (low > high). One that overflows is not."""
    span = high - low
    return (span <= tl.maximum(tl.abs(low), tl.abs(high)) * NOISE) & (span < float("inf"))


@triton.jit
def _cutoff(low, high, threshold):
    """The smallest u whose u / span, rounded to nearest, is not below the threshold: a division per row, not per patch.

    threshold * span lies within a few numbers of it.
    """
    span = high - low
    near = threshold * span
    cutoff = near
    for step in tl.static_range(4):
        u = (near.to(tl.int32, bitcast=True) + (1 - step)).to(tl.float32, bitcast=True)
        cutoff = tl.where(tl.div_rn(u, span) >= threshold, u, cutoff)
    return tl.where(span > 0, cutoff, 0.0)


@triton.jit
def _passed(u, cutoff, keep):
    """ "Not below" rather than "at or above": a NaN passes and shows."""
    below = u < cutoff[:, None]
    return keep[None, :] & (below == 0)


@triton.jit
def _finite_or_nan(total):
    return tl.where(total <= LARGEST_SUM, total, float("nan"))


@triton.jit(do_not_specialize=["L"])
def _forward_kernel(
    image_ptr,  # [B, N, D]
    text_ptr,  # [B, L, D]
    mask_ptr,  # [B, N] int32, or None
    threshold_ptr,  # [B] float32
    joint_ptr,  # [B, L, D] float32
    row_min_ptr,  # [B, L] float32
    row_sum_ptr,  # [B, L] float32; 0 marks a constant row
    N,
    L,
    D,
    HAS_MASK: tl.constexpr,
    WHOLE_ROW: tl.constexpr,  # N <= BLOCK_N
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Grid (B x token blocks, 1 | chunks of D)."""
    b, block = _sample_and_block(tl.cdiv(L, BLOCK_L))
    l = block * BLOCK_L + tl.arange(0, BLOCK_L)
    row_mask = l < L
    rows = b.to(tl.int64) * L + l
    threshold = tl.load(threshold_ptr + b)

    if WHOLE_ROW:
        n, patches, exist = _patches(b, 0, N, BLOCK_N)
        keep = _kept(mask_ptr, patches, exist, HAS_MASK)
        s = _products(text_ptr, rows, row_mask, image_ptr, patches, exist, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
        low, high, _first = _extremes(s, n, keep)
        count = tl.sum(keep.to(tl.int32), 0)
        u = s - low[:, None]
        u = tl.where(_passed(u, _cutoff(low, high, threshold), keep), u, 0.0)
        total = _finite_or_nan(tl.sum(u, 1))
        constant = _is_constant(low, high) & (total == total)
        a = u / tl.where(constant, 1.0, total)[:, None]
        uniform = tl.where(keep, 1.0 / tl.maximum(count, 1), 0.0)
        a = tl.where(constant[:, None], uniform[None, :], a)
        for start in range(0, D, BLOCK_OUT):
            d = start + tl.arange(0, BLOCK_OUT)
            v = load_rows(image_ptr, patches, exist, d, D)
            joint = dot_wide(a, v, tl.zeros((BLOCK_L, BLOCK_OUT), tl.float32), PRECISION)
            tl.store(joint_ptr + rows[:, None] * D + d[None, :], joint, mask=row_mask[:, None] & (d < D)[None, :])
    else:
        low, high, _first, count = _row_extremes(
            text_ptr, rows, row_mask, image_ptr, mask_ptr, b, N, D, HAS_MASK, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D
        )
        constant = _is_constant(low, high)
        cutoff = _cutoff(low, high, threshold)
        d = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        joint = tl.zeros((BLOCK_L, BLOCK_OUT), tl.float32)
        total = tl.zeros((BLOCK_L,), tl.float32)
        for start in range(0, N, BLOCK_N):
            _n, patches, exist = _patches(b, start, N, BLOCK_N)
            s = _products(text_ptr, rows, row_mask, image_ptr, patches, exist, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
            keep = _kept(mask_ptr, patches, exist, HAS_MASK)  # before the products it spills a register
            u = s - low[:, None]
            u = tl.where(_passed(u, cutoff, keep), u, 0.0)
            total += tl.sum(u, 1)
            u = tl.where(constant[:, None], keep[None, :].to(tl.float32), u)
            joint = dot_wide(u, load_rows(image_ptr, patches, exist, d, D), joint, PRECISION)
        total = _finite_or_nan(total)
        constant = constant & (total == total)
        joint /= tl.where(constant, tl.maximum(count, 1).to(tl.float32), total)[:, None]
        tl.store(joint_ptr + rows[:, None] * D + d[None, :], joint, mask=row_mask[:, None] & (d < D)[None, :])

    if tl.program_id(1) == 0:
        tl.store(row_min_ptr + rows, tl.where(count == 0, 0.0, low), mask=row_mask)
        tl.store(row_sum_ptr + rows, tl.where(constant, 0.0, total), mask=row_mask)


@triton.jit(do_not_specialize=["L", "BL"])
def _statistics_kernel(
    djoint_ptr,  # [B, L, D] float32
    image_ptr,  # [B, N, D]
    text_ptr,  # [B, L, D]
    mask_ptr,  # [B, N] int32, or None
    threshold_ptr,  # [B] float32
    row_sum_ptr,  # [B, L] float32
    statistics_ptr,  # [STATISTICS, B, L] float32
    first_ptr,  # [B, L] int32: the first minimum
    N,
    L,
    D,
    BL,  # B * L
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (B x token blocks): all that a row must know before its gradients can be recomputed tile by tile."""
    b, block = _sample_and_block(tl.cdiv(L, BLOCK_L))
    l = block * BLOCK_L + tl.arange(0, BLOCK_L)
    row_mask = l < L
    rows = b.to(tl.int64) * L + l
    threshold = tl.load(threshold_ptr + b)
    total = tl.load(row_sum_ptr + rows, mask=row_mask, other=0.0)
    constant = total == 0
    inverse = tl.where(constant, 0.0, 1.0 / tl.where(constant, 1.0, total))

    low, high, first, count = _row_extremes(
        text_ptr, rows, row_mask, image_ptr, mask_ptr, b, N, D, HAS_MASK, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D
    )
    cutoff = _cutoff(low, high, threshold)
    c = tl.zeros((BLOCK_L,), tl.float32)
    kept_da = tl.zeros((BLOCK_L,), tl.float32)
    kept = tl.zeros((BLOCK_L,), tl.float32)
    for start in range(0, N, BLOCK_N):
        _n, patches, exist = _patches(b, start, N, BLOCK_N)
        keep = _kept(mask_ptr, patches, exist, HAS_MASK)
        s = _products(text_ptr, rows, row_mask, image_ptr, patches, exist, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
        da = _products(djoint_ptr, rows, row_mask, image_ptr, patches, exist, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
        u = s - low[:, None]
        passed = _passed(u, cutoff, keep) & (constant == 0)[:, None]
        c += tl.sum(tl.where(passed, u * inverse[:, None] * da, 0.0), 1)
        kept_da += tl.sum(tl.where(passed, da, 0.0), 1)
        kept += tl.sum(passed.to(tl.float32), 1)

    out = statistics_ptr + rows
    BL = BL.to(tl.int64)
    tl.store(out, tl.where(constant, 0.0, low), mask=row_mask)
    tl.store(out + BL, cutoff, mask=row_mask)
    tl.store(out + 2 * BL, inverse, mask=row_mask)
    tl.store(out + 3 * BL, tl.where(constant, 1.0 / tl.maximum(count, 1), 0.0), mask=row_mask)
    tl.store(out + 4 * BL, c, mask=row_mask)
    tl.store(out + 5 * BL, (kept_da - kept * c) * inverse, mask=row_mask)
    tl.store(first_ptr + rows, first, mask=row_mask)


@triton.jit
def _weights_and_gradient(s, da, n, keep, rows, row_mask, statistics_ptr, first_ptr, BL):
    """Tiles of a and ds from tiles of s and da and the statistics of their rows."""
    at = statistics_ptr + rows
    low = tl.load(at, mask=row_mask, other=0.0)
    cutoff = tl.load(at + BL, mask=row_mask, other=0.0)
    inverse = tl.load(at + 2 * BL, mask=row_mask, other=0.0)
    uniform = tl.load(at + 3 * BL, mask=row_mask, other=0.0)
    c = tl.load(at + 4 * BL, mask=row_mask, other=0.0)
    at_minimum = tl.load(at + 5 * BL, mask=row_mask, other=0.0)
    first = tl.load(first_ptr + rows, mask=row_mask, other=-1)
    u = s - low[:, None]
    passed = _passed(u, cutoff, keep) & (inverse != 0)[:, None]
    a = tl.where(passed, u * inverse[:, None], tl.where(keep[None, :], uniform[:, None], 0.0))
    ds = tl.where(passed, (da - c[:, None]) * inverse[:, None], 0.0)
    ds -= tl.where(n[None, :] == first[:, None], at_minimum[:, None], 0.0)
    return a, ds


@triton.jit(do_not_specialize=["L", "BL"])
def _dtext_kernel(
    djoint_ptr,  # [B, L, D] float32
    image_ptr,  # [B, N, D]
    text_ptr,  # [B, L, D]
    mask_ptr,  # [B, N] int32, or None
    statistics_ptr,  # [STATISTICS, B, L] float32
    first_ptr,  # [B, L] int32
    dtext_ptr,  # [B, L, D]
    N,
    L,
    D,
    BL,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Grid (B x token blocks, chunks of D): dtext_l = sum_k ds_lk v_k, tile of patches after tile."""
    b, block = _sample_and_block(tl.cdiv(L, BLOCK_L))
    l = block * BLOCK_L + tl.arange(0, BLOCK_L)
    row_mask = l < L
    rows = b.to(tl.int64) * L + l
    d = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    dtext = tl.zeros((BLOCK_L, BLOCK_OUT), tl.float32)
    for start in range(0, N, BLOCK_N):
        n, patches, exist = _patches(b, start, N, BLOCK_N)
        s = _products(text_ptr, rows, row_mask, image_ptr, patches, exist, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
        da = _products(djoint_ptr, rows, row_mask, image_ptr, patches, exist, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
        keep = _kept(mask_ptr, patches, exist, HAS_MASK)  # before the products it spills registers
        _a, ds = _weights_and_gradient(s, da, n, keep, rows, row_mask, statistics_ptr, first_ptr, BL.to(tl.int64))
        dtext = dot_wide(ds, load_rows(image_ptr, patches, exist, d, D), dtext, PRECISION)
    out = dtext_ptr + rows[:, None] * D + d[None, :]
    tl.store(out, dtext.to(dtext_ptr.dtype.element_ty), mask=row_mask[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["L", "BL"])
def _dimage_kernel(
    djoint_ptr,  # [B, L, D] float32
    image_ptr,  # [B, N, D]
    text_ptr,  # [B, L, D]
    mask_ptr,  # [B, N] int32, or None
    statistics_ptr,  # [STATISTICS, B, L] float32
    first_ptr,  # [B, L] int32
    dimage_ptr,  # [B, N, D]
    N,
    L,
    D,
    BL,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Grid (B x patch blocks, chunks of D): dimage_k = sum_l a_lk djoint_l + ds_lk t_l, tile of tokens after tile."""
    b, block = _sample_and_block(tl.cdiv(N, BLOCK_N))
    n, patches, exist = _patches(b, block * BLOCK_N, N, BLOCK_N)
    keep = _kept(mask_ptr, patches, exist, HAS_MASK)
    d = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    dimage = tl.zeros((BLOCK_N, BLOCK_OUT), tl.float32)
    for start in range(0, L, BLOCK_L):
        l = start + tl.arange(0, BLOCK_L)
        row_mask = l < L
        rows = b.to(tl.int64) * L + l
        s = _products(text_ptr, rows, row_mask, image_ptr, patches, exist, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
        da = _products(djoint_ptr, rows, row_mask, image_ptr, patches, exist, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
        a, ds = _weights_and_gradient(s, da, n, keep, rows, row_mask, statistics_ptr, first_ptr, BL.to(tl.int64))
        # djoint is float32 always: with half inputs TF32 is what its product with them has as well.
        djoint = load_rows(djoint_ptr, rows, row_mask, d, D)
        text = load_rows(text_ptr, rows, row_mask, d, D)
        if text.dtype == tl.float32:
            dimage = dot_wide(tl.trans(a), djoint, dimage, PRECISION)
        else:
            dimage = tl.dot(tl.trans(a), djoint, dimage, input_precision="tf32")
        dimage = dot_wide(tl.trans(ds), text, dimage, PRECISION)
    # Patches that the mask leaves out are written too: their gradient is zero.
    out = dimage_ptr + patches[:, None] * D + d[None, :]
    tl.store(out, dimage.to(dimage_ptr.dtype.element_ty), mask=exist[:, None] & (d < D)[None, :])


def forward(
    image_tokens: Tensor, text_tokens: Tensor, image_mask: Tensor | None, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """joint [B, L, D], row_min and row_sum [B, L], float32; both kinds of tokens have one dtype."""
    (B, N, D), L = image_tokens.shape, text_tokens.shape[1]
    joint = torch.empty(B, L, D, dtype=torch.float32, device=image_tokens.device)
    row_min, row_sum = (torch.empty(B, L, dtype=torch.float32, device=image_tokens.device) for _ in range(2))
    blocks = choose(FORWARD, image_tokens)
    kind = precision(image_tokens.dtype)
    if N <= ONE_TILE[kind]:
        whole, tile, out, chunks = True, score_tile(N, kind), blocks.WHOLE_OUT, 1
    else:
        whole, tile, out, chunks = False, SCORE_TILES, blocks.TILES_OUT, triton.cdiv(D, blocks.TILES_OUT)
    with on_device(image_tokens):
        launch(
            _forward_kernel, (B * triton.cdiv(L, tile["BLOCK_L"]), chunks),
            *operands(image_tokens, text_tokens), _int32(image_mask), threshold.contiguous(),
            joint, row_min, row_sum, N, L, D,
            HAS_MASK=image_mask is not None, WHOLE_ROW=whole, PRECISION=dot_precision(image_tokens.dtype),
            **tile, BLOCK_D=blocks.BLOCK_D, BLOCK_OUT=out, num_warps=blocks.num_warps, num_stages=blocks.num_stages,
            **all_registers(image_tokens.device),
        )  # fmt: skip
    return joint, row_min, row_sum


def backward(
    djoint: Tensor,
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    threshold: Tensor,
    row_min: Tensor,
    row_sum: Tensor,
) -> tuple[Tensor, Tensor]:
    """dimage_tokens, dtext_tokens. row_min comes along with row_sum and is recomputed, bit for bit, with its index."""
    (B, N, D), L = image_tokens.shape, text_tokens.shape[1]
    device = image_tokens.device
    dimage = torch.empty_like(image_tokens, memory_format=torch.contiguous_format)
    dtext = torch.empty_like(text_tokens, memory_format=torch.contiguous_format)
    statistics = torch.empty(STATISTICS, B, L, dtype=torch.float32, device=device)
    first = torch.empty(B, L, dtype=torch.int32, device=device)
    blocks = choose(BACKWARD, image_tokens)
    flags = {
        "HAS_MASK": image_mask is not None, "PRECISION": dot_precision(image_tokens.dtype),
        **SCORE_TILES, "BLOCK_D": blocks.BLOCK_D, "num_warps": blocks.num_warps, "num_stages": blocks.num_stages,
        **all_registers(device),
    }  # fmt: skip
    tokens, patches = B * triton.cdiv(L, SCORE_TILES["BLOCK_L"]), B * triton.cdiv(N, SCORE_TILES["BLOCK_N"])
    out, chunks = {"BLOCK_OUT": blocks.BLOCK_OUT}, triton.cdiv(D, blocks.BLOCK_OUT)
    sizes = (N, L, D, B * L)
    with on_device(image_tokens):
        image, text = operands(image_tokens, text_tokens)
        # Beside half inputs the kernels want all that djoint has.
        (djoint,) = operands(djoint) if image_tokens.dtype == torch.float32 else (djoint.contiguous(),)
        inputs = djoint, image, text, _int32(image_mask)
        launch(
            _statistics_kernel, (B * triton.cdiv(L, STATISTICS_L),), *inputs, threshold.contiguous(),
            row_sum.contiguous(), statistics, first, *sizes, **flags | {"BLOCK_L": STATISTICS_L},
        )  # fmt: skip
        launch(_dtext_kernel, (tokens, chunks), *inputs, statistics, first, dtext, *sizes, **out, **flags)
        launch(_dimage_kernel, (patches, chunks), *inputs, statistics, first, dimage, *sizes, **out, **flags)
    return dimage, dtext


def _int32(mask: Tensor | None) -> Tensor | None:
    """[B, N] as the kernels read it."""
    return None if mask is None else mask.to(torch.int32).contiguous()
