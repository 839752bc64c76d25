"""Counts the Triton kernels that this process compiles or loads from a cache, ours and other people's alike."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Compiles", "counted"]


class Compiles:
    kernels = 0
    seconds = 0.0


@contextmanager
def counted() -> Iterator[Compiles]:
    """Every kernel that Triton makes ready between entry and exit is counted in what is yielded."""
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:  # no Triton, nothing to compile
        yield Compiles()
        return
    count, original = Compiles(), JITFunction._do_compile

    def compile_counted(self: Any, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(self, *args, **options)
        finally:
            count.kernels += 1
            count.seconds += time.perf_counter() - start

    JITFunction._do_compile = compile_counted
    try:
        yield count
    finally:
        JITFunction._do_compile = original
