"""A-SDM, SDM and ITC in tiles: row losses from raw features, for small batches and half precision.

The logits z_ij = s cos(x_i, y_j) exist only in registers, as tiles [BLOCK_M, BLOCK_N], and so do the running statistics
of Eq. 1-4. Memory is O(R + C). From SMALL to KEPT pairs the cosines are read from memory instead (asdm_kept.py).

    prepare      norms of both inputs, and sum_k y_ik of every query (asdm_prepare.py); sets a counter to zero
    row loss     one program for each block of rows. It loops over all columns and keeps running statistics

                     y_0   y_1   y_2 ...
            x_0 [    z  -> z  -> z  -> ]   top, sum e, sum e (z - top - log(t + eps)), positive  ->  loss

                 Each program stores the sum of its rows' losses; the counter tells which program comes last, and that
                 one adds up all sums in the order of the programs
    gradient     asdm_gradient.py, or asdm_kept.py

With `both` the second grid axis is the direction: rows and columns are exchanged. Every tile of logits is computed once
for each direction. In a small batch the launches take longer than this repeated work; a large batch in float32 uses
`asdm_blocks`. Deterministic: see CONTRIBUTING.md, "A kernel file".
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import asdm_gradient, asdm_kept
from ._asdm import (
    ANY_ADDRESS,
    Gradient,
    alike,
    any_factor_of,
    blocks,
    by_direction,
    contiguous_ids,
    cosines,
    flags,
    kind_of,
    size,
)  # fmt: skip
from ._launch import Strided, by_device, dot_precision, launch, on_device
from ._row_statistics import LOWEST, finalize, update_tile
from .asdm_prepare import prepare

__all__ = ["backward", "forward", "prepare", "takes"]

SUM_BLOCK = tl.constexpr(1024)  # programs whose losses are added at once


@triton.jit(do_not_specialize=[*ANY_ADDRESS, "X", "Y", "offset"])
def _row_loss_kernel(
    x_ptr,  # [X, D] queries; in direction 1 the keys, as every pair below
    y_ptr,  # [Y, D]
    pids_ptr,  # [C]
    image_ids_ptr,  # [C], or anything
    scale_ptr,  # [], or anything
    norms_ptr,  # [2, R + C]: |f x| and f
    label_sum_ptr,  # [X]
    loss_ptr,  # [S, X]; with SUM [programs], the sum of each one's rows
    statistics_ptr,  # [S, STATISTICS, X]
    index_ptr,  # [S, 2, X], or anything
    cos_ptr,  # [S, X, cos_stride]: the cosines of each direction, or anything
    counter_ptr,  # [1], 0 at first
    sum_ptr,  # []; these two are anything without SUM
    X,
    Y,
    D,
    offset,
    scale,
    alpha,
    eps,
    factor,
    loss_weight,
    x_stride,
    y_stride,
    cos_stride,
    KEPT: tl.constexpr,  # cosines are read from memory
    SUM: tl.constexpr,  # the losses are added up
    STATISTICS: tl.constexpr,
    HAS_IMAGES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    POSITIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (row blocks, S): the loss of every row, and what its gradient needs; with SUM the sum of the losses."""
    direction = tl.program_id(1)
    x_norm, y_norm = by_direction(direction, 0, X)
    x_stride, y_stride = by_direction(direction, x_stride, y_stride)
    if direction == 1:
        x_ptr, y_ptr = y_ptr, x_ptr
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)

    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < X
    if not KEPT:
        x_inverse = 1.0 / tl.load(norms_ptr + x_norm + rows, mask=row_mask, other=1.0)
        any_factor = any_factor_of(norms_ptr + X + Y, X + Y)
    own_pid = tl.load(pids_ptr + offset + rows, mask=row_mask, other=0)[:, None]
    own_image = own_pid
    if HAS_IMAGES:
        own_image = tl.load(image_ids_ptr + offset + rows, mask=row_mask, other=0)[:, None]
    total = tl.load(label_sum_ptr + rows, mask=row_mask, other=1.0)[:, None]

    top, positive = tl.full((BLOCK_M,), LOWEST, tl.float32), tl.full((BLOCK_M,), LOWEST, tl.float32)
    sum_e, excess, sum_t = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    top_index, positive_index = tl.zeros((BLOCK_M,), tl.int32), offset + rows
    for start in range(0, Y, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        inside = (cols < Y)[None, :]
        if KEPT:
            entries = cos_ptr + (direction.to(tl.int64) * X + rows)[:, None] * cos_stride + cols[None, :]
            cos = tl.load(entries, mask=row_mask[:, None] & inside, other=0.0)
        else:
            y_inverse = 1.0 / tl.load(norms_ptr + y_norm + cols, mask=cols < Y, other=1.0)
            cos = cosines(
                x_ptr, y_ptr, norms_ptr + X + Y, rows, cols, x_inverse, y_inverse, x_norm, y_norm, X, Y, D,
                x_stride, y_stride, any_factor, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip
        z = tl.where(inside, scale * cos, -float("inf"))
        same = (own_pid == tl.load(pids_ptr + cols, mask=cols < Y, other=0)[None, :]) & inside
        same_image = same
        if HAS_IMAGES:
            same_image = (own_image == tl.load(image_ids_ptr + cols, mask=cols < Y, other=0)[None, :]) & inside

        top, sum_e, excess, sum_t, top_index, positive, positive_index = update_tile(
            top, sum_e, excess, sum_t, top_index, positive, positive_index, z, cols, inside, same, same_image,
            total, factor, eps, HAS_IMAGES, CROSS_ENTROPY, WEIGHTED, POSITIVE,
        )  # fmt: skip

    loss = finalize(
        statistics_ptr + direction.to(tl.int64) * STATISTICS * X, index_ptr + direction.to(tl.int64) * 2 * X,
        rows, row_mask, X, top, sum_e, excess, sum_t, top_index, positive, positive_index,
        alpha, loss_weight, CROSS_ENTROPY, WEIGHTED,
    )  # fmt: skip
    if SUM:
        # The program that comes last adds up the sums of all, in an order that does not depend on which one it is.
        # One thread stores this program's sum and then adds to the counter: its release shows the sum to the device
        # first. Whoever reads the highest count has acquired all others'. `.cg` reads the cache that the device shares.
        # (The barrier keeps this true should a compiler give the store and the atomic to different threads.)
        programs = tl.num_programs(0) * tl.num_programs(1)
        tl.store(loss_ptr + direction * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(row_mask, loss, 0.0), 0))
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1:
            losses = tl.zeros((SUM_BLOCK,), tl.float32)
            for start in range(0, programs, SUM_BLOCK):
                at = start + tl.arange(0, SUM_BLOCK)
                losses += tl.load(loss_ptr + at, mask=at < programs, other=0.0, cache_modifier=".cg")
            tl.store(sum_ptr, tl.sum(losses, 0))
    else:
        tl.store(loss_ptr + direction.to(tl.int64) * X + rows, loss, mask=row_mask)


# Launchers. `spec` is a `RowLoss`: objective, alpha, positive, detach_weight, eps, image_id_factor, offset,
# both, reduction.


def takes(queries: Tensor, keys: Tensor) -> bool:
    """Whether these kernels are the better way: small batches, and half precision.

    For a large batch in float32 the BLAS library is faster: `asdm_blocks` reads the blocks of cosines that it makes.
    """
    return kind_of(queries, keys) == "half" or size(queries, keys) != "large"


def forward(
    queries: Tensor,
    keys: Tensor,
    pids: Tensor,
    image_ids: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
    spec: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics, indices, norms and label sums, as the operator declares them."""
    queries, keys = alike(queries, keys)
    (R, D), C, S = queries.shape, keys.shape[0], spec.directions
    numbers = {"dtype": torch.float32, "device": keys.device}
    statistics = torch.empty(S, 4 if spec.weighted else 3, R, **numbers)
    indices = torch.empty((S, 2, R) if spec.weighted else (0,), dtype=torch.int32, device=keys.device)
    counter, adds = torch.empty(1, dtype=torch.int32, device=keys.device), spec.reduction != "none"
    norms, label_sum = prepare(queries, keys, pids, image_ids, spec, counter)
    block, kept = blocks("row_loss", queries, keys), size(queries, keys) == "kept"
    grid = triton.cdiv(R, block["BLOCK_M"]), S
    loss = torch.empty(grid[0] * S if adds else (S, R), **numbers)
    total = torch.empty((), **numbers) if adds else loss
    cos, cos_stride = asdm_kept.cosines_of(queries, keys, norms, spec.both) if kept else (norms, 16)
    scale_ptr, scale = by_device(scale if logit_scale is None else logit_scale, norms)
    ids = contiguous_ids(pids, image_ids)
    with on_device(keys):
        launch(
            _row_loss_kernel, grid,
            Strided(queries), Strided(keys), *ids, norms if scale_ptr is None else scale_ptr, norms, label_sum,
            loss, statistics, indices if spec.weighted else statistics, cos, counter, total,
            R, C, D, spec.offset, scale, spec.alpha, spec.eps, spec.image_id_factor,
            1 / R if spec.reduction == "mean" else 1.0, queries.stride(0), keys.stride(0), cos_stride,
            KEPT=kept, SUM=adds, POSITIVE=spec.positive, **flags(image_ids, scale_ptr, spec),
            PRECISION=dot_precision(keys.dtype), **block | {"BLOCK_D": block.get("BLOCK_D")},
        )  # fmt: skip
    return total if adds else loss.sum(0), statistics, indices, norms, label_sum


def backward(
    dloss: Tensor,
    statistics: Tensor,
    indices: Tensor,
    norms: Tensor,
    label_sum: Tensor,
    queries: Tensor,
    keys: Tensor,
    pids: Tensor,
    image_ids: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
    scale_gradient: bool,
    spec: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and scale."""
    dqueries, dkeys = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (queries, keys))
    queries, keys = alike(queries, keys)
    scale_ptr, scale = by_device(scale if logit_scale is None else logit_scale, norms)
    way = asdm_kept if size(queries, keys) == "kept" else asdm_gradient
    dscale = way.backward(
        Gradient(
            dloss.expand(queries.shape[0]), statistics, indices, norms, label_sum, queries, keys,
            contiguous_ids(pids, image_ids), image_ids, scale_ptr, scale, scale_gradient, spec, dqueries, dkeys,
        )
    )  # fmt: skip
    return dqueries, dkeys, dscale
