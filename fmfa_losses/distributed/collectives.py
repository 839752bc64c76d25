"""Collectives as operators: opaque to torch.compile, with their transposes as backward, and errors that say why."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.operator import operator, register_gradient
from ..ops.precision import accumulation_dtype

__all__ = ["common_dtype", "gather_op", "named_errors", "transpose_op"]

# sizes are the pairs of each rank, group is a name.


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
    """A reduce-scatter for unequal sizes: each rank receives the gradients of its rows and sums them in rank order."""
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
def _gather_fake(x, sizes, rank, group):  # type: ignore[no-untyped-def]
    return x.new_empty(sum(sizes), *x.shape[1:])


@torch.library.register_fake(gather_backward_op)
def _gather_backward_fake(dgathered, sizes, rank, group):  # type: ignore[no-untyped-def]
    return dgathered.new_empty(sizes[rank], *dgathered.shape[1:])


@torch.library.register_fake(transpose_op)
def _transpose_fake(rows, sizes, rank, group):  # type: ignore[no-untyped-def]
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


def common_dtype(x: Tensor) -> torch.dtype:
    """In which x is sent: all integers as int64, so that ranks need not agree in their kind."""
    return x.dtype if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool else torch.int64


def _group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type, unused-ignore]


@contextmanager
def named_errors(what: str, group: Any, device: torch.device) -> Iterator[None]:
    """A failed collective says what failed where, after which time-out, and what to look for."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} failed on rank {dist.get_rank(group)} of {dist.get_world_size(group)} ({dist.get_backend(group)}, "
            f"{device.type} tensors, time-out {_timeout(group, device)}): a peer died, raised an error, did not arrive "
            "in time, skipped this call, or came with gather=False, another loss or another size. Look for the first "
            "error of the other ranks; all ranks must call the same losses, and their backward, equally often; set the "
            "time-out with init_process_group(timeout=...)"
        ) from error


def _timeout(group: Any, device: torch.device) -> str:
    try:
        return f"{group._get_backend(device).options._timeout.total_seconds():g} s"
    except (AttributeError, RuntimeError):
        return "of the process group"
