"""What a training step launches, compiles, moves and allocates on a GPU, counted without one.

    python -m benchmarks launches [--out docs/launches.md | --json | --check]

A-SDM and EFA, forward and backward, on the stand-in of `benchmarks/stand_in`: launches of Triton kernels and of what
torch does around them, kernels that a step compiles anew, bytes that torch's operators read and write, and the memory
that they allocate. The command fails when a figure exceeds its limit: `LIMITS` is what was counted and a little more,
so that no step gets worse unseen, and `GATES` what a step at the paper's width may need at all.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import ceil, inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fmfa_losses.kernels._asdm import SMALL
from fmfa_losses.kernels.token_lists import SHORT
from torch import Tensor

from fmfa_losses.functional import asdm_loss, efa_loss

from . import products, stand_in

L, N, D = 77, 192, 64  # tokens, patches, width: everything but the bytes is the same at WIDE
WIDE = 512  # the paper's width
BATCHES = (64, 128, 37, 1)  # the first step, a larger batch, a ragged last one, one pair
LENGTHS = (64, 50, 33, 16, 12)  # captions that a loader pads to the longest
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NO_MASK, TEXT, IMAGE, BOTH = "no mask", "text mask", "image mask", "text and image mask"
MASKS = {"asdm": (NO_MASK,), "efa": (NO_MASK, TEXT, IMAGE, BOTH)}


class Limit(NamedTuple):
    """The most that a step may need, at any batch and length above."""

    launches: int  # on the device: Triton's, and torch's, whatever the batch
    kernels: int  # compiled by the first step of a data type and choice of masks; other steps compile none, but:
    other: int  # by the first one of `other_class`; a text mask has compiled it before
    moved: (
        float  # MB that torch reads and writes at the largest batch; a smaller one may need its share, here and below
    )
    buffers: int
    allocated: float  # MB, all buffers
    peak: float  # MB allocated at the same time, above inputs and gradients


# What was counted, and 5 % (A-SDM launches: none); every kernel of the first step. `--suggest` prints these lines anew.
LIMITS = {
    ("asdm", NO_MASK, "bf16"): Limit(4, 3, 0, 0.01, 12, 0.05, 0.02),
    ("asdm", NO_MASK, "fp32"): Limit(6, 3, 4, 0.01, 15, 0.36, 0.15),
    ("efa", NO_MASK, "bf16"): Limit(26, 15, 1, 0.01, 34, 61.5, 36.03),
    ("efa", NO_MASK, "fp32"): Limit(29, 16, 1, 0.01, 36, 101.53, 69.12),
    ("efa", TEXT, "bf16"): Limit(32, 23, 0, 0.01, 36, 61.67, 36.15),
    ("efa", TEXT, "fp32"): Limit(33, 25, 0, 0.01, 36, 101.61, 69.2),
    ("efa", IMAGE, "bf16"): Limit(28, 21, 2, 0.01, 34, 61.71, 36.23),
    ("efa", IMAGE, "fp32"): Limit(31, 23, 2, 0.01, 36, 101.74, 69.33),
    ("efa", BOTH, "bf16"): Limit(34, 19, 0, 0.01, 36, 61.88, 36.36),
    ("efa", BOTH, "fp32"): Limit(35, 19, 0, 0.01, 36, 101.82, 69.41),
}


class Gate(NamedTuple):
    launches: int
    moved: float = inf  # MB
    peak: float = inf


# The targets of issue 12, at the largest batch and L, N and WIDE as above: 0.3 GB, 60 MiB.
MOVED, PEAK = 300.0, round(60 * 2**20 / 1e6, 2)
GATES = {
    ("asdm", NO_MASK, "bf16"): Gate(4),
    ("efa", NO_MASK, "bf16"): Gate(40, MOVED, PEAK),
    ("efa", NO_MASK, "fp32"): Gate(40, MOVED),
    ("efa", BOTH, "bf16"): Gate(60, MOVED),
}


@dataclass(frozen=True)
class Row:
    """One step, forward and backward."""

    loss: str
    masks: str
    dtype: str
    B: int
    L: int
    D: int
    first: bool  # of its data type and masks, and of `other_class` or not
    triton: int
    torch: int
    kernels: int  # compiled at this step
    moved: float
    buffers: int
    allocated: float
    peak: float
    waits: int  # of the host for the device

    @property
    def launches(self) -> int:
        return self.triton + self.torch

    @property
    def exceeded(self) -> list[str]:
        """What exceeds its limit."""
        return [f"{what} {getattr(self, what)} > {m}" for what, m in self.limits.items() if getattr(self, what) > m]

    @property
    def limits(self) -> dict[str, float]:
        """The most that this step may need."""
        if self.D == WIDE:
            gate = GATES[self.loss, self.masks, self.dtype]._asdict()
            return {what: most for what, most in gate.items() if most < inf} | {"waits": 0}
        limit = LIMITS[self.loss, self.masks, self.dtype]
        share = self.B / max(BATCHES)
        megabytes = {what: round(share * getattr(limit, what), 2) for what in ("moved", "allocated", "peak")}
        other = other_class(self.loss, self.dtype, self.B, self.L)
        kernels = 0 if not self.first else limit.other if other else limit.kernels
        return {"launches": limit.launches, "kernels": kernels, "buffers": limit.buffers, "waits": 0} | megabytes


def other_class(loss: str, dtype: str, B: int, L: int) -> bool:
    """Whether a step has kernels of its own: captions of at most SHORT tokens; in A-SDM, cosines kept in memory."""
    return B > SMALL["ieee" if dtype == "fp32" else "half"] if loss == "asdm" else L <= SHORT


def steps(loss: str, masks: str, dtype: str) -> Iterator[Row]:
    """The steps of a training run, on one device that has compiled nothing before."""
    sizes = [(B, L) for B in BATCHES] + ([(BATCHES[0], length) for length in LENGTHS] if loss == "efa" else [])
    before: set[bool] = set()
    with stand_in.gpu() as device:
        for batch, length in sizes:
            other = other_class(loss, dtype, batch, length)
            yield counted(device, loss, masks, dtype, batch, length, D, first=other not in before)
            before.add(other)


def wide_step(loss: str, masks: str, dtype: str) -> Row:
    """One step of the largest batch at the paper's width."""
    with stand_in.gpu() as device:
        return counted(device, loss, masks, dtype, max(BATCHES), L, WIDE, first=True)


