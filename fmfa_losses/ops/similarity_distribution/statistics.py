"""The algebra of row statistics: online softmax, with what the row loss of Eq. 1-4 needs besides.

    of(block)           statistics of the rows of a block of logits z [m, n] (dim=1), or of its columns as rows (dim=0)
    merge(a, b)         the statistics of both blocks' columns; associative and commutative, ties to the lowest index
    finalize(a)         a row's loss, and the numbers that its gradient needs
    dlogits(block, ..)  the gradient in any block of logits, from the final numbers

A row that comes in blocks is merge(of(block), merge(of(block), ...)) in any order and any grouping: blocks of rows
merge nothing, blocks of columns merge along a loop, a ring merges over ranks.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .reference import RowLoss

__all__ = [
    "LOWEST",
    "NOWHERE",
    "Final",
    "Labels",
    "Running",
    "Targets",
    "dlogits",
    "finalize",
    "merge",
    "nothing",
    "of",
]

LOWEST = -3.0e38  # a finite start of a running maximum: -inf - -inf would be NaN
NOWHERE = 2**30  # an index above every column


class Targets(Protocol):
    """What `of` and `dlogits` ask of labels; `total` is sum_k y_ik, [m, 1] of a block's rows or [n] of its columns."""

    @property
    def same(self) -> Tensor: ...  # [m, n] same pid

    def target(self, total: Tensor) -> Tensor: ...  # t, [m, n]

    def log_target(self, total: Tensor) -> Tensor: ...  # log(t + eps)


class Labels(NamedTuple):
    """t_ij = y_ij / sum_k y_ik in a block [m, n]; y is 1, f, 1 - f or 0 by what row and column have in common."""

    same: Tensor  # [m, n] same pid
    same_image: Tensor | None  # [m, n]
    factor: float
    eps: float

    def target(self, total: Tensor) -> Tensor:
        """t; total = sum_k y_ik is [m, 1] of the block's rows, or [n] of its columns."""
        return self._pick(lambda y: y / total, 0.0)

    def log_target(self, total: Tensor) -> Tensor:
        """log(t + eps): logarithms of vectors, never of the matrix."""
        return self._pick(lambda y: (y / total).add_(self.eps).log_(), math.log(self.eps))

    def _pick(self, of: Callable[[float], Tensor], of_zero: float) -> Tensor:
        """of(y) of every entry: of y = 1 alone where there are no images."""
        if self.same_image is None:
            return torch.where(self.same, of(1.0), of_zero)
        same_pid = torch.where(self.same_image, of(1.0), of(self.factor))
        return torch.where(self.same, same_pid, torch.where(self.same_image, of(1 - self.factor), of_zero))


class Running(NamedTuple):
    """Statistics of rows over the columns seen so far, [rows] each; e_j = exp(z_j - top)."""

    top: Tensor  # max_j z_j
    sum_e: Tensor  # sum_j e_j
    excess: Tensor  # sum_j e_j (z_j - top - log(t_j + eps)); for the cross-entropy sum_j t_j (z_j - top)
    sum_t: Tensor  # sum_j t_j, for the cross-entropy alone
    positive: Tensor  # z at the positive, LOWEST before it is seen
    top_index: Tensor  # its column, int32, NOWHERE before any is seen; the next one likewise
    positive_index: Tensor


class Final(NamedTuple):
    """What the gradient of a row's loss needs of the forward, [rows] each.

    lse is kept in two parts: z - top is exact where p is large, top + log_sum would round that away.
    """

    top: Tensor
    log_sum: Tensor  # log sum_j e_j
    third: Tensor  # the divergence KL; for the cross-entropy sum_j t_j
    gap: Tensor | None  # p_top - p_positive, for a weighted loss


def nothing(n: int, like: Tensor) -> Running:
    """The neutral element of `merge`, for n rows."""
    lowest, zero = like.new_full((n,), LOWEST), like.new_zeros(n)
    index = torch.full((n,), NOWHERE, dtype=torch.int32, device=like.device)
    return Running(lowest, zero, zero, zero, lowest, index, index)


def of(
    z: Tensor, labels: Targets, total: Tensor, spec: RowLoss, *, dim: int = 1, first: int = 0, pair: int = 0
) -> Running:
    """Statistics of a block alone.

    Args:
        z: logits [m, n], or with dim=-1 several such blocks [..., m, n] that have the same labels.
        total: sum_k y_ik, [n] with dim=0 and [m, 1] otherwise.
        dim: the columns of a row run along it.
        first: index of the block's first column among all of them.
        pair: index of the column that is paired with the block's first row.
    """
    top = z.amax(dim)
    below = z - top.unsqueeze(dim)
    e = below.exp()
    sum_e, none = e.sum(dim), torch.zeros_like(top)
    if spec.objective == "cross_entropy":
        t = labels.target(total)
        sum_t = t.sum(dim).expand_as(top)
        return Running(top, sum_e, (t * below).sum(dim), sum_t, none, none, none)
    top_index = _lowest_zero(below, dim) + first if spec.weighted else none
    excess = below.sub_(labels.log_target(total)).mul_(e).sum(dim)
    if not spec.weighted:
        return Running(top, sum_e, excess, none, none, top_index, top_index)
    if spec.positive == "paired":
        pairs = torch.arange(pair, pair + top.shape[-1], dtype=torch.int32, device=z.device).expand_as(top)
        at, inside = _inside(pairs, first, z.shape[dim])
        positive = torch.where(inside, z.gather(dim, at.unsqueeze(dim)).squeeze(dim), LOWEST)
        index = torch.where(inside, pairs, NOWHERE)
    else:
        among = z.masked_fill(~labels.same, LOWEST)
        positive = among.amax(dim)
        index = torch.where(positive > LOWEST, _lowest_zero(among.sub_(positive.unsqueeze(dim)), dim) + first, NOWHERE)
    return Running(top, sum_e, excess, none, positive, top_index, index)


