"""The global batch: every process computes its own rows of a loss against the columns of all processes.

    rank r returns   L_r = (W / B) sum_{i on rank r} l_i          W processes, b_r pairs on rank r, B = sum_r b_r

The mean over ranks of L_r is (1/B) sum_i l_i, the loss of one process on the concatenated batch. The backward of every
exchange below adds up what all ranks have to say about a rank's own samples, so rank r's parameters receive their part
of d(sum_r L_r); DistributedDataParallel takes the mean over ranks, and that is the gradient of (1/B) sum_i l_i. Neither
unequal b_r nor the size of the world leave a factor behind. The global order is rank order.

A loss that compares a sample with its own label alone is the rank's own mean times its share W b_r / B: `shares`.
What other losses need of their peers are three linear maps, each with its transpose as backward:

    gather     own rows -> all rows                   backward: every rank sends each owner its gradient, the owner adds
    transpose  own rows of S -> own columns of S      its own backward: transposing back
    ring       f(own rows, block of rank q) for all q, one block at a time, never all; the backward goes round again

Sums run in rank order and in float32 or better: reruns are bitwise equal, on every backend.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .ops._checks import check_option
from .ops._operator import operator, refusals, register_gradient
from .ops._precision import accumulation_dtype

__all__ = ["GATHER", "Peers", "meet", "shares"]

GATHER = (False, True, "ring")
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


class Peers(NamedTuple):
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
        if x.dtype == torch.bool:
            return self.gather(x.to(torch.uint8)).to(torch.bool)
        gathered: Tensor = gather_op(x, self.sizes, self.rank, self.group.group_name)
        return gathered

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

    def _rounds(self, block: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(owner, block) of every rank, the own one first; the next one is under way meanwhile."""
        world = len(self.sizes)
        for step in range(world):
            owner = (self.rank - step) % world
            arriving = self._shift(block, self.sizes[owner - 1]) if step + 1 < world else None
            yield owner, block
            if arriving is not None:
                block = arriving()

    def _shift(self, x: Tensor, size: int) -> Callable[[], Tensor]:
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
        results = {owner: f(owner, *rows, held) for owner, held in peers._rounds(block)}
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
        for owner, held in peers._rounds(block):
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
                totals[0] = peers._shift(totals[0], peers.sizes[owner - 1])()
        dblock, *drows = totals
        return None if dblock is None else dblock.to(block.dtype), *drows


# The collectives are operators, opaque to torch.compile; sizes are the pairs of each rank, group is a name.


@operator("gather(Tensor x, SymInt[] sizes, int rank, str group) -> Tensor")
def gather_op(x, sizes, rank, group):  # type: ignore[no-untyped-def]
    group, longest = _group(group), max(sizes)
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    padded = x.contiguous()
    if x.shape[0] < longest:
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: x.shape[0]] = x
    gathered = x.new_empty(len(sizes) * longest, *x.shape[1:])
    with named_errors("gather", group, x.device):
        all_gather(gathered, padded, group=group)
    if min(sizes) == longest:
        return gathered
    return torch.cat([block[:size] for block, size in zip(gathered.split(longest), sizes, strict=True)])


@operator("gather_backward(Tensor dgathered, SymInt[] sizes, int rank, str group) -> Tensor")
def gather_backward_op(dgathered, sizes, rank, group):  # type: ignore[no-untyped-def]
    """A reduce-scatter that takes unequal sizes and adds in rank order: to each owner its part, the owner adds."""
    group, b = _group(group), sizes[rank]
    received = dgathered.new_empty(len(sizes) * b, *dgathered.shape[1:])
    with named_errors("the backward of gather", group, dgathered.device):
        dist.all_to_all_single(received, dgathered.contiguous(), [b] * len(sizes), list(sizes), group=group)
    return received.view(len(sizes), b, *dgathered.shape[1:]).sum(dim=0)


