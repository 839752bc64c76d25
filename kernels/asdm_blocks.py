"""A-SDM, SDM and ITC in blocks, for large batches in float32: row statistics of a block of cosines, and its dlogits.

The BLAS library computes a block [m, n] of cosines in memory. These kernels read it once for each direction, where
PyTorch operators make dozens of passes. The loops over blocks are those of the PyTorch path,
`fmfa_losses/ops/similarity_distribution/blocks.py`; memory is one block and O(R + C).

    update    direction 0: one program for each group of rows, which loops over the columns
              direction 1: one program for each group of columns, the rows of this direction, which loops down the block

                      k_0 .. k_63   k_64 ..
              q_0  [      |     ->    ->    ]   direction 0
              q_1  [      v                 ]
                          direction 1

              rows that continue in the next block keep their running statistics in memory

    dlogits   one program for each tile: the gradient of the losses of its rows and of its columns. It overwrites the
              cosines

Deterministic: see CONTRIBUTING.md, "A kernel file".
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._asdm import ANY_ADDRESS, alike, contiguous_ids, flags, launch_options
from ._launch import Strided, by_device, launch, on_device
from ._row_statistics import LOWEST, finalize, tile_dlogits, update_tile
from .asdm_prepare import prepare

__all__ = ["block_elements", "dlogits", "norms", "row_multiple", "update"]

block_elements = 2**24  # numbers in a block: 64 MiB
row_multiple = 16  # a row begins where 16 bytes can be loaded at once, and its stride is one specialisation, whatever C

# (BLOCK_M, BLOCK_N): rows, and their columns in one step. Memory is contiguous along the columns of the block.
# A block has 2^24 / C rows: from 4096 columns on, programs of 8 rows would be fewer than four for each of an H100's 132
# multiprocessors, and at 65536 fewer than a quarter of one.
WIDE = 4096
ROWS = {"narrow": (8, 256), "wide": (2, 1024)}
COLUMNS, TILE = (64, 32), (32, 64)


# Not specialised, too: vectors of direction 1, which follow those of direction 0 at any distance.
OF_DIRECTION = ("running_ptr", "loss_ptr", "statistics_ptr", "index_ptr")


@triton.jit(do_not_specialize=[*ANY_ADDRESS, *OF_DIRECTION, "R", "X", "Y", "x_first", "y_first", "offset"])
def _update_kernel(
    cos_ptr,  # [X, Y], or with DOWN [Y, X]
    running_ptr,  # [5, R]: top, sum_e, excess, sum_t, positive; or anything
    pids_ptr,  # [C]
    image_ids_ptr,  # [C], or anything
    scale_ptr,  # [], or anything
    label_sum_ptr,  # [R]
    loss_ptr,  # [R]
    statistics_ptr,  # [STATISTICS, R]
    index_ptr,  # [2, R], or anything
    R,
    X,  # rows in this block
    Y,
    x_first,  # index of the first row among all
    y_first,  # of the first column
    offset,
    scale,
    alpha,
    eps,
    factor,
    cos_stride,
    DOWN: tl.constexpr,  # direction 1, whose rows are the columns of the block
    CARRIED: tl.constexpr,  # rows continue from `running`, and in the next block
    HAS_IMAGES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    POSITIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (row blocks,): the loss of every row after this block, and what its gradient needs."""
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    x = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = x < X
    at = x_first + x
    own_pid = tl.load(pids_ptr + offset + at, mask=row_mask, other=0)[:, None]
    own_image = own_pid
    if HAS_IMAGES:
        own_image = tl.load(image_ids_ptr + offset + at, mask=row_mask, other=0)[:, None]
    total = tl.load(label_sum_ptr + at, mask=row_mask, other=1.0)[:, None]

    top, positive = tl.full((BLOCK_M,), LOWEST, tl.float32), tl.full((BLOCK_M,), LOWEST, tl.float32)
    sum_e, excess, sum_t = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    top_index, positive_index = tl.zeros((BLOCK_M,), tl.int32), offset + at
    if CARRIED:
        top = tl.load(running_ptr + at, mask=row_mask, other=LOWEST)
        sum_e = tl.load(running_ptr + R + at, mask=row_mask, other=0.0)
        excess = tl.load(running_ptr + 2 * R + at, mask=row_mask, other=0.0)
        sum_t = tl.load(running_ptr + 3 * R + at, mask=row_mask, other=0.0)
        if WEIGHTED:
            positive = tl.load(running_ptr + 4 * R + at, mask=row_mask, other=LOWEST)
            top_index = tl.load(index_ptr + at, mask=row_mask, other=0)
            if POSITIVE != "paired":
                positive_index = tl.load(index_ptr + R + at, mask=row_mask, other=0)

    for start in range(0, Y, BLOCK_N):
        y = start + tl.arange(0, BLOCK_N)
        inside = (y < Y)[None, :]
        columns = y_first + y
        if DOWN:
            entries = cos_ptr + y.to(tl.int64)[None, :] * cos_stride + x[:, None]
        else:
            entries = cos_ptr + x.to(tl.int64)[:, None] * cos_stride + y[None, :]
        cos = tl.load(entries, mask=row_mask[:, None] & inside, other=0.0)
        z = tl.where(inside, scale * cos, -float("inf"))
        same = (own_pid == tl.load(pids_ptr + columns, mask=y < Y, other=0)[None, :]) & inside
        same_image = same
        if HAS_IMAGES:
            same_image = (own_image == tl.load(image_ids_ptr + columns, mask=y < Y, other=0)[None, :]) & inside
        top, sum_e, excess, sum_t, top_index, positive, positive_index = update_tile(
            top, sum_e, excess, sum_t, top_index, positive, positive_index, z, columns, inside, same,
            same_image, total, factor, eps, HAS_IMAGES, CROSS_ENTROPY, WEIGHTED, POSITIVE,
        )  # fmt: skip

    if CARRIED:
        tl.store(running_ptr + at, top, mask=row_mask)
        tl.store(running_ptr + R + at, sum_e, mask=row_mask)
        tl.store(running_ptr + 2 * R + at, excess, mask=row_mask)
        tl.store(running_ptr + 3 * R + at, sum_t, mask=row_mask)
        if WEIGHTED:
            tl.store(running_ptr + 4 * R + at, positive, mask=row_mask)
    loss = finalize(
        statistics_ptr, index_ptr, at, row_mask, R,
        top, sum_e, excess, sum_t, top_index, positive, positive_index,
        alpha, 1.0, CROSS_ENTROPY, WEIGHTED,
    )  # fmt: skip
    tl.store(loss_ptr + at, loss, mask=row_mask)


