"""Every kernel of an operation timed alone: its launches are captured in `launch`, and made again between events.

The launches of one kernel (EFA matches twice) are made ten times in one CUDA graph, so that no host time is in the
figure. Their inputs are in the L2 cache, as they are in a step, where another kernel has just written them.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..measure import spread
from .compiles import counted
from .cuda_clock import graph_of, time_calls
from .kernel_work import bytes_of, flops_of

__all__ = ["Launched", "captured", "kernels_of", "measure", "time_kernel", "time_step"]

IN_A_GRAPH = 10


@dataclass(frozen=True)
class Launched:
    """A launch as its launcher made it, and how to make it again."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    again: Callable[[], None]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def arguments(self) -> dict[str, Any]:
        values = (getattr(arg, "tensor", arg) for arg in self.args)  # what a launcher calls Strided
        return dict(zip(self.kernel.arg_names, values, strict=False)) | self.options


@contextmanager
def captured() -> Iterator[list[Launched]]:
    """Launches are made and collected.

    Collected are other tensors of the same memory: a result of the step would keep its graph alive, whose leaves belong
    to the stream of that step, and no later step could be captured.
    """
    import fmfa_losses.kernels as package

    collected: list[Launched] = []
    names = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    modules = [module for module in map(importlib.import_module, names) if hasattr(module, "launch")]
    door = importlib.import_module(f"{package.__name__}._launch").launch

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        door(kernel, grid, *args, **options)
        args = tuple(map(_without_graph, args))
        collected.append(Launched(kernel, args, options, lambda: door(kernel, grid, *args, **options)))

    try:
        for module in modules:
            module.launch = launch
        yield collected
    finally:
        for module in modules:
            module.launch = door


def _without_graph(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return arg.detach()
    return arg._replace(tensor=arg.tensor.detach()) if hasattr(arg, "tensor") else arg  # Strided


def kernels_of(step: Callable[[], Any]) -> tuple[dict[str, list[Launched]], Any]:
    """The launches of a step by kernel, in the order in which kernels come; and what the step returned."""
    with captured() as launches:
        result = step()
    found: dict[str, list[Launched]] = {}
    for launch in launches:
        found.setdefault(launch.name, []).append(launch)
    return found, result


def time_kernel(launches: Sequence[Launched], often: int = IN_A_GRAPH) -> dict[str, float]:
    """Milliseconds of all the launches of one kernel together; its step has compiled it."""

    def together() -> None:
        for launch in launches:
            launch.again()

    return time_step(together, often)


def time_step(step: Callable[[], Any], often: int = IN_A_GRAPH, repeats: int = 7) -> dict[str, float]:
    """Milliseconds of a step, made `often` times in one CUDA graph; it must have run before."""

    def repeatedly() -> None:
        for _ in range(often):
            step()

    with counted() as compiles:
        graph, _ = graph_of(repeatedly)
        graph.replay()
        times = time_calls(graph.replay, repeats)
        if compiles.kernels:
            raise RuntimeError("a kernel was compiled while it was timed")
    return spread([time / often for time in times])


def measure(step: Callable[[], Any], often: int = IN_A_GRAPH) -> Iterator[dict[str, Any]]:
    """One record a kernel of a step: time, launches, counted operations and bytes, blocks."""
    from ..compile_check import describe

    for name, launches in kernels_of(step)[0].items():
        yield {
            "kernel": name,
            "config": describe(launches[0]),
            "launches": len(launches),
            "flops": flops_of(name, [launch.arguments for launch in launches]),
            "bytes": bytes_of([launch.arguments for launch in launches]),
            "ms": time_kernel(launches, often),
            "status": "ok",
        }
    torch.cuda.synchronize()
