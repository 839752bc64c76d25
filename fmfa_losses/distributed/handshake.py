"""Handshake: exchange batch sizes and check that dtypes and shapes agree.

Before a loss exchanges samples, every rank sends its batch size and a digest of its hyperparameters, dtypes and shapes.
Where ranks differ, or one of them has an error, all ranks raise the same error and none of them waits for the others.
"""

import hashlib
import json
import numbers
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.checks import check_option, describe
from ..ops.operator import never_compiled
from ..ops.options import GATHER, Gather
from .collectives import common_dtype, gather_op
from .peers import Peers

__all__ = ["handshake"]

# What ranks agreed on under equal_batches, and in which group: a later group may have the same name.
agreed: dict[tuple[Any, ...], "weakref.ref[Any]"] = {}
MOST_AGREED = 4096  # of one group; where a hyperparameter changes with every step, all ranks forget at the same step


def handshake(
    gather: Gather,
    process_group: Any,
    tensors: Mapping[str, Tensor | None],
    *,
    loss: str = "the loss",
    settings: Mapping[str, object] | None = None,
    equal_batches: bool = False,
    check: Callable[[], Any] = lambda: None,
) -> tuple[Peers, Any]:
    """The peers of this call, and what `check` returns; all ranks raise the same error where they do not agree.

    One exchange of three numbers: the batch size, and the digest and length of a description of everything else. The
    descriptions themselves are exchanged only where digests differ, for the message.

    Args:
        gather: False (a world of one), True or "ring".
        process_group: torch.distributed group; None is the default one. Or the Peers of a handshake that was already
            made for this call.
        tensors: by name, what is to be exchanged, [b, ...] each, the first one never None. Everything but b must be the
            same on all ranks, also which of them are None. Integers are sent as int64.
        loss: name of what is called.
        settings: hyperparameters by name, which must be the same on all ranks. The values of tensors are not compared.
        equal_batches: the caller's promise that b is the same on all ranks at every call. Then the exchange is made
            only where tensors and settings are new; otherwise at every call, and the host waits.
        check: checks the inputs of this rank; all ranks raise its error. It may put other tensors into `tensors`, such
            as padded ones for packed ones: these are then compared.
    Raises:
        RuntimeError: torch.distributed is not initialised, or a peer is dead or absent (with the time-out).
        ValueError: unknown gather, a rank outside of the group, tensors or settings that differ between ranks.
        Exception: what `check` raised, on this rank or on another one.
    """
    if gather is not False:
        check_option("gather", gather, GATHER)
    if not gather or isinstance(process_group, Peers) or not (dist.is_available() and dist.is_initialized()):
        return _without_exchange(gather, process_group, tensors, check)
    group: Any = dist.group.WORLD if process_group is None else process_group
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("process_group must contain the calling rank; pass the group that this rank belongs to")
    settings = {"gather": gather, "equal_batches": equal_batches, **(settings or {})}
    settings = {name: _python_number(value) for name, value in settings.items()}
    error: Exception | None = None
    try:
        _check_not_empty(tensors)
        checked = check()
    except Exception as raised:
        error, key = raised, _settings_key(group, loss, settings)
    else:
        values = ("a tensor" if isinstance(value, Tensor) else value for value in settings.values())
        key = (group.group_name, loss, _batch_size(tensors), *(_layout(x) for x in tensors.values()), *values)
    if equal_batches and _is_agreed(key, group):
        if error is not None:
            raise error  # the other ranks do not wait for an exchange
        return Peers((_batch_size(tensors),) * world, rank, group, gather == "ring"), checked
    sizes = _exchange(loss, tensors, settings, group, error)
    if equal_batches:
        _remember(group, key, _settings_key(group, loss, settings))
    return Peers(sizes, rank, group, gather == "ring"), checked


def _without_exchange(
    gather: Gather, process_group: Any, tensors: Mapping[str, Tensor | None], check: Callable[[], Any]
) -> tuple[Peers, Any]:
    checked = check()
    if gather and not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"gather={gather!r} needs torch.distributed; start with torchrun and call "
            "torch.distributed.init_process_group() first, or leave gather=False for one process"
        )
    return process_group if isinstance(process_group, Peers) else Peers(sizes=(_batch_size(tensors),)), checked


def _python_number(value: Any) -> object:
    """A NumPy array of 0 dimensions is a number, but no key of a dict."""
    if isinstance(value, (bool, int, float, str, Tensor)):  # torch.compile makes a symbol of a float that has changed
        return value
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _check_not_empty(tensors: Mapping[str, Tensor | None]) -> None:
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.shape[:1] == (0,):
            raise ValueError(
                f"{name} must not be empty, got {describe(x)}; with gather a rank cannot skip a step alone, since the "
                "others wait for it: give every rank at least one pair (drop_last=True), or skip the step on all ranks"
            )


