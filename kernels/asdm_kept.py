"""A-SDM, SDM and ITC with [R, C] in memory: each logit is made once a pass, for some hundred pairs.

    forward     cosines     one program for each tile: cos_ij, and for the other direction cos_ji
                row loss    reads them (asdm_tiles.py)
    backward    dlogits     one program for each tile: the logits again, dz_ij of the losses of both directions, and

                                U_ij = dz_ij / |y_j|    [R, C]         sum over the tile's columns of dz_ij cos_ij
                                V_ji = dz_ij / |x_i|    [C, R]         and over its rows

                gradient    one program for each block [rows, chunk of D] of an input's gradient:

                                dx_i = s / |x_i| (sum_j U_ij y_j  -  a_i x_i / |x_i|),    a_i = sum_j dz_ij cos_ij

                            and dy_j with V; the sums of the tiles are added up in the order of the tiles

Products of size R C D: one forward, three backward, whatever D. In one launch without [R, C] (asdm_gradient.py) there
are two forward and 2 + 2 D / BLOCK_OUT backward. Memory: 8 R C bytes while a pass lasts, at 1024 pairs 8 MiB.
The logits of the two passes are the same numbers: the same blocks make them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._asdm import (
    ANY_ADDRESS,
    Gradient,
    any_factor_of,
    blocks,
    by_direction,
    cosines,
    flags,
    scaled_rows,
    store_through_norms,
)
from ._launch import Strided, dot_precision, launch, on_device
from ._row_statistics import tile_dlogits
from ._tile import dot_wide, nearest_tf32

__all__ = ["backward", "cosines_of"]

TILES, SUMS = tl.constexpr(32), tl.constexpr(1024)  # tiles of a row, and sums of the tiles, that are added at once


@triton.jit(do_not_specialize=["R", "C"])
def _cosines_kernel(
    x_ptr,  # [R, D]
    y_ptr,  # [C, D]
    norms_ptr,  # [2, R + C]: |f x| and f
    cos_ptr,  # [R, row_stride], then with BOTH its transpose; there R is C
    R,
    C,
    D,
    x_stride,
    y_stride,
    row_stride,
    BOTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (column blocks, row blocks): cosines of a tile."""
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_inverse = 1.0 / tl.load(norms_ptr + rows, mask=rows < R, other=1.0)
    y_inverse = 1.0 / tl.load(norms_ptr + R + cols, mask=cols < C, other=1.0)
    cos = cosines(
        x_ptr, y_ptr, norms_ptr + R + C, rows, cols, x_inverse, y_inverse, 0, R, R, C, D, x_stride, y_stride,
        any_factor_of(norms_ptr + R + C, R + C), BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
    )  # fmt: skip
    entries = cos_ptr + rows.to(tl.int64)[:, None] * row_stride + cols[None, :]
    tl.store(entries, cos, mask=(rows < R)[:, None] & (cols < C)[None, :])
    if BOTH:
        entries = cos_ptr + (R + cols.to(tl.int64))[:, None] * row_stride + rows[None, :]
        tl.store(entries, tl.trans(cos), mask=(cols < C)[:, None] & (rows < R)[None, :])


