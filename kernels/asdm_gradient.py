"""A-SDM, SDM and ITC in tiles: the gradient of both inputs in one launch, where no logit is kept.

    gradient     one program for each block [rows, chunk of D] of an input's gradient. It computes each tile of logits
                 again, adds up dlogits of its rows and of its columns (rows of the other direction), multiplies with y,
                 and applies the derivative of the normalisation

With x_i a row of the input and dz_ij the gradient in z_ij = s cos(x_i, y_j), of the losses of both directions,

    dx_i = s / |x_i| (sum_j dz_ij y_j / |y_j|  -  a_i x_i / |x_i|),    a_i = sum_j dz_ij cos_ij,    ds = sum_i a_i

Every tile of logits is computed once for each chunk of D. In a small batch the launches take longer than this
repeated work; asdm_kept.py is the way without it.
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
from ._row_statistics import add_dlogits, load_final
from ._tile import dot_nearest, dot_wide

__all__ = ["backward"]


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
    x_norm, y_norm = by_direction(direction, x_norm, y_norm)
    x_stride, y_stride = by_direction(direction, x_stride, y_stride)
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
    any_factor = any_factor_of(norms_ptr + X + Y, X + Y)
    own_pid = tl.load(pids_ptr + x_sample + rows, mask=row_mask, other=0)[:, None]
    own_image = own_pid
    if HAS_IMAGES:
        own_image = tl.load(image_ids_ptr + x_sample + rows, mask=row_mask, other=0)[:, None]
    if AS_ROWS:
        row_g, row_max, row_log_sum, row_third, row_gap, row_top, row_positive = load_final(
            dloss_ptr, statistics_ptr + STATISTICS * as_rows, index_ptr + 2 * as_rows, rows, row_mask, X,
            dloss_stride, loss_weight, WEIGHTED,
        )  # fmt: skip
        own_total = tl.load(label_sum_ptr + rows, mask=row_mask, other=1.0)[:, None]
    d_out = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    dx = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
    # Component of the gradient along x_i: sum_j cos_ij dz_ij. Normalising removes it; dscale is its sum over i.
    along = tl.zeros((BLOCK_M,), tl.float32)

    for start in range(0, Y, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col_mask = cols < Y
        y_inverse = 1.0 / tl.load(norms_ptr + y_norm + cols, mask=col_mask, other=1.0)
        cos = cosines(
            x_ptr, y_ptr, norms_ptr + X + Y, rows, cols, x_inverse, y_inverse, x_norm, y_norm, X, Y, D,
            x_stride, y_stride, any_factor, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
        z = scale * cos
        same = own_pid == tl.load(pids_ptr + y_sample + cols, mask=col_mask, other=0)[None, :]
        same_image = same
        if HAS_IMAGES:
            same_image = own_image == tl.load(image_ids_ptr + y_sample + cols, mask=col_mask, other=0)[None, :]

        dz = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if AS_ROWS:
            dz = add_dlogits(
                dz, z, same, same_image, cols[None, :], own_total, row_g[:, None],
                row_max[:, None], row_log_sum[:, None], row_third[:, None], row_gap[:, None],
                row_top[:, None], row_positive[:, None],
                alpha, gap_alpha, eps, factor, HAS_IMAGES, CROSS_ENTROPY, WEIGHTED,
            )  # fmt: skip
        if AS_COLUMNS:
            other_total = tl.load(label_sum_ptr + cols, mask=col_mask, other=1.0)[None, :]
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

        y = scaled_rows(y_ptr, norms_ptr + X + Y + y_norm, cols, col_mask, d_out, D, y_stride, any_factor)
        # A gradient may be as small as 1 / B^2, out of float16's range.
        if y_ptr.dtype.element_ty == tl.float32:
            dx = dot_nearest(dz * y_inverse[None, :], y, dx, PRECISION)
        else:
            dx = dot_wide(dz * y_inverse[None, :], y, dx, PRECISION)

    store_through_norms(
        out_ptr, dx, along, x_ptr, norms_ptr + X + Y + x_norm, x_inverse, rows, row_mask, d_out, D, x_stride, scale
    )
    if SCALE_GRADIENT:  # noqa: SIM102, settled when compiled
        if (direction == 0) & (tl.program_id(2) == 0):  # every logit belongs to one row of direction 0
            tl.store(dscale_ptr + rows, along, mask=row_mask)


def backward(g: Gradient) -> Tensor:
    """Writes the gradients of queries and keys; gives that of the scale."""
    (R, D), C, spec, norms, dloss = g.queries.shape, g.keys.shape[0], g.spec, g.norms, g.dloss
    dscale = torch.empty(R if g.scale_gradient else 0, dtype=torch.float32, device=g.keys.device)
    block = blocks("gradient", g.queries, g.keys)
    compiled = flags(g.image_ids, g.scale_ptr, spec) | {"PRECISION": dot_precision(g.keys.dtype)} | block
    query = (g.queries, g.dqueries, R, spec.offset, 0)
    key = (g.keys, g.dkeys, C, 0, R)

    def own_gradient(own: tuple, other: tuple, directions: int, as_rows: bool, as_columns: bool) -> None:
        (x, dx, X, x_sample, x_norm), (y, dy, Y, y_sample, y_norm) = own, other
        grid = (triton.cdiv(X, block["BLOCK_M"]), directions, triton.cdiv(D, block["BLOCK_OUT"]))
        launch(
            _gradient_kernel, grid, Strided(x), Strided(y), *g.ids,
            norms if g.scale_ptr is None else g.scale_ptr, norms, g.label_sum,
            g.statistics, g.indices if spec.weighted else g.statistics, Strided(dloss), dx, dy,
            dscale if g.scale_gradient else norms,
            X, Y, D, x_sample, y_sample, x_norm, y_norm, g.scale,
            spec.alpha, 0.0 if spec.detach_weight else spec.alpha,
            spec.eps, spec.image_id_factor, 1 / R if spec.reduction == "mean" else 1.0,
            x.stride(0), y.stride(0), dloss.stride(0),
            AS_ROWS=as_rows, AS_COLUMNS=as_columns, SCALE_GRADIENT=g.scale_gradient and as_rows, **compiled,
        )  # fmt: skip

    with on_device(g.keys):
        if spec.both:
            own_gradient(query, key, 2, True, True)
        else:
            own_gradient(query, key, 1, True, False)
            own_gradient(key, query, 1, False, True)
    return dscale.sum() if g.scale_gradient else dscale
