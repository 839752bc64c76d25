"""Sparse token-patch aggregation: of [B, L, N] scores and weights nothing is in memory forward, two tensors backward.

    forward(image [B, N, D], text [B, L, D], image_mask [B, N] | None, text_mask [B, L] | None, sparsity | None)
        -> joint [B, L, D], row_sum [B, L], both float32
    backward(djoint [B, L, D] float32, image, text, image_mask, sparsity, row_sum, dimage | None, dtext | None)
        -> dimage, dtext in the inputs' dtype; where they are given, the gradients are added to what they hold

    s = t . v    u = s - min s where (s - min s) / (max s - min s) >= threshold, else 0    joint = sum_k u_k v_k / sum u

    forward      one program for each block of tokens of one sample. Up to 512 patches (256 in IEEE float32) whole rows
                 of scores are one tile. With more, one loop over tiles of patches finds minimum and maximum, and a
                 second one aggregates a chunk of D.

                     patches ->  v_0 .. v_N        d chunk
                 tokens  t_0 [ s -> u       ]  @  [ v ]  ->  joint
                         t_1 [              ]

    backward     whole rows: aggregation_rows.py, a and ds in memory; longer ones: aggregation_tiles.py, O(B L) numbers

    grid         axis 0: blocks of tokens or patches, sample after sample, as it may have 2^31 - 1 programs and axis 1
                 only 65535. Axis 1: chunks of D.

Deterministic: see CONTRIBUTING.md, "A kernel file". The threshold is `sparsity`, or one over the number of patches that
image_mask keeps; `strict` keeps only what lies above it. A row whose range is rounding noise is constant: uniform
weights, no gradient through s; row_sum = 0 marks it. A NaN or an infinity among its scores, or a range or a sum that
overflows, makes this row NaN and no other. A token that text_mask leaves out has joint 0 and no gradient; row_sum = -1
marks it, so that the backward needs no text_mask. What masks leave out may hold NaN.

The launchers take tensors of any strides and make them contiguous; results are contiguous. L and B L vary from batch to
batch and are not specialised: another caption length compiles nothing new.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import aggregation_rows, aggregation_tiles
from ._launch import (
    LARGE,
    LDS,
    MEDIUM,
    SMALL,
    all_registers,
    choose,
    contiguous,
    dot_precision,
    launch,
    on_device,
    precision,
)
from ._scores import (
    LEFT_OUT,
    ONE_TILE,
    SCORE_TILES,
    add_wide,
    block_of_rows,
    cutoff_of,
    extent,
    extremes,
    finite_or_nan,
    is_constant,
    kept,
    number,
    passes,
    row_extremes,
    sample_and_block,
    scores,
    threshold_of,
)
from ._tile import load_rows, operands


class Forward(NamedTuple):
    BLOCK_D: int  # of the products over D
    WHOLE_OUT: int  # BLOCK_OUT, the columns of a result's tile, beside whole rows of scores
    TILES_OUT: int  # BLOCK_OUT beside tiles of scores
    num_warps: int
    num_stages: int


# By memory and precision.
FORWARD = {
    (LARGE, "half"): Forward(64, 64, 128, 8, 3),
    (LARGE, "tf32"): Forward(32, 32, 128, 8, 3),
    (LARGE, "ieee"): Forward(16, 16, 128, 8, 2),
    (MEDIUM, "half"): Forward(64, 64, 128, 8, 2),
    (MEDIUM, "tf32"): Forward(32, 32, 128, 8, 2),
    (MEDIUM, "ieee"): Forward(16, 16, 64, 8, 2),
    (SMALL, "half"): Forward(32, 32, 128, 8, 2),
    (SMALL, "tf32"): Forward(16, 16, 64, 8, 2),
    (SMALL, "ieee"): Forward(16, 16, 64, 8, 2),
    (LDS, "half"): Forward(32, 16, 64, 8, 1),
    (LDS, "tf32"): Forward(16, 16, 64, 8, 1),
    (LDS, "ieee"): Forward(16, 16, 64, 8, 1),
}


def score_tile(N: int, kind: str) -> dict[str, int]:
    """[BLOCK_L, BLOCK_N] that holds whole rows of N <= ONE_TILE scores."""
    BLOCK_N = max(16, triton.next_power_of_2(N))
    return {"BLOCK_L": 32 if 2 * BLOCK_N <= ONE_TILE[kind] else 16, "BLOCK_N": BLOCK_N}


@triton.jit(do_not_specialize=["L"])
def _forward_kernel(
    image_ptr,  # [B, N, D]
    text_ptr,  # [B, L, D]
    image_mask_ptr,  # [B, N] bool, or None
    text_mask_ptr,  # [B, L] bool, or None
    joint_ptr,  # [B, L, D] float32
    row_sum_ptr,  # [B, L] float32
    sparsity,
    N,
    L,
    D,
    HAS_IMAGE_MASK: tl.constexpr,
    HAS_TEXT_MASK: tl.constexpr,
    STRICT: tl.constexpr,
    WHOLE_ROW: tl.constexpr,  # N <= BLOCK_N
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Grid (B x token blocks, 1 | chunks of D)."""
    b, block = sample_and_block(tl.cdiv(L, BLOCK_L))
    _l, rows, row_mask = block_of_rows(b, block * BLOCK_L, L, BLOCK_L)
    tokens = kept(text_mask_ptr, rows, row_mask, L, HAS_TEXT_MASK)
    width, depth = D, N
    if HAS_TEXT_MASK:
        width, depth = extent(tokens, D), extent(tokens, N)

    if WHOLE_ROW:
        n, patches, exist = block_of_rows(b, 0, N, BLOCK_N)
        keep = kept(image_mask_ptr, patches, exist, N, HAS_IMAGE_MASK)
        s = scores(text_ptr, rows, tokens, image_ptr, patches, exist, width, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
        low, high, _first = extremes(s, n, keep)
        count = tl.sum(keep.to(tl.int32), 0)
        u = s - low[:, None]
        u = tl.where(passes(u, cutoff_of(low, high, threshold_of(sparsity, count, STRICT)), keep), u, 0.0)
        total = finite_or_nan(tl.sum(u, 1))
        constant = is_constant(low, high) & (total == total)
        a = u / tl.where(constant, 1.0, total)[:, None]
        uniform = tl.where(keep, 1.0 / tl.maximum(count, 1), 0.0)
        a = tl.where(constant[:, None], uniform[None, :], a)
        for start in range(0, width, BLOCK_OUT):
            d = start + tl.arange(0, BLOCK_OUT)
            v = load_rows(image_ptr, patches, keep, d, D)
            joint = add_wide(a, v, tl.zeros((BLOCK_L, BLOCK_OUT), tl.float32), PRECISION)
            joint = tl.where(tokens[:, None], joint, 0.0)
            tl.store(joint_ptr + rows[:, None] * D + d[None, :], joint, mask=row_mask[:, None] & (d < D)[None, :])
        for start in range(width, D, BLOCK_OUT):
            d = start + tl.arange(0, BLOCK_OUT)
            nothing = tl.zeros((BLOCK_L, BLOCK_OUT), tl.float32)
            tl.store(joint_ptr + rows[:, None] * D + d[None, :], nothing, mask=row_mask[:, None] & (d < D)[None, :])
    else:
        low, high, _first, count = row_extremes(
            text_ptr, rows, tokens, image_ptr, image_mask_ptr, b, depth, N, D,
            HAS_IMAGE_MASK, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        constant = is_constant(low, high)
        cutoff = cutoff_of(low, high, threshold_of(sparsity, count, STRICT))
        d = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        joint = tl.zeros((BLOCK_L, BLOCK_OUT), tl.float32)
        total = tl.zeros((BLOCK_L,), tl.float32)
        for start in range(0, depth, BLOCK_N):
            _n, patches, exist = block_of_rows(b, start, N, BLOCK_N)
            s = scores(text_ptr, rows, tokens, image_ptr, patches, exist, D, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
            # Before the products it spills a register.
            keep = kept(image_mask_ptr, patches, exist, N, HAS_IMAGE_MASK)
            u = s - low[:, None]
            u = tl.where(passes(u, cutoff, keep), u, 0.0)
            total += tl.sum(u, 1)
            u = tl.where(constant[:, None], keep[None, :].to(tl.float32), u)
            joint = add_wide(u, load_rows(image_ptr, patches, keep, d, D), joint, PRECISION)
        total = finite_or_nan(total)
        constant = constant & (total == total)
        joint /= tl.where(constant, tl.maximum(count, 1).to(tl.float32), total)[:, None]
        joint = tl.where(tokens[:, None], joint, 0.0)
        tl.store(joint_ptr + rows[:, None] * D + d[None, :], joint, mask=row_mask[:, None] & (d < D)[None, :])

    if tl.program_id(1) == 0:
        row_sum = tl.where(tokens, tl.where(constant, 0.0, total), LEFT_OUT)
        tl.store(row_sum_ptr + rows, row_sum, mask=row_mask)


def forward(
    image: Tensor,
    text: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    sparsity: float | None,
    *,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """joint [B, L, D] and row_sum [B, L], float32; both kinds of tokens have one dtype."""
    (B, N, D), L = image.shape, text.shape[1]
    joint = torch.empty(B, L, D, dtype=torch.float32, device=image.device)
    row_sum = torch.empty(B, L, dtype=torch.float32, device=image.device)
    blocks, kind = choose(FORWARD, image), precision(image.dtype)
    if N <= ONE_TILE[kind]:
        whole, tile, out, chunks = True, score_tile(N, kind), blocks.WHOLE_OUT, 1
    else:
        whole, tile, out, chunks = False, SCORE_TILES, blocks.TILES_OUT, triton.cdiv(D, blocks.TILES_OUT)
    with on_device(image):
        launch(
            _forward_kernel, (B * triton.cdiv(L, tile["BLOCK_L"]), chunks),
            *operands(image, text), contiguous(image_mask), contiguous(text_mask), joint, row_sum,
            number(sparsity), N, L, D,
            HAS_IMAGE_MASK=image_mask is not None, HAS_TEXT_MASK=text_mask is not None, STRICT=strict, WHOLE_ROW=whole,
            PRECISION=dot_precision(image.dtype), **tile, BLOCK_D=blocks.BLOCK_D, BLOCK_OUT=out,
            num_warps=blocks.num_warps, num_stages=blocks.num_stages, **all_registers(image.device),
        )  # fmt: skip
    return joint, row_sum


def backward(
    djoint: Tensor,
    image: Tensor,
    text: Tensor,
    image_mask: Tensor | None,
    sparsity: float | None,
    row_sum: Tensor,
    dimage: Tensor | None = None,
    dtext: Tensor | None = None,
    *,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """dimage and dtext. Given ones are contiguous and hold a gradient: the sum is rounded once."""
    add = dimage is not None, dtext is not None
    dimage = torch.empty_like(image, memory_format=torch.contiguous_format) if dimage is None else dimage
    dtext = torch.empty_like(text, memory_format=torch.contiguous_format) if dtext is None else dtext
    whole = aggregation_rows.takes(image)
    with on_device(image):
        operand, other = operands(image, text)
        # Beside half inputs the kernels want all that djoint has.
        (djoint,) = operands(djoint) if image.dtype == torch.float32 else (djoint.contiguous(),)
        (aggregation_rows if whole else aggregation_tiles).backward(
            djoint, operand, other, contiguous(image_mask), row_sum.contiguous(),
            number(sparsity), strict, dimage, dtext, add,
        )  # fmt: skip
    return dimage, dtext