@triton.jit(do_not_specialize=[*ANY_ADDRESS, "along_ptr", "R", "C", "offset", "dloss_stride"])
def _kept_dlogits_kernel(
    x_ptr,  # [R, D]
    y_ptr,  # [C, D]
    pids_ptr,  # [C]
    image_ids_ptr,  # [C], or anything
    scale_ptr,  # [], or anything
    norms_ptr,  # [2, R + C]: |f x| and f
    label_sum_ptr,  # [R]
    statistics_ptr,  # [S, STATISTICS, R]
    index_ptr,  # [S, 2, R], or anything
    dloss_ptr,  # [R], any stride
    dz_ptr,  # [R, row_stride], U above; then [C, col_stride], V
    along_ptr,  # [column blocks, R], sums of dz cos over the columns of a tile; then [row blocks, C], over its rows
    R,
    C,
    D,
    offset,
    scale,
    alpha,
    gap_alpha,  # alpha, or 0 where the weight is detached
    eps,
    factor,
    loss_weight,
    x_stride,
    y_stride,
    row_stride,
    col_stride,
    dloss_stride,
    BOTH: tl.constexpr,
    STATISTICS: tl.constexpr,
    HAS_IMAGES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROUND: tl.constexpr,  # to TF32, in which the products that follow are made
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (column blocks, row blocks): gradient in the logits of a tile, as the two products need it."""
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = rows < R, cols < C
    x_inverse = 1.0 / tl.load(norms_ptr + rows, mask=row_mask, other=1.0)
    y_inverse = 1.0 / tl.load(norms_ptr + R + cols, mask=col_mask, other=1.0)
    cos = cosines(
        x_ptr, y_ptr, norms_ptr + R + C, rows, cols, x_inverse, y_inverse, 0, R, R, C, D, x_stride, y_stride,
        any_factor_of(norms_ptr + R + C, R + C), BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
    )  # fmt: skip
    dz = tile_dlogits(
        scale * cos, rows, cols, row_mask, col_mask, pids_ptr, image_ids_ptr, label_sum_ptr, statistics_ptr, index_ptr,
        dloss_ptr, R, offset, dloss_stride, loss_weight, alpha, gap_alpha, eps, factor,
        BOTH, STATISTICS, HAS_IMAGES, CROSS_ENTROPY, WEIGHTED,
    )  # fmt: skip
    dz = tl.where(row_mask[:, None] & col_mask[None, :], dz, 0.0)
    tl.store(along_ptr + tl.program_id(0) * R + rows, tl.sum(dz * cos, 1), mask=row_mask)
    of_columns = along_ptr + tl.num_programs(0) * R + tl.program_id(1) * C
    tl.store(of_columns + cols, tl.sum(dz * cos, 0), mask=col_mask)

    U, V = dz * y_inverse[None, :], dz * x_inverse[:, None]
    if ROUND:  # once here, and nothing is left to cut off in the products
        U, V = nearest_tf32(U), nearest_tf32(V)
    entries = dz_ptr + rows.to(tl.int64)[:, None] * row_stride + cols[None, :]
    tl.store(entries, U, mask=row_mask[:, None] & col_mask[None, :])
    entries = dz_ptr + R.to(tl.int64) * row_stride + cols.to(tl.int64)[:, None] * col_stride + rows[None, :]
    tl.store(entries, tl.trans(V), mask=col_mask[:, None] & row_mask[None, :])


@triton.jit(do_not_specialize=[*ANY_ADDRESS, "along_ptr", "R", "C", "row_blocks", "column_blocks"])
def _kept_gradient_kernel(
    q_ptr,  # [R, D]
    k_ptr,  # [C, D]
    scale_ptr,  # [], or anything
    norms_ptr,  # [2, R + C]: |f x| and f
    dz_ptr,  # [R, row_stride], then [C, col_stride]
    along_ptr,  # [column_blocks, R], then [row_blocks, C]
    dq_ptr,  # [R, D]
    dk_ptr,  # [C, D]
    dscale_ptr,  # [], or anything
    R,
    C,
    D,
    row_blocks,  # tiles of dlogits
    column_blocks,
    scale,
    q_stride,
    k_stride,
    row_stride,
    col_stride,
    HAS_SCALE: tl.constexpr,
    SCALE_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Grid (row blocks, 2 inputs, chunks of D): gradient of the program's rows, normalisation included."""
    direction = tl.program_id(1)
    X, Y = by_direction(direction, R, C)
    x_norm, y_norm = by_direction(direction, 0, R)
    x_stride, y_stride = by_direction(direction, q_stride, k_stride)
    dz_stride, _ = by_direction(direction, row_stride, col_stride)
    tiles, _ = by_direction(direction, column_blocks, row_blocks)
    x_ptr, y_ptr, out_ptr = q_ptr, k_ptr, dq_ptr
    if direction == 1:
        x_ptr, y_ptr, out_ptr = k_ptr, q_ptr, dk_ptr
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)

    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < X
    d = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    any_factor = any_factor_of(norms_ptr + R + C, R + C)
    dz_rows = dz_ptr + direction.to(tl.int64) * R * row_stride + rows.to(tl.int64)[:, None] * dz_stride
    dx = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
    for start in range(0, Y, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col_mask = cols < Y
        dz = tl.load(dz_rows + cols[None, :], mask=row_mask[:, None] & col_mask[None, :], other=0.0)
        y = scaled_rows(y_ptr, norms_ptr + R + C + y_norm, cols, col_mask, d, D, y_stride, any_factor)
        if PRECISION == "tf32" and y_ptr.dtype.element_ty == tl.float32:
            y = nearest_tf32(y)
        # A gradient in float16 has as many digits as TF32: dz is rounded in two parts.
        if y_ptr.dtype.element_ty == tl.float16:
            high = nearest_tf32(dz)
            dx = dot_wide(dz - high, y, dx, PRECISION)
            dz = high
        dx = dot_wide(dz, y, dx, PRECISION)

    # Component of the gradient along x_i: normalising removes it; dscale is its sum over i.
    sums = along_ptr + direction.to(tl.int64) * R * column_blocks
    along = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        parts = sums + tile[:, None] * X + rows[None, :]
        along += tl.sum(tl.load(parts, mask=(tile < tiles)[:, None] & row_mask[None, :], other=0.0), 0)

    x_inverse = 1.0 / tl.load(norms_ptr + x_norm + rows, mask=row_mask, other=1.0)
    store_through_norms(
        out_ptr, dx, along, x_ptr, norms_ptr + R + C + x_norm, x_inverse, rows, row_mask, d, D, x_stride, scale
    )
    if SCALE_GRADIENT:  # noqa: SIM102, settled when compiled
        if (tl.program_id(0) == 0) & (direction == 0) & (tl.program_id(2) == 0):
            total = tl.zeros((SUMS,), tl.float32)
            for start in range(0, column_blocks * R, SUMS):
                at = start + tl.arange(0, SUMS)
                total += tl.load(along_ptr + at, mask=at < column_blocks * R, other=0.0)
            tl.store(dscale_ptr, tl.sum(total, 0))


def padded(columns: int) -> int:
    """Stride of a kept row: 16 bytes can be loaded at once, and it is one specialisation whatever the batch."""
    return triton.cdiv(columns, 16) * 16


def cosines_of(queries: Tensor, keys: Tensor, norms: Tensor, both: bool) -> tuple[Tensor, int]:
    """[S, R, stride] and its stride: cosines, and with both their transpose. The inputs are alike."""
    (R, D), C = queries.shape, keys.shape[0]
    cos = torch.empty(2 if both else 1, R, padded(C), dtype=torch.float32, device=keys.device)
    block = blocks("logits", queries, keys)
    with on_device(keys):
        launch(
            _cosines_kernel, (triton.cdiv(C, block["BLOCK_N"]), triton.cdiv(R, block["BLOCK_M"])),
            Strided(queries), Strided(keys), norms, cos, R, C, D, queries.stride(0), keys.stride(0), padded(C),
            BOTH=both, PRECISION=dot_precision(keys.dtype), **block,
        )  # fmt: skip
    return cos, padded(C)


def backward(g: Gradient) -> Tensor:
    """Writes the gradients of queries and keys; gives that of the scale."""
    (R, D), C, spec, norms, dloss = g.queries.shape, g.keys.shape[0], g.spec, g.norms, g.dloss
    queries, keys, numbers = g.queries, g.keys, {"dtype": torch.float32, "device": g.keys.device}
    tile, block = blocks("logits", queries, keys), blocks("gradient", queries, keys)
    grid = triton.cdiv(C, tile["BLOCK_N"]), triton.cdiv(R, tile["BLOCK_M"])
    dz, along = torch.empty(R * padded(C) + C * padded(R), **numbers), torch.empty(grid[0] * R + grid[1] * C, **numbers)
    dscale = torch.empty(() if g.scale_gradient else (0,), **numbers)
    compiled, dot = flags(g.image_ids, g.scale_ptr, spec), dot_precision(keys.dtype)
    scale_at = norms if g.scale_ptr is None else g.scale_ptr
    with on_device(keys):
        launch(
            _kept_dlogits_kernel, grid,
            Strided(queries), Strided(keys), *g.ids, scale_at, norms, g.label_sum,
            g.statistics, g.indices if spec.weighted else g.statistics, Strided(dloss), dz, along,
            R, C, D, spec.offset, g.scale, spec.alpha, 0.0 if spec.detach_weight else spec.alpha,
            spec.eps, spec.image_id_factor, 1 / R if spec.reduction == "mean" else 1.0,
            queries.stride(0), keys.stride(0), padded(C), padded(R), dloss.stride(0),
            BOTH=spec.both, **compiled, ROUND=keys.dtype == torch.bfloat16 or dot == "tf32", PRECISION=dot, **tile,
        )  # fmt: skip
        launch(
            _kept_gradient_kernel, (triton.cdiv(max(R, C), block["BLOCK_M"]), 2, triton.cdiv(D, block["BLOCK_OUT"])),
            Strided(queries), Strided(keys), scale_at, norms, dz, along, g.dqueries, g.dkeys,
            dscale if g.scale_gradient else norms, R, C, D, grid[1], grid[0], g.scale,
            queries.stride(0), keys.stride(0), padded(C), padded(R),
            HAS_SCALE=g.scale_ptr is not None, SCALE_GRADIENT=g.scale_gradient, PRECISION=dot, **block,
        )  # fmt: skip
    return dscale
