"""The global batch: every process computes its own rows of a loss against the columns of all processes.

    rank r returns   L_r = (W / B) sum_{i on rank r} l_i          W processes, b_r pairs on rank r, B = sum_r b_r

The mean over ranks of L_r is (1/B) sum_i l_i, the loss of one process on the concatenated batch. The backward of every
exchange below adds up what all ranks have to say about a rank's own samples, so rank r's parameters receive their part
of d(sum_r L_r); DistributedDataParallel takes the mean over ranks, and that is the gradient of (1/B) sum_i l_i. Neither
unequal b_r nor the size of the world leave a factor behind. The global order is rank order.

A loss that compares a sample with its own label alone is the rank's own mean times W b_r / B: `Peers.loss_weights`.
What other losses need of their peers are three linear maps, each with its transpose as backward:

    gather     own rows -> all rows                   backward: every rank sends each owner its gradient, the owner adds
    transpose  own rows of S -> own columns of S      its own backward: transposing back
    ring       f(own rows, block of rank q) for all q, one block at a time, never all; the backward goes round again

Sums run in rank order and in float32 or better: reruns are bitwise equal, on every backend.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.checks import check_option, describe
from ..ops.operator import refusals
from ..ops.options import GATHER, Gather
from ..ops.precision import accumulation_dtype
from .collectives import gather_op, named_errors, transpose_op
from .handshake import batch_size, common_dtype, handshake

__all__ = ["GATHER", "Peers", "meet"]


@dataclass(frozen=True)
class Peers:
    """The processes that share a batch: who holds how much, and how to exchange it. One process is a world of one.

    Example:
        >>> alone = Peers(sizes=(3,))
        >>> alone.gather(torch.arange(3)), alone.mean(torch.arange(3.0))
        (tensor([0, 1, 2]), tensor(1.))
    """

    sizes: tuple[int, ...]  # pairs of each rank, [W]
    rank: int = 0
    group: Any = None  # ProcessGroup; None: nobody to talk to
    ring: bool = False  # never gather columns

    @property
    def offset(self) -> int:
        """Global index of the first own pair."""
        return sum(self.sizes[: self.rank])

    def gather(self, x: Tensor) -> Tensor:
        """[b, ...] -> [B, ...] in rank order, in x's dtype; its gradient is summed in float32 or better."""
        if self.group is None:
            return x
        travels = torch.uint8 if x.dtype == torch.bool else common_dtype(x)  # not every backend takes every integer
        gathered: Tensor = gather_op(x.to(travels), self.sizes, self.rank, self.group.group_name)
        return gathered.to(x.dtype)

    def transpose(self, rows: Tensor) -> Tensor:
        """Own rows of S, [b, B] -> own rows of the transposed S, [b, B]: each rank receives nothing but its columns."""
        if self.group is None:
            return rows.T
        columns: Tensor = transpose_op(rows, self.sizes, self.rank, self.group.group_name)
        return columns

    def mean(self, per_sample: Tensor) -> Tensor:
        """[b] -> this rank's share of the global mean, L_r at the head of this file."""
        if self.group is None:
            return per_sample.mean()
        return per_sample.sum() * (len(self.sizes) / sum(self.sizes))

    @property
    def loss_weight(self) -> float:
        """W b_r / B: by what a mean over the own pairs is to be multiplied; the mean over ranks is then the whole's."""
        return len(self.sizes) * self.sizes[self.rank] / sum(self.sizes)

    def loss_weights(self, counts: Tensor) -> Tensor:
        """W n_r / sum over ranks of n_r for each of this rank's counts n_r: by what its own mean is to be multiplied.

        The mean over ranks is then the mean over everything that was counted, and 0 where nothing was. Counts are
        integers, so their sum is exact; the host does not wait for it. Same K on all ranks.

        Args:
            counts: [K] integers.
        Returns:
            [K], float64.
        """
        W = len(self.sizes)
        total = Peers((1,) * W, self.rank, self.group).gather(counts.unsqueeze(0)).sum(dim=0)
        return W * counts.double() / total.clamp(min=1)

    def blocks(self, x: Tensor, dim: int = 0) -> Sequence[Tensor]:
        """[B, ...] -> W views [b_q, ...]; B may stand at another dim."""
        return torch.split(x, list(self.sizes), dim)

    def around(self, f: Callable[..., Tensor], rows: tuple[Tensor, ...], block: Tensor) -> tuple[Tensor, ...]:
        """f(q, *rows, block of rank q) of every rank q, in rank order, while the blocks travel from rank to rank.

        A rank holds one block and the one that arrives. The backward sends the blocks around again, each followed by
        its gradient, and calls f again: f must not be random. Differentiable once in rows and block.
        """
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                'gather="ring" cannot run inside of torch.func.grad, vjp, jvp or vmap; use backward() or '
                "torch.autograd.grad, or gather=True"
            )
        results: tuple[Tensor, ...] = _Around.apply(self, f, block, *rows)  # type: ignore[no-untyped-call]
        return results

    def rounds(self, block: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(owner, block) of every rank, the own one first; the next one is under way meanwhile."""
        world = len(self.sizes)
        for step in range(world):
            owner = (self.rank - step) % world
            arriving = self.shift(block, self.sizes[owner - 1]) if step + 1 < world else None
            yield owner, block
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


_refuse_second, _refuse_forward = refusals('gather="ring"', "A-SDM and EFA")


class _Around(torch.autograd.Function):
    jvp = staticmethod(_refuse_forward)

    @staticmethod
    def forward(ctx, peers, f, block, *rows):  # type: ignore[no-untyped-def]
        ctx.peers, ctx.f = peers, f
        ctx.save_for_backward(block, *rows)
        results = {owner: f(owner, *rows, held) for owner, held in peers.rounds(block)}
        return tuple(results[q] for q in range(len(peers.sizes)))

    @staticmethod
    def backward(ctx, *dresults):  # type: ignore[no-untyped-def]
        inputs = ctx.saved_tensors
        arguments = (ctx.peers, ctx.f, ctx.needs_input_grad[2:], *inputs, *dresults)
        return None, None, *_AroundGradient.apply(*arguments)  # type: ignore[no-untyped-call]


class _AroundGradient(torch.autograd.Function):
    jvp, backward = staticmethod(_refuse_forward), staticmethod(_refuse_second)

    @staticmethod
    def forward(ctx, peers, f, wanted, *tensors):  # type: ignore[no-untyped-def]
        (block, *rows), dresults = tensors[: len(wanted)], tensors[len(wanted) :]
        acc = accumulation_dtype(block)
        totals = [torch.zeros_like(x) if needed else None for x, needed in zip([block, *rows], wanted, strict=True)]
        totals[0] = block.new_zeros(block.shape, dtype=acc) if wanted[0] else None
        for owner, held in peers.rounds(block):
            with torch.enable_grad():
                leaves = [
                    x.detach().requires_grad_(needed) for x, needed in zip([held.to(acc), *rows], wanted, strict=True)
                ]
                result = f(owner, *leaves[1:], leaves[0])
            inputs = [leaf for leaf in leaves if leaf.requires_grad]
            grads = iter(torch.autograd.grad(result, inputs, dresults[owner]))
            totals = [total if total is None else total + next(grads) for total in totals]
            if wanted[0]:
                # The gradient follows its block to the next rank, and after the last round comes home.
                totals[0] = peers.shift(totals[0], peers.sizes[owner - 1])()
        dblock, *drows = totals
        return None if dblock is None else dblock.to(block.dtype), *drows


# The handshake: who is there, and whether all came with the same loss, hyperparameters and kinds of tensors.

# What was agreed on under equal_batches, and in which group: a later group may have the same name.
_agreed: dict[tuple[Any, ...], "weakref.ref[Any]"] = {}
MOST_AGREED = 4096  # of one group; where a hyperparameter changes with every step, all ranks forget at the same step


def meet(
    gather: Gather,
    process_group: Any,
    tensors: Mapping[str, Tensor | None],
    *,
    loss: str = "the loss",
    settings: Mapping[str, object] | None = None,
    equal_batches: bool = False,
    check: Callable[[], Any] = lambda: None,
) -> tuple[Peers, Any]:
    """The peers of this call, and what `check` returns; all ranks raise the same error where things do not fit.

    One exchange of three numbers: the batch size, and digest and length of a description of everything else. The
    descriptions follow only where digests differ, to say what does.

    Args:
        gather: False (a world of one), True or "ring".
        process_group: torch.distributed group; None is the default one. Or the Peers of a handshake that has already
            been made for this call.
        tensors: by name, what is to be exchanged, [b, ...] each, the first one never None. All but b, and who is None,
            must be the same on all ranks. Integers count as int64, as which they travel.
        loss: name of what is called.
        settings: hyperparameters by name, which must be the same on all ranks. Of a tensor only that it is one.
        equal_batches: the caller's promise that b is the same on all ranks at every call. Then the exchange is made
            only where tensors and settings are seen for the first time; otherwise at every call, and the host waits.
        check: looks at what this rank brings; its error travels, and all ranks raise it.

    Raises:
        RuntimeError: torch.distributed is not initialised, or a peer is dead or absent (with the time-out).
        ValueError: unknown gather, a rank outside of the group, tensors or settings that differ between ranks.
        Exception: what `check` raised, on this rank or on another one.
    """
    check_option("gather", gather, GATHER)
    available = dist.is_available() and dist.is_initialized()
    if not gather or isinstance(process_group, Peers) or not available:
        checked = check()
        if gather and not available:
            raise RuntimeError(
                f"gather={gather!r} needs torch.distributed; start with torchrun and call "
                "torch.distributed.init_process_group() first, or leave gather=False for one process"
            )
        return process_group if isinstance(process_group, Peers) else Peers(sizes=(batch_size(tensors),)), checked
    group: Any = dist.group.WORLD if process_group is None else process_group
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("process_group must contain the calling rank; pass the group that this rank belongs to")
    settings = {"gather": gather, "equal_batches": equal_batches, **(settings or {})}
    settings = {name: _python_number(value) for name, value in settings.items()}
    key: tuple[Any, ...] = (group.group_name, loss)
    error: Exception | None = None
    try:
        _check_not_empty(tensors)
        checked = check()
    except Exception as raised:
        error = raised
    else:
        values = ("a tensor" if isinstance(value, Tensor) else value for value in settings.values())
        key = (*key, batch_size(tensors), *(_layout(x) for x in tensors.values()), *values)
    if equal_batches:
        where = _agreed.get(key)
        if where is not None and where() is group:
            if error is not None:
                raise error  # the other ranks have agreed on this loss and do not listen
            return Peers((batch_size(tensors),) * world, rank, group, gather == "ring"), checked
    sizes = handshake(loss, tensors, settings, group, error)
    if equal_batches:
        _remember(key, group)
    return Peers(sizes, rank, group, gather == "ring"), checked


def _python_number(value: Any) -> object:
    """NumPy's arrays of 0 dimensions are numbers too, and cannot be looked up."""
    return value.item() if not isinstance(value, Tensor) and getattr(value, "ndim", None) == 0 else value


def _check_not_empty(tensors: Mapping[str, Tensor | None]) -> None:
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.shape[:1] == (0,):
            raise ValueError(
                f"{name} must not be empty, got {describe(x)}; with gather a rank cannot skip a step alone, since the "
                "others wait for it: give every rank at least one pair (drop_last=True), or skip the step on all ranks"
            )


def _layout(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (common_dtype(x), *x.shape[1:])


def _remember(key: tuple[Any, ...], group: Any) -> None:
    of_group = [old for old in _agreed if old[0] == key[0]]
    if len(of_group) >= MOST_AGREED or any(_agreed[old]() is not group for old in of_group):
        for old in of_group:
            del _agreed[old]
    _agreed[key[:2]] = _agreed[key] = weakref.ref(group)
