"""A linear layer over many classes and its cross-entropy, the forward: the logits [M, V] are never in memory.

    z_ij = h_i W_j + b_j,   loss_i = log sum_j exp(z_ij) - z_i,t(i);   rows whose target is `ignore_index` do not count

One program for BLOCK_M rows and a part of the vocabulary, TILES tiles of BLOCK_N columns: a product over D, then the
running top and total = sum exp(z - top) of each row. A second kernel merges the parts of a row in their order.

            part 0                 part 1           ...
    h_i  [ tile | tile | tile ] [ tile | tile ...   BLOCK_M rows -> top, total, best column, the target's logit

Which rows count is known on the device alone. A program none of whose rows counts returns at once: rows that count
should come first, and any order is right. With less than TILES tiles a program more parts would be in memory, 16 bytes
a row each; with more, a few rows would not fill the device.

Launcher: `forward`. Weights of another dtype than the states are copied. linear_cross_entropy_gradient.py has the
gradient. Deterministic: see CONTRIBUTING.md, "A kernel file".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._class_logits import LOGITS, class_logits, column_of, pointer
from ._launch import all_registers, choose, dot_precision, launch, on_device

TILES = 8


@triton.jit
def _merge(top, total, best, new_top, new_total, new_best):
    """Running top, total = sum exp(z - top) and first column at the top, after those of later columns."""
    best = tl.where(new_top > top, new_best, best)
    merged = tl.maximum(top, new_top)  # NaN is passed over here and shows in the total
    base = tl.where(merged == -float("inf"), 0.0, merged)
    return merged, total * tl.exp(top - base) + new_total * tl.exp(new_top - base), best


@triton.jit(do_not_specialize=["bias_ptr", "M", "ignore_index"])
def _linear_cross_entropy_kernel(
    states_ptr,  # [M, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V], or anything
    targets_ptr,  # [M] int64
    parts_ptr,  # [3, parts, M]: top, total, logit of the target (0 in parts that do not have it)
    best_ptr,  # [parts, M] int32
    M,
    V,
    D,
    ignore_index,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
):
    """Grid (row blocks, parts): neighbours have the same columns, whose weights they find in L2."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    target = tl.load(targets_ptr + rows, mask=row_mask, other=ignore_index)
    if tl.max((target != ignore_index).to(tl.int32), 0) == 0:
        return
    part = tl.program_id(1).to(tl.int64)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    own = tl.zeros((BLOCK_M,), tl.float32)
    best = tl.zeros((BLOCK_M,), tl.int32)
    columns = tl.arange(0, BLOCK_N)
    for tile in range(tl.minimum(TILES, tl.cdiv(V, BLOCK_N) - tl.program_id(1) * TILES)):
        start = (part * TILES + tile) * BLOCK_N
        cols = start + columns
        z = class_logits(
            states_ptr, weight_ptr, bias_ptr, rows, row_mask, cols, cols < V, D, HAS_BIAS, PRECISION, BLOCK_D
        )  # fmt: skip
        own += tl.sum(tl.where(columns[None, :] == column_of(target, start, BLOCK_N)[:, None], z, 0.0), 1)
        largest = tl.max(z, 1)
        first = tl.min(tl.where(z == largest[:, None], columns[None, :], BLOCK_N), 1) + start.to(tl.int32)
        base = tl.where(largest == -float("inf"), 0.0, largest)
        sums = tl.sum(tl.exp(z - base[:, None]), 1)
        top, total, best = _merge(top, total, best, largest, sums, first)
    parts = tl.num_programs(1).to(tl.int64)
    at = part * M + rows
    tl.store(parts_ptr + at, top, mask=row_mask)
    tl.store(parts_ptr + parts * M + at, total, mask=row_mask)
    tl.store(parts_ptr + 2 * parts * M + at, own, mask=row_mask)
    tl.store(best_ptr + at, best, mask=row_mask)


@triton.jit(do_not_specialize=["M", "parts", "ignore_index"])
def _merge_parts_kernel(
    parts_ptr,  # [3, parts, M]
    best_ptr,  # [parts, M] int32
    targets_ptr,  # [M] int64
    loss_ptr,  # [M]
    right_ptr,  # [M] int64
    statistics_ptr,  # [2, M]
    M,
    V,
    parts,
    ignore_index,
    BLOCK_M: tl.constexpr,
):
    """Grid (row blocks)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    target = tl.load(targets_ptr + rows, mask=row_mask, other=ignore_index)
    counted = target != ignore_index
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    own = tl.zeros((BLOCK_M,), tl.float32)
    best = tl.zeros((BLOCK_M,), tl.int32)
    size = parts.to(tl.int64) * M
    for part in range(parts):
        at = rows + part * M.to(tl.int64)
        part_top = tl.load(parts_ptr + at, mask=counted, other=0.0)
        part_total = tl.load(parts_ptr + size + at, mask=counted, other=0.0)
        own += tl.load(parts_ptr + 2 * size + at, mask=counted, other=0.0)
        part_best = tl.load(best_ptr + at, mask=counted, other=0)
        top, total, best = _merge(top, total, best, part_top, part_total, part_best)
    total = tl.where((target >= 0) & (target < V), total, float("nan"))  # no such class
    loss = tl.where(counted, top - own + tl.log(total), 0.0)
    right = counted & (best == target) & (total == total)
    tl.store(loss_ptr + rows, loss, mask=row_mask)
    tl.store(right_ptr + rows, right.to(tl.int64), mask=row_mask)
    tl.store(statistics_ptr + rows, tl.where(counted, top, 0.0), mask=row_mask)
    tl.store(statistics_ptr + M + rows, tl.where(counted, total, float("inf")), mask=row_mask)


def forward(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss [], number of right predictions [] int64, and top and total of every row [2, M].

    Args:
        states: [M, D] float16, bfloat16 or float32; the products are made in this type.
        weight: [V, D], bias: [V], of any of these types.
        targets: [M] int64; total is infinite of rows of `ignore_index`, and NaN of a target that is no class.
    """
    states, weight, targets = states.contiguous(), weight.to(states.dtype).contiguous(), targets.contiguous()
    (M, D), V = states.shape, len(weight)
    like = {"dtype": torch.float32, "device": states.device}
    loss, statistics = torch.empty(M, **like), torch.empty(2, M, **like)
    right = torch.empty(M, dtype=torch.int64, device=states.device)
    rows, columns, depth, warps, stages = choose(LOGITS, states)
    parts = triton.cdiv(V, columns * TILES)
    found, best = torch.empty(3, parts, M, **like), torch.empty(parts, M, dtype=torch.int32, device=states.device)
    if M:
        with on_device(states):
            launch(
                _linear_cross_entropy_kernel, (triton.cdiv(M, rows), parts), states, weight, pointer(bias, states),
                targets, found, best, M, V, D, ignore_index, HAS_BIAS=bias is not None,
                PRECISION=dot_precision(states.dtype), BLOCK_M=rows, BLOCK_N=columns, BLOCK_D=depth, TILES=TILES,
                num_warps=warps, num_stages=stages, **all_registers(states.device, warps),
            )  # fmt: skip
            launch(
                _merge_parts_kernel, (triton.cdiv(M, 128),), found, best, targets, loss, right, statistics, M, V, parts,
                ignore_index, BLOCK_M=128, num_warps=4,
            )  # fmt: skip
    return loss.sum(), right.sum(), statistics