@triton.jit(do_not_specialize=[*ANY_ADDRESS, *OF_DIRECTION, "R", "X", "C", "x_first", "y_first", "offset", "g_stride"])
def _dlogits_kernel(
    cos_ptr,  # [X, C]; overwritten with the gradient in the logits
    pids_ptr,  # [C]
    image_ids_ptr,  # [C], or anything
    scale_ptr,  # [], or anything
    label_sum_ptr,  # [R]
    statistics_ptr,  # [S, STATISTICS, R]
    index_ptr,  # [S, 2, R], or anything
    g_ptr,  # [R], any stride
    R,
    X,  # rows in this block
    C,  # columns in this block
    x_first,  # index of the first row among all
    y_first,  # of the first column
    offset,
    scale,
    alpha,
    gap_alpha,  # alpha, or 0 where the weight is detached
    eps,
    factor,
    cos_stride,
    g_stride,
    BOTH: tl.constexpr,
    STATISTICS: tl.constexpr,
    HAS_IMAGES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (column blocks, row blocks): gradient in the logits of the losses of rows and, with BOTH, of columns."""
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    x = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    y = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask, at, columns = x < X, y < C, x_first + x, y_first + y
    entries = cos_ptr + x.to(tl.int64)[:, None] * cos_stride + y[None, :]
    inside = row_mask[:, None] & col_mask[None, :]
    cos = tl.load(entries, mask=inside, other=0.0)
    z = scale * cos
    dz = tile_dlogits(
        z, at, columns, row_mask, col_mask, pids_ptr, image_ids_ptr, label_sum_ptr, statistics_ptr, index_ptr, g_ptr,
        R, offset, g_stride, 1.0, alpha, gap_alpha, eps, factor,
        BOTH, STATISTICS, HAS_IMAGES, CROSS_ENTROPY, WEIGHTED,
    )  # fmt: skip
    tl.store(entries, dz, mask=inside)


# Launchers: a `BlockBackend` of fmfa_losses/ops/similarity_distribution/blocks.py, with its `Batch` and `Rows`.


def norms(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """|f x| and f of the queries, then of the keys, [2, R + C]."""
    return prepare(*alike(queries, keys), None, None, None)[0]


def update(cos: Tensor, rows: slice, first: int, batch: Any, out: Any, carried: int | None) -> None:
    """Brings loss, final statistics and indices of the block's rows, and of its columns, up to date."""
    (m, C), R, spec = cos.shape, out.loss.shape[1], batch.spec
    scale_ptr, scale = by_device(batch.scale, cos)
    ids = contiguous_ids(batch.pids, batch.image_ids)
    compiled = flags(batch.image_ids, scale_ptr, spec)
    compiled.pop("STATISTICS")
    with on_device(cos):
        for direction in range(spec.directions):
            M, N = COLUMNS if direction else ROWS["wide" if C >= WIDE else "narrow"]
            X, Y, x_first, y_first = (C, m, first, rows.start) if direction else (m, C, rows.start, first)
            launch(
                _update_kernel, (triton.cdiv(X, M),),
                Strided(cos), out.running if direction == carried else out.loss, *ids,
                out.loss if scale_ptr is None else scale_ptr, batch.label_sum,
                out.loss[direction], out.final[direction], out.indices[direction] if spec.weighted else out.loss,
                R, X, Y, x_first, y_first, spec.offset, scale, spec.alpha, spec.eps, spec.image_id_factor,
                cos.stride(0),
                DOWN=direction == 1, CARRIED=direction == carried, POSITIVE=spec.positive, **compiled,
                BLOCK_M=M, BLOCK_N=N, **launch_options(cos, 4, 2),
            )  # fmt: skip


def dlogits(cos: Tensor, rows: slice, first: int, g: Tensor, batch: Any, out: Any) -> Tensor:
    """Gradient in the logits of sum_i g_i (loss of row i) over all directions; overwrites the cosines. g [R]."""
    (m, C), R, spec = cos.shape, out.final.shape[2], batch.spec
    scale_ptr, scale = by_device(batch.scale, cos)
    M, N = TILE
    grid = triton.cdiv(C, N), triton.cdiv(m, M)
    with on_device(cos):
        launch(
            _dlogits_kernel, grid,
            Strided(cos), *contiguous_ids(batch.pids, batch.image_ids),
            out.final if scale_ptr is None else scale_ptr, batch.label_sum,
            out.final, out.indices if spec.weighted else out.final, Strided(g),
            R, m, C, rows.start, first, spec.offset, scale, spec.alpha, 0.0 if spec.detach_weight else spec.alpha,
            spec.eps, spec.image_id_factor, cos.stride(0), g.stride(0),
            BOTH=spec.both, **flags(batch.image_ids, scale_ptr, spec),
            BLOCK_M=M, BLOCK_N=N, **launch_options(cos, 4, 2),
        )  # fmt: skip
    return cos
