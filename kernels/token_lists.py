"""Lists of the tokens that a mask [B, T] leaves, so that masked-out tokens cost nothing: made on the device, once.

    tokens  [B, T]   of each sample: the kept tokens in order, then the others in order
    counts  [B]      kept tokens of each sample
    order   [B]      samples by count; equal counts keep their order
    bounds  [4]      where in that order samples begin that have a token, more than SHORT and more than PACKED; B
    ends    [B]      in that order, the granules of GRANULE tokens of the samples up to each one
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

SHORT = 32  # samples with no more tokens than this are a class of the match,
PACKED = 128  # or samples with no more than this share its tiles,
GRANULE = 8  # in which so many columns belong to one sample: packed_match.py
BLOCK_T, BLOCK_B, WARPS = 128, 1024, 4
ALIGNED = 4  # int32 numbers in the 16 bytes that a pointer is aligned to


class TokenLists(NamedTuple):
    tokens: Tensor
    counts: Tensor
    order: Tensor
    bounds: Tensor
    ends: Tensor
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
            _samples_kernel, (B,), *lists, B, T, SHORT=SHORT, PACKED=PACKED, GRANULE=GRANULE,
            BLOCK_B=BLOCK_B, BLOCK_T=BLOCK_T, num_warps=WARPS,
        )  # fmt: skip
    return buffer


def _parts(B: int, T: int) -> tuple[int, ...]:
    return B * T, B, B, 4, B, B * T, 1


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
    bounds_ptr,  # [4] int32
    ends_ptr,  # [B] int32
    rows_ptr,  # [B T] int32
    total_ptr,  # [1] int32
    B,
    T,
    SHORT: tl.constexpr,
    PACKED: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid (B): a sample's position in `order` is the number of samples before it, and so is its first row's."""
    b = tl.program_id(0)
    count = tl.load(counts_ptr + b)
    rank, kept, total, none, short, packed, end = 0, 0, 0, 0, 0, 0, (count + GRANULE - 1) // GRANULE
    for start in range(0, B, BLOCK_B):
        other = start + tl.arange(0, BLOCK_B)
        exists = other < B
        counts = tl.load(counts_ptr + other, mask=exists, other=0)
        lower = (counts < count) | ((counts == count) & (other < b))
        rank += tl.sum((exists & lower).to(tl.int32), 0)
        end += tl.sum(tl.where(exists & lower, (counts + GRANULE - 1) // GRANULE, 0), 0)
        kept += tl.sum(tl.where(other < b, counts, 0), 0)
        total += tl.sum(counts, 0)
        none += tl.sum((exists & (counts == 0)).to(tl.int32), 0)
        short += tl.sum((exists & (counts <= SHORT)).to(tl.int32), 0)
        packed += tl.sum((exists & (counts <= PACKED)).to(tl.int32), 0)
    tl.store(order_ptr + rank, b)
    tl.store(ends_ptr + rank, end)
    if b == 0:
        tl.store(total_ptr, total)
        tl.store(bounds_ptr, none)
        tl.store(bounds_ptr + 1, short)
        tl.store(bounds_ptr + 2, packed)
        tl.store(bounds_ptr + 3, B)
    # Kept tokens come after those of earlier samples, the others after all kept ones and the others of earlier samples.
    first = b.to(tl.int64) * T
    gone = total + first - kept
    for start in range(0, T, BLOCK_T):
        p = start + tl.arange(0, BLOCK_T)
        t = tl.load(tokens_ptr + first + p, mask=p < T, other=0)
        at = tl.where(p < count, kept + p, gone + p - count)
        tl.store(rows_ptr + at, (first + t).to(tl.int32), mask=p < T)