def counted(
    device: stand_in.Device, loss: str, masks: str, dtype: str, B: int, L: int, width: int, *, first: bool
) -> Row:
    """One step, forward and backward."""
    leaves, arguments = inputs(loss, masks, DTYPES[dtype], B, L, width)
    with device.step() as step:
        value = asdm_loss(*leaves, **arguments) if loss == "asdm" else efa_loss(*leaves, **arguments)
        gradients = torch.autograd.grad(value, leaves)
    return Row(
        loss, masks, dtype, B, L, width, first,
        triton=len(step.launches),
        torch=step.device_launches - len(step.launches),
        kernels=len(step.compiled),
        moved=megabytes(step.moved),
        buffers=len(step.buffers),
        allocated=megabytes(sum(step.buffers)),
        peak=megabytes(step.peak - sum(g.numel() * g.element_size() for g in gradients)),
        waits=step.waits,
    )  # fmt: skip


def inputs(
    loss: str, masks: str, dtype: torch.dtype, B: int, L: int, D: int = D
) -> tuple[list[Tensor], dict[str, Any]]:
    """What the loss differentiates, and its other arguments."""
    shapes = [(B, D), (B, D)] if loss == "asdm" else [(B, N, D), (B, L, D)]
    leaves = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    arguments: dict[str, Any] = {"backend": "triton"}
    if loss == "asdm":
        arguments["pids"] = torch.arange(B) // 2
    if masks in (TEXT, BOTH):
        arguments["text_mask"] = kept(B, L)
    if masks in (IMAGE, BOTH):
        arguments["image_mask"] = kept(B, N)
    return leaves, arguments


def kept(B: int, T: int) -> Tensor:
    """[B, T]: between one token and all of them, True = keep."""
    return torch.arange(T) <= (torch.arange(B) * 7 % T)[:, None]


def megabytes(count: int) -> float:
    return round(count / 1e6, 2)


def rows() -> list[Row]:
    torch.manual_seed(0)
    runs = [(loss, masks, dtype) for loss, choices in MASKS.items() for masks in choices for dtype in DTYPES]
    return [row for run in runs for row in steps(*run)] + [wide_step(*run) for run in GATES]


