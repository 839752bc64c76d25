"""The best match of every token, and its gradient, in PyTorch: what the kernels of hard_similarity.py do, in tiles.

    best_jr = max_k e_jk . x_r          all kept tokens r of x, all samples j of e; k* is the lowest k that reaches it
    dx_r    = sum_j w_jr e_jk*          w_jr = dS_ij dS_ij / dbest_jr, where r is a token of x_i
    de_k    = sum of w_jr x_r over the (j, r) that k won

A tile is a block of samples of e against a block of samples of x: one product [tokens of e, tokens of x], reduced over
the tokens of each sample of e before the next one starts. On the CPU, where masks can be read, only kept tokens are
multiplied: they are packed, samples of like length next to each other, so that samples of one length share a maximum.
On an accelerator the host would have to wait for the masks; all tokens are multiplied there, and masked out afterwards.
"""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import across
from ..threads import Work
from . import layout as rows_layout
from .bfloat16 import in_bfloat16, products_of
from .layout import Block, Layout, blocks, by_device, pieces

__all__ = ["EXPONENTIAL", "INT16", "Gradients", "Matches", "in_order", "match", "match_gradients"]

INT16 = torch.iinfo(torch.int16).max  # the largest index of a token that int16 holds
EXPONENTIAL = ("lse", "log_mean")  # pools whose weights are not 1

# (CPU, accelerator). Tokens of e and of x in one tile: a CPU keeps the product, 2 MB, in its cache.
COLUMNS, ROWS = (640, 640), (768, 2**17)
MATCHES = 2**16, 2**25  # in one task of dx; each costs some 30 bytes
# In one task of de, samples of e and, at a time, tokens of x: more matches than torch.sort needs for its radix sort.
SAMPLES, TOKENS = 16, (3072, 2**20)


class Matches(NamedTuple):
    """Similarities sim [Be, Bx], weights dS_ij / dbest_jr and winners, both [Be, Bx, P] or empty, by tasks.

    All stand in the order of the layouts, the rest is 0. Winners count the kept tokens of their sample. Weights are
    left out where all are 1.
    """

    sim: Tensor
    weights: Tensor
    winners: Tensor
    tasks: Sequence[Work]


def match(
    x: Tensor,
    e: Tensor,
    xs: Layout,
    es: Layout,
    pool: str,
    pool_scale: float,
    save: bool,
    inverse: Tensor | None = None,
) -> Matches:
    """Unit rows e, and unit rows x, or any x and inverse [K] = 1 / |x|, laid out by xs and es."""
    (Bx, P, _), (Be, Q, _) = xs.shape, es.shape
    new = x.new_empty if xs.places is None and es.places is None else x.new_zeros
    sim = new(Be, Bx)
    weights = new((Be, Bx, P) if save and pool in EXPONENTIAL else (0,))
    winners = new((Be, Bx, P) if save else (0,), dtype=torch.int16 if Q <= INT16 else torch.int32)

    low = in_bfloat16(x)
    e_factor, x_factor = (t.bfloat16() if low else t for t in (e, x))

    def tile(i: Block, j: Block) -> None:
        best, winner = _best(e_factor[j.rows], x_factor[i.rows], j, es)
        if low:
            first = (es.first[j.samples] - j.rows.start).unsqueeze(1)
            best = products_of(x[i.rows], e[j.rows], (winner + first).to(torch.int32))
        if inverse is not None:
            best *= inverse[i.rows]
        if xs.keep is not None:
            best.masked_fill_(~xs.keep[i.rows], -torch.inf)
        longest = max(i.sizes)
        ragged = min(i.sizes) < longest
        tokens = best
        if ragged:
            tokens = best.new_full((len(best), len(i.sizes) * longest), -torch.inf)
            slots = _slots(xs.counts[i.samples], longest)
            tokens[:, slots] = best
        sim[j.samples, i.samples], weight = _pool(tokens.view(len(best), -1, longest), pool, pool_scale)
        if save:
            if xs.keep is not None or es.keep is not None:
                winner = winner.masked_fill(best == -torch.inf, -1)
            winners.flatten(1)[j.samples, i.rows] = winner
        if save and pool in EXPONENTIAL:
            weight = weight.flatten(1)
            weights.flatten(1)[j.samples, i.rows] = weight[:, slots] if ragged else weight

    rows, columns = by_device(*ROWS, x), by_device(*COLUMNS, x)
    tiles = [partial(tile, i, j) for i in blocks(xs.sizes, rows=rows) for j in blocks(es.sizes, rows=columns)]
    return Matches(sim, weights, winners, tiles)


def in_order(sim: Tensor, xs: Layout, es: Layout) -> Tensor:
    """[Bx, Be] of the samples as they came."""
    if xs.places is None and es.places is None:
        return sim.T.contiguous()
    ordered = sim.new_empty(sim.shape[1], sim.shape[0])
    ordered[xs.samples.unsqueeze(1), es.samples] = sim.T
    return ordered


def _best(e: Tensor, x: Tensor, j: Block, es: Layout) -> tuple[Tensor, Tensor]:
    """max_k e_jk . x_r and the lowest k that reaches it, [J, R] each; -inf where nothing counts."""
    cos = e @ x.T
    if es.keep is not None:
        cos.masked_fill_(~es.keep[j.rows].unsqueeze(1), -torch.inf)
    R = len(x)
    if not rows_layout.on_cpu(cos):
        maxima = cos.view(-1, j.sizes[0], R).max(dim=1)
        return maxima.values, maxima.indices
    found, first = [], 0
    for Q, alike in groupby(j.sizes):
        J = len(list(alike))
        # A pooling with one channel for each column takes them all together; max takes one number after the other.
        channels = cos.as_strided((J, R, Q, 1), (Q * R, 1, R, R), first * R)
        found.append(torch._C._nn.max_pool2d_with_indices(channels, (Q, 1)))
        first += Q * J
    best, winner = found[0] if len(found) == 1 else (torch.cat(parts) for parts in zip(*found, strict=True))
    return best.view(-1, R), winner.view(-1, R)