def _layout(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (common_dtype(x), *x.shape[1:])


def _settings_key(group: Any, loss: str, settings: Mapping[str, object]) -> tuple[Any, ...]:
    """What a rank with wrong tensors knows of its call; in words, since what is wrong may have no hash."""
    return group.group_name, loss, *map(_text, settings.values())


def _is_agreed(key: tuple[Any, ...], group: Any) -> bool:
    where = agreed.get(key)
    return where is not None and where() is group


def _remember(group: Any, *keys: tuple[Any, ...]) -> None:
    of_group = [old for old in agreed if old[0] == group.group_name]
    if len(of_group) >= MOST_AGREED or any(agreed[old]() is not group for old in of_group):
        for old in of_group:
            del agreed[old]
    agreed.update(dict.fromkeys(keys, weakref.ref(group)))


def _batch_size(tensors: Mapping[str, Tensor | None]) -> int:
    for x in tensors.values():
        if x is not None:
            return x.shape[0]
    raise ValueError("no tensor to count pairs of")


@never_compiled
def _exchange(
    loss: str,
    tensors: Mapping[str, Tensor | None],
    settings: Mapping[str, object],
    group: Any,
    error: Exception | None,
) -> tuple[int, ...]:
    """Batch size of each rank, if all ranks send the same description; the one error of all ranks where they differ."""
    served = [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]
    devices = {x.device.type: x.device for x in tensors.values() if isinstance(x, Tensor)}
    if error is None and not set(devices) <= set(served):
        error = ValueError(
            f"gather needs tensors on a device that the process group serves ({', '.join(served)}), got "
            f"{', '.join(devices)}; move model and batch there, or add a backend: init_process_group("
            '"cpu:gloo,cuda:nccl")'
        )
    # Through the CPU where the group serves it: that does not stop the accelerator.
    own_device = next((device for kind, device in devices.items() if kind in served), torch.device(served[0]))
    device = torch.device("cpu") if "cpu" in served else own_device
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if error is None:
        description: dict[str, object] = {
            "error": None,
            "loss": loss,
            "settings": {name: _text(value) for name, value in settings.items()},
            "tensors": {name: _shape_text(x) for name, x in tensors.items()},
        }
    else:
        description = {"error": [type(error).__name__, str(error)]}
    text = json.dumps(description).encode()
    digest = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
    header = torch.tensor([[0 if error else _batch_size(tensors), digest, len(text)]], device=device)
    sizes, digests, lengths = gather_op(header, [1] * world, rank, group.group_name).T.tolist()
    if len(set(digests)) > 1:
        letters = torch.tensor(list(text), dtype=torch.uint8, device=device)
        texts = gather_op(letters, lengths, rank, group.group_name).cpu().split(lengths)
        raise _difference([json.loads(bytes(text.tolist())) for text in texts]) from error
    if error is not None:
        raise error  # the same on all ranks
    differing = _differing(sizes)
    if settings["equal_batches"] and differing:
        raise ValueError(
            f"equal_batches=True promises the same batch size on all ranks, got {differing}; leave it out, or let the "
            "sampler drop what is left over (drop_last=True)"
        )
    return tuple(sizes)


def _text(value: object) -> str:
    if isinstance(value, Tensor):
        return "a tensor"
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return repr(float(value)).removesuffix(".0") if is_number else repr(value)  # type: ignore[arg-type]


def _shape_text(x: Tensor | None) -> str:
    if x is None:
        return "None"
    return f"{str(common_dtype(x)).removeprefix('torch.')} [{', '.join(['b', *map(str, x.shape[1:])])}]"


def _differing(values: Sequence[object]) -> str | None:
    """ "x on rank 0, y on rank 3" where not all are the same."""
    other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
    return None if other is None else f"{values[0]} on rank 0, {values[other]} on rank {other}"


def _difference(described: list[dict[str, Any]]) -> Exception:
    """The error that all ranks raise, from the descriptions of all."""
    for rank, entry in enumerate(described):
        if entry["error"]:
            kind, message = entry["error"]
            known: type[Exception] | None = {"TypeError": TypeError, "ValueError": ValueError}.get(kind)
            message = message if known or kind == "RuntimeError" else f"{kind}: {message}"
            return (known or RuntimeError)(f"rank {rank} of {len(described)} cannot take part: {message}")
    found = _differing([entry["loss"] for entry in described])
    if found:
        return ValueError(f"all ranks must call the same loss, got {found}; call the losses in the same order")
    problems = []
    for name in described[0]["settings"]:
        found = _differing([entry["settings"].get(name) for entry in described])
        if found:
            problems.append(f"{name} must be the same on all ranks, got {found}")
    if problems:
        return ValueError(f"{'; '.join(problems)}; build {described[0]['loss']} with the same arguments on all ranks")
    for name in described[0]["tensors"]:
        found = _differing([entry["tensors"].get(name) for entry in described])
        if found:
            return ValueError(
                f"{name} must agree on all ranks in everything but the batch size b, got {found}; "
                "build the model and pad the batches alike on all ranks"
            )
    return RuntimeError(f"the ranks must call {described[0]['loss']} of one version of fmfa_losses; update all of them")
