"""The two ceilings of a device, measured, and how much of them a measurement reached.

A pass that does F operations and moves at least M bytes cannot take less than max(F / matmul rate, M / copy rate).
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from ..cases import Case, Work, work
from ..measure import DTYPES, matmul_precision, spread

__all__ = ["measure_ceilings", "share_of_roof"]

COPY_BYTES, MATMUL_SIZE = 2**31, 8192


def measure_ceilings(device: str) -> dict[str, float]:
    """`copy` in bytes read and written a second; a large product's operations a second by precision. Random data."""
    source = torch.randn(COPY_BYTES // 4, device=device)
    ceilings = {"copy": 2 * COPY_BYTES / _seconds(partial(torch.empty_like(source).copy_, source))}
    del source
    for precision, dtype in DTYPES.items():
        matmul_precision(precision)
        a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        ceilings[precision] = 2 * MATMUL_SIZE**3 / _seconds(partial(torch.mm, a, b, out=out))
    torch.cuda.empty_cache()
    return ceilings


def _seconds(fn: Callable[[], Any], repeats: int = 10) -> float:
    for _ in range(3):
        fn()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        fn()
        event.record()
    torch.cuda.synchronize()
    return spread([a.elapsed_time(b) / 1e3 for a, b in pairwise(events)])["median"]


def least_seconds(least: Work, precision: str, ceilings: dict[str, float]) -> float:
    return max(least.flops / ceilings[precision], least.bytes / ceilings["copy"])


def share_of_roof(row: dict[str, Any], key: str, ceilings: dict[str, float]) -> float | None:
    """Least over measured time of a pass, in [0, 1] unless a count is wrong; None where work is not counted."""
    least = work(Case.of(row), DTYPES[row["dtype"]].itemsize)
    if least is None or key not in row:
        return None
    return least_seconds(least[key], row["dtype"], ceilings) / (row[key]["median"] / 1e3)
