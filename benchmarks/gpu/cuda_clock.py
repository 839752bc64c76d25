"""Time on a CUDA device: steps between events, steps replayed as CUDA graphs, single launches.

Nothing is compiled inside a timed region: steps are repeated until one round over all inputs compiles nothing, and a
figure during which a kernel was compiled all the same is refused.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..cases import leaves
from ..measure import PASSES, cotangent, fingerprint, spread
from .compiles import counted

__all__ = ["CaptureError", "events", "graph_of", "measure_cuda", "time_calls"]

ROUNDS = 6  # over all inputs at most, before a step that still compiles is refused


class CaptureError(RuntimeError):
    """A step waits for the device, and so cannot become a CUDA graph."""


def events(number: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(number)]


def time_calls(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each call."""
    marks = events(repeats + 1)
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def graph_of(call: Callable[[], Any], pool: Any = None) -> tuple[Any, Any]:
    """A CUDA graph of one call (warmed up before on another stream), and what the call returned while captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # An old graph that is garbage-collected while another is captured makes the capture fail.
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph, **({} if pool is None else {"pool": pool})):
            result = call()
    finally:
        gc.enable()
    return graph, result


def measure_cuda(
    fn: Callable[..., Tensor],
    make_inputs: Callable[[int], dict[str, Any]],
    *,
    modes: Sequence[str] = ("eager",),
    seconds: float = 0.5,
    least: int = 5,
    before_run: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(mode, measurement) for each of "eager" and "graph" that is asked for, as soon as it is there.

    A figure is refused when a kernel was compiled while it was timed, and when an input has a gradient of zeros: random
    inputs have none, so a backward was left out, or came too late to be timed.

    Input sets rotate, so many that none is still in L2 when its turn comes. `above_mib` is the peak of allocated memory
    above inputs and their gradients. `first_call_s` is all of the first call, `compiled` what Triton did in warming up.
    """
    sets = input_sets(make_inputs)
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()

    def step(arguments: dict[str, Any], marks: Sequence[torch.cuda.Event] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
        before_run()
        if marks:
            marks[0].record()
        value = fn(**arguments)
        if marks:
            marks[1].record()
        grads = torch.autograd.grad(value, leaves(arguments), cotangent(value))
        if marks:
            marks[2].record()
        return value.detach(), grads

    with counted() as compiles:
        start = time.perf_counter()
        value, grads = step(sets[0])
        torch.cuda.synchronize()
        warm: dict[str, Any] = {"first_call_s": round(time.perf_counter() - start, 2)}
        gradient_bytes = sum(grad.numel() * grad.element_size() for grad in grads)
        del value, grads
        for _ in range(ROUNDS):
            before = compiles.kernels
            for arguments in sets:
                step(arguments)
            torch.cuda.synchronize()
            if compiles.kernels == before:
                break
        # Of a step as it is timed: a compiler that tries its kernels out in the first call can spoil what that returns.
        value, grads = step(sets[0])
        found, zeros = fingerprint(value, grads), _zeros(grads)
        del value, grads
        warm |= {"compiled": compiles.kernels, "compile_s": round(compiles.seconds, 2), "input_sets": len(sets)}
        before = compiles.kernels
        if "eager" in modes:
            figure = _eager(step, sets, base + gradient_bytes, seconds, least)
            yield "eager", _refused(found | warm | figure, compiles.kernels - before, zeros)
        if "graph" in modes:
            before = compiles.kernels
            figure = _graph(step, sets, seconds, least)
            yield "graph", _refused(warm | figure, compiles.kernels - before, zeros)


def input_sets(make_inputs: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Enough of them to leave L2, in a sixteenth of the free memory at most: a large case leaves it by itself."""
    sets = [make_inputs(0)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in leaves(sets[0]))
    cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 * 2**20)
    count = min(8, 1 + int(2 * cache // size), 1 + int(torch.cuda.mem_get_info()[0] // 16 // size))
    return sets + [make_inputs(seed) for seed in range(1, count)]


def _zeros(grads: Sequence[Tensor]) -> int:
    """How many gradients are zero everywhere."""
    return sum(not bool(grad.any()) for grad in grads)


def _refused(figure: dict[str, Any], compiled: int, zeros: int) -> dict[str, Any]:
    zeros = max(zeros, figure.pop("zeros", 0))
    if not compiled and not zeros:
        return figure
    kept = {name: value for name, value in figure.items() if name not in PASSES}
    if zeros:
        return kept | {"status": f"failed: {zeros} gradients are zero everywhere"}
    return kept | {"status": f"failed: {compiled} kernels were compiled while it was timed"}


def _eager(step: Callable[..., Any], sets: list[Any], base: int, seconds: float, least: int) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step(sets[0])
    torch.cuda.synchronize()
    once = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - base
    repeats = int(min(200, max(least, seconds / max(once, 1e-5))))
    marks = [events(3) for _ in range(repeats)]
    for number, mark in enumerate(marks):
        step(sets[number % len(sets)], mark)
    torch.cuda.synchronize()
    pairs = ((0, 1), (1, 2), (0, 2))
    times = {name: [m[a].elapsed_time(m[b]) for m in marks] for name, (a, b) in zip(PASSES, pairs, strict=True)}
    figure = {name: spread(values) for name, values in times.items()}
    return figure | {"repeats": repeats, "above_mib": round(peak / 2**20, 1)}


def _graph(step: Callable[..., Any], sets: list[Any], seconds: float, least: int) -> dict[str, Any]:
    """Forward and backward as one graph an input set; they share memory, since only one runs at a time."""
    _check_capturable(lambda: step(sets[0]))
    first, result = graph_of(lambda: step(sets[0]))
    first.replay()
    torch.cuda.synchronize()
    found = fingerprint(*result) | {"zeros": _zeros(result[1])}  # before another graph uses the memory
    graphs = [first] + [graph_of(lambda s=s: step(s), first.pool())[0] for s in sets[1:4]]
    for graph in graphs:
        graph.replay()
    once = max(time_calls(graphs[0].replay, 3)) / 1e3
    repeats = int(min(200, max(least, seconds / max(once, 1e-5))))
    turns = iter(range(repeats))
    times = time_calls(lambda: graphs[next(turns) % len(graphs)].replay(), repeats)
    return found | {"both": spread(times), "repeats": repeats, "graphs": len(graphs)}


def _check_capturable(call: Callable[[], object]) -> None:
    """A capture that fails can leave the allocator in capture mode, so a step that would fail is found beforehand."""
    import warnings

    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode warns that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise CaptureError("no CUDA graph: the step waits for the device") from None
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode(before)