HEAD = f"""# Launches

Written by `python -m benchmarks launches --out docs/launches.md`; do not edit it by hand.

Every row is one training step, forward and backward, of {N} patches and width D, counted without a GPU on a stand-in
that sends each launch through Triton's own JIT (`benchmarks/stand_in`). Every launch costs host time, Triton's and
torch's alike, and so does every kernel that is compiled: they decide how fast a small batch is. "Moved" is what
torch's operators between the kernels read and write, which grows with the width; `a / b` is a figure and its limit.
"Compiled" is what a step compiles that none before it did. Captions of at most {SHORT} tokens are a class of their own:
a text mask compiles both classes at once (beside 16-bit tokens one kernel for all lengths, packed_match.py), without
one the first short batch compiles its own. So does A-SDM's first batch of more than {SMALL["ieee"]} pairs in IEEE
float32. Limits at width {D} are 5 % above the largest step of a group, for smaller batches their share. Those at width
{WIDE}, the paper's, are targets: {MOVED:g} MB moved, and {PEAK:g} MB (60 MiB) of memory above inputs and gradients.
"""
COLUMNS = (
    "loss", "masks", "dtype", "B", "L", "D", "launches", "Triton", "torch", "compiled", "moved, MB", "buffers",
    "allocated, MB", "peak, MB",
)  # fmt: skip


def table(measured: list[Row]) -> str:
    """Markdown, figures beside their limits; what exceeds its limit is bold."""
    lines = [COLUMNS, ["---"] * 6 + ["---:"] * (len(COLUMNS) - 6)]
    for row in measured:

        def beside(what: str, row: Row = row) -> str:
            figure, most = getattr(row, what), row.limits.get(what)
            if most is None:
                return f"{figure:g}"
            return f"**{figure:g}** / {most:g}" if figure > most else f"{figure:g} / {most:g}"

        lines.append((
            row.loss.replace("asdm", "A-SDM").replace("efa", "EFA"), row.masks, row.dtype, str(row.B),
            "-" if row.loss == "asdm" else str(row.L), str(row.D), beside("launches"), str(row.triton),
            str(row.torch), beside("kernels"), beside("moved"),
            beside("buffers"), beside("allocated"), beside("peak"),
        ))  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def suggestion(measured: list[Row]) -> str:
    """Lines for `LIMITS`."""
    lines = []
    for loss, masks, dtype in LIMITS:
        run = [row for row in measured if (row.loss, row.masks, row.dtype, row.D) == (loss, masks, dtype, D)]
        most = {what: max(getattr(row, what) for row in run) for what in Limit._fields if what != "other"}
        limit = Limit(
            launches=ceil(1.05 * most["launches"]),
            kernels=max(row.kernels for row in run if row.first and not other_class(row.loss, row.dtype, row.B, row.L)),
            other=max(
                (row.kernels for row in run if row.first and other_class(row.loss, row.dtype, row.B, row.L)), default=0
            ),
            moved=roomy(most["moved"]),
            buffers=ceil(1.05 * most["buffers"]),
            allocated=roomy(most["allocated"]),
            peak=roomy(most["peak"]),
        )
        name = {NO_MASK: "NO_MASK", TEXT: "TEXT", IMAGE: "IMAGE", BOTH: "BOTH"}[masks]
        lines.append(f'    ("{loss}", {name}, "{dtype}"): Limit({", ".join(map(str, limit))}),')
    return "\n".join(lines)


def roomy(megabytes: float) -> float:
    return round(1.05 * megabytes + 0.005, 2)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks launches", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page there")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="every row as JSON, one per line")
    form.add_argument("--check", action="store_true", help="only what exceeds its limit")
    form.add_argument("--suggest", action="store_true", help="lines for LIMITS, from what is counted now")
    options = parser.parse_args(argv)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what triton does where nothing is set, without its warning
    measured, multiplied = rows(), products.measured()
    if options.out:
        options.out.write_text(f"{HEAD}\n{table(measured)}\n\n{products.PAGE}\n{products.table(multiplied)}\n")
        print(f"written to {options.out}", file=sys.stderr)
    if options.json:
        for row in measured:
            print(json.dumps(asdict(row) | {"launches": row.launches, "exceeded": row.exceeded}))
    elif options.suggest:
        print(suggestion(measured))
    elif not (options.check or options.out):
        print(f"{table(measured)}\n\n{products.table(multiplied)}")
    bad = [row for row in measured if row.exceeded]
    for row in bad:
        print(
            f"{row.loss}, {row.masks}, {row.dtype}, B {row.B}, L {row.L}, D {row.D}: {'; '.join(row.exceeded)}",
            file=sys.stderr,
        )
    print(f"{len(measured)} steps, {len(bad)} exceed a limit", file=sys.stderr)
    more = products.exceeded(multiplied)
    print(*more, sep="\n", end="\n" * bool(more), file=sys.stderr)
    return 1 if bad or more else 0


if __name__ == "__main__":
    sys.exit(main())
