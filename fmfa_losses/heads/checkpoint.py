"""Reads a head out of the checkpoints that TIPR codebases publish: nested, prefixed, in mixed precision."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LoadReport", "checkpoint_entries", "load_entries"]

NESTS = ("model", "state_dict")  # what a checkpoint calls the entry that holds its weights
WRAPPERS = ("module.", "_orig_mod.")  # what DDP and torch.compile put before every name
SHOWN = 6  # of the names that are missing: another transformer's would fill the screen


@dataclass(frozen=True)
class LoadReport:
    """What was loaded from a checkpoint into a head; `print(report)` is a sentence.

    Attributes:
        loaded: names of the head that were in the checkpoint and are copied.
        missing: names of the head that were not in the checkpoint and keep their values.
        ignored: names of the checkpoint that do not belong to the head.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing)
        if not self.loaded:
            text = f"nothing loaded: the checkpoint holds none of the {total} tensors of the head"
        else:
            text = f"loaded {len(self.loaded)} of {total} tensors"
            if self.missing:
                text += f"; missing, left as they were: {', '.join(self.missing[:SHOWN])}"
                if len(self.missing) > SHOWN:
                    text += f" and {len(self.missing) - SHOWN} more, all in report.missing"
        return f"{text}; ignored {len(self.ignored)} other entries of the checkpoint"


def checkpoint_entries(checkpoint: object) -> dict[str, Any]:
    """Names and values without the nesting under "model" and without the prefix "module."."""
    if not isinstance(checkpoint, Mapping):
        raise TypeError(
            f"state_dict must be a mapping of names to tensors, got {type(checkpoint).__name__}; "
            "pass what torch.load returns"
        )
    for nest in NESTS:
        if isinstance(checkpoint.get(nest), Mapping):
            return checkpoint_entries(checkpoint[nest])
    return {_bare(str(name)): value for name, value in checkpoint.items()}


def load_entries(head: nn.Module, entries: Mapping[str, Any], remedy: str) -> LoadReport:
    """Copies the entries that `head` names, in the dtype and on the device of the head: all of them, or none.

    Raises:
        ValueError: an entry has another shape than the head; `remedy` says which argument to change.
        TypeError: the head is sharded: a DTensor holds a part of a parameter.
    """
    own = head.state_dict()
    sharded = [name for name, value in own.items() if hasattr(value, "device_mesh")]
    if sharded:
        raise TypeError(
            f"the head must have plain parameters when a checkpoint is loaded, got DTensors: {', '.join(sharded)}; "
            "load it before fully_shard, or pass the full state of the module to set_model_state_dict"
        )
    loaded = [name for name in own if isinstance(entries.get(name), Tensor)]
    wrong = [name for name in loaded if entries[name].shape != own[name].shape]
    if wrong:
        shapes = "; ".join(
            f"{name}: checkpoint {list(entries[name].shape)}, head {list(own[name].shape)}" for name in wrong
        )
        raise ValueError(f"the checkpoint must have the shapes of the head, got {shapes}; {remedy}")
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(entries[name])
    return LoadReport(
        loaded=tuple(loaded),
        missing=tuple(name for name in own if name not in loaded),
        ignored=tuple(name for name in entries if name not in loaded),
    )


def _bare(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name