@operator("transpose(Tensor rows, SymInt[] sizes, int rank, str group) -> Tensor")
def transpose_op(rows, sizes, rank, group):  # type: ignore[no-untyped-def]
    group, b = _group(group), sizes[rank]
    numbers = [b * size for size in sizes]  # of the block that this rank exchanges with each other
    sent = torch.cat([block.reshape(-1) for block in rows.split(list(sizes), dim=1)])
    received = torch.empty_like(sent)
    with named_errors("transpose", group, rows.device):
        dist.all_to_all_single(received, sent, numbers, numbers, group=group)
    return received.view(sum(sizes), b).T.contiguous()


@torch.library.register_fake(gather_op)
def _(x, sizes, rank, group):  # type: ignore[no-untyped-def]
    return x.new_empty(sum(sizes), *x.shape[1:])


@torch.library.register_fake(gather_backward_op)
def _(dgathered, sizes, rank, group):  # type: ignore[no-untyped-def]
    return dgathered.new_empty(sizes[rank], *dgathered.shape[1:])


@torch.library.register_fake(transpose_op)
def _(rows, sizes, rank, group):  # type: ignore[no-untyped-def]
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, *ctx.route = inputs
    ctx.dtype = x.dtype


def _gather_backward(ctx, dgathered):  # type: ignore[no-untyped-def]
    dx = gather_backward_op(dgathered.to(accumulation_dtype(dgathered)), *ctx.route)
    return dx.to(ctx.dtype), None, None, None


def _jvp(op: Any) -> Callable[..., Tensor]:
    """A linear map is its own tangent."""
    return lambda ctx, dx, *_: op(dx, *ctx.route)


def _gather_again(ctx, dx):  # type: ignore[no-untyped-def]
    return gather_op(dx, *ctx.route), None, None, None


def _transpose_backward(ctx, dcolumns):  # type: ignore[no-untyped-def]
    return transpose_op(dcolumns, *ctx.route), None, None, None


register_gradient(gather_op, _gather_backward, _setup_context, _jvp(gather_op))
register_gradient(gather_backward_op, _gather_again, _setup_context, _jvp(gather_backward_op))
register_gradient(transpose_op, _transpose_backward, _setup_context, _jvp(transpose_op))


def _group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type, unused-ignore]


# Meeting: who is there, and whether all came with the same kind of tensors.

# Layouts that were agreed on under equal_batches.
_agreed: set[tuple[Any, ...]] = set()


def meet(
    gather: bool | str,
    process_group: Any,
    tensors: Mapping[str, Tensor | None],
    *,
    equal_batches: bool = False,
) -> Peers:
    """The peers of this call. All ranks raise the same error where their tensors do not fit together.

    Args:
        gather: False (a world of one), True or "ring".
        process_group: torch.distributed group; None is the default one.
        tensors: by name, what is to be exchanged, [b, ...] each, the first one never None. All but b, and who is None,
            must be the same on all ranks.
        equal_batches: the caller's promise that b is the same on all ranks at every call. Then the sizes are
            exchanged only when a layout is seen for the first time; otherwise at every call, for which the host waits.

    Raises:
        RuntimeError: torch.distributed is not initialised, or a peer is dead or absent (with the time-out).
        ValueError: unknown gather, a rank outside of the group, tensors that differ between ranks.
    """
    check_option("gather", gather, GATHER)
    first = next(x for x in tensors.values() if x is not None)
    if not gather:
        return Peers(sizes=(first.shape[0],))
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"gather={gather!r} needs torch.distributed; start with torchrun and call "
            "torch.distributed.init_process_group() first, or leave gather=False for one process"
        )
    group: Any = dist.group.WORLD if process_group is None else process_group
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("process_group must contain the calling rank; pass the group that this rank belongs to")
    layout = _Layout.of(gather, tensors)
    key = (group.group_name, *layout.numbers) if equal_batches else None
    if key not in _agreed:
        layouts = [_Layout(layout.names, numbers) for numbers in _exchange(layout.numbers, group, first.device)]
        _check_layouts(layouts, equal_batches)
        sizes = tuple(other.numbers[0] for other in layouts)
        if key is None:
            return Peers(sizes, rank, group, gather == "ring")
        _agreed.add(key)
    return Peers((first.shape[0],) * world, rank, group, gather == "ring")


