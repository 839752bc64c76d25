"""What the tests on a CUDA device share: the skip with its reason, token sets with clear winners, the error budget."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from benchmarks.budget import allowed_error, relative_error
from benchmarks.measure import DTYPES
from benchmarks.measure import matmul_precision as set_matmul_precision
from helpers.budget import assert_within_budget
from helpers.compare import value_and_grads

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def needs_memory(gib: int) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of device memory, {free:.0f} are free")


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """float32 products as benchmarks/measure.py makes them for that precision."""
    before = torch.get_float32_matmul_precision()
    set_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def waiting_raises() -> Iterator[None]:
    """Whatever makes the host wait for the device raises inside."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        _set_sync_debug_mode("error")
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # setting it warns of a prototype, after the mode has changed
        torch.cuda.set_sync_debug_mode(mode)


def captured_step(step: Callable[[], Sequence[Tensor]]) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
    """A step as a CUDA graph, and the tensors into which it replays. They must have no graph of autograd's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def compiled() -> dict[str, int]:
    """How often each kernel of the library was compiled in this process so far."""
    modules = [module for name, module in sys.modules.items() if name.startswith("fmfa_losses.kernels.")]
    kernels = {id(k): k for module in modules for k in vars(module).values() if hasattr(k, "device_caches")}
    return {k.__name__: sum(len(cache[0]) for cache in k.device_caches.values()) for k in kernels.values()}


def clear_tokens(B: int, T: int, D: int, *, directions: Tensor, seed: int) -> Tensor:
    """[B, T, D]: token t points along direction t modulo their number, the further from it the later its copy.

    The best match of a token has a cosine well apart from the second best, so that no precision picks another winner,
    and gradients of all precisions can be compared.
    """
    generator = torch.Generator().manual_seed(seed)
    M = len(directions)
    copy = torch.arange(T) // M
    noise = torch.randn(B, T, D, generator=generator) / D**0.5
    return directions[torch.arange(T) % M] + noise * (0.1 + 0.25 * copy)[:, None]


def directions(M: int, D: int, seed: int = 0) -> Tensor:
    """M orthogonal unit vectors [M, D]; M <= D."""
    return torch.linalg.qr(torch.randn(D, M, generator=torch.Generator().manual_seed(seed)))[0].T


def assert_function_within_budget(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    precision: str,
    amplification: float = 1.0,
    held: Sequence[Tensor] | None = None,
) -> None:
    """Value and gradients: `plain` on float64 copies is exact, and under autocast the comparison.

    `held`: what `ours` is given in place of the inputs, other where masks leave out.
    """
    for index, (a, b, c) in enumerate(_results(ours, plain, inputs, precision, held)):
        assert_within_budget(a, b, c, precision=precision, amplification=amplification, name=f"entry {index}")


def assert_usually_within_budget(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    draws: Sequence[Sequence[Tensor]],
    precision: str,
) -> None:
    """Of inputs whose near ties any rounding decides otherwise: our median error, where plain PyTorch's largest may be.

    One tie that falls differently is most of an error, so that of a single draw says who was lucky.
    """
    results = [_results(ours, plain, inputs, precision) for inputs in draws]
    for index, entries in enumerate(zip(*results, strict=True)):
        errors = [(relative_error(a, c), relative_error(b, c)) for a, b, c in entries]
        median = sorted(own for own, _ in errors)[len(errors) // 2]
        allowed = allowed_error(max(theirs for _, theirs in errors), precision)
        assert median <= allowed, f"entry {index}: median error {median:.2e}, budget {allowed:.2e}, all {errors}"


def _results(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    precision: str,
    held: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(ours, plain PyTorch's, exact) of the value and of each gradient."""
    dtype = DTYPES[precision]
    rounded = [t.to(dtype) for t in inputs]
    exact = value_and_grads(plain, [t.double() for t in rounded])
    with matmul_precision(precision):
        got = value_and_grads(ours, rounded if held is None else [t.to(dtype) for t in held])
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            theirs = value_and_grads(plain, rounded)
    return list(zip(got, theirs, exact, strict=True))
