"""The kernels on a CUDA device: their tests first, then time, memory and share of the roof, against what users have.

    python -m benchmarks gpu --out DIR [--minutes 8]

Writes DIR/gpu.json, gpu.md, the log of the tests and three plots. It ends in time: what did not fit is listed as "not
run: out of time". Operations whose tests fail get no speed. Copy gpu.json to benchmarks/results/ and run
`python -m benchmarks report` to have the figures in the documentation.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import plots, results
from .machine import describe_machine, describe_versions, today
from .plan import OUT_OF_TIME, Job, gpu_jobs
from .tables import gpu_tables, target_table
from .targets import gpu_targets

ROOT = Path(__file__).parents[1]
# Which file of tests/gpu speaks for which operations.
TESTS = {
    "test_gpu_efa.py": ("efa", "hard_similarity", "maxsim", "sparse_aggregate"),
    "test_gpu_asdm.py": ("asdm",),
}
TEST_SHARE = 0.4  # of the time at most goes to the tests
REPORT_SECONDS = 15  # kept for tables and plots


def run_tests(log: Path, seconds: float) -> dict[str, str]:
    """Outcome by test file: "passed ..." or why the operations behind it get no speed."""
    parallel = ["-n", "4"] if importlib.util.find_spec("xdist") else []  # most of the time is the compiler's
    with log.open("w") as file:
        running = {
            name: subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *parallel, f"tests/gpu/{name}"],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for name in TESTS
        }
        outcome = {}
        deadline = time.monotonic() + seconds
        for name, process in running.items():
            try:
                output, _ = process.communicate(timeout=max(1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
                output += f"\nstopped after {seconds:.0f} s"
            file.write(f"== {name}\n{output}\n")
            last = (output.strip().splitlines() or ["no output"])[-1].strip("= ")
            green = process.returncode == 0 and "passed" in last
            outcome[name] = ("passed: " if green else "failed: ") + last
    return outcome


def run_worker(records: Path, deadline: float, red: Sequence[str]) -> None:
    """Keeps a worker on the plan until it is through or the time is; a worker that dies costs the job it was at."""
    total = len(gpu_jobs())
    while True:
        command = [sys.executable, "-m", "benchmarks.gpu_worker", "--records", str(records)]
        worker = subprocess.Popen([*command, "--deadline", str(deadline), "--red", *red], cwd=ROOT)
        try:
            code = worker.wait(timeout=max(1, deadline - time.time()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            return
        lines = read_lines(records)
        done, begun = sum("status" in line for line in lines), sum("begun" in line for line in lines)
        if done >= total or code == 0 or begun == 0 or time.time() > deadline:
            return
        job = gpu_jobs()[done]
        append(records, job.identity | {"status": f"failed: the process died with exit code {code}"})


def read_lines(records: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []


def append(records: Path, line: dict[str, Any]) -> None:
    with records.open("a") as file:
        file.write(json.dumps(line) + "\n")


def complete(measured: Sequence[dict[str, Any]], jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """A record for every job of the plan: the missing ones did not fit."""
    return [*measured, *(job.identity | {"status": OUT_OF_TIME} for job in jobs[len(measured) :])]


def finish(out: Path, tests: dict[str, str], minutes: float) -> dict[str, Any]:
    """gpu.json, gpu.md and the plots from what has been recorded."""
    lines = read_lines(out / "records.jsonl")
    ceilings = next((line["ceilings"] for line in lines if "ceilings" in line), None)
    measurements = complete([line for line in lines if "status" in line], gpu_jobs())
    result = {
        "kind": "gpu",
        "command": "python -m benchmarks gpu",
        "date": today(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "minutes": minutes,
        "tests": tests,
        "ceilings": ceilings,
        "targets": gpu_targets(measurements, ceilings),
        "measurements": measurements,
    }
    results.write(out / "gpu.json", result)
    (out / "gpu.md").write_text(gpu_tables(result) + "\n\n" + target_table(result["targets"]) + "\n")
    plots.draw_gpu(result, out, stem="gpu")
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: %(default)s)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip or "no accelerator"
        print(f"needs a CUDA device, and torch {torch.__version__} (built for {built}) sees none; nothing was measured")
        return 2
    began, seconds = time.time(), 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    records = options.out / "records.jsonl"
    records.unlink(missing_ok=True)

    print("tests of the kernels ...", flush=True)
    tests = run_tests(options.out / "tests.log", TEST_SHARE * seconds)
    for name, outcome in tests.items():
        print(f"  {name}: {outcome}", flush=True)
    red = [op for name, ops in TESTS.items() if not tests[name].startswith("passed") for op in ops]
    run_worker(records, began + seconds - REPORT_SECONDS, red)
    result = finish(options.out, tests, options.minutes)
    print(gpu_tables(result), target_table(result["targets"]), f"written to {options.out}", sep="\n\n")
    return int(bool(red))
