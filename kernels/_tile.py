"""Triton helpers that the kernels of several objectives share: loads of tiles, products, row maxima, series."""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import dot_precision, launch

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
BIG = tl.constexpr(2147483647)  # above every index; min(x, BIG) folds away where a column is known to be out


@triton.jit
def load_rows(
    ptr,  # [., D], contiguous
    rows,  # [R], int64
    row_mask,  # [R]
    d,  # [C]
    D,
):
    """[R, C]: the columns `d` of some rows; zeros where a row or a column is out of range."""
    return tl.load(ptr + rows[:, None] * D + d[None, :], mask=row_mask[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_columns(ptr, rows, row_mask, d, D):
    """[C, R]: what `load_rows` gives, transposed, as the second operand of a product wants it."""
    return tl.load(ptr + rows[None, :] * D + d[:, None], mask=row_mask[None, :] & (d < D)[:, None], other=0.0)


# Rows with a norm beyond LIMIT or below 1 / LIMIT are multiplied with a power of two before anything is squared.
LIMIT, POWER = tl.constexpr(2.0**40), tl.constexpr(2.0**88)


@triton.jit
def _row_lengths(rows, factor, kept, D, BLOCK_D: tl.constexpr):
    """|f x| of rows that begin at the pointers `rows`."""
    squares = tl.zeros((rows.shape[0], BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(rows[:, None] + d[None, :], mask=kept[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        x *= factor[:, None]
        squares += x * x
    return tl.sqrt(tl.sum(squares, 1))


@triton.jit
def row_norms(rows, kept, D, BLOCK_D: tl.constexpr):
    """|f x| and f of rows that begin at the pointers `rows`; 1 and 1 of a zero vector and of rows that are not kept.

    The unit vector is f x / |f x|. f is 1, or a power of two where squares would leave float32's range.
    """
    factor = tl.full((rows.shape[0],), 1.0, tl.float32)
    norm = _row_lengths(rows, factor, kept, D, BLOCK_D)
    if rows.dtype.element_ty != tl.float16:  # whose squares are in range
        factor = tl.where(norm > LIMIT, 1 / POWER, tl.where(norm < 1 / LIMIT, POWER, 1.0))
        factor = tl.where(kept, factor, 1.0)
        if tl.max((factor != 1.0).to(tl.int32), 0) > 0:
            norm = _row_lengths(rows, factor, kept, D, BLOCK_D)
    zero = norm == 0
    return tl.where(zero, 1.0, norm), tl.where(zero, 1.0, factor)


@triton.jit
def nearest_tf32(x):
    """float32 rounded to the 10 bits of TF32. Tensor cores cut the others off, so all products would be small."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 4096) & -8192).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit(do_not_specialize=["n"])
def _nearest_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Grid (blocks of all elements)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, nearest_tf32(tl.load(x_ptr + at, mask=at < n, other=0.0)), mask=at < n)


def operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, contiguous; copies rounded to TF32 where products are made in it, so that nothing is left to cut."""
    return tuple(_rounded(x.contiguous()) if dot_precision(x.dtype) == "tf32" else x.contiguous() for x in tensors)


def _rounded(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    launch(_nearest_kernel, (triton.cdiv(x.numel(), 1024),), x, out, x.numel(), BLOCK=1024, num_warps=4)
    return out


@triton.jit
def dot_nearest(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, float32 operands in TF32 rounded to the nearest."""
    if PRECISION == "tf32" and a.dtype == tl.float32:
        a, b = nearest_tf32(a), nearest_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot_wide(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b for a float32 `a`; float16 and bfloat16 `b` are exact in TF32, and `a` keeps its range.

    A float32 `b` in TF32 is one of `operands`: nothing is left to cut.
    """
    if b.dtype == tl.float32:
        if PRECISION == "tf32":
            a = nearest_tf32(a)
        return tl.dot(a, b, acc, input_precision=PRECISION)
    return tl.dot(a, b.to(tl.float32), acc, input_precision="tf32")


@triton.jit
def max_or_nan(a, b):
    """One instruction; tl.max passes over NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_max(x, AXIS: tl.constexpr = 1):
    """[R] of [R, C]: the largest of every row, NaN where there is one."""
    if INTERPRETED:  # the interpreter would call a function of ours for one number at a time
        best = tl.where(tl.max((x != x).to(tl.int32), AXIS) > 0, float("nan"), tl.max(x, AXIS))
    else:
        best = tl.reduce(x, AXIS, max_or_nan)
    return best


@triton.jit
def cosines(
    x_ptr,
    e_ptr,
    row,  # [BLOCK_M] int64
    row_mask,
    column,  # [BLOCK_N] int64
    col_mask,
    D,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,  # rows are [2, D], high and low parts: three products of TF32
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] float32: rows of x with rows of e."""
    length, padded = D, D
    if SPLIT:
        row *= 2
        column *= 2
        padded = (D + BLOCK_D - 1) // BLOCK_D * BLOCK_D
        length = 3 * padded
    cos = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_d in range(0, length, BLOCK_D):
        x_from, e_from, first_d = x_ptr, e_ptr, start_d
        if SPLIT:  # low high, high low, high high: small terms first
            part = (start_d >= padded).to(tl.int32) + (start_d >= 2 * padded).to(tl.int32)
            first_d -= part * padded
            x_from += tl.where(part == 0, D, 0)
            e_from += tl.where(part == 1, D, 0)
        d = first_d + tl.arange(0, BLOCK_D)
        x = load_rows(x_from, row, row_mask, d, D)
        e = load_columns(e_from, column, col_mask, d, D)
        cos = tl.dot(x, e, cos, input_precision=PRECISION)
    return cos


@triton.jit
def best_column(x, columns, UNIT: tl.constexpr, SAVE: tl.constexpr):
    """[R] of [R, C], over the columns that are numbered 0 to UNIT - 1: the largest entry and, with SAVE, where it is.

    Which columns those are is known when compiling: the others cost nothing. Of equal ones the lowest.
    """
    mine = (columns >= 0) & (columns < UNIT)
    best = row_max(tl.where(mine[None, :], x, -float("inf")))
    index = tl.zeros((x.shape[0],), tl.int32)
    if SAVE:
        # Not below rather than equal: where the best is NaN, all columns are, and the first one is it.
        index = tl.min(tl.where(mine[None, :] & ((x < best[:, None]) == 0), columns[None, :], BIG), 1)
    return best, index


@triton.jit
def tile_of(program, row_tiles, column_tiles, SUPER: tl.constexpr):
    """Row and column of a tile: SUPER row tiles go through the column tiles together, so that both stay in L2."""
    group = program // (SUPER * column_tiles)
    height = tl.minimum(row_tiles - group * SUPER, SUPER)
    inside = program - group * SUPER * column_tiles
    return group * SUPER + inside % height, inside // height


@triton.jit
def expm1_over(x, scale):
    """(exp(scale x) - 1) / scale for |scale x| <= 1/4, to the last digits and undivided; x where scale is 0."""
    z = scale * x
    series = 1 + z * (1 / 5) * (1 + z * (1 / 6) * (1 + z * (1 / 7)))
    return x * (1 + z * (1 / 2) * (1 + z * (1 / 3) * (1 + z * (1 / 4) * series)))


@triton.jit
def log1p_over(x, scale):
    """log(1 + scale x) / scale for |scale x| <= 0.3, likewise: log(1 + t) = 2 artanh(t / (2 + t))."""
    t = scale * x
    y = t / (2 + t)
    y *= y
    return 2 * x / (2 + t) * (1 + y * (1 / 3 + y * (1 / 5 + y * (1 / 7))))
