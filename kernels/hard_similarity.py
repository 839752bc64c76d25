"""Hard similarity on a GPU: match, pool, and the gradients of both, put together; no [Bx, Be, P, Q] anywhere.

    forward(x [Bx, P, D], e [Be, Q, D], x_mask [Bx, P] | None, e_mask [Be, Q] | None, pool, scale, save)
        -> sim [Bx, Be] float32, matches [Bx, Be, P] (empty unless `save`)
    backward(dsim [Bx, Be], matches, x, e, x_mask, e_mask, pool) -> dx, de, in the inputs' dtype
    Inputs: unit rows (or zeros), contiguous, one dtype, finite where masked out. Both take x_lists and e_lists, what
    token_lists.make(mask) gave; without them they make them.

    match.py            max_k x_il . e_jk and the k that won, one number each (_matches.py)
    pool.py             sim_ij over the l of these maxima, which become their weights in it
    gather_gradient.py  dx_il = sum_j w_ijl e_jk*
    winner_gradient.py  de_jk = sum over the (i, l) that chose k of w_ijl x_il;   w_ijl = dsim_ij p_ijl

Memory beyond inputs and results: Bx Be P matches of 4 bytes, of float32 tokens 8.
"""

import torch
from torch import Tensor

from . import gather_gradient, winner_gradient
from ._matches import Lists, buffer_of, sections_of
from .match import match
from .pool import pool as pooled

EXPONENTIAL = ("lse", "log_mean")


def forward(
    x: Tensor,
    e: Tensor,
    x_mask: Tensor | None,
    e_mask: Tensor | None,
    pool: str,
    pool_scale: float,
    save: bool,
    x_lists: Tensor | None = None,
    e_lists: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sim, matches (empty unless `save`)."""
    of_x = sections_of(buffer_of(x_mask, x_lists), *x.shape[:2])
    of_e = sections_of(buffer_of(e_mask, e_lists), *e.shape[:2])
    matches = match(x, e, of_x, of_e, save, pool in EXPONENTIAL)
    sim = pooled(matches, x_mask, of_e[1], pool, pool_scale, save)
    return sim, matches if save else torch.empty(0, dtype=matches.dtype, device=x.device)


def backward(
    dsim: Tensor,
    matches: Tensor,
    x: Tensor,
    e: Tensor,
    x_mask: Tensor | None,
    e_mask: Tensor | None,
    pool: str,
    x_lists: Tensor | None = None,
    e_lists: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx, de."""
    x_lists, e_lists = buffer_of(x_mask, x_lists), buffer_of(e_mask, e_lists)
    *_, rows, row_count = of_x = sections_of(x_lists, *x.shape[:2])
    dx, de = (torch.empty_like(tokens, memory_format=torch.contiguous_format) for tokens in (x, e))
    dsim = _of_tokens(dsim, pool, x.shape[1], of_x)
    winner_gradient.de(dsim, matches, x, x_lists, e_lists, e.shape[1], de, False)
    gather_gradient.dx(dsim, matches, e, rows, row_count, dx)
    return dx, de


def add_gradients(
    dsim: Tensor,
    matches: Tensor,
    units: Tensor,
    tokens: Tensor,
    e: Tensor,
    x_mask: Tensor | None,
    pool: str,
    x_lists: Tensor | None,
    e_lists: Tensor | None,
    inverse: Tensor,
    de: Tensor,
    accumulate: bool,
) -> None:
    """The gradient of `tokens` in place of their unit rows `units`, and of e in `de`, or added to it.

    tokens and units are [Bx, P, D], inverse [Bx, P] float32 is 1 / |token| (unit_rows.py); de [Be, Q, D], float32 where
    more is added to it. Where there are masks there are lists.
    """
    *_, rows, row_count = of_x = sections_of(buffer_of(x_mask, x_lists), *units.shape[:2])
    dsim = _of_tokens(dsim, pool, units.shape[1], of_x)
    winner_gradient.de(dsim, matches, units, x_lists, e_lists, e.shape[1], de, accumulate)
    gather_gradient.dx(dsim, matches, e, rows, row_count, units, tokens, inverse)


def _of_tokens(dsim: Tensor, pool: str, P: int, x_lists: Lists) -> Tensor:
    """What multiplies the weights: a mean divides by its count."""
    dsim = dsim.to(torch.float32)
    if pool in ("mean", "log_mean"):
        counts = x_lists[1]
        dsim = dsim / (P if counts is None else counts.clamp(min=1).unsqueeze(-1))
    return dsim.contiguous()
