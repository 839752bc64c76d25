"""The match where a mask leaves samples of e of different lengths: each takes the columns that its tokens need.

    packed_match(x [Bx, P, D], e [Be, Q, D], out [Bx, Be, P], save, x's lists, e's lists, blocks)     called by match

What match.py says of matches, products and TF32 holds here. A tile's columns are granules of GRANULE, and a sample of e
with n tokens left has ceil(n / GRANULE) of them, all in one tile: tile after tile takes the next samples, in order of
their lengths, until one does not fit. Columns beyond a sample's last token hold that token again.

    columns   one program for each tile of columns: which samples it has, found from the first tile on, and for each
              column the token, for each granule the sample and whether it ends. There are no more tiles than samples of
              the greatest length would fill; those behind the last sample are empty, and their programs leave at once.
    match     a row of cosines is in the registers of a few threads. The columns of a granule are spread over them
              (LAYOUT), so that each goes through its sample's granules alone, and their best are compared where the
              sample ends: between threads once a sample, not once a granule.

                         e_j           e_j+1     e_j+2
              x_i,l   [ g g g g k k | g g g k | g g g g g k | . . ]  ->  matches [i, j.., l]

At 25 tokens of 77 on average 1.1 to 1.2 columns are multiplied for one that is needed, where two classes of width took
1.7 (docs/launches.md). Deterministic: see CONTRIBUTING.md, "A kernel file".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import BLACKWELL, LARGE, LDS, MEDIUM, SMALL, all_registers, launch
from ._matches import Lists, listed_rows, pack
from ._tile import BIG, cosines, max_or_nan, row_max, tile_of
from .token_lists import GRANULE, PACKED

BLOCK_B, WARPS = 256, 4  # of the columns kernel
# Which of a tile's 256 columns make a granule, [A, LANE, C, PART, E] with LANE PART = GRANULE, by memory and precision:
# those of different threads, so that each thread has some column of every granule. None: a row is spread over too many
# threads, and match.py takes two classes of width.
LAYOUT = {
    (LARGE, "half"): (16, 8, 1, 1, 2),
    (LARGE, "tf32"): (16, 8, 1, 1, 2),
    (LARGE, "ieee"): None,
    (BLACKWELL, "half"): (1, 8, 1, 1, 32),
    (BLACKWELL, "tf32"): (1, 8, 1, 1, 32),
    (MEDIUM, "half"): None,
    (MEDIUM, "tf32"): None,
    (MEDIUM, "ieee"): None,
    (SMALL, "half"): None,
    (SMALL, "tf32"): None,
    (SMALL, "ieee"): None,
    (LDS, "half"): (2, 4, 4, 2, 4),
    (LDS, "tf32"): (2, 4, 4, 2, 4),
    (LDS, "ieee"): None,
}


@triton.jit(do_not_specialize=["B", "Q"])
def _columns_kernel(
    tokens_ptr,  # [B, Q] int32: the tokens of each e that are left, first, in order
    counts_ptr,  # [B] int32: how many
    order_ptr,  # [B] int32: samples of e by count
    ends_ptr,  # [B] int32: granules of the samples up to this one, in that order
    bounds_ptr,  # [4] int32: where in it those of more than PACKED tokens begin, third
    columns_ptr,  # [tiles, GRANULES GRANULE] int32: a token among all B Q, -1 where there is none
    granules_ptr,  # [tiles, GRANULES] int32: 2 sample + (1 where its last one), -2 where there is none
    B,
    Q,
    GRANULE: tl.constexpr,
    GRANULES: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Grid (tiles): a tile begins where the last one before it ends."""
    samples = tl.load(bounds_ptr + 2)
    tile = tl.program_id(0)
    start, end = 0, 0
    for _ in range(tile + 1):
        start = end
        for first in range(0, samples, BLOCK_B):
            sample = first + tl.arange(0, BLOCK_B)
            ends = tl.load(ends_ptr + sample, mask=sample < samples, other=BIG)
            end = tl.maximum(end, tl.max(tl.where(ends <= start + GRANULES, ends, 0), 0))

    granule = start + tl.arange(0, GRANULES)
    position = tl.zeros((GRANULES,), tl.int32)  # of its sample in the order
    earlier = tl.zeros((GRANULES,), tl.int32)
    for first in range(0, samples, BLOCK_B):
        sample = first + tl.arange(0, BLOCK_B)
        ends = tl.load(ends_ptr + sample, mask=sample < samples, other=BIG)
        passed = ends[None, :] <= granule[:, None]
        position += tl.sum(passed.to(tl.int32), 1)
        earlier = tl.maximum(earlier, tl.max(tl.where(passed, ends[None, :], 0), 1))
    exists = granule < end
    j = tl.load(order_ptr + position, mask=exists, other=0)
    last = granule + 1 == tl.load(ends_ptr + position, mask=exists, other=0)
    count = tl.load(counts_ptr + j, mask=exists, other=1)
    k = (granule - earlier)[:, None] * GRANULE + tl.arange(0, GRANULE)[None, :]
    k = tl.minimum(k, count[:, None] - 1)
    row = j * Q
    token = tl.load(tokens_ptr + row.to(tl.int64)[:, None] + k, mask=exists[:, None], other=0)
    at = tile * GRANULES + tl.arange(0, GRANULES)
    tl.store(granules_ptr + at, tl.where(exists, 2 * j + last.to(tl.int32), -2))
    tl.store(
        columns_ptr + at[:, None] * GRANULE + tl.arange(0, GRANULE)[None, :],
        tl.where(exists[:, None], row[:, None] + token, -1),
    )


