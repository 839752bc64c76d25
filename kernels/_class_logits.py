"""Logits of a linear layer over many classes, tile by tile: what the forward and the gradient of its loss share.

z_ij = h_i W_j + b_j       BLOCK_M rows, BLOCK_N columns, a sum over D in steps of BLOCK_D
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import BLACKWELL, LARGE, LDS, MEDIUM, SMALL
from ._tile import dot_nearest, load_columns, load_rows

# BLOCK_M, BLOCK_N, BLOCK_D, num_warps, num_stages of the kernels that make logits.
LOGITS = {
    (LARGE, "half"): (128, 128, 64, 8, 3),
    (LARGE, "tf32"): (128, 128, 32, 8, 3),
    (LARGE, "ieee"): (64, 64, 16, 8, 2),
    (BLACKWELL, "half"): (128, 64, 64, 8, 3),  # 128 columns spill
    (BLACKWELL, "tf32"): (128, 64, 32, 8, 3),
    (MEDIUM, "half"): (128, 128, 64, 8, 3),
    (MEDIUM, "tf32"): (128, 128, 32, 8, 3),
    (SMALL, "half"): (128, 128, 64, 8, 2),
    (SMALL, "tf32"): (128, 128, 32, 8, 2),
    (LDS, "half"): (128, 128, 32, 8, 2),
    (LDS, "tf32"): (128, 128, 32, 8, 1),
}


@triton.jit
def class_logits(
    states_ptr,  # [M, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V], or anything
    rows,  # [R], int64
    row_mask,  # [R]
    cols,  # [C], int64
    col_mask,  # [C]
    D,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[R, C] float32; -inf where there is no column."""
    acc = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = load_rows(states_ptr, rows, row_mask, d, D)
        acc = dot_nearest(h, load_columns(weight_ptr, cols, col_mask, d, D), acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    return tl.where(col_mask[None, :], acc, -float("inf"))


@triton.jit
def column_of(target, start, BLOCK_N: tl.constexpr):
    """The target's place among the BLOCK_N columns from `start` on, or -1; in int32, which a tile compares with."""
    column = target - start
    return tl.where((column >= 0) & (column < BLOCK_N), column, -1).to(tl.int32)


def pointer(bias: Tensor | None, unread: Tensor) -> Tensor:
    """Of the argument that may be missing."""
    return unread if bias is None else bias.contiguous()
