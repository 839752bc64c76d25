"""Lists of the tokens that a mask [B, T] leaves, so that masked-out tokens cost nothing: made on the device, once.

    tokens  [B, T]   of each sample: the kept tokens in order, then the others in order
    counts  [B]      kept tokens of each sample
    order   [B]      samples by count; equal counts keep their order
    bounds  [3]      where in that order samples begin that have a token, and those that have more than SHORT; B
    rows    [B T]    the kept ones of all B T tokens in order, then the others in order
    total   [1]      kept tokens of all samples

All int32, sections of one buffer, each aligned as the compiler was told. Two launches; the host waits for nothing, no
atomics. Every program of the second one reads all counts: B^2 numbers from the cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, on_device

SHORT = 32  # samples with no more tokens than this are matched together
BLOCK_T, BLOCK_B, WARPS = 128, 1024, 4
ALIGNED = 4  # int32 numbers in the 16 bytes that a pointer is aligned to


class TokenLists(NamedTuple):
    tokens: Tensor
    counts: Tensor
    order: Tensor
    bounds: Tensor
    rows: Tensor
    total: Tensor


def size(B: int, T: int) -> int:
    """Numbers in the buffer of a mask [B, T]."""
    return sum(_aligned(part) for part in _parts(B, T))


def sections(buffer: Tensor, B: int, T: int) -> TokenLists:
    """The lists in the buffer [size(B, T)] of a mask [B, T]."""
    views, start = [], 0
    for part in _parts(B, T):
        views.append(buffer[start : start + part])
        start += _aligned(part)
    return TokenLists(views[0].view(B, T), *views[1:])


def make(mask: Tensor) -> Tensor:
    """The lists of a mask [B, T], in one buffer."""
    B, T = mask.shape
    mask = mask.contiguous()
    buffer = torch.empty(size(B, T), dtype=torch.int32, device=mask.device)
    lists = sections(buffer, B, T)
    with on_device(mask):
        launch(_tokens_kernel, (B,), mask, lists.tokens, lists.counts, T, BLOCK_T=BLOCK_T, num_warps=WARPS)
        launch(
            _samples_kernel, (B,), *lists, B, T, SHORT=SHORT, BLOCK_B=BLOCK_B, BLOCK_T=BLOCK_T, num_warps=WARPS
        )  # fmt: skip
    return buffer


def _parts(B: int, T: int) -> tuple[int, ...]:
    return B * T, B, B, 3, B * T, 1


def _aligned(part: int) -> int:
    return -(-part // ALIGNED) * ALIGNED


@triton.jit(do_not_specialize=["mask_ptr", "T"])
def _tokens_kernel(
    mask_ptr,  # [B, T] bool
    tokens_ptr,  # [B, T] int32
    counts_ptr,  # [B] int32
    T,
    BLOCK_T: tl.constexpr,
):
    """Grid (B): a token's position is the number of its kind before it."""
    b = tl.program_id(0)
    first = b.to(tl.int64) * T
    count = 0
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        count += tl.sum(tl.load(mask_ptr + first + t, mask=t < T, other=0).to(tl.int32), 0)
    before = 0
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        keep = tl.load(mask_ptr + first + t, mask=t < T, other=0).to(tl.int32)
        kept = before + tl.cumsum(keep, 0) - keep  # kept tokens before t
        tl.store(tokens_ptr + first + tl.where(keep > 0, kept, count + t - kept), t, mask=t < T)
        before += tl.sum(keep, 0)
    tl.store(counts_ptr + b, count)


@triton.jit(do_not_specialize=["B", "T"])
def _samples_kernel(
    tokens_ptr,  # [B, T] int32
    counts_ptr,  # [B] int32
    order_ptr,  # [B] int32
    bounds_ptr,  # [3] int32
    rows_ptr,  # [B T] int32
    total_ptr,  # [1] int32
    B,
    T,
    SHORT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid (B): a sample's position in `order` is the number of samples before it, and so is its first row's."""
    b = tl.program_id(0)
    count = tl.load(counts_ptr + b)
    rank, kept, total, none, short = 0, 0, 0, 0, 0
    for start in range(0, B, BLOCK_B):
        other = start + tl.arange(0, BLOCK_B)
        exists = other < B
        counts = tl.load(counts_ptr + other, mask=exists, other=0)
        lower = (counts < count) | ((counts == count) & (other < b))
        rank += tl.sum((exists & lower).to(tl.int32), 0)
        kept += tl.sum(tl.where(other < b, counts, 0), 0)
        total += tl.sum(counts, 0)
        none += tl.sum((exists & (counts == 0)).to(tl.int32), 0)
        short += tl.sum((exists & (counts <= SHORT)).to(tl.int32), 0)
    tl.store(order_ptr + rank, b)
    if b == 0:
        tl.store(total_ptr, total)
        tl.store(bounds_ptr, none)
        tl.store(bounds_ptr + 1, short)
        tl.store(bounds_ptr + 2, B)
    # Kept tokens come after those of earlier samples, the others after all kept ones and the others of earlier samples.
    first = b.to(tl.int64) * T
    gone = total + first - kept
    for start in range(0, T, BLOCK_T):
        p = start + tl.arange(0, BLOCK_T)
        t = tl.load(tokens_ptr + first + p, mask=p < T, other=0)
        at = tl.where(p < count, kept + p, gone + p - count)
        tl.store(rows_ptr + at, (first + t).to(tl.int32), mask=p < T)
