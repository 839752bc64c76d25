"""The match of match.py in one loop: the next tile is loaded while this one is reduced. Off: not measured.

    persistent_match(x [Bx, P, D], e [Be, Q, D], out [Bx, Be, P], save, unit, block)

A tile of match.py first waits for its first loads, and at the end it reduces while nothing is loaded. Here there are as
many programs as multiprocessors. Each walks its tiles, and the steps over D of all of them are one loop, so that the
compiler's pipeline goes on across the border. The reduction is a branch of a tile's last step. Same tiles, same bits.

For 16-bit tokens without lists, of which several samples fit in a tile. Compiled for sm_90 (bfloat16, Triton 3.6.0) a
step in which nothing is reduced has 217 instructions instead of 107, as it may begin a tile; registers 246, not 187.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._launch import all_registers, launch, multiprocessors
from ._matches import pack
from ._tile import best_column, load_columns, load_rows, tile_of


@triton.jit(do_not_specialize=["Bx", "Be", "P", "Q", "row_tiles", "column_tiles", "programs"])
def _persistent_match_kernel(
    x_ptr,  # [Bx P, D]
    e_ptr,  # [Be, Q, D]
    out_ptr,  # [Bx, Be, P]: matches with SAVE, maxima without
    Bx,
    Be,
    P,
    Q,
    D,
    row_tiles,
    column_tiles,
    programs,
    SAVE: tl.constexpr,
    UNIT: tl.constexpr,  # columns that a sample of e has in a tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUPER: tl.constexpr,
):
    """Grid (programs): tiles program_id, program_id + programs, ... in the order of match.py."""
    SAMPLES: tl.constexpr = BLOCK_N // UNIT
    c = tl.arange(0, BLOCK_N)
    steps = (D + BLOCK_D - 1) // BLOCK_D
    tiles = (row_tiles * column_tiles - tl.program_id(0) + programs - 1) // programs
    tile, step, first = tl.program_id(0) - programs, steps - 1, 0
    row = tl.arange(0, BLOCK_M)
    row_mask = row < 0
    column = tl.zeros((BLOCK_N,), tl.int64)
    col_mask = c < 0
    cos = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.range(0, tiles * steps):
        step = tl.where(step == steps - 1, 0, step + 1)
        if step == 0:
            tile += programs
            row_tile, column_tile = tile_of(tile, row_tiles, column_tiles, SUPER)
            row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
            row_mask = row < Bx * P
            first = column_tile * SAMPLES
            sample = first + c // UNIT
            col_mask = (sample < Be) & (c < SAMPLES * UNIT)
            column = sample.to(tl.int64) * Q + tl.minimum(c % UNIT, Q - 1)  # beyond the last token: that one again
        d = step * BLOCK_D + tl.arange(0, BLOCK_D)
        x = load_rows(x_ptr, row.to(tl.int64), row_mask, d, D)
        e = load_columns(e_ptr, column, col_mask, d, D)
        cos = tl.dot(x, e, cos)
        if step == steps - 1:
            i = row // P
            out = i.to(tl.int64) * Be * P + (row - i * P)
            for g in tl.static_range(SAMPLES):
                best, index_g = best_column(cos, c - g * UNIT, UNIT, SAVE)
                if SAVE:
                    match = pack(best, tl.minimum(index_g, Q - 1), out_ptr.dtype.element_ty == tl.int64)
                else:
                    match = best.to(out_ptr.dtype.element_ty)
                at = out_ptr + (out + tl.cast(first + g, tl.int64) * P)
                tl.store(at, match, mask=row_mask & (first + g + 0 * row < Be))
            cos = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


def persistent_match(x: Tensor, e: Tensor, out: Tensor, save: bool, unit: int, block: tuple[int, ...]) -> None:
    """Writes all of `out`; one program a multiprocessor, whose shared memory it fills."""
    (Bx, P, D), (Be, Q, _) = x.shape, e.shape
    M, N, BLOCK_D, super_rows, warps, stages = block
    row_tiles, column_tiles = triton.cdiv(Bx * P, M), triton.cdiv(Be, N // unit)
    programs = min(multiprocessors(x.device), row_tiles * column_tiles)
    launch(
        _persistent_match_kernel, (programs,), x, e, out, Bx, Be, P, Q, D, row_tiles, column_tiles, programs,
        SAVE=save, UNIT=unit, BLOCK_M=M, BLOCK_N=N, BLOCK_D=BLOCK_D, SUPER=super_rows,
        num_warps=warps, num_stages=stages, **all_registers(x.device),
    )  # fmt: skip
