"""de of a match: every token of e adds up the tokens of x that it won, times their weights.

    de(dsim [Bx, Be] float32, matches [Bx, Be, P], x [Bx, P, D], x_lists | None, e_lists | None, Q, out [Be, Q, D],
       accumulate) -> None

    de_jk = sum over the (i, l) whose winner is k of w_ijl x_il,   w_ijl = dsim_ij p_ijl

A match is winner and weight p in one number (_matches.py). `out` is float32 or the tokens' dtype, and contiguous: all
of it is written, zeros where no token won, or with `accumulate` added to. x_lists and e_lists are buffers of
token_lists.make(mask). There are two ways:

    winner_products.py   16-bit tokens: products of weights, zero where another token won, with tokens of x. Q times
                         more operations than there are terms, and tensor cores make them sooner than loads would.
    winner_lists.py      float32 tokens, whose IEEE products have no tensor cores, whatever torch's setting for TF32:
                         matches are sorted by winner, and a token loads the rows that it won. Also 16-bit tokens
                         where a sample has more of them than 16 bits count.
"""

import torch
from torch import Tensor

from . import winner_lists, winner_products
from ._launch import on_device
from ._matches import sections_of


def de(
    dsim: Tensor,
    matches: Tensor,
    x: Tensor,
    x_lists: Tensor | None,
    e_lists: Tensor | None,
    Q: int,
    out: Tensor,
    accumulate: bool,
) -> None:
    """Writes `out`, or adds to it."""
    dsim, x = dsim.to(torch.float32).contiguous(), x.contiguous()
    of_x = sections_of(x_lists, *x.shape[:2])
    with on_device(x):
        if matches.dtype == torch.int64:
            winner_lists.de(dsim, matches, x, of_x, Q, out, accumulate)
        else:
            winner_products.de(dsim, matches, x, of_x, sections_of(e_lists, dsim.shape[1], Q), Q, out, accumulate)
