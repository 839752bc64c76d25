"""Every loss on a large batch of one process on the CPU: seconds and peak memory, and how exact its blocks of rows are.

    python -m benchmarks large-batch [--pairs 16384] [--whole 4096] [--out FILE]

Each measurement is one forward and one backward in a process of its own, whose whole peak it gives. At `--whole` pairs
the losses over rows also run on whole [B, B] matrices, and in float64 their values and gradients are compared with
those in blocks. A-SDM, and SDM and ITC with hard labels, keep row statistics and never have whole matrices there.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fmfa_losses as fl
from fmfa_losses.ops import rows_in_blocks

from . import ROOT, results
from .measure import peak_process_bytes
from .tables import markdown, number

D = 512
BOUND_MIB = 1500  # of a process that has B = 16384
PER_PERSON = 4  # pairs of one identity

# What is measured: the loss, and whether it looks at identities.
LOSSES: dict[str, tuple[Callable[[], Any], bool]] = {
    "A-SDM": (fl.ASDMLoss, True),
    "SDM": (fl.SDMLoss, True),
    "ITC": (fl.ITCLoss, False),
    "R-ITC": (fl.RITCLoss, True),
    "N-ITC, softlabel_ratio 0.5": (lambda: fl.ITCLoss(targets="identity", softlabel_ratio=0.5), True),
    "N-ITC, mutual_neighbors 3": (lambda: fl.ITCLoss(targets="identity", mutual_neighbors=3), True),
    "CMPM": (fl.CMPMLoss, True),
    "TAL": (fl.TALLoss, True),
    "TRL": (fl.TRLLoss, True),
    "triplet": (fl.TripletLoss, True),
    "sigmoid": (fl.SigmoidLoss, True),
    "C-ITC": (fl.CITCLoss, False),
    "SimCLR": (fl.SimCLRLoss, False),
}
ROW_STATISTICS = ("A-SDM", "SDM", "ITC", "R-ITC")
WAYS = ("blocks", "whole")


def step(name: str, pairs: int, way: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, float]]:
    """Value and gradients, and the seconds of both passes."""
    rows_in_blocks.MOST_SCORES = 0 if way == "blocks" else sys.maxsize
    generator = torch.Generator().manual_seed(0)
    image, text = (
        torch.randn(pairs, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2)
    )
    build, with_pids = LOSSES[name]
    pids = (torch.arange(pairs) // PER_PERSON,) if with_pids else ()
    start = time.perf_counter()
    value = build()(image, text, *pids)
    middle = time.perf_counter()
    gradients = torch.autograd.grad(value, [image, text])
    seconds = {"forward_seconds": middle - start, "backward_seconds": time.perf_counter() - middle}
    return [value.detach(), *gradients], {key: round(x, 3) for key, x in seconds.items()}


def measure(name: str, pairs: int, way: str) -> dict[str, Any]:
    _, seconds = step(name, pairs, way, torch.float32)
    return {"loss": name, "pairs": pairs, "way": way, **seconds, "process_mib": peak_process_bytes() // 2**20}


def compare(name: str, pairs: int) -> dict[str, Any]:
    """The largest difference between blocks and whole matrices in float64, relative to the largest number."""
    found, expected = (step(name, pairs, way, torch.float64)[0] for way in WAYS)
    errors = torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)])
    return {"loss": name, "pairs": pairs, "way": "blocks against whole, float64", "error": errors.max().item()}


def in_process(*arguments: object) -> dict[str, Any]:
    """One record, from a fresh process."""
    command = [sys.executable, "-m", "benchmarks.large_batch", "--one", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def table(records: list[dict[str, Any]]) -> str:
    """One line a loss: what it takes on a large batch, and beside whole matrices on a smaller one."""
    by_case = {(row["loss"], row["pairs"], row["way"]): row for row in records}
    sizes = sorted({row["pairs"] for row in records})
    errors = {row["loss"]: row["error"] for row in records if "error" in row}
    head = ["loss", "pairs", "seconds", "process, MiB", "seconds, whole", "process, whole, MiB", "float64 error"]
    rows = []
    for name in dict.fromkeys(row["loss"] for row in records):
        for pairs in sizes:
            own, whole = (by_case.get((name, pairs, way)) for way in WAYS)
            if own is None:
                continue
            rows.append([name, str(pairs), *_figures(own), *_figures(whole)])
            rows[-1].append(f"{errors[name]:.0e}" if whole is not None and name in errors else "-")
    return markdown(head, rows)


def _figures(record: dict[str, Any] | None) -> tuple[str, str]:
    if record is None:
        return "-", "-"
    return number(record["forward_seconds"] + record["backward_seconds"]), str(record["process_mib"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks large-batch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", type=int, default=16384, metavar="B")
    parser.add_argument("--whole", type=int, default=4096, metavar="B")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/large_batch_cpu.json", metavar="FILE")
    parser.add_argument("--one", nargs=3, metavar=("LOSS", "B", "WAY"), help="print one record of this process")
    options = parser.parse_args(argv)
    if options.one:
        name, pairs, way = options.one
        print(json.dumps(measure(name, int(pairs), way) if way in WAYS else compare(name, int(pairs))))
        return 0
    head = results.head(
        "large-batch", "python -m benchmarks large-batch", note=f"D {D}, float32, {PER_PERSON} pairs a person"
    )
    records = []
    for name in LOSSES:
        cases: list[tuple[int, str]] = [(options.pairs, "blocks"), (options.whole, "blocks")]
        if name not in ROW_STATISTICS:
            cases += [(options.whole, "whole"), (options.whole, "compare")]
        for pairs, way in cases:
            records.append(in_process(name, pairs, way))
            print(json.dumps(records[-1]), flush=True)
    results.write(options.out, head | {"records": records})
    print(table(records))
    over = [row for row in records if row.get("process_mib", 0) > BOUND_MIB and row["way"] == "blocks"]
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
