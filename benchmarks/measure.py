"""Time and peak memory of one provider on one case, on the CPU or on a CUDA device.

A pass is timed as training runs it: the forward keeps what its backward needs. One warm-up at least is thrown away.
"""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from .cases import leaves

__all__ = ["DTYPES", "PASSES", "autocast", "disagreement", "matmul_precision", "measure_cpu", "measure_cuda", "spread"]

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = ("forward", "backward", "both")


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile; linear between the samples."""
    quantiles = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    p20, median, p80 = (float(f"{q:.5g}") for q in quantiles.tolist())
    return {"median": median, "p20": p20, "p80": p80}


def measure_cpu(fn: Callable[..., Tensor], arguments: dict[str, Any], *, seconds: float = 5.0) -> dict[str, Any]:
    """Repeats for `seconds` (3 times at least, 200 at most). Run it in a fresh process: the peak is the process's.

    `process_mib` is all of it, `above_inputs_mib` what came on top of inputs and libraries, gradients included.
    """
    targets = leaves(arguments)
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    value, grads = _run(fn, arguments, targets)[:2]
    result: dict[str, Any] = fingerprint(value, grads)
    del value, grads
    while time.perf_counter() - start < min(0.2, seconds):
        _run(fn, arguments, targets)
    times: dict[str, list[float]] = {name: [] for name in PASSES}
    start = time.perf_counter()
    while len(times["both"]) < 3 or (time.perf_counter() - start < seconds and len(times["both"]) < 200):
        stamps = _run(fn, arguments, targets)[2]
        for name, duration in zip(PASSES, _durations(stamps), strict=True):
            times[name].append(duration * 1e3)
    peak = peak_process_bytes()
    result |= {name: spread(times[name]) for name in (PASSES if targets else ("forward",))}
    return result | {
        "repeats": len(times["both"]),
        "process_mib": round(peak / 2**20),
        "above_inputs_mib": round(max(0, peak - before) / 2**20),
    }


def _run(
    fn: Callable[..., Tensor], arguments: dict[str, Any], targets: list[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...], list[float]]:
    stamps = [time.perf_counter()]
    value = fn(**arguments)
    stamps.append(time.perf_counter())
    grads = torch.autograd.grad(value, targets, cotangent(value)) if targets else ()
    stamps.append(time.perf_counter())
    return value.detach(), grads, stamps


def _durations(stamps: Sequence[float]) -> tuple[float, float, float]:
    start, middle, end = stamps
    return middle - start, end - middle, end - start


def cotangent(value: Tensor) -> Tensor:
    """A gradient for the output that is neither constant nor zero; for a loss a scale, as fp16 training needs one."""
    if value.ndim == 0:
        return torch.full_like(value, 1024)
    return torch.linspace(0.5, 1.5, value.numel(), device=value.device, dtype=value.dtype).view(value.shape)


def fingerprint(value: Tensor, grads: Sequence[Tensor]) -> dict[str, float]:
    """Two numbers by which providers of one case are seen to compute the same."""
    # Without copies in float64, which would count as memory of what is measured.
    norms = [torch.linalg.vector_norm(grad.detach(), dtype=torch.float64) for grad in grads]
    norm = torch.stack(norms).square().sum().sqrt().item() if norms else 0.0
    return {"value": value.double().sum().item(), "gradient_norm": norm}


def disagreement(row: dict[str, Any], baseline: dict[str, Any], tolerance: float) -> str | None:
    """Why two providers cannot have computed the same, or None."""
    for key in ("value", "gradient_norm"):
        a, b = row[key], baseline[key]
        if not abs(a - b) <= tolerance * max(abs(a), abs(b)):
            return f"{key} {a:.6g}, where {baseline['provider']} has {b:.6g}"
    return None


def peak_process_bytes() -> int:
    """Largest resident memory of this process.

    Linux carries the parent's peak over to a child's ru_maxrss; VmHWM starts anew with the program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matmul_precision(name: str) -> None:
    """float32 products in IEEE arithmetic unless TF32 is what is measured."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")


def autocast(name: str, device: str) -> AbstractContextManager[Any]:
    """Lets plain PyTorch multiply in the 16 bits that its inputs have; nothing for 32 bits."""
    dtype = DTYPES[name]
    return nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype=dtype)


def measure_cuda(
    fn: Callable[..., Tensor],
    make_inputs: Callable[[int], dict[str, Any]],
    *,
    seconds: float = 1.0,
    before_run: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Times with CUDA events over several input sets, so many that none is still in L2 when its turn comes.

    `above_mib` is the peak of allocated memory above inputs and their gradients.
    """
    sets = [make_inputs(0)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in leaves(sets[0]))
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 * 2**20)
    # Not more than a sixteenth of the free memory goes to the sets: a large case leaves the cache by itself.
    count = min(8, 1 + int(2 * cache // size), 1 + int(torch.cuda.mem_get_info()[0] // 16 // size))
    sets += [make_inputs(seed) for seed in range(1, count)]
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()

    def run(arguments: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...], list[torch.cuda.Event]]:
        before_run()
        targets, events = leaves(arguments), [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        value = fn(**arguments)
        events[1].record()
        grads = torch.autograd.grad(value, targets, cotangent(value))
        events[2].record()
        return value.detach(), grads, events

    value, grads, _ = run(sets[0])
    result: dict[str, Any] = fingerprint(value, grads)
    gradient_bytes = sum(grad.numel() * grad.element_size() for grad in grads)
    del value, grads
    for arguments in [*sets, *sets]:  # compilers, autotuners and captured graphs have settled
        run(arguments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run(sets[0])
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - base - gradient_bytes

    repeats = int(min(200, max(5, seconds / max(once, 1e-5))))
    recorded = [run(sets[i % count])[2] for i in range(repeats)]
    torch.cuda.synchronize()
    times = {name: [] for name in PASSES}
    for first, middle, last in recorded:
        for name, (a, b) in zip(PASSES, ((first, middle), (middle, last), (first, last)), strict=True):
            times[name].append(a.elapsed_time(b))
    result |= {name: spread(times[name]) for name in PASSES}
    return result | {"repeats": repeats, "input_sets": count, "above_mib": round(peak / 2**20, 1)}
