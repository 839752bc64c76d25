"""Triton helpers shared by the A-SDM kernels: online-softmax row statistics of a tile of logits, and its dlogits.

The algebra is that of fmfa_losses/ops/similarity_distribution/statistics.py: `update_tile` is merge(running, of(tile)).
`update_tile` has rows along axis 0. `add_dlogits` takes either axis: its vectors are [BLOCK_M, 1] or [1, BLOCK_N].
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # a finite start of a running maximum: -inf - -inf would be NaN


@triton.jit
def by_label(same, same_image, both, pid, image, neither, HAS_IMAGES: tl.constexpr):
    """One of four values for each entry: same pid and image, pid alone, image alone, neither."""
    if HAS_IMAGES:
        both = tl.where(same_image, both, pid)
        neither = tl.where(same_image, image, neither)
    return tl.where(same, both, neither)


@triton.jit
def target(same, same_image, total, factor, HAS_IMAGES: tl.constexpr):
    """t = y / total; total is [BLOCK_M, 1] or [1, BLOCK_N]."""
    return by_label(same, same_image, 1 / total, factor / total, (1 - factor) / total, 0.0, HAS_IMAGES)


@triton.jit
def log_target(same, same_image, total, factor, eps, HAS_IMAGES: tl.constexpr):
    """log(t + eps): logarithms of vectors, never of the tile."""
    return by_label(
        same,
        same_image,
        tl.log(1 / total + eps),
        tl.log(factor / total + eps),
        tl.log((1 - factor) / total + eps),
        tl.log(0 * total + eps),
        HAS_IMAGES,
    )


@triton.jit
def update_tile(
    top,  # running statistics of the rows, [BLOCK_M] each, as the next six; e = exp(z - top)
    sum_e,
    excess,  # sum e (z - top - log(t + eps)), or for the cross-entropy sum t (z - top)
    sum_t,  # sum t
    top_index,
    positive,  # z there
    positive_index,
    z,  # [BLOCK_M, BLOCK_N], -inf outside
    columns,  # their indices, [BLOCK_N]
    inside,  # [1, BLOCK_N]
    same,  # [BLOCK_M, BLOCK_N]; nothing is the same outside
    same_image,
    total,  # sum of the row's labels, [BLOCK_M, 1]
    factor,
    eps,
    HAS_IMAGES: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    POSITIVE: tl.constexpr,
):
    """The running statistics after one more tile. Ties go to the lowest column, in whatever order tiles come."""
    if WEIGHTED:
        first_column = tl.min(columns, 0)
        tile_top, tile_index = tl.max(z, 1, return_indices=True)
        tile_index += first_column
        higher = (tile_top > top) | ((tile_top == top) & (tile_index < top_index))
        top_index = tl.where(higher, tile_index, top_index)
        if POSITIVE == "any":
            tile_positive, tile_index = tl.max(tl.where(same, z, -float("inf")), 1, return_indices=True)
            tile_index += first_column
            higher = (tile_positive > positive) | ((tile_positive == positive) & (tile_index < positive_index))
            positive_index = tl.where(higher, tile_index, positive_index)
            positive = tl.where(higher, tile_positive, positive)
        else:
            found = (columns[None, :] == positive_index[:, None]) & inside
            tile_positive = tl.max(tl.where(found, z, LOWEST), 1)
            positive = tl.where(positive == LOWEST, tile_positive, positive)
    else:
        tile_top = tl.max(z, 1)

    new_top = tl.maximum(top, tile_top)
    below = tl.where(inside, z - new_top[:, None], 0.0)
    e = tl.where(inside, tl.exp(below), 0.0)
    shrink = tl.exp(top - new_top)
    if CROSS_ENTROPY:
        t = target(same, same_image, total, factor, HAS_IMAGES)
        excess += (top - new_top) * sum_t + tl.sum(tl.where(t > 0, t * below, 0.0), 1)
        sum_t += tl.sum(t, 1)
    else:
        log_t = log_target(same, same_image, total, factor, eps, HAS_IMAGES)
        excess = shrink * (excess + (top - new_top) * sum_e) + tl.sum(e * (below - log_t), 1)
    sum_e = shrink * sum_e + tl.sum(e, 1)
    return new_top, sum_e, excess, sum_t, top_index, positive, positive_index


@triton.jit
def finalize(
    statistics_ptr,  # [STATISTICS, R]
    index_ptr,  # [2, R], or anything
    at,  # [BLOCK_M]
    row_mask,  # [BLOCK_M]
    R,
    top,
    sum_e,
    excess,
    sum_t,
    top_index,
    positive,
    positive_index,
    alpha,
    loss_weight,
    CROSS_ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """The losses of the rows after all tiles so far, [BLOCK_M]; stores what their gradient needs."""
    # lse in two parts: z - top is exact where p is large, top + log_sum would round that away.
    log_sum = tl.log(sum_e)
    tl.store(statistics_ptr + at, top, mask=row_mask)
    tl.store(statistics_ptr + R + at, log_sum, mask=row_mask)
    if CROSS_ENTROPY:
        loss = sum_t * log_sum - excess
        tl.store(statistics_ptr + 2 * R + at, sum_t, mask=row_mask)
    else:
        divergence = excess / sum_e - log_sum
        tl.store(statistics_ptr + 2 * R + at, divergence, mask=row_mask)
        loss = divergence
        if WEIGHTED:
            positive = tl.where(row_mask, positive, top)  # a row beyond the end has no positive
            gap = 1 / sum_e - tl.exp(positive - top - log_sum)
            loss = (1 + alpha * gap) * divergence
            tl.store(statistics_ptr + 3 * R + at, gap, mask=row_mask)
            tl.store(index_ptr + at, top_index, mask=row_mask)
            tl.store(index_ptr + R + at, positive_index, mask=row_mask)
    return loss * loss_weight


@triton.jit
def load_final(
    dloss_ptr,  # [R], any stride
    statistics_ptr,  # [STATISTICS, R]
    index_ptr,  # [2, R], or anything
    at,  # [BLOCK]
    row_mask,  # [BLOCK]
    R,
    dloss_stride,
    loss_weight,
    WEIGHTED: tl.constexpr,
):
    """What `add_dlogits` needs of the rows, [BLOCK] each: gradient, top, log_sum, third, gap and two indices."""
    g = loss_weight * tl.load(dloss_ptr + at.to(tl.int64) * dloss_stride, mask=row_mask, other=0.0)
    top = tl.load(statistics_ptr + at, mask=row_mask, other=0.0)
    log_sum = tl.load(statistics_ptr + R + at, mask=row_mask, other=0.0)
    third = tl.load(statistics_ptr + 2 * R + at, mask=row_mask, other=0.0)
    gap, top_index, positive_index = top, at, at
    if WEIGHTED:
        gap = tl.load(statistics_ptr + 3 * R + at, mask=row_mask, other=0.0)
        top_index = tl.load(index_ptr + at, mask=row_mask, other=0)
        positive_index = tl.load(index_ptr + R + at, mask=row_mask, other=0)
    return g, top, log_sum, third, gap, top_index, positive_index


@triton.jit
def add_dlogits(
    dz,  # [BLOCK_M, BLOCK_N] so far
    z,  # [BLOCK_M, BLOCK_N]
    same,
    same_image,
    columns,  # index of every entry in its row, [1, BLOCK_N] or [BLOCK_M, 1]
    total,  # sum of the row's labels, [BLOCK_M, 1] or [1, BLOCK_N]
    g,  # gradient of the rows' losses, [BLOCK_M, 1] or [1, BLOCK_N], as the next six
    top,
    log_sum,
    third,  # divergence, or sum t
    gap,
    top_index,
    positive_index,
    alpha,
    gap_alpha,  # alpha, or 0 where the weight is detached
    eps,
    factor,
    HAS_IMAGES: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Adds the gradient in the logits of the losses of the tile's rows, or, with everything transposed, its columns.

    g p [w (log p - log(t + eps) - KL) + alpha KL ([top] - [positive] - gap)]     divergence
    g (p sum_t - t)                                                                cross-entropy
    """
    log_p = z - top - log_sum
    p = tl.exp(log_p)
    if CROSS_ENTROPY:
        dz += g * (third * p - target(same, same_image, total, factor, HAS_IMAGES))
    else:
        excess = log_p - log_target(same, same_image, total, factor, eps, HAS_IMAGES) - third
        if WEIGHTED:
            excess *= 1 + alpha * gap
            of_gap = gap_alpha * third
            ends = (columns == top_index).to(tl.float32) - (columns == positive_index).to(tl.float32)
            excess += of_gap * (ends - gap)
        dz += g * p * excess
    return dz


