"""`launch`, through which every kernel is started; the class of chip and the precision that choose its block sizes.

`recording()` collects launches instead of making them. `python -m benchmarks compile-check` and `tune` run launchers
under it on meta tensors: they see the kernel, argument types, compile-time sizes and block table that a GPU would get.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

KIB = 1024
# Bytes of shared memory that one block can have.
SHARED_MEMORY = {
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "gfx942": 64 * KIB,
}
# The columns of a block table. BLACKWELL is what differs from LARGE, where anything does.
LARGE, BLACKWELL, MEDIUM, SMALL, LDS = "227 KiB", "227 KiB and tensor memory", "163 KiB", "99 KiB", "64 KiB"


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


class Strided(NamedTuple):
    """An argument of `launch` whose strides the kernel is told among its other arguments."""

    tensor: Tensor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Makes the launch, or records it.

    A kernel that is not told a tensor's strides reads it as contiguous, and past its storage where it is expanded. So
    every tensor passed here is contiguous, or its launcher says `Strided`.
    """
    args = tuple(_pointed_to(kernel, number, arg) for number, arg in enumerate(args))
    if _Recorder.launches is not None:
        _Recorder.launches.append(Launch(kernel, grid, args, options))
    else:
        kernel[grid](*args, **options)


def _pointed_to(kernel: Any, number: int, arg: Any) -> Any:
    if isinstance(arg, Strided):
        return arg.tensor
    if isinstance(arg, Tensor) and not arg.is_contiguous():
        raise RuntimeError(
            f"{kernel.__name__} reads {kernel.arg_names[number]} as contiguous, got shape {list(arg.shape)} with "
            f"strides {list(arg.stride())}; the launcher must make it contiguous, or pass Strided(...) and its "
            "strides: a fault of fmfa-losses, please report it"
        )
    return arg


def contiguous(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()


def by_device(scale: Tensor | float, like: Tensor) -> tuple[Tensor | None, float]:
    """A scale on the accelerator is read there; one on the CPU is at hand without waiting."""
    if isinstance(scale, Tensor) and scale.device == like.device:
        return scale, 1.0
    return None, float(scale)


def choose(table: dict[tuple[str, str], Any], like: Tensor, kind: str | None = None) -> Any:
    """The entry of a block table for a tensor's device and precision, or for products made as `kind`."""
    memory, kind = chip_class(like.device), kind or precision(like.dtype)
    return table[memory if (memory, kind) in table else LARGE, kind]


def chip_class(device: torch.device) -> str:
    if _Recorder.chip is not None:
        major, minor = divmod(int(_Recorder.chip[3:]), 10) if _Recorder.chip.startswith("sm_") else (0, 0)
    elif device.type != "cuda":
        return LARGE  # the interpreter
    else:
        major, minor = (0, 0) if torch.version.hip is not None else torch.cuda.get_device_capability(device)
    if major == 8:
        return MEDIUM if minor in (0, 7) else SMALL
    return {9: LARGE, 10: BLACKWELL, 11: BLACKWELL, 12: SMALL}.get(major, LDS)


def precision(dtype: torch.dtype) -> str:
    """How float32 products are made: torch's own setting decides; other types have one way only."""
    if dtype != torch.float32:
        return "half"
    matmul = torch.backends.cuda.matmul
    # Since torch 2.9 this switch follows the two older ones, which raise or warn once it was set itself.
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    allowed = matmul.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"


def match_precision(like: Tensor) -> str:
    """Of the match of hard similarity: "tf32x3", three products of TF32, where torch asks for "high" float32 products.

    Which token wins is a matter of digits that one product of TF32 does not have; "medium" takes it all the same.
    """
    kind = precision(like.dtype)
    return "tf32x3" if kind == "tf32" and _matmul_precision() != "medium" else kind


def _matmul_precision() -> str:
    """torch.get_float32_matmul_precision(), which raises or warns where newer switches were set by hand: "high"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return torch.get_float32_matmul_precision()
    except (RuntimeError, Warning):
        return "high"


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of tl.dot, which only float32 operands read."""
    return "tf32" if precision(dtype) == "tf32" else "ieee"


def all_registers(device: torch.device, num_warps: int = 8) -> dict[str, int]:
    """Launch option: unasked, ptxas aims at two blocks a multiprocessor and spills the odd value to get there."""
    if _Recorder.chip is not None:
        nvidia = _Recorder.chip.startswith("sm_")
    else:
        nvidia = device.type == "cuda" and torch.version.hip is None
    return {"maxnreg": min(255, 2048 // num_warps)} if nvidia else {}


def multiprocessors(device: torch.device) -> int:
    """Of a recorded launch those of an H100; the interpreter has few, so that a program has several tiles."""
    if _Recorder.chip is not None:
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def on_device(like: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the tensor's device, whichever is current."""
    return torch.cuda.device(like.device) if like.is_cuda else nullcontext()
