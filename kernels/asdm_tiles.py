"""A-SDM, SDM and ITC in tiles: row losses and input gradients from raw features, for small batches and half precision.

The logits z_ij = s cos(x_i, y_j) exist only in registers, as tiles [BLOCK_M, BLOCK_N], and so do the running statistics
of Eq. 1-4. Memory is O(R + C).

    prepare      norms of both inputs, and sum_k y_ik of every query: D and the ids are read once. A row whose squares
                 leave float32's range gets a factor, a power of two; where there is one, products are redone
    row loss     one program for each block of rows. It loops over all columns and keeps running statistics

                     y_0   y_1   y_2 ...
            x_0 [    z  -> z  -> z  -> ]   top, sum e, sum e (z - top - log(t + eps)), positive  ->  loss

    gradient     one program for each block [rows, chunk of D] of an input's gradient. It computes each tile of logits
                 again, adds up dlogits of its rows and of its columns (rows of the other direction), multiplies with y,
                 and applies the derivative of the normalisation

With `both` the second grid axis is the direction: rows and columns are exchanged. Every tile of logits is computed once
for each direction, and in the gradient once for each chunk of D. In a small batch the launches take longer than this
repeated work; a large batch in float32 uses `asdm_blocks`. Deterministic: see CONTRIBUTING.md, "A kernel file".
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import LDS, Strided, chip_class, dot_precision, launch, on_device, precision
from ._row_statistics import LOWEST, add_dlogits, finalize, load_final, update_tile
from ._tile import dot_nearest, dot_wide

# Rows with a norm beyond LIMIT or below 1 / LIMIT are multiplied with a power of two before anything is squared.
LIMIT, POWER = tl.constexpr(2.0**40), tl.constexpr(2.0**88)


# Blocks by kernel, size of the batch and precision: (BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_OUT, num_warps, num_stages).
# Small batches want many programs, large ones large tiles. BLOCK_D is the same in both kernels: the
# gradient of a peaked row is a small difference that needs the very logits of the forward.
# SMALL: pairs of a small batch. In IEEE float32 each 64 columns of the gradient compute all logits anew: more pairs go
# through `asdm_blocks`, as they do in TF32.
SMALL = {"half": 1024, "tf32": 1024, "ieee": 256}
BLOCKS: dict[tuple[str, str, str], tuple[Any, ...]] = {
    ("row_loss", "small", "half"): (16, 64, 64, None, 4, 3),
    ("row_loss", "small", "tf32"): (16, 64, 64, None, 4, 3),
    ("row_loss", "small", "ieee"): (16, 32, 32, None, 4, 3),
    ("row_loss", "large", "half"): (64, 64, 64, None, 8, 3),
    ("gradient", "small", "half"): (16, 32, 64, 128, 4, 2),
    ("gradient", "small", "tf32"): (16, 32, 64, 64, 4, 2),
    ("gradient", "small", "ieee"): (16, 32, 32, 64, 4, 2),
    ("gradient", "large", "half"): (64, 32, 64, 256, 8, 2),
}


def blocks(kernel: str, rows: int, like: Tensor) -> dict[str, int]:
    """Compile-time sizes and launch options of a kernel."""
    kind = precision(like.dtype)
    M, N, D, out, warps, stages = BLOCKS[kernel, "small" if rows <= SMALL[kind] else "large", kind]
    sizes = {"BLOCK_M": M, "BLOCK_N": N, "BLOCK_D": D} | ({} if out is None else {"BLOCK_OUT": out})
    return sizes | launch_options(like, warps, stages)


def launch_options(like: Tensor, warps: int, stages: int) -> dict[str, int]:
    if chip_class(like.device) == LDS:  # an AMD chip: a wave holds 64 threads
        return {"num_warps": min(warps, 4), "num_stages": stages}
    # Allowed 255 registers, the compiler takes what it needs; left to itself it spills a few to fit one more program.
    return {"num_warps": warps, "num_stages": stages, "maxnreg": 255}


@triton.jit
def _by_direction(direction, first, second):
    """The two numbers in the order of the direction. (A stride of 1 is a constant to the compiler, so no `if`.)"""
    return tl.where(direction == 0, first, second), tl.where(direction == 0, second, first)


@triton.jit
def _any_factor(factors_ptr, n):
    """Whether one of n rows has a factor."""
    found = tl.zeros((1024,), tl.int32)
    for start in range(0, n, 1024):
        at = start + tl.arange(0, 1024)
        found |= (tl.load(factors_ptr + at, mask=at < n, other=1.0) != 1.0).to(tl.int32)
    return tl.max(found, 0) > 0


@triton.jit
def _cosines(
    x_ptr,  # [X, D]
    y_ptr,  # [Y, D]
    factors_ptr,  # [R + C]
    rows,  # [BLOCK_M]
    cols,  # [BLOCK_N]
    x_inverse,  # [BLOCK_M]
    y_inverse,  # [BLOCK_N]
    x_norm,  # index of x_0 among the factors
    y_norm,
    X,
    Y,
    D,
    x_stride,
    y_stride,
    any_factor,  # whether any row has one
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] of cos(x_i, y_j): raw features are multiplied, so that nothing is rounded before."""
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    y_rows = y_ptr + cols.to(tl.int64)[None, :] * y_stride
    dots = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_rows + d[None, :], mask=(rows < X)[:, None] & (d < D)[None, :], other=0.0)
        y = tl.load(y_rows + d[:, None], mask=(cols < Y)[None, :] & (d < D)[:, None], other=0.0)
        dots = dot_nearest(x, y, dots, PRECISION)
    if x_ptr.dtype.element_ty != tl.float16:  # noqa: SIM102, settled when compiled; products of float16 are in range
        if any_factor:
            x_factor = tl.load(factors_ptr + x_norm + rows, mask=rows < X, other=1.0)[:, None]
            y_factor = tl.load(factors_ptr + y_norm + cols, mask=cols < Y, other=1.0)[None, :]
            dots = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            # No stages and narrow steps: this rare case takes no registers from the usual one.
            STEP: tl.constexpr = 16 if x_ptr.dtype.element_ty == tl.float32 else BLOCK_D
            for start in tl.range(0, D, STEP, num_stages=1):
                d = start + tl.arange(0, STEP)
                x = tl.load(x_rows + d[None, :], mask=(rows < X)[:, None] & (d < D)[None, :], other=0.0)
                y = tl.load(y_rows + d[:, None], mask=(cols < Y)[None, :] & (d < D)[:, None], other=0.0)
                dots = dot_nearest((x * x_factor).to(x.dtype), (y * y_factor).to(y.dtype), dots, PRECISION)
    # One product of the inverses: both directions, rows and columns exchanged, get the same number to the last bit.
    return dots * (x_inverse[:, None] * y_inverse[None, :])


