"""Products that the kernels of a step execute, against those that its result needs.

    python -m benchmarks products

Blocks at the edge of a batch multiply zeros, and what is not kept is computed again. Both show here: every kernel of a
step is counted by its launches, its grid and its blocks (`PRODUCTS`, a line for each kernel), and set against the
products of the mathematics. The whole EFA step may execute `MOST` times what it needs; A-SDM has no limit: a small
batch is bound by launches, not by products. The launches are those of a stand-in for sm_90 (`benchmarks/stand_in`) at
the paper's sizes, without masks and with masks that leave everything, since what a mask leaves differs by batch.

A kernel that multiplies tiles and has no line in `PRODUCTS` is an error. (`gpu/kernel_work.py` has something else: the
least that a kernel alone must do to give its results, for its roof.)
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from fmfa_losses.kernels import _launch
from torch import Tensor

from fmfa_losses.functional import asdm_loss, efa_loss

from . import stand_in

__all__ = ["MOST", "PRODUCTS", "Counted", "Products", "count", "main", "multiplies_tiles", "step_launches", "table"]

MOST = 1.15
L, N, D = 77, 192, 512
# Operation, masks, batches.
STEPS = (("efa", False, (128,)), ("efa", True, (128,)), ("asdm", False, (64, 128, 256, 512, 1024)))


class Call(NamedTuple):
    """A launch, its arguments by name. `a("Q", "BLOCK_N")`: as many Q as whole blocks hold."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def programs(self) -> int:
        return prod(self.grid)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def padded(self, size: str, block: str) -> int:
        return -(-self[size] // self[block]) * self[block]


class Products(NamedTuple):
    """Multiply-adds of one launch."""

    needed: Callable[[Call], int]
    executed: Callable[[Call], int]


def _nothing(_: Call) -> int:
    return 0


def _alignment(a: Call) -> int:
    """All tokens of x with all tokens of e."""
    return _all_with_all(a) if _has_class(a) else 0


def _has_class(a: Call) -> bool:
    """Samples by number of tokens go to a launch for each class of width: those with all tokens to the widest."""
    return not (a["LIST_E"] and 2 * a["UNIT"] <= a["BLOCK_N"] and a["Q"] > a["UNIT"])


def _match(a: Call) -> int:
    if not _has_class(a):
        return 0
    columns = a["BLOCK_N"] if a["BLOCK_N"] // a["UNIT"] > 1 else a.padded("Q", "BLOCK_N")
    return a["row_tiles"] * a["BLOCK_M"] * a["column_tiles"] * columns * a.padded("D", "BLOCK_D")


def _persistent_match(a: Call) -> int:
    return a["row_tiles"] * a["BLOCK_M"] * a["column_tiles"] * a["BLOCK_N"] * a.padded("D", "BLOCK_D")


def _all_with_all(a: Call) -> int:
    return a["Bx"] * a["P"] * a["Be"] * a["Q"] * a["D"]


def _gathered(a: Call) -> int:
    """One row of D for every winner."""
    return a["Bx"] * a["P"] * a["Be"] * a["D"]


def _dx(a: Call) -> int:
    return a.grid[0] * a["BLOCK_OWN"] * a["Be"] * a["D"]


def _de_needed(a: Call) -> int:
    return a["Bx"] * a["P"] * a["Be"] * a["Q"] * a["D"]


def _de(a: Call) -> int:
    rows = -(-a["Bx"] * a["P"] // a["BLOCK_SUM"]) * a["BLOCK_SUM"]
    return a.programs * a["BLOCK_OWN"] * rows * a["BLOCK_OUT"]


def _aggregation(products: int) -> Callable[[Call], int]:
    """So many products of [L, N] with D for each sample."""
    return lambda a: products * _samples(a) * a["L"] * a["N"] * a["D"]


def _samples(a: Call) -> int:
    return int(next(value for name, value in a.arguments.items() if name in ("image_ptr", "text_ptr")).shape[0])


def _forward(a: Call) -> int:
    """s and the weighted sum; where a row is longer than a tile, s twice, and a chunk of D for each program."""
    tile, scores = a["BLOCK_L"] * a.padded("N", "BLOCK_N"), a.padded("D", "BLOCK_D")
    return a.programs * tile * (scores + a.padded("D", "BLOCK_OUT") if a["WHOLE_ROW"] else 2 * scores + a["BLOCK_OUT"])


def _statistics(a: Call) -> int:
    return a.programs * a["BLOCK_L"] * a.padded("N", "BLOCK_N") * 3 * a.padded("D", "BLOCK_D")  # s, then s and da


def _dtext(a: Call) -> int:
    each = 2 * a.padded("D", "BLOCK_D") + a["BLOCK_OUT"]  # s and da for each chunk of ds v
    return a.programs * a["BLOCK_L"] * a.padded("N", "BLOCK_N") * each


def _dimage(a: Call) -> int:
    each = 2 * a.padded("D", "BLOCK_D") + 2 * a["BLOCK_OUT"]  # s and da for each chunk of a djoint and ds t
    return a.programs * a["BLOCK_N"] * a.padded("L", "BLOCK_L") * each


def _rows(a: Call) -> int:
    each = 2 * a.padded("D", "BLOCK_D") + a.padded("D", "BLOCK_OUT")  # s, da and ds v
    return a.programs * a["BLOCK_L"] * a["BLOCK_N"] * each


def _dimage_product(a: Call) -> int:
    return a.programs * a["BLOCK_N"] * a.padded("L", "BLOCK_L") * 2 * a["BLOCK_OUT"]


def _logits(rows: str, columns: str, products: int = 1) -> Callable[[Call], int]:
    """Of both directions; none where an earlier kernel keeps them."""
    return lambda a: 0 if a.arguments.get("KEPT") else products * a[rows] * a[columns] * a["D"]


def _row_loss(a: Call) -> int:
    """The logits once for each direction, unless they are kept."""
    if a.arguments.get("KEPT"):
        return 0
    return a.programs * a["BLOCK_M"] * a.padded("Y", "BLOCK_N") * a.padded("D", "BLOCK_D")


def _gradient(a: Call) -> int:
    each = a.padded("D", "BLOCK_D") + a["BLOCK_OUT"]  # the logits again, and one chunk of the gradient
    return a.programs * a["BLOCK_M"] * a.padded("Y", "BLOCK_N") * each


def _gradient_needed(a: Call) -> int:
    return a.grid[1] * a["X"] * a["Y"] * a["D"]


def _tile_of_logits(a: Call) -> int:
    return a.programs * a["BLOCK_M"] * a["BLOCK_N"] * a.padded("D", "BLOCK_D")


def _kept_gradient(a: Call) -> int:
    return a.programs * a["BLOCK_M"] * a.padded("C", "BLOCK_N") * a["BLOCK_OUT"]


def _classes(a: Call) -> int:
    """All rows, as if all counted, with all classes."""
    return a.padded("M", "BLOCK_M") * a.padded("V", "BLOCK_N") * a.padded("D", "BLOCK_D")


def _rows_of(a: Call) -> int:
    return int(a["states_ptr"].shape[0])


def _dweight(a: Call) -> int:
    return a.programs * a["BLOCK_OWN"] * a["BLOCK_OUT"] * (-(-_rows_of(a) // a["BLOCK_SUM"]) * a["BLOCK_SUM"])


def _dstates(a: Call) -> int:
    return a.programs * a["BLOCK_OWN"] * a["BLOCK_OUT"] * a.padded("size", "BLOCK_SUM")


# What is made again, because it was not kept, is executed and not needed.
PRODUCTS: dict[str, Products] = {
    "_match_kernel": Products(_alignment, _match),
    "_persistent_match_kernel": Products(_all_with_all, _persistent_match),
    "_dx_kernel": Products(_gathered, _dx),
    "_de_kernel": Products(_de_needed, _de),  # as one-hot weights [Be Q, Bx P] times x
    "_products_kernel": Products(_de_needed, _de),
    "_forward_kernel": Products(_aggregation(2), _forward),
    "_statistics_kernel": Products(_aggregation(1), _statistics),  # da
    "_dtext_kernel": Products(_aggregation(1), _dtext),
    "_dimage_kernel": Products(_aggregation(2), _dimage),
    "_rows_kernel": Products(_aggregation(2), _rows),  # da, dtext
    "_dimage_product_kernel": Products(_aggregation(2), _dimage_product),
    "_row_loss_kernel": Products(_logits("X", "Y"), _row_loss),
    "_gradient_kernel": Products(_gradient_needed, _gradient),
    "_cosines_kernel": Products(_logits("R", "C"), _tile_of_logits),
    "_kept_dlogits_kernel": Products(_nothing, _tile_of_logits),
    "_kept_gradient_kernel": Products(_logits("R", "C", 2), _kept_gradient),
    "_linear_cross_entropy_kernel": Products(_logits("M", "V"), _classes),
    "_dz_kernel": Products(_nothing, _tile_of_logits),
    "_dweight_kernel": Products(lambda a: _rows_of(a) * a["size"] * a["D"], _dweight),
    "_dstates_kernel": Products(_logits("M", "size"), _dstates),
}

GATHERS = {"_dx_kernel"}  # no tiles of products, but as many multiply-adds


def multiplies_tiles(kernel: Any, seen: frozenset[str] = frozenset()) -> bool:
    """Whether tl.dot is in a kernel or in a function that it calls."""
    if "tl.dot(" in kernel.src:
        return True
    called = {name: kernel.fn.__globals__.get(name) for name in re.findall(r"\b([A-Za-z_]\w*)\(", kernel.src)}
    return any(
        multiplies_tiles(function, seen | {kernel.__name__})
        for name, function in called.items()
        if hasattr(function, "src") and name not in seen
    )


@dataclass(frozen=True)
class Counted:
    """One kernel of a step."""

    kernel: str
    launches: int
    needed: float  # GFLOP
    executed: float

    @property
    def ratio(self) -> float:
        return self.executed / self.needed if self.needed else float("inf")


def count(calls: Iterable[Call]) -> list[Counted]:
    """Kernels with products, in the order in which they come; and all together."""
    kernels: dict[str, list[Call]] = {}
    for call in calls:
        if call.name not in GATHERS and not multiplies_tiles(call.kernel):
            continue
        kernels.setdefault(call.name, []).append(call)
        if call.name not in PRODUCTS:
            raise KeyError(f"{call.name} multiplies tiles; benchmarks/products.py needs a line in PRODUCTS for it")
    rows = [
        Counted(
            name,
            len(found),
            sum(2e-9 * PRODUCTS[name].needed(call) for call in found),
            sum(2e-9 * PRODUCTS[name].executed(call) for call in found),
        )
        for name, found in kernels.items()
    ]
    together = (sum(getattr(row, what) for row in rows) for what in ("launches", "needed", "executed"))
    return [*rows, Counted("all", *together)]


def step_launches(operation: str, masked: bool, B: int, dtype: torch.dtype = torch.bfloat16) -> list[Call]:
    """Every launch of one training step at the paper's sizes."""
    shapes = [(B, D), (B, D)] if operation == "asdm" else [(B, N, D), (B, L, D)]
    leaves = [torch.ones(shape, dtype=dtype).requires_grad_() for shape in shapes]
    with stand_in.gpu() as device, device.step(), _launch.recording("sm_90") as launches:
        if operation == "asdm":
            loss = asdm_loss(*leaves, torch.arange(B), backend="triton")
        else:
            masks = {"image_mask": torch.ones(B, N, dtype=torch.bool), "text_mask": torch.ones(B, L, dtype=torch.bool)}
            loss = efa_loss(*leaves, backend="triton", **(masks if masked else {}))
        torch.autograd.grad(loss, leaves)
    return [call_of(launch) for launch in launches]


def call_of(launch: Any) -> Call:
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    return Call(
        launch.kernel, launch.grid, {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    )


PAGE = f"""## Products

What the tiles of the kernels multiply at {N} patches, {L} tokens, width {D} and bfloat16, and what the result needs:
blocks at an edge multiply zeros, and what is not kept is computed again. `benchmarks/products.py` has a line for each
kernel. The whole EFA step may execute {MOST} times what it needs.
"""


def table(steps: Sequence[tuple[str, list[Counted]]]) -> str:
    """Markdown."""
    lines = [
        "| step | kernel | launches | needed, GFLOP | executed, GFLOP | executed / needed |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for step, rows in steps:
        for row in rows:
            ratio = f"{row.ratio:.2f}" if row.needed else "-"
            figures = f"{row.launches} | {row.needed:.3g} | {row.executed:.3g} | {ratio}"
            lines.append(f"| {step} | {row.kernel.strip('_').removesuffix('_kernel')} | {figures} |")
    return "\n".join(lines)


def measured() -> list[tuple[str, list[Counted]]]:
    return [
        (
            f"{operation.upper().replace('ASDM', 'A-SDM')}, B {B}{', masks' * masked}",
            count(step_launches(operation, masked, B)),
        )
        for operation, masked, batches in STEPS
        for B in batches
    ]


def exceeded(steps: Sequence[tuple[str, list[Counted]]]) -> list[str]:
    """EFA steps that execute more than they may."""
    return [
        f"{step}: executed / needed {rows[-1].ratio:.2f} > {MOST}"
        for step, rows in steps
        if step.startswith("EFA") and rows[-1].ratio > MOST
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks products", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what triton does where nothing is set, without its warning
    steps = measured()
    print(table(steps))
    bad = exceeded(steps)
    print(*bad, sep="\n", end="\n" * bool(bad), file=sys.stderr)
    return 1 if bad else 0