def shares(counts: Tensor, gather: bool | str, process_group: Any) -> Tensor:
    """W n_r / sum over ranks of n_r for each of this rank's counts n_r [K]: what its own mean is to be multiplied by.

    The mean over ranks is then the mean over everything that was counted, and 0 where nothing was. Counts are integers,
    so their sum is exact; the host does not wait for it, but for the agreement of the first call.

    Args:
        counts: [K] integers, of the same things on all ranks.
        gather: True or "ring", as the rest of the loss has it.
        process_group: as `meet` takes it.
    Returns:
        [K], float64.
    Raises:
        RuntimeError, ValueError: as `meet` does.
    """
    own = counts.unsqueeze(0)
    peers = meet(gather, process_group, {"counts": own}, equal_batches=True)  # a row of counts a rank
    total = peers.gather(own).sum(dim=0)
    return len(peers.sizes) * counts.double() / total.clamp(min=1)


class _Layout(NamedTuple):
    """b, mode, and for each tensor (dtype, or -1 for None, rank, sizes after the batch), as numbers that can travel."""

    names: tuple[str, ...]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, gather: bool | str, tensors: Mapping[str, Tensor | None]) -> "_Layout":
        first = next(x for x in tensors.values() if x is not None)
        numbers = [first.shape[0], GATHER.index(gather)]
        for x in tensors.values():
            trailing = () if x is None else x.shape[1:]
            numbers += [-1 if x is None else DTYPES.index(x.dtype), *trailing, *[0] * (2 - len(trailing))]
        return cls(tuple(tensors), tuple(numbers))

    def describe(self, index: int) -> str:
        dtype, *trailing = self.numbers[2 + 3 * index : 5 + 3 * index]
        if dtype < 0:
            return "None"
        shape = ", ".join(["b", *(str(size) for size in trailing if size)])
        return f"{str(DTYPES[dtype]).removeprefix('torch.')} [{shape}]"


def _exchange(numbers: tuple[int, ...], group: Any, device: torch.device) -> list[tuple[int, ...]]:
    """Every rank's numbers. A group that also serves CPU tensors does it without stopping the accelerator."""
    if "cpu:" in dist.get_backend_config(group):
        device = torch.device("cpu")
    mine = torch.tensor([numbers], device=device)
    table = gather_op(mine, [1] * dist.get_world_size(group), dist.get_rank(group), group.group_name)
    return [tuple(row) for row in table.tolist()]


def _check_layouts(layouts: list[_Layout], equal_batches: bool) -> None:
    def differing(values: list[Any]) -> str | None:
        """ "x on rank 0, y on rank 3" where not all are the same."""
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        return None if other is None else f"{values[0]} on rank 0, {values[other]} on rank {other}"

    found = differing([repr(GATHER[layout.numbers[1]]) for layout in layouts])
    if found:
        raise ValueError(f"gather must be the same on all ranks, got {found}")
    for index, name in enumerate(layouts[0].names):
        found = differing([layout.describe(index) for layout in layouts])
        if found:
            raise ValueError(
                f"{name} must agree on all ranks in everything but the batch size b, got {found}; "
                "build the model and pad the batches alike on all ranks"
            )
    found = differing([layout.numbers[0] for layout in layouts])
    if equal_batches and found:
        raise ValueError(
            f"equal_batches=True promises the same batch size on all ranks, got {found}; leave it out, or let the "
            "sampler drop what is left over (drop_last=True)"
        )


@contextmanager
def named_errors(what: str, group: Any, device: torch.device) -> Iterator[None]:
    """A failed collective says what failed where, after which time-out, and what to look for."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} failed on rank {dist.get_rank(group)} of {dist.get_world_size(group)} ({dist.get_backend(group)}, "
            f"{device.type} tensors, time-out {_timeout(group, device)}): a peer died, did not arrive in time, or came "
            "with another size. Look for the first error of the other ranks; all ranks must call the loss and its "
            "backward equally often; set the time-out with init_process_group(timeout=...)"
        ) from error


def _timeout(group: Any, device: torch.device) -> str:
    try:
        return f"{group._get_backend(device).options._timeout.total_seconds():g} s"
    except (AttributeError, RuntimeError):
        return "of the process group"