def _slots(counts: Tensor, width: int) -> Tensor:
    """Where the tokens of samples of so many are among `width` places for each."""
    return (torch.arange(width, device=counts.device) < counts.unsqueeze(1)).flatten().nonzero().squeeze(1)


def _pool(best: Tensor, pool: str, pool_scale: float) -> tuple[Tensor, Tensor]:
    """[j, i, l] -> [j, i], and the weights [j, i, l] of an exponential; -inf marks what is masked out.

    A pair with nothing left gives 0. Weights where something is masked out are anything.
    """
    gone = best == -torch.inf
    if pool == "lse":
        top = best.amax(dim=-1)
        # The difference is exact, and so is its product with a large scale.
        terms = (best - top.unsqueeze(-1)).mul_(pool_scale).exp_()
        total = terms.sum(dim=-1)
        sim = total.log().div_(pool_scale).add_(top).masked_fill_(gone.all(dim=-1), 0)
        return sim, terms.div_(total.unsqueeze(-1))
    kept = (torch.expm1(pool_scale * best) if pool == "log_mean" else best).masked_fill(gone, 0)
    total = kept.sum(dim=-1)
    if pool == "sum":
        return total, best
    mean = total / (~gone).sum(dim=-1).clamp(min=1)
    if pool == "mean":
        return mean, best
    sim = torch.log1p(mean) / pool_scale
    return sim, torch.exp(pool_scale * (best - sim.unsqueeze(-1)))


class Gradients(NamedTuple):
    """dx [K, D] and de [K, D], by tasks."""

    dx: Tensor
    de: Tensor
    tasks: Sequence[Work]


def match_gradients(
    dsim: Tensor,
    weights: Tensor,
    winners: Tensor,
    x: Tensor,
    e: Tensor,
    xs: Layout,
    es: Layout,
    pool: str,
    inverse: Tensor | None = None,
    factor: Tensor | None = None,
) -> Gradients:
    """Of the same arguments and dsim [Bx, Be]. With inverse, dx is that of x / factor and not of the unit rows."""
    if pool in ("mean", "log_mean"):
        count = (xs.counts if xs.keep is None else xs.keep.view(xs.shape[:2]).sum(dim=1)).clamp(min=1)
        dsim = dsim / torch.empty_like(count).index_copy_(0, xs.samples, count).unsqueeze(1)
    dsim = dsim.to(x.dtype).T
    if xs.places is not None or es.places is not None:
        dsim = dsim[es.samples.unsqueeze(1), xs.samples]
    masked = xs.keep is not None or es.keep is not None
    won = _Won(dsim, weights if pool in EXPONENTIAL else None, winners, xs.owner(), inverse, masked)
    dx, de = torch.empty_like(x), torch.zeros_like(e)
    live = slice(0, sum(size > 0 for size in es.sizes))
    if live.stop == 0:
        return Gradients(dx.zero_(), de, [])
    first = es.first.to(torch.int32).unsqueeze(1)

    def of_x(rows: slice) -> None:
        weight, winner = won.matches(live, rows)
        token = (winner + first[live]).T.contiguous()
        sums = F.embedding_bag(token, e, mode="sum", per_sample_weights=weight.T.contiguous())
        if inverse is None:
            dx[rows] = sums
            return
        across(sums, x[rows], inverse[rows], out=dx[rows])
        if factor is not None:
            dx[rows] *= factor[rows].unsqueeze(1)

    # The same sum for e: sorting the matches by the token that won puts those of each token next to each other.
    def of_e(j: Block) -> None:
        K = j.rows.stop - j.rows.start
        number = torch.int16 if K <= INT16 else torch.int32  # a sort reads every byte
        before = (first[j.samples] - j.rows.start).to(number)
        for rows in pieces(len(x), by_device(*TOKENS, x)):
            weight, winner = won.matches(j.samples, rows)
            token, order = (winner.to(number) + before).flatten().sort(stable=True)
            starts = torch.searchsorted(token, torch.arange(K, dtype=number, device=x.device))
            row = torch.arange(winner.shape[1], device=x.device).repeat(len(winner))
            weight = weight.flatten()[order]
            de[j.rows] += F.embedding_bag(row[order], x[rows], starts, mode="sum", per_sample_weights=weight)

    step = max(1, by_device(*MATCHES, x) // live.stop)
    tasks = [partial(of_e, j) for j in blocks(es.sizes, samples=SAMPLES)]
    tasks += [partial(of_x, rows) for rows in pieces(len(x), step)]
    return Gradients(dx, de, tasks)


class _Won(NamedTuple):
    """What a gradient needs of every match."""

    dsim: Tensor  # [Be, Bx]
    weights: Tensor | None  # [Be, Bx, P]
    winners: Tensor  # [Be, Bx, P]
    owner: Tensor  # [K] of the rows of x
    inverse: Tensor | None  # [K]
    masked: bool  # some have no winner

    def matches(self, j: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """w_jr (/ |x_r|, with inverse) and k*, [J, R] each; 0 where nothing won."""
        weight, winner = self.dsim[j].index_select(1, self.owner[rows]), self.winners.flatten(1)[j, rows]
        if self.weights is not None:
            weight *= self.weights.flatten(1)[j, rows]
        if self.inverse is not None:
            weight *= self.inverse[rows]
        if self.masked:
            weight, winner = weight.masked_fill(winner < 0, 0), winner.clamp(min=0)
        return weight, winner
