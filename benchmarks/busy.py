"""EFA while other processes work: how much slower is a step when one core has something else to do?

    python -m benchmarks busy [--threads N] [--out FILE]

A data loader, another job or a virtual machine's neighbour takes a core now and then. Where every product is spread
over all threads, all of them wait for the one that was interrupted. Measured are one thread alone, all threads alone,
and all threads beside a process that counts without end. Nobody is bound to a core: the system shares them out as it
does for anybody. On two cores nothing can be faster beside it than 1.5 times the time of two threads alone.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from . import ROOT, results
from .cases import Case
from .micro import agreed, measure_in_process
from .providers import REFERENCE, TORCH
from .tables import markdown, milliseconds, target_table
from .targets import ratio, target

__all__ = ["busy_tables", "busy_targets", "other_work"]

# Counts until whoever started it has gone, so that nothing stays behind, however the measurement ends.
COUNT = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(10**6):
        pass
"""
CASES = (Case("efa", 48), Case("efa", 48, mean_length=25))
QUICK = (Case("efa", 3, L=5, N=6, D=8),)
PROVIDERS = (REFERENCE, TORCH)
BOUND = 2.0  # of the time beside another process, over the time alone


@contextmanager
def other_work(processes: int) -> Iterator[None]:
    """So many processes of one thread at full load; all are at work when it begins."""
    started = [subprocess.Popen([sys.executable, "-c", COUNT]) for _ in range(processes)]
    try:
        for process in started:
            while psutil.Process(process.pid).cpu_times().user < 0.1:
                if process.poll() is not None:
                    raise RuntimeError(f"the process that makes the load ended with {process.returncode}")
                time.sleep(0.01)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def settings(threads: int) -> list[dict[str, int]]:
    """Threads of the step, and other processes at work."""
    return [{"threads": 1, "others": 0}, {"threads": threads, "others": 0}, {"threads": threads, "others": 1}]


def measure(
    cases: Sequence[Case], threads: int, seconds: float, save: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """A record for each case, provider and setting; all of a case must agree in value and gradient."""
    records: list[dict[str, Any]] = []
    for case in cases:
        rows = []
        for name in PROVIDERS:
            for setting in settings(threads):
                print(f"{case.name}: {name}, {setting}", file=sys.stderr)
                with other_work(setting["others"]):
                    found = measure_in_process(case, name, seconds, setting["threads"])
                rows.append({"case": case.name, **case.as_dict(), "provider": name, "dtype": "fp32", **setting} | found)
        records += agreed(rows)
        save(records)
    return records


def busy_table(records: Sequence[dict[str, Any]]) -> str:
    """Forward and backward together, a line for each case and provider."""
    if not records:
        return ""
    columns = settings(max(row["threads"] for row in records))
    names = [f"{column['threads']} thread{'s' * (column['threads'] > 1)}" for column in columns]
    head = [f"{names[0]} ms", f"{names[1]} ms", f"{names[2]}, {columns[2]['others']} other process ms", "times slower"]
    rows = []
    for case, name in dict.fromkeys((row["case"], row["provider"]) for row in records):
        found = [_at(records, case, name, column) for column in columns]
        slower = ratio(found[2], found[1])
        times = ["-" if row is None else milliseconds(row, "both") for row in found]
        rows.append([case, name, *times, "-" if slower is None else f"{slower:.2f}"])
    return markdown(["case", "provider", *head], rows)


def busy_targets(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    entries = []
    for case in dict.fromkeys(row["case"] for row in records):
        _, alone, beside = settings(max(row["threads"] for row in records))
        slower = ratio(_at(records, case, TORCH, beside), _at(records, case, TORCH, alone))
        goal = (
            f"{case}, {alone['threads']} threads beside {beside['others']} other process: at most {BOUND:g}x the time"
        )
        measured = None if slower is None else f"{slower:.2f}x"
        entries.append(target(goal, measured, None if slower is None else slower <= BOUND))
    return entries


def busy_tables(records: Sequence[dict[str, Any]]) -> str:
    return f"{busy_table(records)}\n\n{target_table(busy_targets(records))}"


def _at(records: Sequence[dict[str, Any]], case: str, provider: str, setting: dict[str, int]) -> dict[str, Any] | None:
    wanted = {"case": case, "provider": provider, "status": "ok"} | setting
    return next((row for row in records if all(row.get(key) == value for key, value in wanted.items())), None)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks busy", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny shape: is everything in order?")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/busy_cpu.json, or runs/busy.json")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a step (default: one a core)")
    parser.add_argument("--seconds", type=float, help="of repeats a measurement (default: 2, --quick 0.1)")
    options = parser.parse_args(argv)
    out = options.out or (ROOT / "runs/busy.json" if options.quick else ROOT / "benchmarks/results/busy_cpu.json")
    seconds = options.seconds if options.seconds is not None else (0.1 if options.quick else 2.0)

    command = "python -m benchmarks busy" + " --quick" * options.quick
    head = results.head("busy", command, threads=options.threads) | {"seconds_of_repeats": seconds}

    def save(records: list[dict[str, Any]]) -> None:
        results.write(out, head | {"records": records})

    records = measure(QUICK if options.quick else CASES, options.threads, seconds, save)
    print(busy_tables(records))
    print(f"\nwritten to {out}")
    return int(any(row["status"].startswith("failed") for row in records))