def merge(a: Running, b: Running, spec: RowLoss) -> Running:
    """Statistics of the columns of both."""
    top = torch.maximum(a.top, b.top)
    down_a, down_b = a.top - top, b.top - top  # e and z - top become relative to the common top
    shrink_a, shrink_b = down_a.exp(), down_b.exp()
    sum_e = shrink_a * a.sum_e + shrink_b * b.sum_e
    if spec.objective == "cross_entropy":
        excess = (a.excess + down_a * a.sum_t) + (b.excess + down_b * b.sum_t)
        return a._replace(top=top, sum_e=sum_e, excess=excess, sum_t=a.sum_t + b.sum_t)
    excess = shrink_a * (a.excess + down_a * a.sum_e) + shrink_b * (b.excess + down_b * b.sum_e)
    if not spec.weighted:
        return a._replace(top=top, sum_e=sum_e, excess=excess)
    positive = torch.maximum(a.positive, b.positive)
    top_index = _index_of_higher(a.top, a.top_index, b.top, b.top_index)
    positive_index = _index_of_higher(a.positive, a.positive_index, b.positive, b.positive_index)
    return Running(top, sum_e, excess, a.sum_t, positive, top_index, positive_index)


def finalize(a: Running, spec: RowLoss) -> tuple[Tensor, Final]:
    """Every row's loss w KL, or its cross-entropy, [rows], and what its gradient needs."""
    log_sum = a.sum_e.log()
    if spec.objective == "cross_entropy":
        return a.sum_t * log_sum - a.excess, Final(a.top, log_sum, a.sum_t, None)
    divergence = a.excess / a.sum_e - log_sum
    if not spec.weighted:
        return divergence, Final(a.top, log_sum, divergence, None)
    gap = (-log_sum).exp() - (a.positive - a.top - log_sum).exp()
    return (1 + spec.alpha * gap) * divergence, Final(a.top, log_sum, divergence, gap)


def dlogits(
    z: Tensor,
    labels: Targets,
    total: Tensor,
    final: Final,
    index: tuple[Tensor, ...],
    g: Tensor,
    spec: RowLoss,
    *,
    dim: int = 1,
    first: int = 0,
) -> Tensor:
    """Gradient in a block z of sum_i g_i (loss of row i). Arguments as of `of`, vectors [rows] as the forward has them.

    g p [w (log p - log(t + eps) - KL) + alpha KL ([top] - [positive] - gap)]     divergence, w = 1 + alpha gap
    g (p sum_j t_j - t)                                                           cross-entropy
    """
    top, log_sum, third = (x.unsqueeze(dim) for x in final[:3])
    g = g.unsqueeze(dim)
    log_p = (z - top).sub_(log_sum)
    p = log_p.exp()
    if spec.objective == "cross_entropy":
        return p.mul_(third).sub_(labels.target(total)).mul_(g)
    excess = log_p.sub_(labels.log_target(total)).sub_(third)
    if final.gap is None:
        return excess.mul_(p).mul_(g)
    gap = final.gap.unsqueeze(dim)
    excess.mul_(g * (1 + spec.alpha * gap))
    if not spec.detach_weight:
        of_gap = spec.alpha * g * third
        excess.sub_(of_gap * gap)
        for columns, sign in zip(index, (1, -1), strict=True):
            at, inside = _inside(columns, first, z.shape[dim])
            excess.scatter_add_(dim, at.unsqueeze(dim), torch.where(inside.unsqueeze(dim), sign * of_gap, 0))
    return excess.mul_(p)


def _inside(index: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Position of columns in a block of `width` that begins at `first`, clamped to it, and whether they are in it."""
    at = index.long() - first
    return at.clamp(0, width - 1), (at >= 0) & (at < width)


def _index_of_higher(a: Tensor, a_index: Tensor, b: Tensor, b_index: Tensor) -> Tensor:
    """The index of the larger value, of equal ones the lower index."""
    return torch.where((b > a) | ((b == a) & (b_index < a_index)), b_index, a_index)


def _lowest_zero(x: Tensor, dim: int) -> Tensor:
    """The first index along `dim` where x <= 0 is 0, int32; beyond every index where it is negative throughout.

    index - infinity x is smallest there: two passes, where argmax along dim 0 takes as long as a matrix product.
    """
    index = torch.arange(x.shape[dim], dtype=x.dtype, device=x.device)
    index = index.unsqueeze(1) if dim == 0 else index
    return torch.sub(index, x, alpha=torch.finfo(x.dtype).max).amin(dim).clamp(max=NOWHERE).int()
