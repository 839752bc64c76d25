"""What a tile of logits says of the rows that it belongs to, and what they pay sends back into it: Eq. 1-4 in Triton.

Rows are along axis 0 in `absorb_tile`; `add_dlogits` takes either axis, its vectors being [BLOCK_M, 1] or [1, BLOCK_N].
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # a finite start of a running maximum: -inf - -inf would be NaN


@triton.jit
def by_label(same, same_image, both, pid, image, neither, HAS_IMAGES: tl.constexpr):
    """One of four values an entry, by what its row and column share."""
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
def absorb_tile(
    top,  # running numbers of the rows, [BLOCK_M] each, as the next six; e = exp(z - top)
    sum_e,
    paid,  # sum e (z - top - log(t + eps)), or for the cross-entropy sum t (z - top)
    mass,  # sum t
    top_place,
    positive,  # z there
    positive_place,
    z,  # [BLOCK_M, BLOCK_N], -inf outside
    columns,  # their places, [BLOCK_N]
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
    """The running numbers after one more tile. Ties go to the lowest column."""
    if WEIGHTED:
        first_column = tl.min(columns, 0)
        tile_top, tile_place = tl.max(z, 1, return_indices=True)
        top_place = tl.where(tile_top > top, first_column + tile_place, top_place)
        if POSITIVE == "any":
            tile_positive, tile_place = tl.max(tl.where(same, z, -float("inf")), 1, return_indices=True)
            better = tile_positive > positive
            positive_place = tl.where(better, first_column + tile_place, positive_place)
            positive = tl.where(better, tile_positive, positive)
        else:
            found = (columns[None, :] == positive_place[:, None]) & inside
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
        paid += (top - new_top) * mass + tl.sum(tl.where(t > 0, t * below, 0.0), 1)
        mass += tl.sum(t, 1)
    else:
        excess = below - log_target(same, same_image, total, factor, eps, HAS_IMAGES)
        paid = shrink * (paid + (top - new_top) * sum_e) + tl.sum(e * excess, 1)
    sum_e = shrink * sum_e + tl.sum(e, 1)
    return new_top, sum_e, paid, mass, top_place, positive, positive_place


@triton.jit
def conclude(
    loss_ptr,  # of the rows, as the next two
    statistics_ptr,  # [STATISTICS, R]
    places_ptr,  # [2, R], or anything
    at,  # [BLOCK_M]
    live,  # [BLOCK_M]
    R,
    top,
    sum_e,
    paid,
    mass,
    top_place,
    positive,
    positive_place,
    alpha,
    loss_weight,
    CROSS_ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Stores what the rows pay after all tiles so far, and their statistics."""
    # lse in two parts: z - top is exact where p is large, top + log_sum would round that away.
    log_sum = tl.log(sum_e)
    tl.store(statistics_ptr + at, top, mask=live)
    tl.store(statistics_ptr + R + at, log_sum, mask=live)
    if CROSS_ENTROPY:
        loss = mass * log_sum - paid
        tl.store(statistics_ptr + 2 * R + at, mass, mask=live)
    else:
        divergence = paid / sum_e - log_sum
        tl.store(statistics_ptr + 2 * R + at, divergence, mask=live)
        loss = divergence
        if WEIGHTED:
            positive = tl.where(live, positive, top)  # a row beyond the end has no positive
            gap = 1 / sum_e - tl.exp(positive - top - log_sum)
            loss = (1 + alpha * gap) * divergence
            tl.store(statistics_ptr + 3 * R + at, gap, mask=live)
            tl.store(places_ptr + at, top_place, mask=live)
            tl.store(places_ptr + R + at, positive_place, mask=live)
    tl.store(loss_ptr + at, loss * loss_weight, mask=live)


@triton.jit
def load_paid(
    dloss_ptr,  # [R], any stride
    statistics_ptr,  # [STATISTICS, R]
    places_ptr,  # [2, R], or anything
    at,  # [BLOCK]
    live,  # [BLOCK]
    R,
    dloss_stride,
    loss_weight,
    WEIGHTED: tl.constexpr,
):
    """What `add_dlogits` needs of the paying rows, [BLOCK] each: gradient, top, log_sum, third, gap and two places."""
    g = loss_weight * tl.load(dloss_ptr + at.to(tl.int64) * dloss_stride, mask=live, other=0.0)
    top = tl.load(statistics_ptr + at, mask=live, other=0.0)
    log_sum = tl.load(statistics_ptr + R + at, mask=live, other=0.0)
    third = tl.load(statistics_ptr + 2 * R + at, mask=live, other=0.0)
    gap, top_place, positive_place = top, at, at
    if WEIGHTED:
        gap = tl.load(statistics_ptr + 3 * R + at, mask=live, other=0.0)
        top_place = tl.load(places_ptr + at, mask=live, other=0)
        positive_place = tl.load(places_ptr + R + at, mask=live, other=0)
    return g, top, log_sum, third, gap, top_place, positive_place


@triton.jit
def add_dlogits(
    dz,  # [BLOCK_M, BLOCK_N] so far
    z,  # [BLOCK_M, BLOCK_N]
    same,
    same_image,
    columns,  # who stands where in the paying row, [1, BLOCK_N] or [BLOCK_M, 1]
    total,  # sum of the paying row's labels, [BLOCK_M, 1] or [1, BLOCK_N]
    g,  # gradient of the paying rows' losses, [BLOCK_M, 1] or [1, BLOCK_N], as the next six
    top,
    log_sum,
    third,  # divergence, or mass
    gap,
    top_place,
    positive_place,
    alpha,
    push_alpha,  # alpha, or 0 where the weight is detached
    eps,
    factor,
    HAS_IMAGES: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Adds the gradient in the logits of what the tile's rows pay, or, with everything transposed, its columns.

    g p [w (log p - log(t + eps) - KL) + alpha KL ([top] - [positive] - gap)]     divergence
    g (mass p - t)                                                                cross-entropy
    """
    log_p = z - top - log_sum
    p = tl.exp(log_p)
    if CROSS_ENTROPY:
        dz += g * (third * p - target(same, same_image, total, factor, HAS_IMAGES))
    else:
        excess = log_p - log_target(same, same_image, total, factor, eps, HAS_IMAGES) - third
        if WEIGHTED:
            excess *= 1 + alpha * gap
            push = push_alpha * third
            ends = (columns == top_place).to(tl.float32) - (columns == positive_place).to(tl.float32)
            excess += push * (ends - gap)
        dz += g * p * excess
    return dz
