"""A match in one number: which token won, and the cosine it won with, later the weight it has in the pooling.

    matches [Bx, Be, P]   int32 = float16 bits << 16 | (winner & 0xFFFF)         16-bit tokens, up to 32767 a sample
                          int64 = float32 bits << 32 | (winner & 0xFFFFFFFF)     float32 tokens, or more of them

match.py writes cosines and pool.py turns them into weights in place. gather_gradient.py, winner_products.py and
winner_lists.py read weight and winner in one load of 4 or 8 bytes, which a GPU can make ahead of time; one of 2 bytes
it cannot. Where nothing won (the row is masked out, or the sample of e has no token) the winner is -1 and the weight 0.
Float16 holds a cosine, and a weight in [0, 1], as exactly as 16-bit tokens give it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import token_lists
from .token_lists import TokenLists

Lists = TokenLists | tuple[None, ...]  # of the tokens that a mask leaves, or of no mask
NARROW_WINNERS = 32767  # what the lower half of an int32 counts to


def matches_dtype(x: Tensor, Q: int) -> torch.dtype:
    """Of the matches of tokens x among Q tokens each."""
    return torch.int64 if x.dtype == torch.float32 or Q > NARROW_WINNERS else torch.int32


@triton.jit
def pack(value, winner, WIDE: tl.constexpr):
    """float32 values and int32 winners -> matches."""
    if WIDE:
        match = (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (winner.to(tl.int64) & 0xFFFFFFFF)
    else:
        match = (value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16) | (winner & 0xFFFF)
    return match


@triton.jit
def unpack(match, WIDE: tl.constexpr):
    """Matches -> float32 values and int32 winners."""
    if WIDE:
        value = (match >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        winner = match.to(tl.int32)
    else:
        value = (match >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        winner = match.to(tl.int16).to(tl.int32)
    return value, winner


@triton.jit
def listed_rows(list_ptr, count_ptr, start, total, P, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """A block of tokens of x: row in [Bx P], sample i, its token l, and which exist."""
    row = start + tl.arange(0, BLOCK)
    if LISTED:
        row_mask = row < tl.load(count_ptr)
        row = tl.load(list_ptr + row, mask=row_mask, other=0)
    else:
        row_mask = row < total
    i = row // P
    return row.to(tl.int64), i.to(tl.int64), row - i * P, row_mask


def buffer_of(mask: Tensor | None, lists: Tensor | None) -> Tensor | None:
    """The buffer of token_lists.make(mask), made where there is none yet."""
    return token_lists.make(mask) if mask is not None and lists is None else lists


def sections_of(lists: Tensor | None, B: int, T: int) -> Lists:
    """The lists in such a buffer."""
    return (None,) * len(TokenLists._fields) if lists is None else token_lists.sections(lists, B, T)
