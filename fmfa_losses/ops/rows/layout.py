"""Tokens [B, T, D] as rows [K, D]: those that a mask keeps, sample after sample.

On the CPU, where the values of a mask can be read, what it leaves out is left out of every product. Samples stand in
the order of their length, the longest first, so that neighbours are alike. On an accelerator the host would have to
wait for the mask: there all tokens are rows, and `keep` says which of them count.
"""

import sys
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Block", "Layout", "blocks", "by_device", "layout", "on_cpu", "pieces"]


class Layout(NamedTuple):
    shape: torch.Size  # [B, T, D]
    sizes: list[int]  # rows of each sample, in the order of the rows
    counts: Tensor  # [B] the same
    first: Tensor  # [B] its first row
    samples: Tensor  # [B] its number
    places: Tensor | None  # [K] of the rows among all B T tokens; None: all of them, in order
    keep: Tensor | None  # [K] which rows count, where they could not be left out

    def pack(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [K, D] of x [B, T, D], contiguous; 0 where they do not count."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if self.places is not None:
            return rows.index_select(0, self.places).to(dtype)
        rows = rows.to(dtype).contiguous()
        return rows if self.keep is None else rows.masked_fill(~self.keep.unsqueeze(1), 0)

    def unpack(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Inverse of pack: [B, T, D], 0 for all other tokens."""
        if self.places is None:
            everything = rows.to(dtype)
            if self.keep is not None:
                everything = everything.masked_fill(~self.keep.unsqueeze(1), 0)
        else:
            everything = rows.new_zeros(self.shape[0] * self.shape[1], rows.shape[1], dtype=dtype)
            everything[self.places] = rows.to(dtype)
        return everything.view(*self.shape[:2], rows.shape[1])

    def owner(self) -> Tensor:
        """Whose row it is, as an index of sizes, [K]."""
        every = torch.arange(len(self.sizes), device=self.counts.device)
        return every.repeat_interleave(self.shape[1] if self.places is None else self.counts)


def layout(x: Tensor, mask: Tensor | None) -> Layout:
    """Of tokens [B, T, D] and their mask [B, T], True = keep."""
    (B, T, _), device = x.shape, x.device
    if mask is None or not on_cpu(x):
        every = torch.arange(B, device=device)
        keep = None if mask is None else mask.flatten()
        return Layout(x.shape, [T] * B, torch.full_like(every, T), every * T, every, None, keep)
    counts, samples = mask.sum(dim=1).sort(descending=True, stable=True)
    sample, token = mask[samples].nonzero().unbind(dim=1)
    return Layout(
        x.shape, counts.tolist(), counts, counts.cumsum(0) - counts, samples, samples[sample] * T + token, None
    )


class Block(NamedTuple):
    """Neighbouring samples and their rows."""

    samples: slice
    rows: slice
    sizes: list[int]


def blocks(sizes: list[int], *, rows: int = sys.maxsize, samples: int = sys.maxsize) -> list[Block]:
    """Neighbouring samples, as many as have at most `rows` rows together, or a single one with more; no empty ones."""
    sizes = [size for size in sizes if size]  # those stand last
    ends = list(accumulate(sizes, initial=0))
    found, first = [], 0
    for last in range(1, len(sizes) + 1):
        if last == len(sizes) or ends[last + 1] - ends[first] > rows or last - first == samples:
            found.append(Block(slice(first, last), slice(ends[first], ends[last]), sizes[first:last]))
            first = last
    return found


def pieces(count: int, step: int) -> list[slice]:
    """0 to count, `step` at a time."""
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def by_device(cpu: int, accelerator: int, x: Tensor) -> int:
    """Sizes that fit a CPU's cache, or the fewer and larger ones that keep an accelerator busy."""
    return cpu if on_cpu(x) else accelerator


def on_cpu(x: Tensor) -> bool:
    """Whether the values of a mask can be read without waiting."""
    return x.device.type == "cpu"
