"""The CPU under the name of a CUDA device, as far as the benchmark looks at one: for dry runs and tests.

Everything is computed (kernels by Triton's interpreter, with TRITON_INTERPRET=1), nothing that is timed means anything.
A captured graph replays nothing: its outputs are what the capture computed.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from ..cases import Case
from . import device, plan, roofline

__all__ = ["CUDA", "install"]


class Event:
    """An event of a device that computes at once."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "Event") -> float:
        return max(1e3 * (later.time - self.time), 1e-6)


class Stream:
    def wait_stream(self, other: Any) -> None:
        pass


class CUDAGraph:
    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def replay(self) -> None:
        pass


@contextmanager
def _context(*args: Any, **options: Any) -> Iterator[None]:
    yield


def _nothing(*args: Any, **options: Any) -> None:
    pass


PROPERTIES = SimpleNamespace(
    name="stand-in (CPU)", total_memory=2**34, multi_processor_count=132, L2_cache_size=0, major=9, minor=0
)
# What of torch.cuda the benchmark uses.
CUDA: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "get_device_properties": lambda index=0: PROPERTIES,
    "get_device_name": lambda index=0: PROPERTIES.name,
    "get_device_capability": lambda index=0: (9, 0),
    "mem_get_info": lambda index=0: (2**33, 2**34),
    "memory_allocated": lambda index=0: 0,
    "max_memory_allocated": lambda index=0: 2**20,
    "max_memory_reserved": lambda index=0: 2**21,
    "current_stream": lambda index=0: Stream(),
    "get_sync_debug_mode": lambda: 0,
    "Event": Event,
    "Stream": Stream,
    "CUDAGraph": CUDAGraph,
    "graph": _context,
    "stream": _context,
    **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats", "set_sync_debug_mode"), _nothing),
    "set_per_process_memory_fraction": _nothing,
}


def install(set: Callable[[Any, str, Any], None] = setattr) -> None:
    """`set(object, name, value)` makes the changes: setattr, or a test's monkeypatch.setattr, which takes them back."""
    for name, function in CUDA.items():
        set(torch.cuda, name, function)
    set(torch, "compile", lambda fn, **options: fn)
    set(device, "NAME", "cpu")
    set(roofline, "COPY_BYTES", 2**12)
    set(roofline, "MATMUL_SIZE", 16)
    from fmfa_losses.kernels import _asdm, asdm_tiles

    takes = asdm_tiles.takes
    large = plan.LARGE_TOY
    # A-SDM keeps [B, B] from 257 to 1024 pairs; larger batches have kernels of their own in float32.
    middle = plan.toy(Case("asdm", 256)).B, plan.toy(Case("asdm", 1024)).B
    for table, pairs in zip(("SMALL", "KEPT"), middle, strict=True):
        set(_asdm, table, dict.fromkeys(getattr(_asdm, table), pairs))
    set(
        asdm_tiles,
        "takes",
        lambda q, k: takes(q, k) and (len(k) < large or k.dtype != torch.float32),
    )