# Arguments that Triton does not specialise on: vectors of the user, at any address. Each kernel's list adds the numbers
# that change with the batch, so that a smaller last batch compiles nothing.
ANY_ADDRESS = ("pids_ptr", "image_ids_ptr", "scale_ptr", "dloss_ptr", "g_ptr")


@triton.jit(do_not_specialize=[*ANY_ADDRESS, "R", "C", "offset"])
def _prepare_kernel(
    q_ptr,  # [R, D]
    k_ptr,  # [C, D]
    pids_ptr,  # [C]
    image_ids_ptr,  # [C], or anything
    norms_ptr,  # [2, R + C]: |f x| and f
    label_sum_ptr,  # [R]
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
    X, _ = _by_direction(direction, R, C)
    x_norm, _ = _by_direction(direction, 0, R)
    stride, _ = _by_direction(direction, q_stride, k_stride)
    x_ptr = q_ptr
    if direction == 1:
        x_ptr = k_ptr
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride
    squares = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_rows + d[None, :], mask=(rows < X)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        squares += x * x
    norm, power = tl.sqrt(tl.sum(squares, 1)), tl.full((BLOCK_M,), 1.0, tl.float32)
    if x_ptr.dtype.element_ty != tl.float16:
        power = tl.where(norm > LIMIT, 1 / POWER, tl.where(norm < 1 / LIMIT, POWER, 1.0))
        power = tl.where(rows < X, power, 1.0)
        if tl.max((power != 1.0).to(tl.int32), 0) > 0:
            squares = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            for start in range(0, D, BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                x = tl.load(x_rows + d[None, :], mask=(rows < X)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
                squares += (x * power[:, None]) * (x * power[:, None])
            norm = tl.sqrt(tl.sum(squares, 1))
    zero = norm == 0  # a zero vector: its unit vector is zero, its 1 / |x| counts as 1
    tl.store(norms_ptr + x_norm + rows, tl.where(zero, 1.0, norm), mask=rows < X)
    tl.store(norms_ptr + R + C + x_norm + rows, tl.where(zero, 1.0, power), mask=rows < X)

    if COUNT and direction == 0:
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


@triton.jit(do_not_specialize=[*ANY_ADDRESS, "X", "Y", "offset"])
def _row_loss_kernel(
    x_ptr,  # [X, D] queries; in direction 1 the keys, as every pair below
    y_ptr,  # [Y, D]
    pids_ptr,  # [C]
    image_ids_ptr,  # [C], or anything
    scale_ptr,  # [], or anything
    norms_ptr,  # [2, R + C]: |f x| and f
    label_sum_ptr,  # [X]
    loss_ptr,  # [S, X]
    statistics_ptr,  # [S, STATISTICS, X]
    index_ptr,  # [S, 2, X], or anything
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
    """Grid (row blocks, S): the loss of every row, and what its gradient needs."""
    direction = tl.program_id(1)
    x_norm, y_norm = _by_direction(direction, 0, X)
    x_stride, y_stride = _by_direction(direction, x_stride, y_stride)
    if direction == 1:
        x_ptr, y_ptr = y_ptr, x_ptr
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)

    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < X
    x_inverse = 1.0 / tl.load(norms_ptr + x_norm + rows, mask=row_mask, other=1.0)
    any_factor = _any_factor(norms_ptr + X + Y, X + Y)
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
        y_inverse = 1.0 / tl.load(norms_ptr + y_norm + cols, mask=cols < Y, other=1.0)
        cos = _cosines(
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

    finalize(
        loss_ptr + direction.to(tl.int64) * X, statistics_ptr + direction.to(tl.int64) * STATISTICS * X,
        index_ptr + direction.to(tl.int64) * 2 * X, rows, row_mask, X,
        top, sum_e, excess, sum_t, top_index, positive, positive_index,
        alpha, loss_weight, CROSS_ENTROPY, WEIGHTED,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*ANY_ADDRESS, "X", "Y", "x_sample", "y_sample", "x_norm", "y_norm", "dloss_stride"])
def _gradient_kernel(
    x_ptr,  # [X, D] the input whose gradient is computed; in direction 1 the other one, as every pair below
    y_ptr,  # [Y, D]
    pids_ptr,  # [C]
    image_ids_ptr,  # [C], or anything
    scale_ptr,  # [], or anything
    norms_ptr,  # [2, R + C]: |f x| and f
    label_sum_ptr,  # [R]
    statistics_ptr,  # [S, STATISTICS, R]
    index_ptr,  # [S, 2, R], or anything
    dloss_ptr,  # [R], any stride
    dx_ptr,  # [X, D]
    dy_ptr,  # [Y, D]; untouched unless there are two directions
    dscale_ptr,  # [X], or anything
    X,
    Y,
    D,
    x_sample,  # sample of x_0
    y_sample,
    x_norm,  # index of x_0 among the norms
    y_norm,
    scale,
    alpha,
    gap_alpha,  # alpha, or 0 where the weight is detached
    eps,
    factor,
    loss_weight,
    x_stride,
    y_stride,
    dloss_stride,
    STATISTICS: tl.constexpr,
    AS_ROWS: tl.constexpr,  # x are rows
    AS_COLUMNS: tl.constexpr,  # x are columns of rows y
    HAS_IMAGES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SCALE_GRADIENT: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Grid (row blocks, directions, chunks of D): gradient of the program's rows, normalisation included."""
    direction = tl.program_id(1)
    x_norm, y_norm = _by_direction(direction, x_norm, y_norm)
    x_stride, y_stride = _by_direction(direction, x_stride, y_stride)
    out_ptr = dx_ptr
    if direction == 1:
        x_ptr, y_ptr = y_ptr, x_ptr
        out_ptr = dy_ptr
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    # Statistics of the direction whose rows are x, and of the one whose rows are y.
    as_rows = direction.to(tl.int64) * X
    as_columns = (1 - direction if AS_ROWS else direction).to(tl.int64) * Y

    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < X
    x_inverse = 1.0 / tl.load(norms_ptr + x_norm + rows, mask=row_mask, other=1.0)
    any_factor = _any_factor(norms_ptr + X + Y, X + Y)
    own_pid = tl.load(pids_ptr + x_sample + rows, mask=row_mask, other=0)[:, None]
    own_image = own_pid
    if HAS_IMAGES:
        own_image = tl.load(image_ids_ptr + x_sample + rows, mask=row_mask, other=0)[:, None]
    if AS_ROWS:
        row_g, row_max, row_log_sum, row_third, row_gap, row_top, row_positive = load_final(
            dloss_ptr, statistics_ptr + STATISTICS * as_rows, index_ptr + 2 * as_rows, rows, row_mask, X,
            dloss_stride, loss_weight, WEIGHTED,
        )  # fmt: skip
    if AS_ROWS:
        own_total = tl.load(label_sum_ptr + rows, mask=row_mask, other=1.0)[:, None]

    d_out = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    dx = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
    # Component of the gradient along x_i: sum_j cos_ij dz_ij. Normalising removes it; dscale is its sum over i.
    along = tl.zeros((BLOCK_M,), tl.float32)

    for start in range(0, Y, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col_mask = cols < Y
        y_inverse = 1.0 / tl.load(norms_ptr + y_norm + cols, mask=col_mask, other=1.0)
        cos = _cosines(
            x_ptr, y_ptr, norms_ptr + X + Y, rows, cols, x_inverse, y_inverse, x_norm, y_norm, X, Y, D,
            x_stride, y_stride, any_factor, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
        z = scale * cos
        same = own_pid == tl.load(pids_ptr + y_sample + cols, mask=col_mask, other=0)[None, :]
        same_image = same
        if HAS_IMAGES:
            same_image = own_image == tl.load(image_ids_ptr + y_sample + cols, mask=col_mask, other=0)[None, :]

        if AS_COLUMNS:
            other_total = tl.load(label_sum_ptr + cols, mask=col_mask, other=1.0)[None, :]

        dz = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if AS_ROWS:
            dz = add_dlogits(
                dz, z, same, same_image, cols[None, :], own_total, row_g[:, None],
                row_max[:, None], row_log_sum[:, None], row_third[:, None], row_gap[:, None],
                row_top[:, None], row_positive[:, None],
                alpha, gap_alpha, eps, factor, HAS_IMAGES, CROSS_ENTROPY, WEIGHTED,
            )  # fmt: skip
        if AS_COLUMNS:
            col_g, col_max, col_log_sum, col_third, col_gap, col_top, col_positive = load_final(
                dloss_ptr, statistics_ptr + STATISTICS * as_columns, index_ptr + 2 * as_columns, cols, col_mask, Y,
                dloss_stride, loss_weight, WEIGHTED,
            )  # fmt: skip
            dz = add_dlogits(
                dz, z, same, same_image, rows[:, None], other_total, col_g[None, :],
                col_max[None, :], col_log_sum[None, :], col_third[None, :], col_gap[None, :],
                col_top[None, :], col_positive[None, :],
                alpha, gap_alpha, eps, factor, HAS_IMAGES, CROSS_ENTROPY, WEIGHTED,
            )  # fmt: skip
        dz = tl.where(col_mask[None, :], dz, 0.0)
        along += tl.sum(dz * cos, 1)

        y = tl.load(
            y_ptr + cols.to(tl.int64)[:, None] * y_stride + d_out[None, :],
            mask=col_mask[:, None] & (d_out < D)[None, :],
            other=0.0,
        )
        if y_ptr.dtype.element_ty != tl.float16:  # noqa: SIM102, settled when compiled
            if any_factor:
                y_factor = tl.load(norms_ptr + X + Y + y_norm + cols, mask=col_mask, other=1.0)
                y = (y * y_factor[:, None]).to(y.dtype)
        # A gradient may be as small as 1 / B^2, out of float16's range.
        if y_ptr.dtype.element_ty == tl.float32:
            dx = dot_nearest(dz * y_inverse[None, :], y, dx, PRECISION)
        else:
            dx = dot_wide(dz * y_inverse[None, :], y, dx, PRECISION)

    edge = row_mask[:, None] & (d_out < D)[None, :]
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_stride + d_out[None, :], mask=edge, other=0.0).to(tl.float32)
    x_factor = tl.load(norms_ptr + X + Y + x_norm + rows, mask=row_mask, other=1.0)[:, None]
    dx = scale * dx - (scale * along * x_inverse)[:, None] * (x * x_factor)
    dx = dx * x_inverse[:, None] * x_factor
    out = out_ptr + rows.to(tl.int64)[:, None] * D + d_out[None, :]
    tl.store(out, dx.to(out_ptr.dtype.element_ty), mask=edge)
    if SCALE_GRADIENT:  # noqa: SIM102, settled when compiled
        if (direction == 0) & (tl.program_id(2) == 0):  # every logit belongs to one row of direction 0
            tl.store(dscale_ptr + rows, along, mask=row_mask)


# Launchers. `spec` is a `RowLoss`: objective, alpha, positive, detach_weight, eps, image_id_factor, offset,
# both, reduction.


def takes(queries: Tensor, keys: Tensor) -> bool:
    """Whether these kernels are the better way: small batches, and half precision.

    In float32 a program has registers for 64 of the gradient's D columns, and computes every logit again for each 64.
    For a large batch the BLAS library is faster: `asdm_blocks` reads the blocks of cosines that it makes.
    """
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    kind = precision(dtype)
    return kind == "half" or max(queries.shape[0], keys.shape[0]) <= SMALL[kind]


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
    norms, label_sum = prepare(queries, keys, pids, image_ids, spec)
    loss = torch.empty(S, R, **numbers)
    scale_ptr, scale = by_device(scale if logit_scale is None else logit_scale, norms)
    ids = contiguous_ids(pids, image_ids)
    with on_device(keys):
        block = blocks("row_loss", max(R, C), keys)
        launch(
            _row_loss_kernel, (triton.cdiv(R, block["BLOCK_M"]), S),
            Strided(queries), Strided(keys), *ids, norms if scale_ptr is None else scale_ptr, norms, label_sum,
            loss, statistics, indices if spec.weighted else statistics,
            R, C, D, spec.offset, scale, spec.alpha, spec.eps, spec.image_id_factor,
            1 / R if spec.reduction == "mean" else 1.0, queries.stride(0), keys.stride(0),
            POSITIVE=spec.positive, **flags(image_ids, scale_ptr, spec), PRECISION=dot_precision(keys.dtype), **block,
        )  # fmt: skip
    return loss.sum(0) if spec.reduction == "none" else loss.sum(), statistics, indices, norms, label_sum


def prepare(
    queries: Tensor, keys: Tensor | None, pids: Tensor | None, image_ids: Tensor | None, spec: Any
) -> tuple[Tensor, Tensor]:
    """Norms [2, R + C] and label sums; norms alone without ids, of the queries alone without keys. Both are alike."""
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
            Strided(queries), Strided(keys), *ids, norms, label_sum, R, C, D, offset, factor,
            queries.stride(0), keys.stride(0),
            HAS_IMAGES=image_ids is not None, COUNT=count,
            BLOCK_M=16, BLOCK_N=128, BLOCK_D=128, **launch_options(keys, 4, 2),
        )  # fmt: skip
    return norms, label_sum


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
    dqueries = torch.empty_like(queries, memory_format=torch.contiguous_format)
    dkeys = torch.empty_like(keys, memory_format=torch.contiguous_format)
    queries, keys = alike(queries, keys)
    (R, D), C = queries.shape, keys.shape[0]
    dscale = torch.empty(R if scale_gradient else 0, dtype=torch.float32, device=keys.device)
    scale_ptr, scale = by_device(scale if logit_scale is None else logit_scale, norms)
    ids, dloss = contiguous_ids(pids, image_ids), dloss.expand(R)
    block = blocks("gradient", max(R, C), keys)
    compiled = flags(image_ids, scale_ptr, spec) | {"PRECISION": dot_precision(keys.dtype)} | block
    query = (queries, dqueries, R, spec.offset, 0)
    key = (keys, dkeys, C, 0, R)

    def own_gradient(own: tuple, other: tuple, directions: int, as_rows: bool, as_columns: bool) -> None:
        (x, dx, X, x_sample, x_norm), (y, dy, Y, y_sample, y_norm) = own, other
        grid = (triton.cdiv(X, block["BLOCK_M"]), directions, triton.cdiv(D, block["BLOCK_OUT"]))
        launch(
            _gradient_kernel, grid, Strided(x), Strided(y), *ids,
            norms if scale_ptr is None else scale_ptr, norms, label_sum,
            statistics, indices if spec.weighted else statistics, Strided(dloss), dx, dy,
            dscale if scale_gradient else norms,
            X, Y, D, x_sample, y_sample, x_norm, y_norm, scale, spec.alpha, 0.0 if spec.detach_weight else spec.alpha,
            spec.eps, spec.image_id_factor, 1 / R if spec.reduction == "mean" else 1.0,
            x.stride(0), y.stride(0), dloss.stride(0),
            AS_ROWS=as_rows, AS_COLUMNS=as_columns, SCALE_GRADIENT=scale_gradient and as_rows, **compiled,
        )  # fmt: skip

    with on_device(keys):
        if spec.both:
            own_gradient(query, key, 2, True, True)
        else:
            own_gradient(query, key, 1, True, False)
            own_gradient(key, query, 1, False, True)
    return dqueries, dkeys, dscale.sum() if scale_gradient else dscale


def alike(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, with rows of consecutive numbers."""
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    queries, keys = queries.to(dtype), keys.to(dtype)
    return tuple(x if x.stride(1) == 1 else x.contiguous() for x in (queries, keys))  # type: ignore[return-value]


def contiguous_ids(pids: Tensor, image_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids as the kernels read them, contiguous. Without image ids the second is a pointer that is not read."""
    pids = pids.contiguous()
    return pids, pids if image_ids is None else image_ids.contiguous()


def by_device(scale: Tensor | float, like: Tensor) -> tuple[Tensor | None, float]:
    """A scale on the accelerator is read there; one on the CPU is at hand without waiting."""
    if isinstance(scale, Tensor) and scale.device == like.device:
        return scale, 1.0
    return None, float(scale)


def flags(image_ids: Tensor | None, scale_ptr: Tensor | None, spec: Any) -> dict[str, object]:
    return {
        "STATISTICS": 4 if spec.weighted else 3,
        "HAS_IMAGES": image_ids is not None,
        "HAS_SCALE": scale_ptr is not None,
        "CROSS_ENTROPY": spec.objective == "cross_entropy",
        "WEIGHTED": spec.weighted,
    }
