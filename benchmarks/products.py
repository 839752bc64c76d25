"""Products that the kernels of a step execute, against those that its result needs.

    python -m benchmarks products

Blocks at the edge of a batch multiply zeros, and what is not kept is computed again. Both show here: every kernel of a
step is counted by its launches, its grid and its blocks (`launch_products.py`, a line for each kernel), and set against
the products of the mathematics. The whole EFA step may execute `MOST` times what it needs, with captions as they are
`MOST_SHORT` times, and so may each kernel that compares all pairs; A-SDM has no limit: a small batch is bound by
launches, not by products. The launches are those of a stand-in for sm_90 (`benchmarks/stand_in`) at the paper's sizes:
without masks, with masks that leave everything, and with a text mask that leaves captions of real lengths
(`cases.lengths`). There a grid is an upper bound, for the host knows no lengths: what a program with something to do
executes is counted, and how many have nothing to do.

A kernel that multiplies tiles and has no line there is an error. (`gpu/kernel_work.py` has something else: the least
that a kernel alone must do to give its results, for its roof.)
"""

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fmfa_losses.kernels import _launch
from torch import Tensor

from fmfa_losses.functional import asdm_loss, efa_loss

from . import cases, stand_in
from .launch_products import GATHERS, PAIRWISE, PRODUCTS, Call, multiplies_tiles

__all__ = [
    "MOST",
    "MOST_SHORT",
    "Counted",
    "call_of",
    "count",
    "exceeded",
    "main",
    "measured",
    "step_launches",
    "table",
]

MOST, MOST_SHORT = 1.15, 1.25
L, N, D = 77, 192, 512
FULL, MASKS, SHORT_CAPTIONS = "", "masks", "captions of 25"
# Operation, masks, batches.
STEPS = (
    ("efa", FULL, (128,)),
    ("efa", MASKS, (128,)),
    ("efa", SHORT_CAPTIONS, (64, 128)),
    ("asdm", FULL, (64, 128, 256, 512, 1024)),
)


@dataclass(frozen=True)
class Counted:
    """One kernel of a step."""

    kernel: str
    launches: int
    needed: float  # GFLOP
    executed: float
    programs: int = 0
    idle: int = 0  # programs that have nothing to do

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
            raise KeyError(f"{call.name} multiplies tiles; benchmarks/launch_products.py needs a line for it")
    rows = [
        Counted(
            name,
            len(found),
            sum(2e-9 * PRODUCTS[name].needed(call) for call in found),
            sum(2e-9 * PRODUCTS[name].executed(call) for call in found),
            sum(call.programs for call in found),
            sum(call.programs - PRODUCTS[name].busy(call) for call in found),
        )
        for name, found in kernels.items()
    ]
    together = (
        sum(getattr(row, what) for row in rows) for what in ("launches", "needed", "executed", "programs", "idle")
    )
    return [*rows, Counted("all", *together)]


def step_launches(operation: str, masks: str, B: int, dtype: torch.dtype = torch.bfloat16) -> list[Call]:
    """Every launch of one training step at the paper's sizes."""
    shapes = [(B, D), (B, D)] if operation == "asdm" else [(B, N, D), (B, L, D)]
    leaves = [torch.ones(shape, dtype=dtype).requires_grad_() for shape in shapes]
    given: dict[str, Tensor] = {}
    lengths: dict[int, list[int]] = {}
    if masks == MASKS:
        given = {"image_mask": torch.ones(B, N, dtype=torch.bool), "text_mask": torch.ones(B, L, dtype=torch.bool)}
    elif masks == SHORT_CAPTIONS:
        case = cases.Case("efa", B, L, N, D, mean_length=25)
        given, lengths = {"text_mask": cases.kept(case, "cpu")}, {L: cases.lengths(case).tolist()}
    with stand_in.gpu() as device, device.step(), _launch.recording("sm_90") as launches:
        if operation == "asdm":
            loss = asdm_loss(*leaves, torch.arange(B), backend="triton")
        else:
            loss = efa_loss(*leaves, backend="triton", **given)
        torch.autograd.grad(loss, leaves)
    return [call_of(launch, lengths) for launch in launches]


def call_of(launch: Any, lengths: Mapping[int, Sequence[int]] | None = None) -> Call:
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    return Call(
        launch.kernel,
        launch.grid,
        {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()},
        lengths or {},
    )


PAGE = f"""## Products

What the tiles of the kernels multiply at {N} patches, {L} tokens, width {D} and bfloat16, and what the result needs:
blocks at an edge multiply zeros, and what is not kept is computed again. `benchmarks/launch_products.py` has a line for
each kernel. The whole EFA step may execute {MOST} times what it needs. *{SHORT_CAPTIONS}*: behind a text mask, lengths
drawn log-normally with mean 25 of {L}, as those of CUHK-PEDES are (`benchmarks/cases.py`). The step, and each kernel
that compares all pairs, may execute {MOST_SHORT} times what the tokens that exist need. Grids are upper bounds, for the
host reads no lengths: *idle* programs leave at once.
"""


def table(steps: Sequence[tuple[str, list[Counted]]]) -> str:
    """Markdown."""
    lines = [
        "| step | kernel | launches | programs, idle | needed, GFLOP | executed, GFLOP | executed / needed |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for step, rows in steps:
        for row in rows:
            ratio = f"{row.ratio:.2f}" if row.needed else "-"
            figures = f"{row.launches} | {row.programs}, {row.idle} | {row.needed:.3g} | {row.executed:.3g} | {ratio}"
            lines.append(f"| {step} | {row.kernel.strip('_').removesuffix('_kernel')} | {figures} |")
    return "\n".join(lines)


def measured() -> list[tuple[str, list[Counted]]]:
    return [
        (
            ", ".join([operation.upper().replace("ASDM", "A-SDM"), f"B {B}", *filter(None, [masks])]),
            count(step_launches(operation, masks, B)),
        )
        for operation, masks, batches in STEPS
        for B in batches
    ]


def exceeded(steps: Sequence[tuple[str, list[Counted]]]) -> list[str]:
    """EFA steps that execute more than they may."""
    found = []
    for step, rows in steps:
        short = SHORT_CAPTIONS in step
        most = MOST_SHORT if short else MOST
        limited = [row for row in rows if row.kernel == "all" or (short and row.kernel in PAIRWISE)]
        if step.startswith("EFA"):
            found += [
                f"{step}, {row.kernel}: executed / needed {row.ratio:.2f} > {most}"
                for row in limited
                if row.ratio > most
            ]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks products", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what triton does where nothing is set, without its warning
    steps = measured()
    print(table(steps))
    bad = exceeded(steps)
    print(*bad, sep="\n", end="\n" * bool(bad), file=sys.stderr)
    return 1 if bad else 0
