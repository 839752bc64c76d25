"""Leaves out the padding at the end of every sample."""

import torch
from torch import Tensor

from .operator import replaced

__all__ = ["longest", "refuse_trace"]


def longest(mask: Tensor) -> int:
    """Tokens up to the last kept one of any sample, at least 1; mask [B, L], True = keep.

    All L where the values cannot be read: on an accelerator the host would have to wait, torch.compile would break its
    graph, torch.vmap has a mask for each problem, and fake tensors and make_fx have no values.
    """
    refuse_trace("a mask")
    L = mask.shape[1]
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return L
    if type(mask) is not Tensor or replaced():
        return L
    used = mask.any(dim=0)
    return max(1, L - int(used.flip(0).to(torch.uint8).argmax())) if bool(used.any()) else 1


def refuse_trace(what: str) -> None:
    """torch.jit.trace would repeat for every batch what the host decided by the values of the first one."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
        raise RuntimeError(
            f"torch.jit.trace cannot follow {what}: the host decides by the values of the batch, and a trace would "
            "repeat the first decision in silence; use torch.compile or torch.export"
        )