@triton.jit(do_not_specialize=["Bx", "Be", "P", "Q", "row_tiles", "column_tiles"])
def _packed_match_kernel(
    x_ptr,  # [Bx P, D]; with SPLIT [Bx P, 2, D]: high and low parts
    e_ptr,  # [Be Q, D], or [Be Q, 2, D]
    rows_ptr,  # [Bx P] int32: the tokens of x that are left, first; or None
    row_count_ptr,  # [1] int32: how many; or None
    columns_ptr,  # [column tiles, BLOCK_N] int32
    granules_ptr,  # [column tiles, BLOCK_N / GRANULE] int32
    out_ptr,  # [Bx, Be, P]: matches with SAVE, maxima without
    Bx,
    Be,
    P,
    Q,
    D,
    row_tiles,
    column_tiles,
    LIST_X: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    GRANULE: tl.constexpr,
    A: tl.constexpr,  # columns are [A, LANE, C, PART, E]: granule a, c, e and its column lane, part
    LANE: tl.constexpr,
    C: tl.constexpr,
    PART: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUPER: tl.constexpr,
):
    """Grid (row tiles x column tiles), in the order of tile_of."""
    GRANULES: tl.constexpr = BLOCK_N // GRANULE
    row_tile, column_tile = tile_of(tl.program_id(0), row_tiles, column_tiles, SUPER)
    row_total = Bx * P
    if LIST_X:
        row_total = tl.load(row_count_ptr)
    granules_ptr += column_tile * GRANULES
    columns_ptr += column_tile * BLOCK_N
    if (tl.load(granules_ptr) >= 0) & (row_tile * BLOCK_M < row_total):
        row, i, l, row_mask = listed_rows(rows_ptr, row_count_ptr, row_tile * BLOCK_M, Bx * P, P, LIST_X, BLOCK_M)
        out = i * Be * P + l
        n = tl.arange(0, BLOCK_N)
        granule = (n // (E * PART * C * LANE) * C + n // (E * PART) % C) * E + n % E
        column = tl.load(columns_ptr + granule * GRANULE + n // (E * PART * C) % LANE * PART + n // E % PART)
        column_mask, column = column >= 0, column.to(tl.int64)
        cos = cosines(x_ptr, e_ptr, row, row_mask, column, column_mask, D, PRECISION, SPLIT, BLOCK_M, BLOCK_N, BLOCK_D)
        # [rows, columns of a granule, granules]: no number changes its thread.
        cos = tl.permute(tl.reshape(cos, (BLOCK_M, A, LANE, C, PART, E)), (0, 2, 4, 1, 3, 5))
        cos = tl.reshape(cos, (BLOCK_M, GRANULE, GRANULES))
        number = tl.arange(0, GRANULES)[None, None, :]
        lane = tl.arange(0, GRANULE)[None, :]
        running = tl.full((BLOCK_M, GRANULE), -float("inf"), tl.float32)
        index = tl.zeros((BLOCK_M, GRANULE), tl.int32)  # column of it, in the order of columns_ptr
        begins = True  # a sample, with this granule
        for g in tl.static_range(GRANULES):
            of = tl.load(granules_ptr + g)
            best = row_max(tl.where(number == g, cos, -float("inf")), 2)  # which numbers is known when compiling
            if SAVE:
                index = tl.where(begins | (best > running), g * GRANULE + lane, index)
            running = tl.where(begins, best, max_or_nan(best, running))
            begins = of % 2 == 1
            if begins:  # it ends here, and the next one begins
                j = of // 2
                most = row_max(running)
                if SAVE:
                    winner = tl.min(tl.where((running < most[:, None]) == 0, index, BIG), 1)
                    token = tl.load(columns_ptr + winner, mask=row_mask, other=0) - j * Q
                    match = pack(most, token, out_ptr.dtype.element_ty == tl.int64)
                else:
                    match = most.to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + (out + j.to(tl.int64) * P), match, mask=row_mask)


def packed_match(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    save: bool,
    x_lists: Lists,
    e_lists: Lists,
    Q: int,
    layout: tuple[int, int, int, int, int],
    blocks: tuple[int, int, int, int, int, int],
    **options: object,
) -> None:
    """Writes the matches of the samples of e that have a token left and no more than PACKED.

    a, b: operands of x and e. layout: one of LAYOUT. blocks: BLOCK_M, BLOCK_N, BLOCK_D, SUPER, num_warps, num_stages.
    options: PRECISION, SPLIT.
    """
    (Bx, Be, P), D = out.shape, b.shape[-1]
    *_, rows, row_count = x_lists
    tokens, counts, order, bounds, ends, *_ = e_lists
    M, N, BLOCK_D, SUPER, warps, stages = blocks
    tiles = column_tiles(Be, Q, N)
    both = torch.empty(tiles * (N + N // GRANULE), dtype=torch.int32, device=out.device)
    columns, granules = both[: tiles * N].view(tiles, N), both[tiles * N :].view(tiles, N // GRANULE)
    launch(
        _columns_kernel, (tiles,), tokens, counts, order, ends, bounds, columns, granules, Be, Q,
        GRANULE=GRANULE, GRANULES=N // GRANULE, BLOCK_B=BLOCK_B, num_warps=WARPS,
    )  # fmt: skip
    grid = triton.cdiv(Bx * P, M), tiles
    launch(
        _packed_match_kernel, (grid[0] * grid[1],),
        a, b, rows, row_count, columns, granules, out, Bx, Be, P, Q, D, *grid,
        LIST_X=rows is not None, SAVE=save, **options, GRANULE=GRANULE,
        **dict(zip(("A", "LANE", "C", "PART", "E"), layout, strict=True)),
        BLOCK_M=M, BLOCK_N=N, BLOCK_D=BLOCK_D, SUPER=SUPER,
        num_warps=warps, num_stages=stages, **all_registers(out.device),
    )  # fmt: skip


def column_tiles(Be: int, Q: int, BLOCK_N: int) -> int:
    """The most that Be samples fill: of every length up to Q, so many fit into any tile that has one after it."""
    return triton.cdiv(Be, BLOCK_N // (triton.cdiv(min(Q, PACKED), GRANULE) * GRANULE))
