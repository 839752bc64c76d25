"""`python -m benchmarks torchrun`: training in one process and in two under torchrun, compared.

Both have the same batch of all processes and the same seed. They differ by the order of sums, and every step builds on
the ones before, so the difference is told by step: it starts at rounding and grows. Two controls: one process with two
threads adds in another order as well, and `--gather no` is another training from the first step on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .. import ROOT, results

OPTIONS = [
    *("--identities", "200", "--test-identities", "50", "--epochs", "2", "--minutes", "0"),
    *("--seed", "0", "--quiet", "--device", "cpu"),
]
BATCH = 64  # of all processes
RUNS: tuple[tuple[int, int, str | None, str], ...] = (  # processes, threads of each, --gather, dtype
    (1, 1, None, "float32"),
    (2, 1, "true", "float32"),
    (1, 2, None, "float32"),
    (2, 1, "no", "float32"),
    (1, 1, None, "float64"),
    (2, 1, "true", "float64"),
)
PHASES = {"FMFA": "checkpoint.pt"}


def train(processes: int, threads: int, gather: str | None, dtype: str, out: Path) -> list[str]:
    """Runs the demo; returns its command line, from "python" or "torchrun" on and without --out."""
    options = ["-m", "benchmarks", "person-retrieval", *OPTIONS, "--batch-size", str(BATCH // processes)]
    options += ["--float64"] if dtype == "float64" else []
    launcher, told = [sys.executable], "python"
    if gather is not None:
        options += ["--gather", gather]
        nproc = ["--standalone", "--nproc-per-node", str(processes)]
        launcher, told = [sys.executable, "-m", "torch.distributed.run", *nproc], " ".join(["torchrun", *nproc])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([*launcher, *options, "--out", str(out)], check=True, env=environment, stdout=subprocess.DEVNULL)
    return [told, *options]


def read(out: Path) -> tuple[dict[str, Any], dict[str, dict[str, list[float]]]]:
    """Metrics, and by phase the history of every term and accuracy."""
    histories = {name: torch.load(out / file, weights_only=True)["history"] for name, file in PHASES.items()}
    return json.loads((out / "metrics.json").read_text()), histories


def compare(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> list[float]:
    """Of every step, the largest relative difference of a term."""
    terms = [name for name in theirs if not name.endswith("accuracy")]
    steps = zip(*(zip(ours[name], theirs[name], strict=True) for name in terms), strict=True)
    return [max(abs(a - b) / max(abs(b), 1e-12) for a, b in step) for step in steps]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks torchrun",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/demo_torchrun_cpu.json")
    args = parser.parse_args(argv)
    head, rows = results.head("torchrun", "python -m benchmarks torchrun") | {"batch_size": BATCH}, []
    alone: dict[str, dict[str, dict[str, list[float]]]] = {}  # by dtype: what one process with one thread did
    for processes, threads, gather, dtype in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            command = train(processes, threads, gather, dtype, Path(folder))
            metrics, histories = read(Path(folder))
        alone.setdefault(dtype, histories)
        for phase, history in histories.items():
            differences = compare(history, alone[dtype][phase])
            retrieval = (metrics if phase == "FMFA" else metrics["before"])["t2i"]
            row = {
                "processes": processes,
                "threads": threads,  # of each
                "gather": gather,
                "dtype": dtype,
                "phase": phase,
                "command": " ".join(command),
                "steps": len(differences),
                "max_relative_difference": max(differences),
                "relative_difference_by_step": [float(f"{x:.2g}") for x in differences],
                "loss_by_step": [round(x, 6) for x in history["loss"]],
                "last_epoch": metrics["last_epoch"] if phase == "FMFA" else None,
                "retrieval": {name: round(x, 2) for name, x in retrieval.items()},
            }
            rows.append(row)
            print(processes, threads, gather, dtype, phase, max(differences), row["retrieval"], flush=True)
    results.write(args.out, head | {"records": rows})
