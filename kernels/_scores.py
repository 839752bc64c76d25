"""What the kernels of the aggregation share: tiles of scores, the extremes of a row, who passes, who is masked out.

    s = t . v    u = s - min s where (s - min s) / (max s - min s) >= threshold, else 0

A patch that the forward keeps must be kept in the backward. So a score is made in one way only: from operands of the
tokens' dtype, in the order of d, one matrix instruction after the other, whatever BLOCK_D is; and tiles
[BLOCK_L, BLOCK_N] have fewer than 64 rows, so that all of them come from the same instruction.

What a mask leaves out may hold anything, NaN too. Where patches are summed over, they are read as zeros; where each has
a column of its own, the column is passed over. A token that its mask leaves out has no scores: `row_sum` says so. A
block without a token makes no products (`extent`), and what adds up over tokens stops after the last (`tokens_end`).
"""

import triton
import triton.language as tl

from ._tile import BIG, dot_wide, load_columns, load_rows

NOISE = tl.constexpr(8 * 1.1920929e-07)  # a range of up to 8 roundings of the largest entry is noise
LARGEST_SUM = tl.constexpr(2.0**126)  # the inverse of a larger one is no normal number
# Patches whose scores fit into one tile; without tensor cores a product takes more registers.
ONE_TILE = {"half": 512, "tf32": 512, "ieee": 256}
# Tiles of longer rows.
SCORE_TILES = {"BLOCK_L": 32, "BLOCK_N": 64}
OWN_COUNT = -1.0  # as `sparsity`: the threshold is one over the number of the sample's patches
TOKENS = 128  # that `tokens_end` looks at together
LEFT_OUT = tl.constexpr(-1.0)  # row_sum of a token that the mask leaves out; 0 is that of a constant row


def number(sparsity: float | None) -> float:
    """`sparsity` as the kernels read it."""
    return OWN_COUNT if sparsity is None else sparsity


@triton.jit
def scores(
    a_ptr,  # [., D]
    a_rows,  # [BLOCK_L] int64
    a_mask,  # [BLOCK_L]
    v_ptr,  # [., D]
    v_rows,  # [BLOCK_N] int64
    v_mask,  # [BLOCK_N]
    width,  # D, or 0 for zeros
    D,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_L, BLOCK_N] of a . v. One order of summation everywhere: what is recomputed is what was computed."""
    s = tl.zeros((BLOCK_L, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a = load_rows(a_ptr, a_rows, a_mask, d, D)
        v = load_columns(v_ptr, v_rows, v_mask, d, D)
        s = add_product(a, v, s, PRECISION)
    return s


@triton.jit
def add_product(a, v, s, PRECISION: tl.constexpr):
    """s + a v, for `a` of v's dtype or float32."""
    if a.dtype == v.dtype:
        s = tl.dot(a, v, s, input_precision=PRECISION)
    else:
        s = add_wide(a, v, s, PRECISION)
    return s


@triton.jit
def add_wide(a, v, s, PRECISION: tl.constexpr):
    """s + a v for a float32 `a`, whose range is kept."""
    if v.dtype == tl.bfloat16:
        return add_halves(a, v, s)
    return dot_wide(a, v, s, PRECISION)


@triton.jit
def add_patch_gradient(a, djoint, ds, text, dimage, PRECISION: tl.constexpr):
    """dimage + a djoint + ds t for tiles [patches, tokens] of a and ds.

    djoint is float32 always: beside half tokens TF32 is what its product with them has as well.
    """
    if text.dtype == tl.float32:
        dimage = add_wide(a, djoint, dimage, PRECISION)
    else:
        dimage = tl.dot(a.to(tl.float32), djoint, dimage, input_precision="tf32")
    if ds.dtype == text.dtype and ds.dtype != tl.float32:
        dimage = tl.dot(ds, text, dimage)
    else:
        dimage = add_wide(ds, text, dimage, PRECISION)
    return dimage


@triton.jit
def weights_of(s, low, cutoff, inverse, keep):
    """Tiles of a = u / sum u, 0 in a constant row, and of who passes, from a tile of s and numbers of its rows."""
    u = s - low[:, None]
    passed = passes(u, cutoff, keep) & (inverse != 0)[:, None]
    return tl.where(passed, u * inverse[:, None], 0.0), passed


@triton.jit
def score_gradient(da, c, inverse, passed):
    """A tile of ds, but for what the minimum gets."""
    return tl.where(passed, (da - c[:, None]) * inverse[:, None], 0.0)


@triton.jit
def add_halves(a, v, s):
    """s + a v, where a is the sum of two numbers of v's dtype, to 2^-17 in bfloat16.

    As many matrix instructions as TF32 takes, closer, and v needs no conversion. Not for numbers above 3.38e38.
    """
    upper = a.to(v.dtype)
    lower = (a - upper.to(tl.float32)).to(v.dtype)
    return tl.dot(lower, v, tl.dot(upper, v, s))


@triton.jit
def sample_and_block(blocks):
    """Which sample, and which of its blocks, a program of axis 0 has: the blocks of one sample are neighbours."""
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks


@triton.jit
def block_of_rows(b, start, T, BLOCK: tl.constexpr):
    """Indices of a block of a sample's T tokens or patches, their rows among those of all samples, and which exist."""
    t = start + tl.arange(0, BLOCK)
    return t, b.to(tl.int64) * T + t, t < T


