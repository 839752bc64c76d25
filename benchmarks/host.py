"""Host time of one eager training step, without a GPU: how long Python, torch and Triton take to issue its work.

    python -m benchmarks host [--steps 200] [--out FILE]

A GPU that is faster than the host waits for it, which decides the time of a small batch. What is timed here is forward
and backward of A-SDM and EFA, ours and the plain reference, at sizes so small that the arithmetic of the CPU hardly
counts. Triton's launches go through its own JIT to the stand-in of `benchmarks/stand_in`, which launches nothing; what
torch computes it does compute, with one thread. So a figure holds all that the host does for a launch but the driver's
part, a few microseconds each for ours and for the reference, and in exchange the arithmetic of tiny operations. The
stand-in counts launches in a step of its own: counting takes time, and is off while the clock runs.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fmfa_losses.functional import asdm_loss, efa_loss

from . import results, stand_in
from .providers import REFERENCE, TORCH, TRITON, reference

SIZES = {"B": 4, "L": 3, "N": 5, "D": 16}
PROVIDERS = (TRITON, TORCH, REFERENCE)
ROUNDS, WARM_UP = 10, 3  # turns of a provider, steps before the clock runs in each


@dataclass(frozen=True)
class Row:
    """Microseconds of processor time in one step."""

    op: str
    provider: str
    launches: int  # on the device: Triton's, and torch's
    triton: int
    minimum: float
    median: float
    steps: int


def inputs(op: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """What the loss differentiates, and its other arguments."""
    B, L, N, D = SIZES.values()
    shapes = [(B, D), (B, D)] if op == "asdm" else [(B, N, D), (B, L, D)]
    leaves = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    return leaves, (torch.arange(B) // 2,) if op == "asdm" else ()


def step_of(op: str, provider: str) -> Callable[[], Any]:
    """One training step: the loss and the gradients of its inputs."""
    leaves, others = inputs(op)
    if provider == REFERENCE:
        loss = reference(op)
    else:
        ours, backend = {"asdm": asdm_loss, "efa": efa_loss}[op], {TRITON: "triton", TORCH: "torch"}[provider]
        loss = lambda *tensors: ours(*tensors, backend=backend)  # type: ignore[operator]  # noqa: E731
    return lambda: torch.autograd.grad(loss(*leaves, *others), leaves)


def measure(op: str, steps: int) -> list[Row]:
    """All providers by turns, so that what disturbs one disturbs all; `ROUNDS` steps of each at least.

    Several steps a turn: the first one after another provider's takes up to twice as long.
    """
    steps = max(steps, ROUNDS)
    functions, counted = {name: step_of(op, name) for name in PROVIDERS}, {}
    times: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    with stand_in.gpu() as device:
        for name, step in functions.items():
            step()
            with device.step() as counts:
                step()
            counted[name] = counts
        with _uncounted():
            for _ in range(ROUNDS):
                for name, step in functions.items():
                    for _ in range(WARM_UP):
                        step()
                    for _ in range(steps // ROUNDS):
                        before = time.thread_time()
                        step()
                        times[name].append(1e6 * (time.thread_time() - before))
    return [
        Row(
            op, name, counted[name].device_launches, len(counted[name].launches),
            round(min(taken), 1), round(statistics.median(taken), 1), len(taken),
        )
        for name, taken in times.items()
    ]  # fmt: skip


@contextmanager
def _uncounted() -> Iterator[None]:
    """Without the stand-in's mode, which counts; tensors still hide their values from the host, as a GPU's do."""
    holders = [m for key, m in sys.modules.items() if key.startswith("fmfa_losses.") and hasattr(m, "on_host")]
    with ExitStack() as stack:
        for module in holders:
            stack.enter_context(mock.patch.object(module, "on_host", lambda tensor: False))
        stack.enter_context(_disable_current_modes())
        yield


def rows(steps: int) -> list[Row]:
    """A-SDM and EFA, with one thread and without the garbage collector, which runs when it likes."""
    torch.manual_seed(0)
    threads, collects = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    gc.disable()
    try:
        return [row for op in ("asdm", "efa") for row in measure(op, steps)]
    finally:
        torch.set_num_threads(threads)
        if collects:
            gc.enable()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks host", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="timed steps of each")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there, as JSON")
    options = parser.parse_args(argv)
    measured = rows(options.steps)
    print(f"{'':5}{'':33}{'launches':>9}{'Triton':>8}{'min, us':>9}{'median, us':>12}")
    for row in measured:
        print(f"{row.op:5}{row.provider:33}{row.launches:9}{row.triton:8}{row.minimum:9.0f}{row.median:12.0f}")
    if options.out:
        note = f"Processor time of the host, {SIZES}, float32; what the GPU's driver takes is not in it."
        head = results.head("host", f"python -m benchmarks host --steps {options.steps}", note=note, threads=1)
        results.write(options.out, head | {"records": [asdict(row) for row in measured]})
        print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
