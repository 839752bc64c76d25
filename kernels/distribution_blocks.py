"""What a block of cosines in memory says of its rows and of its columns, and the gradient in its logits.

Large batches in float32: a block [m, C] is one product of the BLAS library, and these kernels read it once a side,
where PyTorch makes dozens of passes. The walk over blocks, and with it what is done on the PyTorch path too, is
`fmfa_losses/ops/similarity_distribution/blocks.py`; memory is one block and O(R + C).

    absorb    side 0: a program owns rows,    walks along them, and concludes
              side 1: a program owns columns, walks down the block, and carries its running numbers to the next one

                      k_0 .. k_63   k_64 ..
              q_0  [      |     ->    ->    ]   side 0
              q_1  [      v                 ]
                          side 1

    dlogits   a program owns a tile: what its rows pay and what its columns pay, in place of the cosines

Every number has one owner: no atomics, bitwise equal reruns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._distribution_tile import LOWEST, absorb_tile, add_dlogits, conclude, load_paid
from ._launch import Strided, launch, on_device
from .similarity_distribution import ANY_ADDRESS, alike, by_device, contiguous_ids, flags, launch_options, prepare

__all__ = ["absorb", "block_elements", "dlogits", "norms", "row_multiple"]

block_elements = 2**24  # numbers in a block: 64 MiB
row_multiple = 16  # a row begins where 16 bytes can be loaded at once, and its stride is one specialisation, whatever C

# (BLOCK_M, BLOCK_N): payers, and what they look at in one step. Memory is contiguous along the columns of the block.
# A block has 2^24 / C rows: from 4096 columns on, programs of 8 rows would be fewer than four for each of an H100's 132
# multiprocessors, and at 65536 fewer than a quarter of one.
WIDE = 4096
ROWS = {"narrow": (8, 256), "wide": (2, 1024)}
COLUMNS, TILE = (64, 32), (32, 64)


# Not specialised, too: vectors of side 1, which follow those of side 0 at any distance.
OF_A_SIDE = ("running_ptr", "loss_ptr", "statistics_ptr", "places_ptr")


@triton.jit(do_not_specialize=[*ANY_ADDRESS, *OF_A_SIDE, "R", "X", "Y", "x_first", "y_first", "offset"])
def _absorb_kernel(
    cos_ptr,  # [X, Y], or with DOWN [Y, X]
    running_ptr,  # [5, R]: top, sum_e, paid, mass, positive; or anything
    pids_ptr,  # [C]
    image_ids_ptr,  # [C], or anything
    scale_ptr,  # [], or anything
    label_sum_ptr,  # [R]
    loss_ptr,  # [R]
    statistics_ptr,  # [STATISTICS, R]
    places_ptr,  # [2, R], or anything
    R,
    X,  # payers in this block
    Y,
    x_first,  # place of the first payer among all
    y_first,
    offset,
    scale,
    alpha,
    eps,
    factor,
    cos_stride,
    DOWN: tl.constexpr,  # side 1: whose rows are the columns of the block, and go on in the next
    HAS_IMAGES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    POSITIVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (payer blocks,): what every payer pays after this block, and its statistics."""
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    x = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = x < X
    at = x_first + x
    own_pid = tl.load(pids_ptr + offset + at, mask=live, other=0)[:, None]
    own_image = own_pid
    if HAS_IMAGES:
        own_image = tl.load(image_ids_ptr + offset + at, mask=live, other=0)[:, None]
    total = tl.load(label_sum_ptr + at, mask=live, other=1.0)[:, None]

    top, positive = tl.full((BLOCK_M,), LOWEST, tl.float32), tl.full((BLOCK_M,), LOWEST, tl.float32)
    sum_e, paid, mass = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    top_place, positive_place = tl.zeros((BLOCK_M,), tl.int32), offset + at
    if DOWN:
        top = tl.load(running_ptr + at, mask=live, other=LOWEST)
        sum_e = tl.load(running_ptr + R + at, mask=live, other=0.0)
        paid = tl.load(running_ptr + 2 * R + at, mask=live, other=0.0)
        mass = tl.load(running_ptr + 3 * R + at, mask=live, other=0.0)
        if WEIGHTED:
            positive = tl.load(running_ptr + 4 * R + at, mask=live, other=LOWEST)
            top_place = tl.load(places_ptr + at, mask=live, other=0)
            if POSITIVE != "paired":
                positive_place = tl.load(places_ptr + R + at, mask=live, other=0)

    for start in range(0, Y, BLOCK_N):
        y = start + tl.arange(0, BLOCK_N)
        inside = (y < Y)[None, :]
        columns = y_first + y
        if DOWN:
            entries = cos_ptr + y.to(tl.int64)[None, :] * cos_stride + x[:, None]
        else:
            entries = cos_ptr + x.to(tl.int64)[:, None] * cos_stride + y[None, :]
        cos = tl.load(entries, mask=live[:, None] & inside, other=0.0)
        z = tl.where(inside, scale * cos, -float("inf"))
        same = (own_pid == tl.load(pids_ptr + columns, mask=y < Y, other=0)[None, :]) & inside
        same_image = same
        if HAS_IMAGES:
            same_image = (own_image == tl.load(image_ids_ptr + columns, mask=y < Y, other=0)[None, :]) & inside
        top, sum_e, paid, mass, top_place, positive, positive_place = absorb_tile(
            top, sum_e, paid, mass, top_place, positive, positive_place, z, columns, inside, same,
            same_image, total, factor, eps, HAS_IMAGES, CROSS_ENTROPY, WEIGHTED, POSITIVE,
        )  # fmt: skip

    if DOWN:
        tl.store(running_ptr + at, top, mask=live)
        tl.store(running_ptr + R + at, sum_e, mask=live)
        tl.store(running_ptr + 2 * R + at, paid, mask=live)
        tl.store(running_ptr + 3 * R + at, mass, mask=live)
        if WEIGHTED:
            tl.store(running_ptr + 4 * R + at, positive, mask=live)
    conclude(
        loss_ptr, statistics_ptr, places_ptr, at, live, R,
        top, sum_e, paid, mass, top_place, positive, positive_place,
        alpha, 1.0, CROSS_ENTROPY, WEIGHTED,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*ANY_ADDRESS, *OF_A_SIDE, "R", "X", "C", "x_first", "offset", "g_stride"])
