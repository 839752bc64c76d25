"""Every kernel of an operation timed alone: its launches are captured at the one door, and made again between events.

The launches of one kernel (EFA matches twice) are made ten times in one CUDA graph, so that no host time is in the
figure. What they read was read just before: times are those of a warm L2, as after the kernel that wrote it.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .compiles import counted
from .cuda_clock import graph_of, time_calls
from .measure import spread

__all__ = ["Launched", "captured", "flops", "kernels_of", "moved", "time_kernel", "time_step"]

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
    """Launches are made and collected."""
    import fmfa_losses.kernels as package

    collected: list[Launched] = []
    names = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
    modules = [module for module in map(importlib.import_module, names) if hasattr(module, "launch")]
    door = importlib.import_module(f"{package.__name__}._launch").launch

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        door(kernel, grid, *args, **options)
        collected.append(Launched(kernel, args, options, lambda: door(kernel, grid, *args, **options)))

    try:
        for module in modules:
            module.launch = launch
        yield collected
    finally:
        for module in modules:
            module.launch = door


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


def moved(launches: Sequence[Launched]) -> int:
    """Bytes of the tensors that the launches are given, each once: no kernel can move less of what it needs."""
    return sum(
        sum(value.numel() * value.element_size() for value in launch.arguments.values() if isinstance(value, Tensor))
        for launch in launches
    )


def _match(a: dict[str, Any]) -> float:
    return 2.0 * a["Bx"] * a["P"] * a["Be"] * a["Q"] * a["D"]


def _gathered(a: dict[str, Any]) -> float:
    return 2.0 * a["Bx"] * a["P"] * a["Be"] * a["D"]  # one row of D for every winner


def _scores(products: int) -> Callable[[dict[str, Any]], float]:
    """So many products of [L, N] with D, a sample."""
    return lambda a: 2.0 * products * a["image_ptr"].shape[0] * a["L"] * a["N"] * a["D"]


def _logits(products: int, sides: int, rows: str, columns: str) -> Callable[[dict[str, Any]], float]:
    return lambda a: 2.0 * products * sides * a[rows] * a[columns] * a["D"]


# Operations of a kernel's products by its arguments: the least that gives its results. Kernels that are not here make
# no products, or move bytes for longer than they compute.
FLOPS: dict[str, Callable[[dict[str, Any]], float]] = {
    "_match_kernel": _match,
    "_dx_kernel": _gathered,
    "_de_kernel": _gathered,
    "_forward_kernel": _scores(2),  # s and the weighted sum
    "_statistics_kernel": _scores(2),  # s and da
    "_dtext_kernel": _scores(3),  # s, da, ds v
    "_dimage_kernel": _scores(4),  # s, da, a^T djoint, ds^T t
    "_row_loss_kernel": _logits(1, 2, "X", "Y"),
    "_gradient_kernel": _logits(2, 2, "X", "Y"),  # the logits and one gradient
}


def flops(launches: Sequence[Launched]) -> float:
    """0 where they are not counted: a time without its roof is better than none."""
    try:
        return sum(FLOPS[launch.name](launch.arguments) if launch.name in FLOPS else 0.0 for launch in launches)
    except KeyError:  # a kernel whose arguments have other names by now; the tests say so
        return 0.0


def seconds_at(operations: float, moved: float, precision: str, ceilings: dict[str, float]) -> float:
    """The least time: whichever of the two takes longer at the measured ceilings."""
    return max(operations / ceilings[precision], moved / ceilings["copy"])


def measure(step: Callable[[], Any], often: int = IN_A_GRAPH) -> Iterator[dict[str, Any]]:
    """One record a kernel of a step: time, launches, counted operations and bytes, blocks."""
    from .compile_check import describe

    for name, launches in kernels_of(step)[0].items():
        yield {
            "kernel": name,
            "config": describe(launches[0]),
            "launches": len(launches),
            "flops": flops(launches),
            "bytes": moved(launches),
            "ms": time_kernel(launches, often),
            "status": "ok",
        }
    torch.cuda.synchronize()
