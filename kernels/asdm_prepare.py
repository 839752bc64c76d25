"""Norms of both inputs of A-SDM, SDM and ITC, and sum_k y_ik of every query: D and the ids are read once.

    prepare    [R, D], [C, D], ids [C]  ->  norms [2, R + C]: |f x| and f,  label sums [R]

A row whose squares leave float32's range gets a factor f, a power of two; where there is one, whoever multiplies rows
multiplies with it first. One program for each block of rows of an input.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._asdm import ANY_ADDRESS, by_direction, contiguous_ids, launch_options
from ._launch import Strided, launch, on_device
from ._tile import row_norms


@triton.jit(do_not_specialize=[*ANY_ADDRESS, "R", "C", "offset"])
def _prepare_kernel(
    q_ptr,  # [R, D]
    k_ptr,  # [C, D]
    pids_ptr,  # [C]
    image_ids_ptr,  # [C], or anything
    norms_ptr,  # [2, R + C]: |f x| and f
    label_sum_ptr,  # [R]
    counter_ptr,  # [1], set to 0 with COUNT
    R,
    C,
    D,
    offset,
    factor,
    q_stride,
    k_stride,
    HAS_IMAGES: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (row blocks, 2): |q_i| and |k_j|; with COUNT, direction 0 also counts labels."""
    direction = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    X, _ = by_direction(direction, R, C)
    x_norm, _ = by_direction(direction, 0, R)
    stride, _ = by_direction(direction, q_stride, k_stride)
    x_ptr = q_ptr
    if direction == 1:
        x_ptr = k_ptr
    norm, factor_of_row = row_norms(x_ptr + rows.to(tl.int64) * stride, rows < X, D, BLOCK_D)
    tl.store(norms_ptr + x_norm + rows, norm, mask=rows < X)
    tl.store(norms_ptr + R + C + x_norm + rows, factor_of_row, mask=rows < X)

    if COUNT and direction == 0:
        if tl.program_id(0) == 0:
            tl.store(counter_ptr, 0)
        samples = rows + offset
        own_pid = tl.load(pids_ptr + samples, mask=rows < X, other=0)
        same = tl.zeros((BLOCK_M,), tl.int32)
        if HAS_IMAGES:
            own_image = tl.load(image_ids_ptr + samples, mask=rows < X, other=0)
            same_image = tl.zeros((BLOCK_M,), tl.int32)
        for start in range(0, C, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            pid = tl.load(pids_ptr + cols, mask=cols < C, other=0)
            same += tl.sum(((own_pid[:, None] == pid[None, :]) & (cols < C)[None, :]).to(tl.int32), 1)
            if HAS_IMAGES:
                image = tl.load(image_ids_ptr + cols, mask=cols < C, other=0)
                same_image += tl.sum(((own_image[:, None] == image[None, :]) & (cols < C)[None, :]).to(tl.int32), 1)
        total = same.to(tl.float32)
        if HAS_IMAGES:
            total = factor * total + (1 - factor) * same_image.to(tl.float32)
        tl.store(label_sum_ptr + rows, total, mask=rows < X)


def prepare(
    queries: Tensor,
    keys: Tensor | None,
    pids: Tensor | None,
    image_ids: Tensor | None,
    spec: Any,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Norms [2, R + C] and label sums; norms alone without ids, of the queries alone without keys. Both are alike.

    With ids `counter` [1], int32, becomes 0.
    """
    (R, D), C, count = queries.shape, 0 if keys is None else keys.shape[0], pids is not None
    directions, keys = (1, queries) if keys is None else (2, keys)
    norms = torch.empty(2, R + C, dtype=torch.float32, device=keys.device)
    label_sum, ids, offset, factor = norms, (norms, norms), 0, 0.0
    if count:
        offset, factor = spec.offset, spec.image_id_factor
        label_sum = torch.empty(R, dtype=torch.float32, device=keys.device)
        ids = contiguous_ids(pids, image_ids)
    with on_device(keys):
        launch(
            _prepare_kernel, (triton.cdiv(max(R, C), 16), directions),
            Strided(queries), Strided(keys), *ids, norms, label_sum, norms if counter is None else counter,
            R, C, D, offset, factor, queries.stride(0), keys.stride(0),
            HAS_IMAGES=image_ids is not None, COUNT=count,
            BLOCK_M=16, BLOCK_N=128, BLOCK_D=128, **launch_options(keys, 4, 2),
        )  # fmt: skip
    return norms, label_sum
