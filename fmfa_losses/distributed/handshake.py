"""What the ranks tell each other before anything else travels, and the one error that all raise where it differs."""

import hashlib
import json
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import gather_op

__all__ = ["batch_size", "common_dtype", "handshake"]


def batch_size(tensors: Mapping[str, Tensor | None]) -> int:
    for x in tensors.values():
        if x is not None:
            return x.shape[0]
    raise ValueError("no tensor to count pairs of")


def common_dtype(x: Tensor) -> torch.dtype:
    """Ranks need not agree in the kind of their integers."""
    return x.dtype if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool else torch.int64


def handshake(
    loss: str,
    tensors: Mapping[str, Tensor | None],
    settings: Mapping[str, object],
    group: Any,
    error: Exception | None,
) -> tuple[int, ...]:
    """Pairs of each rank, if all of them describe what they bring in the same words."""
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
            "settings": {name: _in_words(value) for name, value in settings.items()},
            "tensors": {name: _shape_in_words(x) for name, x in tensors.items()},
        }
    else:
        description = {"error": [type(error).__name__, str(error)]}
    text = json.dumps(description).encode()
    digest = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
    header = torch.tensor([[0 if error else batch_size(tensors), digest, len(text)]], device=device)
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


def _in_words(value: object) -> str:
    if isinstance(value, Tensor):
        return "a tensor"
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return repr(float(value)).removesuffix(".0") if is_number else repr(value)  # type: ignore[arg-type]


def _shape_in_words(x: Tensor | None) -> str:
    if x is None:
        return "None"
    return f"{str(common_dtype(x)).removeprefix('torch.')} [{', '.join(['b', *map(str, x.shape[1:])])}]"


def _differing(values: Sequence[object]) -> str | None:
    """ "x on rank 0, y on rank 3" where not all are the same."""
    other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
    return None if other is None else f"{values[0]} on rank 0, {values[other]} on rank {other}"


def _difference(described: list[dict[str, Any]]) -> Exception:
    """The error of all ranks, from what each of them says that it brings."""
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
