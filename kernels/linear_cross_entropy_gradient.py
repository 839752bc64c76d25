"""A linear layer over many classes and its cross-entropy, the gradient: dz [M, V] is made in chunks of columns.

    dz_ij = p_ij - [j = t(i)],   p_ij = exp(z_ij - top_i) / total_i,   z as in the forward, made again
    dh = g dz W,   dW = g dz^T h,   db_j = g sum_i dz_ij

For one chunk of C columns after the other, with C so that dz [M, C] in the dtype of the states has at most CHUNK bytes:

    dz                             tiles [BLOCK_M, BLOCK_N], with the sums of their columns
    dW[chunk] = g dz^T h           own columns x BLOCK_OUT of D, sum over rows
    dh       += g dz W[chunk]      own rows x BLOCK_OUT of D, sum over the chunk's columns
    db[chunk]                      the sums of all row blocks

Making dW and dh from tiles that stay on the chip would take accumulators [BLOCK, D], for which a program has no
registers, and the logits twice.

Which rows count is known on the device alone: a kernel finds `limit`, the number of rows up to the last one that does.
What lies behind it is neither made nor read, and dh is zero there. So rows that count should come first; any order is
right.

Launcher: `backward`. In memory besides inputs and gradients: the chunk of dz, the sums of its columns, and dh in
float32. Weights of another dtype than the states are copied. Each element of dW is added up by one program and rounded
once; dh is added up chunk by chunk. Deterministic: see CONTRIBUTING.md, "A kernel file".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._class_logits import LOGITS, class_logits, column_of, pointer
from ._launch import LARGE, LDS, MEDIUM, SMALL, all_registers, choose, dot_precision, launch, on_device
from ._tile import dot_nearest, load_columns, load_rows

CHUNK = 64 * 2**20  # bytes of dz at most, unless so many rows leave fewer than COLUMNS columns
COLUMNS = 256
HALF_FACTOR = 256.0  # what dz in float16 is multiplied with: one word of 49408 is below its least normal number

# BLOCK_OWN, BLOCK_OUT, BLOCK_SUM, num_warps, num_stages of the two products of dz.
PRODUCTS = {
    (LARGE, "half"): (128, 128, 64, 8, 3),
    (LARGE, "tf32"): (128, 128, 32, 8, 3),
    (LARGE, "ieee"): (64, 64, 16, 4, 2),
    (MEDIUM, "half"): (128, 128, 64, 8, 3),
    (MEDIUM, "tf32"): (128, 128, 32, 8, 3),
    (SMALL, "half"): (128, 128, 64, 8, 2),
    (SMALL, "tf32"): (128, 128, 32, 8, 2),
    (LDS, "half"): (128, 128, 32, 8, 2),
    (LDS, "tf32"): (128, 128, 32, 8, 1),
}


@triton.jit(do_not_specialize=["M", "ignore_index"])
def _limit_kernel(
    targets_ptr,  # [M] int64
    limit_ptr,  # [] int32: 1 + the last row that counts, or 0
    M,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Grid (1)."""
    last = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, M, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        target = tl.load(targets_ptr + rows, mask=rows < M, other=ignore_index)
        last = tl.maximum(last, tl.where(target != ignore_index, rows + 1, 0))
    tl.store(limit_ptr, tl.max(last, 0))


