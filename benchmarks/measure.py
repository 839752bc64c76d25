"""Time and peak memory of one provider on one case on the CPU, and what the CPU and a CUDA device share.

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

__all__ = [
    "AGREEMENT",
    "DTYPES",
    "FINGERPRINT",
    "MATMUL",
    "PASSES",
    "autocast",
    "disagreement",
    "fingerprint",
    "matmul_precision",
    "matmul_rate",
    "measure_cpu",
    "sample",
    "spread",
]

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "tf32x3": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# What torch.set_float32_matmul_precision is given; "highest" for the others. By "high" the match of hard similarity is
# made of three products of TF32, and everything else is TF32, as it is by "medium" (kernels/_launch.py).
MATMUL = {"tf32": "medium", "tf32x3": "high"}
PASSES = ("forward", "backward", "both")
FINGERPRINT = ("value", "gradient_norm")
LONG = 10.0  # seconds

# Relative difference in value and gradient norm beyond which two providers have not computed the same. Rounding flips
# near ties between winners, which changes gradients more than values.
AGREEMENT = {"fp32": 1e-3, "tf32": 1e-2, "tf32x3": 1e-2, "bf16": 5e-2, "fp16": 1e-2}


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile; linear between the samples."""
    quantiles = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    p20, median, p80 = (float(f"{q:.5g}") for q in quantiles.tolist())
    return {"median": median, "p20": p20, "p80": p80}


def measure_cpu(
    fn: Callable[..., Tensor], arguments: dict[str, Any], *, seconds: float = 5.0, compiled: bool = False
) -> dict[str, Any]:
    """Repeats for `seconds`, 200 times at most, and 3 at least, unless they take more than `LONG` seconds.

    A warm-up of more than `LONG` seconds is the measurement, but where it compiles: what is done once is nothing beside
    it. Run it in a fresh process: the peak is the process's. `process_mib` is all of it, `above_inputs_mib` what came
    on top of inputs and libraries, gradients included. `sample` is some of the output, by which orders are compared.
    """
    targets = leaves(arguments)
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    value, grads, first = _run(fn, arguments, targets)
    result: dict[str, Any] = fingerprint(value, grads) | {"sample": sample(value)}
    del value, grads
    while time.perf_counter() - start < min(0.2, seconds):
        _run(fn, arguments, targets)
    long = first[-1] - first[0] > LONG and not compiled
    steps = [first] if long else _repeated(lambda: _run(fn, arguments, targets)[2], seconds)
    peak = peak_process_bytes()
    for name, times in zip(PASSES, zip(*map(_durations, steps), strict=True), strict=True):
        if targets or name == "forward":
            result[name] = spread([1e3 * duration for duration in times])
    return result | {
        "repeats": len(steps),
        "process_mib": round(peak / 2**20),
        "above_inputs_mib": round(max(0, peak - before) / 2**20),
    }


def _repeated(step: Callable[[], list[float]], seconds: float) -> list[list[float]]:
    start, steps = time.perf_counter(), [step()]
    while len(steps) < 200:
        elapsed = time.perf_counter() - start
        if elapsed >= (LONG if len(steps) < 3 else seconds):
            break
        steps.append(step())
    return steps


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


def sample(value: Tensor) -> list[float]:
    """Eight numbers of the output, evenly spaced: a sum does not show that rows and columns were exchanged."""
    flat = value.detach().flatten()
    return [float(x) for x in flat[:: max(1, flat.numel() // 8)][:8]]


def disagreement(row: dict[str, Any], baseline: dict[str, Any], tolerance: float) -> str | None:
    """Why two providers cannot have computed the same, or None."""
    pairs = [(key, row[key], baseline[key], max(abs(row[key]), abs(baseline[key]))) for key in FINGERPRINT]
    if "sample" in row and "sample" in baseline:
        scale = max(map(abs, baseline["sample"]))
        both = zip(row["sample"], baseline["sample"], strict=True)
        pairs += [("one of the outputs", mine, theirs, scale) for mine, theirs in both]
    for key, a, b, scale in pairs:
        if not abs(a - b) <= tolerance * scale:
            return f"{key} {a:.6g}, where {baseline['provider']} has {b:.6g}"
    return None


def matmul_rate(size: int, repeats: int = 15) -> float:
    """Operations a second of a large float32 product, the median: what no implementation on this machine exceeds."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out, times = torch.zeros(size, size), []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / spread(times[2:])["median"]


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
    """float32 products in IEEE arithmetic unless TF32, or three of its products, is what is measured."""
    torch.set_float32_matmul_precision(MATMUL.get(name, "highest"))


def autocast(name: str, device: str) -> AbstractContextManager[Any]:
    """Lets plain PyTorch multiply in the 16 bits that its inputs have; nothing for 32 bits."""
    dtype = DTYPES[name]
    return nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype=dtype)