@triton.jit
def tile_dlogits(
    z,  # [BLOCK_M, BLOCK_N]
    rows,  # [BLOCK_M], indices of queries
    columns,  # [BLOCK_N], of keys
    row_mask,
    col_mask,
    pids_ptr,  # [C]
    image_ids_ptr,  # [C], or anything
    label_sum_ptr,  # [R]
    statistics_ptr,  # [S, STATISTICS, R]
    index_ptr,  # [S, 2, R], or anything
    g_ptr,  # [R], any stride
    R,
    offset,
    g_stride,
    loss_weight,
    alpha,
    gap_alpha,
    eps,
    factor,
    BOTH: tl.constexpr,
    STATISTICS: tl.constexpr,
    HAS_IMAGES: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Gradient in the logits of the losses of the tile's rows and, with BOTH, of its columns."""
    own_pid = tl.load(pids_ptr + offset + rows, mask=row_mask, other=0)
    same = own_pid[:, None] == tl.load(pids_ptr + columns, mask=col_mask, other=0)[None, :]
    same_image = same
    if HAS_IMAGES:
        own_image = tl.load(image_ids_ptr + offset + rows, mask=row_mask, other=0)
        same_image = own_image[:, None] == tl.load(image_ids_ptr + columns, mask=col_mask, other=0)[None, :]
    row_total = tl.load(label_sum_ptr + rows, mask=row_mask, other=1.0)
    g, top, log_sum, third, gap, top_index, positive_index = load_final(
        g_ptr, statistics_ptr, index_ptr, rows, row_mask, R, g_stride, loss_weight, WEIGHTED
    )
    dz = add_dlogits(
        tl.zeros_like(z), z, same, same_image, columns[None, :], row_total[:, None],
        g[:, None], top[:, None], log_sum[:, None], third[:, None], gap[:, None],
        top_index[:, None], positive_index[:, None],
        alpha, gap_alpha, eps, factor, HAS_IMAGES, CROSS_ENTROPY, WEIGHTED,
    )  # fmt: skip
    if BOTH:
        column_total = tl.load(label_sum_ptr + columns, mask=col_mask, other=1.0)
        g, top, log_sum, third, gap, top_index, positive_index = load_final(
            g_ptr, statistics_ptr + STATISTICS * R, index_ptr + 2 * R, columns, col_mask, R, g_stride, loss_weight,
            WEIGHTED,
        )  # fmt: skip
        dz = add_dlogits(
            dz, z, same, same_image, rows[:, None], column_total[None, :],
            g[None, :], top[None, :], log_sum[None, :], third[None, :], gap[None, :],
            top_index[None, :], positive_index[None, :],
            alpha, gap_alpha, eps, factor, HAS_IMAGES, CROSS_ENTROPY, WEIGHTED,
        )  # fmt: skip
    return dz