@triton.jit(do_not_specialize=["bias_ptr", "sums_ptr", "M", "first", "size", "ignore_index"])
def _dz_kernel(
    states_ptr,  # [M, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V], or anything
    targets_ptr,  # [M] int64
    statistics_ptr,  # [2, M]
    limit_ptr,  # [] int32
    dz_ptr,  # [M, C], columns first, ..., first + size - 1 of the vocabulary, then zeros to the end of the last block
    sums_ptr,  # [row blocks, C]: of dz over the rows of a block, or anything
    M,
    D,
    C,
    first,
    size,
    ignore_index,
    FACTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OF_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (row blocks, column blocks). Nothing is written of the row blocks behind the last row that counts."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if tl.program_id(0) * BLOCK_M >= tl.load(limit_ptr):
        return
    row_mask = rows < M
    columns = tl.arange(0, BLOCK_N)
    start = tl.program_id(1).to(tl.int64) * BLOCK_N
    at = start + columns
    col_mask, cols = at < size, first + at
    z = class_logits(states_ptr, weight_ptr, bias_ptr, rows, row_mask, cols, col_mask, D, HAS_BIAS, PRECISION, BLOCK_D)
    target = tl.load(targets_ptr + rows, mask=row_mask, other=ignore_index)
    top = tl.load(statistics_ptr + rows, mask=row_mask, other=0.0)
    total = tl.load(statistics_ptr + M + rows, mask=row_mask, other=1.0)
    p = tl.exp(z - top[:, None]) * (1.0 / total)[:, None]
    dz = tl.where(columns[None, :] == column_of(target, first + start, BLOCK_N)[:, None], p - 1.0, p) * FACTOR
    dz = tl.where((target != ignore_index)[:, None], dz, 0.0)
    tl.store(dz_ptr + rows[:, None] * C + at[None, :], dz.to(dz_ptr.dtype.element_ty), mask=row_mask[:, None])
    if OF_BIAS:
        tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * C + at, tl.sum(dz, 0))