@triton.jit
def kept(mask_ptr, rows, exist, T, HAS_MASK: tl.constexpr):
    """Which tokens or patches of a block are there. T, their number, is positive.

    The branch is for the compiler: it looks from a product's operands back to every load for the narrowest one, and
    with the 8 bits of a mask among them chooses a layout that takes twice the instructions. It does not look into a
    branch.
    """
    keep = exist
    if HAS_MASK:  # noqa: SIM102 - known to the compiler, the other one is not
        if T > 0:
            keep = tl.load(mask_ptr + rows, mask=exist, other=0) != 0
    return keep


@triton.jit
def threshold_of(sparsity, count, STRICT: tl.constexpr):
    """What n is compared with: `sparsity`, or 1 / count to the nearest; in a strict comparison the next number."""
    threshold = tl.where(sparsity < 0, tl.div_rn(1.0, tl.maximum(count, 1).to(tl.float32)), sparsity)
    if STRICT:
        above = (threshold.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
        threshold = tl.where(threshold < 1, above, threshold)
    return threshold


@triton.jit
def extremes(s, n, keep):
    """Minimum, maximum and first minimum of every row. Both pass over a NaN, which shows in sums of s - minimum."""
    low = tl.min(tl.where(keep[None, :], s, float("inf")), 1)
    high = tl.max(tl.where(keep[None, :], s, -float("inf")), 1)
    first = tl.min(tl.where((s == low[:, None]) & keep[None, :], n[None, :], BIG), 1)
    return low, high, first


@triton.jit
def row_extremes(
    text_ptr, text_rows, tokens, image_ptr, mask_ptr, b, depth, N, D,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`extremes` of whole rows, tile after tile, and the number of patches kept; depth is N, or 0 for no tile."""
    low = tl.full((BLOCK_L,), float("inf"), tl.float32)
    high = tl.full((BLOCK_L,), -float("inf"), tl.float32)
    first = tl.full((BLOCK_L,), BIG, tl.int32)
    count = tl.zeros((BLOCK_L,), tl.int32)
    for start in range(0, depth, BLOCK_N):
        n, rows, exist = block_of_rows(b, start, N, BLOCK_N)
        keep = kept(mask_ptr, rows, exist, N, HAS_MASK)
        s = scores(text_ptr, text_rows, tokens, image_ptr, rows, exist, D, D, PRECISION, BLOCK_L, BLOCK_N, BLOCK_D)
        tile_low, tile_high, tile_first = extremes(s, n, keep)
        first = tl.where(tile_low < low, tile_first, first)
        low = tl.minimum(low, tile_low)
        high = tl.maximum(high, tile_high)
        count += tl.sum(keep.to(tl.int32), 0)
    return low, high, first, count


@triton.jit
def is_constant(low, high):
    """The range is rounding noise, or there is no patch at all (low > high). One that overflows is not."""
    span = high - low
    return (span <= tl.maximum(tl.abs(low), tl.abs(high)) * NOISE) & (span < float("inf"))


@triton.jit
def cutoff_of(low, high, threshold):
    """The smallest u whose u / span, rounded to nearest, is not below the threshold: a division per row, not per patch.

    threshold * span lies within a few numbers of it.
    """
    span = high - low
    near = threshold * span
    cutoff = near
    for step in tl.static_range(4):
        u = (near.to(tl.int32, bitcast=True) + (1 - step)).to(tl.float32, bitcast=True)
        cutoff = tl.where(tl.div_rn(u, span) >= threshold, u, cutoff)
    return tl.where(span > 0, cutoff, 0.0)


@triton.jit
def passes(u, cutoff, keep):
    """ "Not below" rather than "at or above": a NaN passes and shows."""
    below = u < cutoff[:, None]
    return keep[None, :] & (below == 0)


@triton.jit
def finite_or_nan(total):
    return tl.where(total <= LARGEST_SUM, total, float("nan"))


@triton.jit
def tokens_of(row_sum_ptr, rows, exist):
    """Which tokens of a block are there. A row of NaN is."""
    return (tl.load(row_sum_ptr + rows, mask=exist, other=LEFT_OUT) < 0) == 0


@triton.jit
def extent(tokens, size):
    """`size`, or 0 for a block of which no token is there: how far loops go that need none of it."""
    return tl.where(tl.max(tokens.to(tl.int32), 0) > 0, size, 0)


@triton.jit
def tokens_end(row_sum_ptr, b, L, BLOCK: tl.constexpr):
    """Where a sample's last token that is there ends: loops over tokens go no further."""
    end = 0
    for start in range(0, L, BLOCK):
        t, rows, exist = block_of_rows(b, start, L, BLOCK)
        end = tl.maximum(end, tl.max(tl.where(tokens_of(row_sum_ptr, rows, exist), t + 1, 0), 0))
    return end


@triton.jit
def inverse_sums(row_sum_ptr, rows, exist):
    """Of every row: whether it is constant, and 1 / sum u, which is 0 where no gradient passes through s."""
    total = tl.load(row_sum_ptr + rows, mask=exist, other=LEFT_OUT)
    ordered = (total <= 0) == 0
    return total == 0, tl.where(ordered, 1.0 / tl.where(ordered, total, 1.0), 0.0)


@triton.jit
def store_gradient(ptr, rows, row_mask, d, D, gradient, ADD: tl.constexpr):
    """Stores a tile of a gradient; with ADD, what is there is added before the one rounding."""
    at = ptr + rows[:, None] * D + d[None, :]
    mask = row_mask[:, None] & (d < D)[None, :]
    if ADD:
        gradient += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, gradient.to(ptr.dtype.element_ty), mask=mask)
