"""The global batch: every process computes its own rows of a loss against the columns of all processes.

    rank r returns   L_r = (W / B) sum_{i on rank r} l_i          W processes, b_r pairs on rank r, B = sum_r b_r

The mean over ranks of L_r is (1/B) sum_i l_i, the loss of one process on the concatenated batch. The backward of every
exchange below sums the gradients that all ranks have for a rank's own samples. So rank r's parameters receive their
part of the gradient of sum_r L_r, and the mean over ranks, which DistributedDataParallel takes, is the gradient of
(1/B) sum_i l_i: for unequal b_r and any number of processes. The global order is rank order.

A loss that compares a sample only with its own label is the rank's own mean times W b_r / B: `Peers.loss_weight`.
The other losses exchange samples by three linear maps, each with its transpose as backward:

    gather     own rows -> all rows                   backward: each rank receives its rows' gradients and sums them
    transpose  own rows of S -> own columns of S      backward: the same, transposing back
    ring       f(own rows, block of rank q) for all q, one block in memory at a time; the backward repeats the ring

Sums run in rank order and in float32 or better: reruns are bitwise equal, on every backend.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.operator import refusals
from ..ops.precision import accumulation_dtype
from .collectives import common_dtype, gather_op, named_errors, transpose_op

__all__ = ["Peers"]


@dataclass(frozen=True)
class Peers:
    """The processes of a global batch: their batch sizes, and exchanges between them. One process is a world of one.

    Example:
        >>> alone = Peers(sizes=(3,))
        >>> alone.gather(torch.arange(3)), alone.mean(torch.arange(3.0))
        (tensor([0, 1, 2]), tensor(1.))
    """

    sizes: tuple[int, ...]  # pairs of each rank, [W]
    rank: int = 0
    group: Any = None  # ProcessGroup; None for one process
    ring: bool = False  # columns travel around the ring and are never gathered

    @property
    def offset(self) -> int:
        """Global index of the first own pair."""
        return sum(self.sizes[: self.rank])

    def gather(self, x: Tensor) -> Tensor:
        """[b, ...] -> [B, ...] in rank order, in x's dtype; its gradient is summed in float32 or better."""
        if self.group is None:
            return x
        sent = x.to(torch.uint8 if x.dtype == torch.bool else common_dtype(x))  # not every backend takes every integer
        gathered: Tensor = gather_op(sent, self.sizes, self.rank, self.group.group_name)
        return gathered.to(x.dtype)

    def transpose(self, rows: Tensor) -> Tensor:
        """Own rows of S, [b, B] -> own rows of the transposed S, [b, B]: each rank receives nothing but its columns."""
        if self.group is None:
            return rows.T
        columns: Tensor = transpose_op(rows, self.sizes, self.rank, self.group.group_name)
        return columns

    def mean(self, per_sample: Tensor) -> Tensor:
        """[b] -> this rank's loss L_r, whose mean over ranks is the global mean."""
        if self.group is None:
            return per_sample.mean()
        return per_sample.sum() * (len(self.sizes) / sum(self.sizes))

    @property
    def loss_weight(self) -> float:
        """W b_r / B, the factor of a mean over the own pairs; the mean over ranks is then the global mean."""
        return len(self.sizes) * self.sizes[self.rank] / sum(self.sizes)

    def loss_weights(self, counts: Tensor) -> Tensor:
        """W n_r / sum over ranks of n_r for each of this rank's counts n_r: the factor of its own mean.

        The mean over ranks is then the mean over all that is counted, and 0 where nothing is. Counts are integers, so
        their sum is exact; the host does not wait for it. All ranks have the same K.

        Args:
            counts: [K] integers.
        Returns:
            [K], float64.
        """
        W = len(self.sizes)
        total = Peers((1,) * W, self.rank, self.group).gather(counts.unsqueeze(0)).sum(dim=0)
        return W * counts.double() / total.clamp(min=1)

    def blocks(self, x: Tensor, dim: int = 0) -> Sequence[Tensor]:
        """[B, ...] -> W views [b_q, ...], along another dim if asked."""
        return torch.split(x, list(self.sizes), dim)

    def over_ranks(self, f: Callable[..., Tensor], rows: tuple[Tensor, ...], block: Tensor) -> tuple[Tensor, ...]:
        """f(q, *rows, block of rank q) for every rank q, in rank order, while the blocks travel from rank to rank.

        A rank holds one block and the one that arrives. The backward sends the blocks around the ring again, each
        followed by its gradient, and calls f again: f must not be random. Differentiable once in rows and block.
        """
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                'gather="ring" cannot run inside of torch.func.grad, vjp, jvp or vmap; use backward() or '
                "torch.autograd.grad, or gather=True"
            )
        results: tuple[Tensor, ...] = _OverRanks.apply(self, f, block, *rows)  # type: ignore[no-untyped-call]
        return results

    def rounds(self, block: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(rank, its block) of every rank, the own one first; the next block is received meanwhile."""
        world = len(self.sizes)
        for step in range(world):
            rank = (self.rank - step) % world
            arriving = self.shift(block, self.sizes[rank - 1]) if step + 1 < world else None
            yield rank, block
            if arriving is not None:
                block = arriving()

    def shift(self, x: Tensor, size: int) -> Callable[[], Tensor]:
        """Starts sending x to the next rank; the result waits for what the previous one sends, [size, ...]."""
        world = len(self.sizes)
        if world == 1:
            return lambda: x
        x, arrived = x.contiguous(), x.new_empty(size, *x.shape[1:])
        following, preceding = (dist.get_global_rank(self.group, (self.rank + step) % world) for step in (1, -1))
        with named_errors("the ring", self.group, x.device):
            sends_and_receives = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, x, following, self.group),
                    dist.P2POp(dist.irecv, arrived, preceding, self.group),
                ]
            )

        def wait() -> Tensor:
            with named_errors("the ring", self.group, x.device):
                for work in sends_and_receives:
                    work.wait()
            return arrived

        return wait


_refuse_second, _refuse_forward = refusals('gather="ring"', "all losses")


class _OverRanks(torch.autograd.Function):
    jvp = staticmethod(_refuse_forward)

    @staticmethod
    def forward(ctx, peers, f, block, *rows):  # type: ignore[no-untyped-def]
        ctx.peers, ctx.f = peers, f
        ctx.save_for_backward(block, *rows)
        results = {rank: f(rank, *rows, held) for rank, held in peers.rounds(block)}
        return tuple(results[q] for q in range(len(peers.sizes)))

    @staticmethod
    def backward(ctx, *dresults):  # type: ignore[no-untyped-def]
        inputs = ctx.saved_tensors
        arguments = (ctx.peers, ctx.f, ctx.needs_input_grad[2:], *inputs, *dresults)
        return None, None, *_OverRanksGradient.apply(*arguments)  # type: ignore[no-untyped-call]


class _OverRanksGradient(torch.autograd.Function):
    jvp, backward = staticmethod(_refuse_forward), staticmethod(_refuse_second)

    @staticmethod
    def forward(ctx, peers, f, wanted, *tensors):  # type: ignore[no-untyped-def]
        (block, *rows), dresults = tensors[: len(wanted)], tensors[len(wanted) :]
        acc = accumulation_dtype(block)
        totals = [torch.zeros_like(x) if needed else None for x, needed in zip([block, *rows], wanted, strict=True)]
        totals[0] = block.new_zeros(block.shape, dtype=acc) if wanted[0] else None
        for rank, held in peers.rounds(block):
            with torch.enable_grad():
                leaves = [
                    x.detach().requires_grad_(needed) for x, needed in zip([held.to(acc), *rows], wanted, strict=True)
                ]
                result = f(rank, *leaves[1:], leaves[0])
            inputs = [leaf for leaf in leaves if leaf.requires_grad]
            grads = iter(torch.autograd.grad(result, inputs, dresults[rank]))
            totals = [total if total is None else total + next(grads) for total in totals]
            if wanted[0]:
                # The gradient follows its block to the next rank, and after the last step is back at its rank.
                totals[0] = peers.shift(totals[0], peers.sizes[rank - 1])()
        dblock, *drows = totals
        return None if dblock is None else dblock.to(block.dtype), *drows