@triton.jit(do_not_specialize=["first", "size"])
def _dbias_kernel(
    sums_ptr,  # [row blocks, C]
    dloss_ptr,  # []
    limit_ptr,  # [] int32
    dbias_ptr,  # [V]
    C,
    first,
    size,
    FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (blocks of the chunk's columns)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    block_ptr = sums_ptr + at
    for _ in range(tl.cdiv(tl.load(limit_ptr), BLOCK_M)):
        acc += tl.load(block_ptr, mask=at < size, other=0.0)
        block_ptr += C
    acc *= tl.load(dloss_ptr) / FACTOR
    tl.store(dbias_ptr + first + at.to(tl.int64), acc.to(dbias_ptr.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["first", "size"])
def _dweight_kernel(
    dz_ptr,  # [M, C]
    states_ptr,  # [M, D]
    dloss_ptr,  # []
    limit_ptr,  # [] int32
    dweight_ptr,  # [V, D]
    D,
    C,
    first,
    size,
    FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
):
    """Grid (blocks of D, blocks of the chunk's columns)."""
    d = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    at = tl.program_id(1).to(tl.int64) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    limit = tl.load(limit_ptr)
    acc = tl.zeros((BLOCK_OWN, BLOCK_OUT), tl.float32)
    for start in range(0, limit, BLOCK_SUM):
        rows = (start + tl.arange(0, BLOCK_SUM)).to(tl.int64)
        dz = load_columns(dz_ptr, rows, rows < limit, at, C)
        acc = dot_nearest(dz, load_rows(states_ptr, rows, rows < limit, d, D), acc, PRECISION)
    acc *= tl.load(dloss_ptr) / FACTOR
    out = dweight_ptr + (first + at)[:, None] * D + d[None, :]
    tl.store(out, acc.to(dweight_ptr.dtype.element_ty), mask=(at < size)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["M", "first", "size"])
def _dstates_kernel(
    dz_ptr,  # [M, C]
    weight_ptr,  # [V, D]
    dloss_ptr,  # []
    limit_ptr,  # [] int32
    dstates_ptr,  # [M, D]
    M,
    D,
    C,
    first,
    size,
    FACTOR: tl.constexpr,
    ADD: tl.constexpr,  # to what earlier chunks have left
    PRECISION: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
):
    """Grid (blocks of D, row blocks)."""
    d = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = tl.program_id(1).to(tl.int64) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    limit = tl.load(limit_ptr)
    out = dstates_ptr + rows[:, None] * D + d[None, :]
    mask = (rows < M)[:, None] & (d < D)[None, :]
    if tl.program_id(1) * BLOCK_OWN >= limit:  # no row that counts
        if not ADD:
            tl.store(out, tl.zeros((BLOCK_OWN, BLOCK_OUT), dstates_ptr.dtype.element_ty), mask=mask)
        return
    acc = tl.zeros((BLOCK_OWN, BLOCK_OUT), tl.float32)
    for start in range(0, size, BLOCK_SUM):
        at = (start + tl.arange(0, BLOCK_SUM)).to(tl.int64)
        dz = load_rows(dz_ptr, rows, rows < limit, at, C)
        acc = dot_nearest(dz, load_rows(weight_ptr, first + at, at < size, d, D), acc, PRECISION)
    acc *= tl.load(dloss_ptr) / FACTOR
    if ADD:
        acc += tl.load(out, mask=mask, other=0.0)
    tl.store(out, acc.to(dstates_ptr.dtype.element_ty), mask=mask)


def backward(
    dloss: Tensor,
    statistics: Tensor,
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    of_states: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of states, weight and bias in their dtypes; [0] for those not wanted.

    Args:
        dloss: [] float32.
    """
    states, targets = states.contiguous(), targets.contiguous()
    (M, D), V = states.shape, len(weight)
    of_bias = of_bias and bias is not None
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if of_weight else weight.new_empty(0)
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if of_bias else weight.new_empty(0)
    if M == 0:
        return states.new_empty(states.shape if of_states else 0), dweight.zero_(), dbias.zero_()
    weight = weight.to(states.dtype).contiguous()
    C = _chunk(M, V, states)
    dstates = torch.empty(
        (M, D) if of_states else 0, dtype=states.dtype if C >= V else torch.float32, device=states.device
    )
    dz = torch.empty(M, C, dtype=states.dtype, device=states.device)
    limit = torch.empty((), dtype=torch.int32, device=states.device)
    common = {"PRECISION": dot_precision(states.dtype)}
    factor = {"FACTOR": HALF_FACTOR if states.dtype == torch.float16 else 1.0}
    rows, columns, depth, warps, stages = choose(LOGITS, states)
    own, out, summed, product_warps, product_stages = choose(PRODUCTS, states)
    sums = torch.empty(triton.cdiv(M, rows), C if of_bias else 0, dtype=torch.float32, device=states.device)
    blocks = {"BLOCK_OWN": own, "BLOCK_OUT": out, "BLOCK_SUM": summed}
    blocks |= {"num_warps": product_warps, "num_stages": product_stages}
    with on_device(states):
        launch(_limit_kernel, (1,), targets, limit, M, ignore_index, BLOCK=1024, num_warps=4)
        for first in range(0, V, C):
            size = min(C, V - first)
            launch(
                _dz_kernel, (triton.cdiv(M, rows), triton.cdiv(size, columns)), states, weight,
                pointer(bias, states), targets, statistics, limit, dz, sums if of_bias else dz, M, D, C, first,
                size, ignore_index, HAS_BIAS=bias is not None, OF_BIAS=of_bias, BLOCK_M=rows, BLOCK_N=columns,
                BLOCK_D=depth, num_warps=warps, num_stages=stages, **common, **factor,
                **all_registers(states.device, warps),
            )  # fmt: skip
            if of_bias:
                launch(
                    _dbias_kernel, (triton.cdiv(size, 256),), sums, dloss, limit, dbias, C, first, size,
                    BLOCK_M=rows, BLOCK=256, num_warps=4, **factor,
                )  # fmt: skip
            if of_weight:
                launch(
                    _dweight_kernel, (triton.cdiv(D, out), triton.cdiv(size, own)), dz, states, dloss, limit,
                    dweight, D, C, first, size, **blocks, **common, **factor,
                )  # fmt: skip
            if of_states:
                launch(
                    _dstates_kernel, (triton.cdiv(D, out), triton.cdiv(M, own)), dz, weight, dloss, limit, dstates,
                    M, D, C, first, size, ADD=first > 0, **blocks, **common, **factor,
                )  # fmt: skip
    return dstates.to(states.dtype), dweight, dbias


def _chunk(M: int, V: int, states: Tensor) -> int:
    """Columns of dz that are made at once: a multiple of COLUMNS."""
    most = max(COLUMNS, CHUNK // (M * states.element_size()) // COLUMNS * COLUMNS)
    return min(most, triton.cdiv(V, COLUMNS) * COLUMNS)