def _dlogits_kernel(
    cos_ptr,  # [X, C]; the gradient in the logits takes its place
    pids_ptr,  # [C]
    image_ids_ptr,  # [C], or anything
    scale_ptr,  # [], or anything
    label_sum_ptr,  # [R]
    statistics_ptr,  # [S, STATISTICS, R]
    places_ptr,  # [S, 2, R], or anything
    g_ptr,  # [R], any stride
    R,
    X,  # rows in this block
    C,
    x_first,  # place of the first row among all
    offset,
    scale,
    alpha,
    push_alpha,  # alpha, or 0 where the weight is detached
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
    """Grid (column blocks, row blocks): gradient in the logits of what rows and, with BOTH, columns pay."""
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    x = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live, here, at = x < X, columns < C, x_first + x
    entries = cos_ptr + x.to(tl.int64)[:, None] * cos_stride + columns[None, :]
    inside = live[:, None] & here[None, :]
    cos = tl.load(entries, mask=inside, other=0.0)
    z = scale * cos
    own_pid = tl.load(pids_ptr + offset + at, mask=live, other=0)
    same = own_pid[:, None] == tl.load(pids_ptr + columns, mask=here, other=0)[None, :]
    same_image = same
    if HAS_IMAGES:
        own_image = tl.load(image_ids_ptr + offset + at, mask=live, other=0)
        same_image = own_image[:, None] == tl.load(image_ids_ptr + columns, mask=here, other=0)[None, :]
    row_total = tl.load(label_sum_ptr + at, mask=live, other=1.0)

    dz = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    g, top, log_sum, third, gap, top_place, positive_place = load_paid(
        g_ptr, statistics_ptr, places_ptr, at, live, R, g_stride, 1.0, WEIGHTED
    )
    dz = add_dlogits(
        dz, z, same, same_image, columns[None, :], row_total[:, None],
        g[:, None], top[:, None], log_sum[:, None], third[:, None], gap[:, None],
        top_place[:, None], positive_place[:, None],
        alpha, push_alpha, eps, factor, HAS_IMAGES, CROSS_ENTROPY, WEIGHTED,
    )  # fmt: skip
    if BOTH:
        column_total = tl.load(label_sum_ptr + columns, mask=here, other=1.0)
        g, top, log_sum, third, gap, top_place, positive_place = load_paid(
            g_ptr, statistics_ptr + STATISTICS * R, places_ptr + 2 * R, columns, here, R, g_stride, 1.0, WEIGHTED
        )
        dz = add_dlogits(
            dz, z, same, same_image, at[:, None], column_total[None, :],
            g[None, :], top[None, :], log_sum[None, :], third[None, :], gap[None, :],
            top_place[None, :], positive_place[None, :],
            alpha, push_alpha, eps, factor, HAS_IMAGES, CROSS_ENTROPY, WEIGHTED,
        )  # fmt: skip
    tl.store(entries, dz, mask=inside)


# Launchers: a `Reader` of fmfa_losses/ops/similarity_distribution/blocks.py. `batch` is what all blocks share, `out`
# what rows have shown.


def norms(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """|f x| and f of the queries, then of the keys, [2, R + C]."""
    return prepare(*alike(queries, keys), None, None, None)[0]


def absorb(cos: Tensor, rows: slice, batch: Any, out: Any) -> None:
    """Writes what the rows pay and their statistics; those of the columns as far as the blocks have come."""
    (m, C), R, spec = cos.shape, out.loss.shape[1], batch.spec
    scale_ptr, scale = by_device(batch.scale, cos)
    ids = contiguous_ids(batch.pids, batch.image_ids)
    compiled = flags(batch.image_ids, scale_ptr, spec)
    compiled.pop("STATISTICS")
    with on_device(cos):
        for side in range(spec.sides):
            M, N = COLUMNS if side else ROWS["wide" if C >= WIDE else "narrow"]
            X, Y, x_first, y_first = (C, m, 0, rows.start) if side else (m, C, rows.start, 0)
            launch(
                _absorb_kernel, (triton.cdiv(X, M),),
                Strided(cos), out.running if side else out.loss, *ids, out.loss if scale_ptr is None else scale_ptr,
                batch.label_sum, out.loss[side], out.statistics[side], out.places[side] if spec.weighted else out.loss,
                R, X, Y, x_first, y_first, spec.offset, scale, spec.alpha, spec.eps, spec.image_id_factor,
                cos.stride(0),
                DOWN=side == 1, POSITIVE=spec.positive, **compiled, BLOCK_M=M, BLOCK_N=N, **launch_options(cos, 4, 2),
            )  # fmt: skip


def dlogits(cos: Tensor, rows: slice, g: Tensor, batch: Any, out: Any) -> Tensor:
    """Gradient in the logits of sum_i g_i (what row i pays), both sides together, in place of the cosines; g [R]."""
    (m, C), R, spec = cos.shape, out.statistics.shape[2], batch.spec
    scale_ptr, scale = by_device(batch.scale, cos)
    M, N = TILE
    grid = triton.cdiv(C, N), triton.cdiv(m, M)
    with on_device(cos):
        launch(
            _dlogits_kernel, grid,
            Strided(cos), *contiguous_ids(batch.pids, batch.image_ids),
            out.statistics if scale_ptr is None else scale_ptr, batch.label_sum,
            out.statistics, out.places if spec.weighted else out.statistics, Strided(g),
            R, m, C, rows.start, spec.offset, scale, spec.alpha, 0.0 if spec.detach_weight else spec.alpha,
            spec.eps, spec.image_id_factor, cos.stride(0), g.stride(0),
            BOTH=spec.both, **flags(batch.image_ids, scale_ptr, spec),
            BLOCK_M=M, BLOCK_N=N, **launch_options(cos, 4, 2),
        )  # fmt: skip
    return cos
