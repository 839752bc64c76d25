"""Where a kernel runs and in which blocks; the one door through which every launch goes.

`recording()` collects launches instead of making them. The compile gate and the tuner run the launchers under it on
meta tensors, so that what they see is what a GPU would get: kernel, argument types, compile-time sizes, block table.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KIB = 1024
# Shared memory one block can have. A chip that is not listed takes the largest entry that it can hold.
SHARED_MEMORY = {
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "gfx942": 64 * KIB,
}
LARGE, MEDIUM, SMALL, LDS = 227, 163, 99, 64  # KiB: the classes that block tables speak of


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]  # compile-time sizes, num_warps, num_stages


class _Recorder:
    launches: list[Launch] | None = None
    chip: str | None = None


@contextmanager
def recording(chip: str) -> Iterator[list[Launch]]:
    """Launches for `chip` (a key of SHARED_MEMORY) are collected in the list, not made."""
    before = _Recorder.launches, _Recorder.chip
    _Recorder.launches, _Recorder.chip = [], chip
    try:
        yield _Recorder.launches
    finally:
        _Recorder.launches, _Recorder.chip = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    if _Recorder.launches is not None:
        _Recorder.launches.append(Launch(kernel, grid, args, options))
    else:
        kernel[grid](*args, **options)


def memory_class(device: torch.device) -> int:
    """LARGE, MEDIUM, SMALL or LDS: the block table's column for this device."""
    if _Recorder.chip is not None:
        available = SHARED_MEMORY[_Recorder.chip]
    elif device.type != "cuda":
        available = LARGE * KIB  # the interpreter
    elif torch.version.hip is not None:
        available = LDS * KIB
    else:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) in ((8, 0), (8, 7)):
            available = MEDIUM * KIB
        elif major in (9, 10, 11):
            available = LARGE * KIB
        else:
            available = SMALL * KIB if major >= 8 else LDS * KIB
    return next(size for size in (LARGE, MEDIUM, SMALL, LDS) if size * KIB <= available)


def precision(dtype: torch.dtype) -> str:
    """How float32 products are made: torch's own setting decides; other types have one way only."""
    if dtype != torch.float32:
        return "half"
    allowed = torch.backends.cuda.matmul.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot, which only float32 operands read."""
    return "tf32" if precision(dtype) == "tf32" else "ieee"


def on_device(like: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the tensor's device, whichever is current."""
    return torch.cuda.device(like.device) if like.is_cuda else nullcontext()
