"""Which entries of the block tables are worth trying, and the kernels that each changes: data for `tune`."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import results
from .alternatives import EFA, HALF, Alternative

__all__ = ["TABLES", "Table", "survivors", "tables"]


class Table(NamedTuple):
    entry: Alternative  # which entry, the step that shows it, and the kernels that it changes; `other` is a candidate
    fields: tuple[str, ...]
    values: tuple[Sequence[int], ...]  # of each field; all combinations are candidates

    @property
    def name(self) -> str:
        return self.entry.table

    def candidates(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*self.values))


def _entry(module: str, table: str, key: tuple[str, str] | None, kernels: tuple[str, ...]) -> Alternative:
    return Alternative(module, table, key, None, EFA, "bf16", kernels, 1.0)


def survivors(file: Path) -> list[dict[str, Any]]:
    """What is worth timing in a file of `tune --compile`, in the order in which it is timed."""
    return [row for row in results.read(file)["records"] if "dropped" not in row]


def tables() -> dict[str, "Table"]:
    """TABLES by name."""
    return {table.name: table for table in TABLES}


# Kernels without a matrix product have no pipeline, so their number of stages changes nothing and does not vary.
TABLES = (
    Table(
        _entry("winner_products", "PRODUCTS", HALF, ("_products_kernel",)),
        ("BLOCK_OWN", "BLOCK_SUM", "BLOCK_OUT", "num_warps", "num_stages"),
        ((64, 128, 256), (32, 64), (128, 256), (4, 8), (2, 3, 4)),
    ),
    Table(
        _entry("gather_gradient", "DX", HALF, ("_dx_kernel",)),
        ("BLOCK_OWN", "BLOCK_D", "num_warps", "UNROLL"),
        ((1, 2, 4, 8, 16), (512,), (1, 2, 4), (1, 2, 4, 8)),
    ),
    Table(
        _entry("aggregation_rows", "ROWS", HALF, ("_rows_kernel",)),
        ("BLOCK_D", "BLOCK_OUT", "num_warps", "num_stages"),
        ((16, 32, 64), (32, 64, 128), (4, 8), (2, 3, 4)),
    ),
    Table(
        _entry("aggregation_rows", "DIMAGE", HALF, ("_dimage_product_kernel",)),
        ("BLOCK_N", "BLOCK_L", "BLOCK_OUT", "num_warps", "num_stages"),
        ((32, 64), (16, 32), (64, 128, 256), (4, 8), (2, 3, 4)),
    ),
    Table(
        _entry("match", "MATCH", HALF, ("_match_kernel",)),
        ("BLOCK_M", "BLOCK_N", "BLOCK_D", "num_warps", "num_stages"),
        ((64, 128), (128, 256), (32, 64, 128), (4, 8), (2, 3, 4)),
    ),
    Table(
        _entry("pool", "POOL", 256, ("_pool_kernel",)),
        ("BLOCK_J", "BLOCK_P", "num_warps"),
        ((2, 4, 8, 16, 32), (256,), (1, 2, 4)),
    ),
)
