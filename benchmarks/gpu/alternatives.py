"""Entries of the block tables beside a candidate whose time is not known, or not decided: stage c measures both.

A row's first value is the table as it stands; `other` replaces it while `swapped` lasts.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..cases import Case

__all__ = ["ALTERNATIVES", "Alternative", "swapped", "value"]


class Alternative(NamedTuple):
    module: str  # of fmfa_losses.kernels
    table: str
    key: Any  # None: the table is a single entry
    other: Any
    case: Case
    precision: str
    kernels: tuple[str, ...]  # which the entry changes; none: it changes which kernels run, and the step is timed
    predicted: float  # time of `other` over the time of the entry as it stands

    @property
    def name(self) -> str:
        key = ", ".join(self.key) if isinstance(self.key, tuple) else self.key
        return f"{self.module}.{self.table}" + ("" if key is None else f"[{key}]")


def value(row: Alternative) -> Any:
    """The entry as it stands."""
    table = getattr(importlib.import_module(f"fmfa_losses.kernels.{row.module}"), row.table)
    return table if row.key is None else table[row.key]


@contextmanager
def swapped(row: Alternative, new: Any) -> Iterator[None]:
    module = importlib.import_module(f"fmfa_losses.kernels.{row.module}")
    before = value(row)
    try:
        # Entries with named fields stay what they are.
        _put(module, row, type(before)(*new) if hasattr(before, "_fields") else new)
        yield
    finally:
        _put(module, row, before)


def _put(module: Any, row: Alternative, new: Any) -> None:
    if row.key is None:
        setattr(module, row.table, new)
    else:
        getattr(module, row.table)[row.key] = new


EFA = Case("efa", 128)
HALF = ("227 KiB", "half")  # a column of the block tables (kernels/_launch.py)
ALTERNATIVES = (
    # One loop over all tiles of a program: loads go on while a tile is reduced.
    Alternative("match", "PERSISTENT", None, True, EFA, "bf16", (), 0.98),
    # One launch more and [R, C] kept, where a graph's time counts; blocks, where the BLAS library's products would.
    Alternative("_asdm", "SMALL", "ieee", 256, Case("asdm", 256), "fp32", (), 4.4),
    Alternative("_asdm", "KEPT", "ieee", 256, Case("asdm", 1024), "fp32", (), 2.0),
)  # fmt: skip
