"""de by gather: the matches of each sample of e in the order of their winners, then each token's sum over its own.

    de(dsim [Bx, Be] float32, matches [Bx, Be, P] int64, x [Bx, P, D], lists of x, Q, out [Be, Q, D], accumulate)

    sort     a counting sort of the rows (i, l) by winner, for every j. A program counts how often each of BLOCK_K
             tokens won, and how often one before them; a row's position is the start of its winner and the number of
             earlier rows that the same token won, so equal winners stay in order of rows. Its record is row and
             weight w_ijl = dsim_ij p_ijl in one int64; where nothing won there is none.

                 winners of j    2 0 - 2 1 0        starts [0, 2, 3, 5],   records  1 5 | 4 | 0 3
                 rows            0 1 2 3 4 5

    gather   de_jk = sum of w x[row] over the records of (j, k): BLOCK_SUM rows at once, each in a sum of its own; the
             next records are loaded before the rows of these arrive. Of CHAIN additions the sum is put aside: one
             chain over a large batch would lose a digit.

IEEE float32. The work is Bx Be P D multiplications and as many loads, where products would need Q times as many; the
sort compares Bx Be P winners with Q tokens twice, in integers. A token that won all rows is the work of one program,
Bx P rows of D numbers: no more bytes than ever, but where one token of each sample wins everything, Be programs for
each chunk of D load them. Memory: 8 Bx Be P bytes of records. Deterministic: see CONTRIBUTING.md, "A kernel file".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from ._matches import Lists, listed_rows, pack, unpack
from ._tile import load_rows

SORT = (32, 64, 4)  # (BLOCK_K tokens of e, BLOCK_ROWS, num_warps)
GATHER = (8, 512, 4)  # (BLOCK_SUM rows of x, BLOCK_OUT of D, num_warps)
CHAIN = 16  # additions after which a sum is put aside


@triton.jit
def _winners(matches_ptr, rows_ptr, row_count_ptr, start, j, Bx, Be, P, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """Weights p and winners of a block of rows with sample j; rows and their samples."""
    row, i, l, row_mask = listed_rows(rows_ptr, row_count_ptr, start, Bx * P, P, LISTED, BLOCK)
    match = tl.load(matches_ptr + (i * Be + j) * P + l, mask=row_mask, other=-1)
    p, winner = unpack(match, True)
    return p, winner, row, i, row_mask


@triton.jit(do_not_specialize=["dsim_ptr", "Bx", "Be", "P", "Q"])
def _sort_kernel(
    dsim_ptr,  # [Bx, Be] float32
    matches_ptr,  # [Bx, Be, P] int64
    rows_ptr,  # [Bx P] int32: the tokens of x that are left, first; or None
    row_count_ptr,  # [1] int32: how many; or None
    starts_ptr,  # [Be, Q + 1] int32
    records_ptr,  # [Be, Bx P] int64
    Bx,
    Be,
    P,
    Q,
    LIST_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Grid (Be, token blocks)."""
    j = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    total = Bx * P
    if LIST_X:
        total = tl.load(row_count_ptr)

    before = tl.zeros((BLOCK_ROWS,), tl.int32)  # rows that a token before `first` won
    count = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, total, BLOCK_ROWS):
        _, winner, _, _, _ = _winners(matches_ptr, rows_ptr, row_count_ptr, start, j, Bx, Be, P, LIST_X, BLOCK_ROWS)
        before += ((winner >= 0) & (winner < first)).to(tl.int32)
        count += tl.sum((winner[None, :] == k[:, None]).to(tl.int32), 1)
    starts = tl.sum(before, 0) + tl.cumsum(count, 0) - count
    tl.store(starts_ptr + j * (Q + 1) + k, starts, mask=k < Q)
    tl.store(starts_ptr + j * (Q + 1) + k + 1, starts + count, mask=k == Q - 1)

    for start in range(0, total, BLOCK_ROWS):
        p, winner, row, i, row_mask = _winners(
            matches_ptr, rows_ptr, row_count_ptr, start, j, Bx, Be, P, LIST_X, BLOCK_ROWS
        )
        won = (winner[None, :] == k[:, None]).to(tl.int32)
        position = tl.sum(won * (starts[:, None] + tl.cumsum(won, 1) - 1), 0)
        starts += tl.sum(won, 1)
        w = p * tl.load(dsim_ptr + i * Be + j, mask=row_mask, other=0.0)
        mine = (winner >= first) & (winner < first + BLOCK_K)
        record = pack(w, row.to(tl.int32), True)
        tl.store(records_ptr + j * Bx * P + position, record, mask=mine)


@triton.jit(do_not_specialize=["Bx", "Be", "P", "Q"])
def _gather_kernel(
    starts_ptr,  # [Be, Q + 1] int32
    records_ptr,  # [Be, Bx P] int64
    x_ptr,  # [Bx P, D]
    out_ptr,  # [Be Q, D]
    Bx,
    Be,
    P,
    Q,
    D,
    ACCUMULATE: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """Grid (Be Q, chunks of D)."""
    token = tl.program_id(0).to(tl.int64)
    j = token // Q
    d = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    start = tl.load(starts_ptr + token + j)
    count = tl.load(starts_ptr + token + j + 1) - start
    records = records_ptr + j * Bx * P + start
    r = tl.arange(0, BLOCK_SUM)
    de = tl.zeros((BLOCK_SUM, BLOCK_OUT), tl.float32)
    total = tl.zeros((BLOCK_SUM, BLOCK_OUT), tl.float32)
    record = tl.load(records + r, mask=r < count, other=0)
    for n in range(0, count, BLOCK_SUM):
        w, row = unpack(record, True)
        exists = n + r < count
        record = tl.load(records + (n + BLOCK_SUM) + r, mask=n + BLOCK_SUM + r < count, other=0)
        de += w[:, None] * load_rows(x_ptr, row.to(tl.int64), exists, d, D).to(tl.float32)
        if (n // BLOCK_SUM + 1) % CHAIN == 0:
            total += de
            de = tl.zeros((BLOCK_SUM, BLOCK_OUT), tl.float32)
    de_k = tl.sum(total + de, 0)
    out = out_ptr + token * D + d
    if ACCUMULATE:
        de_k += tl.load(out, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out, de_k.to(out_ptr.dtype.element_ty), mask=d < D)


def de(dsim: Tensor, matches: Tensor, x: Tensor, of_x: Lists, Q: int, out: Tensor, accumulate: bool) -> None:
    """Writes `out`, or adds to it."""
    (Bx, Be, P), D = matches.shape, x.shape[-1]
    *_, rows, row_count = of_x
    starts = torch.empty(Be, Q + 1, dtype=torch.int32, device=x.device)
    records = torch.empty(Be, Bx * P, dtype=torch.int64, device=x.device)
    tokens, block, warps = SORT
    launch(
        _sort_kernel, (Be, triton.cdiv(Q, tokens)), dsim, matches, rows, row_count, starts, records, Bx, Be, P, Q,
        LIST_X=rows is not None, BLOCK_K=tokens, BLOCK_ROWS=block, num_warps=warps,
    )  # fmt: skip
    together, width, warps = GATHER
    width = min(width, triton.next_power_of_2(D))
    launch(
        _gather_kernel, (Be * Q, triton.cdiv(D, width)), starts, records, x, out, Bx, Be, P, Q, D,
        ACCUMULATE=accumulate, BLOCK_SUM=together, BLOCK_OUT=width, CHAIN=CHAIN, num_warps=warps,
    )  # fmt: skip
