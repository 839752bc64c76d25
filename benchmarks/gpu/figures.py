"""A figure: time and memory of one provider on one case, as a user gets it."""

from collections.abc import Iterator
from typing import Any

import torch

from .. import providers
from ..cases import Case, inputs
from ..measure import DTYPES, autocast
from ..providers import AUTOTUNED, COMPILED, REFERENCE, memory_needed
from . import device
from .cuda_clock import CaptureError, measure_cuda

__all__ = ["figures", "why_not"]


def why_not(case: Case, provider: str, precision: str) -> str | None:
    """The reason why it cannot be measured here, or None."""
    reason = providers.why_not(provider)
    if reason is not None:
        return reason
    itemsize = DTYPES[precision].itemsize
    needed = memory_needed(provider, case.op, case.B, case.L, case.N, case.D, itemsize)
    free = torch.cuda.mem_get_info()[0]
    if needed > 0.95 * free:
        return f"needs over {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
    return None


def figures(
    case: Case, provider: str, precision: str, modes: tuple[str, ...], timing: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(mode, record without identity) for each mode, as soon as it is there."""
    fn = providers.provider(provider, case.op)
    plain = provider in (REFERENCE, COMPILED, AUTOTUNED)

    def call(**arguments: Any) -> torch.Tensor:
        if not plain:
            return fn(**arguments)
        with autocast(precision, device.NAME):
            return fn(**arguments)

    def make(seed: int) -> dict[str, Any]:
        return inputs(case, dtype=DTYPES[precision], device=device.NAME, seed=seed)

    step = torch.compiler.cudagraph_mark_step_begin if provider == AUTOTUNED else lambda: None
    try:
        for mode, figure in measure_cuda(call, make, modes=modes, before_run=step, **timing):
            yield mode, {"status": "ok"} | figure
    except CaptureError as reason:
        yield "graph", {"status": f"not run: {reason}"}
    finally:
        if provider in (COMPILED, AUTOTUNED):
            torch.compiler.reset()
