"""A loss over whole rows of scores, in blocks of rows: memory of one block, whatever the size of the batch.

    loss_i = equation(row i of the scores [b, C])       the equation sees [m, C] at a time and knows nothing of blocks

The forward evaluates the equation block after block and keeps none of what it computes. The backward evaluates it once
more, with a graph of one block alone. Where the scores are products of queries and keys, a block of them is computed
when it is needed. The price is one more evaluation. Source: Chen et al., Training Deep Nets with Sublinear Memory Cost,
arXiv 1604.06174.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .operator import watched
from .precision import full_precision, product

__all__ = ["all_rows", "row_blocks", "rows_in_blocks", "scores_of", "whole_rows"]

MOST_SCORES = 2**22  # of a matrix that is kept whole: 2048 x 2048, 16 MiB in float32
# Of a block; an equation has some ten temporaries of this size. On a CPU they should fit its caches, elsewhere a block
# must be worth its launches.
BLOCK_SCORES, BLOCK_SCORES_ELSEWHERE = 2**20, 2**22


def whole_rows(rows: int, columns: int, like: Tensor) -> bool:
    """Whether [rows, columns] scores are kept whole: few, or watched by what sees no Function (torch.compile, ...)."""
    return watched(like) or rows * columns <= MOST_SCORES


def scores_of(queries: Tensor, keys: Tensor | None = None) -> Tensor:
    """[b, C]: the products of queries [b, D] and keys [C, D], or what is given."""
    return queries if keys is None else product(queries, keys)


def rows_in_blocks(
    equation: Callable[..., Tensor],
    factors: tuple[Tensor, Tensor] | tuple[Tensor],
    cut: Mapping[str, Tensor],
    whole: Mapping[str, Any],
) -> Tensor:
    """The losses of all rows.

    Args:
        equation: (first, scores [m, C], **cut, **whole) -> [m], the losses of rows first to first + m - 1; not random.
        factors: what the scores are made of, see `scores_of`; float32 or float64.
        cut: by name [b, ...] each, of which the equation gets its m rows.
        whole: by name tensors of which it gets all, and numbers.

    Returns:
        [b]. Differentiable in all tensors. With create_graph it is as often as the equation, and keeps all blocks.
    """
    tensors = {name: x for name, x in whole.items() if isinstance(x, Tensor)}
    numbers = {name: x for name, x in whole.items() if name not in tensors}

    def named(first: int, scores: Tensor, *given: Tensor) -> Tensor:
        return equation(first, scores, **dict(zip((*cut, *tensors), given, strict=True)), **numbers)

    plan = _Plan(named, len(factors), len(factors) + len(cut), _columns(factors))
    losses: Tensor = _RowsInBlocks.apply(plan, *factors, *cut.values(), *tensors.values())  # type: ignore[no-untyped-call]
    return losses


def all_rows(
    equation: Callable[..., Tensor],
    factors: tuple[Tensor, Tensor] | tuple[Tensor],
    cut: Mapping[str, Tensor],
    whole: Mapping[str, Any],
) -> Tensor:
    """`rows_in_blocks`, or all rows at once where `whole_rows` says so."""
    if whole_rows(factors[0].shape[0], _columns(factors), factors[0]):
        return equation(0, scores_of(*factors), **cut, **whole)
    return rows_in_blocks(equation, factors, cut, whole)


def _columns(factors: tuple[Tensor, Tensor] | tuple[Tensor]) -> int:
    return factors[1].shape[0] if len(factors) == 2 else factors[0].shape[1]


def row_blocks(rows: int, columns: int, like: Tensor) -> Iterator[slice]:
    """The rows of each block."""
    most = BLOCK_SCORES if like.device.type == "cpu" else BLOCK_SCORES_ELSEWHERE
    step = max(1, most // columns)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


class _Plan:
    """Which rows make a block, and what the equation gets of the tensors factors, cut, whole."""

    def __init__(self, equation: Callable[..., Tensor], factors: int, cut: int, columns: int) -> None:
        self.equation, self.factors, self.cut, self.columns = equation, factors, cut, columns

    def blocks(self, tensors: Sequence[Tensor]) -> Iterator[tuple[slice, list[Tensor]]]:
        """The rows of each block, and the tensors reduced to them: not keys and what is whole."""
        for rows in row_blocks(tensors[0].shape[0], self.columns, tensors[0]):
            yield rows, [x[rows] if n == 0 or self.factors <= n < self.cut else x for n, x in enumerate(tensors)]

    def losses(self, tensors: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
        for rows, own in self.blocks(tensors):
            yield rows, self.equation(rows.start, scores_of(*own[: self.factors]), *own[self.factors :])


class _RowsInBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, *tensors):  # type: ignore[no-untyped-def]
        ctx.plan = plan
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        # Results that lie between the temporaries of the blocks would keep the allocator from using these again.
        results = tensors[0].new_empty(tensors[0].shape[0])
        with full_precision(results):
            for rows, losses in plan.losses(tensors):
                results[rows] = losses
        return results

    @staticmethod
    def backward(ctx, dlosses):  # type: ignore[no-untyped-def]
        plan, tensors, needed = ctx.plan, ctx.saved_tensors, ctx.needs_input_grad[1:]
        if dlosses is None or not any(needed):
            return (None,) * (1 + len(tensors))
        at_once = torch.is_grad_enabled() or watched(dlosses)  # create_graph, or batched gradients
        gradients = _gradients_at_once if at_once else _gradients
        with full_precision(tensors[0]):  # whatever autocast the backward is called under
            return None, *gradients(plan, tensors, needed, dlosses)


def _gradients(
    plan: _Plan, tensors: tuple[Tensor, ...], needed: Sequence[bool], dlosses: Tensor
) -> list[Tensor | None]:
    """One block's graph at a time. What is cut gets its rows' gradients, what is whole their sum over the blocks."""
    of_equation = [n for n in range(plan.factors, len(tensors)) if needed[n]]
    totals: list[Any] = [
        torch.zeros_like(x) if is_needed else None for x, is_needed in zip(tensors, needed, strict=True)
    ]
    for rows, own in plan.blocks(tensors):
        scores = scores_of(*own[: plan.factors]).detach().requires_grad_(any(needed[: plan.factors]))
        given = [x.detach().requires_grad_(needed[n]) for n, x in enumerate(own)][plan.factors :]
        with torch.enable_grad():
            losses = plan.equation(rows.start, scores, *given)
        if not losses.requires_grad:
            continue
        leaves = [*([scores] if scores.requires_grad else []), *(given[n - plan.factors] for n in of_equation)]
        found = list(torch.autograd.grad(losses, leaves, dlosses[rows], materialize_grads=True))
        if scores.requires_grad:
            _add_scores_gradient(found.pop(0), rows, own[: plan.factors], totals)
        for n, gradient in zip(of_equation, found, strict=True):
            (totals[n][rows] if n < plan.cut else totals[n]).add_(gradient)
    return totals


def _add_scores_gradient(dscores: Tensor, rows: slice, factors: list[Tensor], totals: list[Any]) -> None:
    if len(factors) == 1:
        totals[0][rows] = dscores
        return
    queries, keys = factors
    if totals[0] is not None:
        torch.mm(dscores, keys, out=totals[0][rows])
    if totals[1] is not None:
        totals[1].addmm_(dscores.T, queries)


def _gradients_at_once(
    plan: _Plan, tensors: tuple[Tensor, ...], needed: Sequence[bool], dlosses: Tensor
) -> list[Tensor | None]:
    """The graphs of all blocks: with create_graph nothing may be cut off from what it came from.

    Each tensor is looked at through a view of it. Else, where keys come from queries (CMPM of a feature with itself),
    the gradient of the queries would have that of the keys in it, which reaches them by the graph outside besides.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [x.view_as(x) if is_needed else x for x, is_needed in zip(tensors, needed, strict=True)]
        losses = torch.cat([of_block for _, of_block in plan.losses(own)])
    wanted = [x for x, is_needed in zip(own, needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(losses, wanted, dlosses, create_graph=create_graph, materialize_grads=True))
    return [next(found) if is_needed else None for is_needed in needed]
