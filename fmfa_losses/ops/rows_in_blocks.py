"""A loss over whole rows of scores, in blocks of rows: memory of one block, whatever the size of the batch.

    loss_i = equation(row i of [b, C])       the equation sees [m, C] at a time and knows nothing of blocks

The forward evaluates the equation block after block and keeps none of what it computes. The backward evaluates it once
more, with a graph of one block alone, and adds up the gradients of what all blocks use, in the order of the blocks.
The price is one more evaluation; what equation and scores need in memory shrinks from b to m rows. Source: Chen et al.,
Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .operator import watched
from .precision import full_precision

__all__ = ["rows_in_blocks", "whole_rows"]

MOST_SCORES = 2**22  # of a matrix that is kept whole: 2048 x 2048, 16 MiB in float32
BLOCK_SCORES = 2**21  # of a block


def whole_rows(rows: int, columns: int, like: Tensor) -> bool:
    """Whether [rows, columns] scores are kept whole: few, or watched by what sees no Function (torch.compile, ...)."""
    return watched(like) or rows * columns <= MOST_SCORES


def rows_in_blocks(
    equation: Callable[..., Tensor], columns: int, cut: tuple[Tensor, ...], whole: tuple[Tensor, ...]
) -> Tensor:
    """The losses of all rows.

    Args:
        equation: (first, *cut, *whole) -> [m], the losses of rows first to first + m - 1; not random.
        columns: C, the scores of a row, from which m follows.
        cut: [b, ...] each, of which the equation gets its m rows; one at least.
        whole: of which it gets all.

    Returns:
        [b]. Differentiable in cut and whole, with create_graph as often as the equation is, then without its saving.
    """
    step = max(1, BLOCK_SCORES // columns)
    losses: Tensor = _RowsInBlocks.apply(equation, step, len(cut), *cut, *whole)  # type: ignore[no-untyped-call]
    return losses


class _RowsInBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, equation, step, cuts, *tensors):  # type: ignore[no-untyped-def]
        ctx.plain = equation, step, cuts
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return torch.cat([_evaluate(equation, rows.start, own) for rows, own in _blocks(tensors, cuts, step)])

    @staticmethod
    def backward(ctx, dlosses):  # type: ignore[no-untyped-def]
        (equation, step, cuts), tensors = ctx.plain, ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        if dlosses is None or not any(needed):
            return (None,) * (3 + len(tensors))
        gradients = _gradients_with_graph if torch.is_grad_enabled() else _gradients
        return None, None, None, *gradients(equation, step, cuts, tensors, needed, dlosses)


def _gradients(
    equation: Callable[..., Tensor],
    step: int,
    cuts: int,
    tensors: tuple[Tensor, ...],
    needed: tuple[bool, ...],
    dlosses: Tensor,
) -> list[Tensor | None]:
    """One block's graph at a time. What is cut gets its rows' gradients, what is whole their sum over the blocks."""
    wanted = [n for n, is_needed in enumerate(needed) if is_needed]
    pieces: dict[int, list[Tensor]] = {n: [] for n in wanted}
    for rows, own in _blocks(tensors, cuts, step):
        leaves = [x.detach().requires_grad_(is_needed) for x, is_needed in zip(own, needed, strict=True)]
        with torch.enable_grad():
            losses = _evaluate(equation, rows.start, leaves)
        inputs = [leaves[n] for n in wanted]
        found = torch.autograd.grad(losses, inputs, dlosses[rows], materialize_grads=True)
        for n, gradient in zip(wanted, found, strict=True):
            if n < cuts:
                pieces[n].append(gradient)
            elif pieces[n]:
                pieces[n][0].add_(gradient)
            else:
                pieces[n].append(gradient.clone())
    totals = {n: torch.cat(of) if n < cuts else of[0] for n, of in pieces.items()}
    return [totals.get(n) for n in range(len(tensors))]


def _gradients_with_graph(
    equation: Callable[..., Tensor],
    step: int,
    cuts: int,
    tensors: tuple[Tensor, ...],
    needed: tuple[bool, ...],
    dlosses: Tensor,
) -> list[Tensor | None]:
    """With create_graph nothing may be cut off from what it came from: the graphs of all blocks at once."""
    losses = torch.cat([_evaluate(equation, rows.start, own) for rows, own in _blocks(tensors, cuts, step)])
    wanted = [x for x, is_needed in zip(tensors, needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(losses, wanted, dlosses, create_graph=True, materialize_grads=True))
    return [next(found) if is_needed else None for is_needed in needed]


def _evaluate(equation: Callable[..., Tensor], first: int, tensors: Sequence[Tensor]) -> Tensor:
    with full_precision(tensors[0]):  # the backward may run under an autocast that the forward did not have
        return equation(first, *tensors)


def _blocks(tensors: tuple[Tensor, ...], cuts: int, step: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """The rows of each block, and the tensors with what is cut reduced to them."""
    b = tensors[0].shape[0]
    for first in range(0, b, step):
        rows = slice(first, min(first + step, b))
        yield rows, [x[rows] if n < cuts else x for n, x in enumerate(tensors)]
