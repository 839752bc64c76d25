"""Every operation and loss against its reference on this machine's CPU: time, spread and peak memory.

    python -m benchmarks micro [--quick] [--out FILE]

Each (case, provider) runs in a process of its own, so that its peak memory is its own. Providers of one case must agree
in value and gradient, or their times are not reported.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import ROOT, providers, results
from .cases import SIZES, Case, inputs
from .measure import disagreement, measure_cpu
from .providers import REFERENCE, RELEASED, TORCH
from .tables import micro_table, target_table
from .targets import micro_targets

PEOPLE = 11003  # identities in the training split of CUHK-PEDES
AGREEMENT = 1e-3  # relative; float32 sums of 1e7 terms in different orders stay well below

FULL = [
    (Case("efa", 64), (RELEASED, REFERENCE, TORCH)),
    (Case("efa", 64, mean_length=25), (REFERENCE, TORCH)),
    (Case("efa", 256), (TORCH,)),
    (Case("hard_similarity", 64), (RELEASED, REFERENCE, TORCH)),
    (Case("sparse_aggregate", 64), (REFERENCE, TORCH)),
    (Case("asdm", 64), (REFERENCE, TORCH)),
    (Case("asdm", 1024), (REFERENCE, TORCH)),
    (Case("asdm", 4096), (REFERENCE, TORCH)),
    (Case("asdm", 16384), (TORCH,)),
    (Case("asdm", 32768), (TORCH,)),
    (Case("irr", 16, N=193), (REFERENCE, TORCH)),
    (Case("irr", 16, N=193, mean_length=25), (REFERENCE, TORCH)),
    (Case("id", 64, V=PEOPLE), (REFERENCE, TORCH)),
    (Case("mask_tokens", 64), (REFERENCE, TORCH)),
]
QUICK = [
    (Case("efa", 4, L=7, N=12, D=64), (RELEASED, REFERENCE, TORCH)),
    (Case("hard_similarity", 4, L=7, N=12, D=64), (RELEASED, REFERENCE, TORCH)),
    (Case("sparse_aggregate", 4, L=7, N=12, D=64), (REFERENCE, TORCH)),
    (Case("asdm", 32, D=64), (REFERENCE, TORCH)),
    (Case("irr", 2, L=7, N=13, D=64, V=100), (REFERENCE, TORCH)),
    (Case("id", 8, D=64, V=50), (REFERENCE, TORCH)),
    (Case("mask_tokens", 4, L=20), (REFERENCE, TORCH)),
]


def measure_one(case: Case, provider: str, seconds: float) -> dict[str, Any]:
    fn = providers.provider(provider, case.op)
    # A miniature first: what libraries load and allocate once does not count as the case's memory.
    measure_cpu(fn, inputs(replace(case, B=2, L=min(case.L, 9), N=5, D=64, V=min(case.V, 50))), seconds=0)
    return measure_cpu(fn, inputs(case), seconds=seconds)


def measure_in_process(case: Case, provider: str, seconds: float, threads: int) -> dict[str, Any]:
    """The measurement, or the reason why there is none."""
    request = json.dumps({"case": asdict(case), "provider": provider, "seconds": seconds, "threads": threads})
    command = [sys.executable, "-m", "benchmarks.micro", request]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if process.returncode == 0:
        return {"status": "ok"} | json.loads(process.stdout.splitlines()[-1])
    reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
    return {"status": f"failed (exit {process.returncode}): {reason:.200}"}


def run(
    plan: Sequence[tuple[Case, tuple[str, ...]]],
    seconds: float,
    threads: int,
    save: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """All measurements; `save` sees those so far after every case, so that a run cut short leaves what it has."""
    measurements: list[dict[str, Any]] = []
    with tqdm(total=sum(len(names) for _, names in plan), unit="measurement") as bar:
        for case, names in plan:
            rows: list[dict[str, Any]] = []
            for name in names:
                bar.set_description(f"{case.name}: {name}")
                identity = {"case": case.name, **case.as_dict(), "provider": name, "dtype": "fp32"}
                rows.append(identity | measure_in_process(case, name, seconds, threads))
                bar.update()
            measured = [row for row in rows if row["status"] == "ok"]
            for row in measured[1:] if case.op != "mask_tokens" else ():  # which tokens are masked is random
                wrong = disagreement(row, measured[0], AGREEMENT)
                if wrong:  # no speed of a wrong result
                    rows[rows.index(row)] = {key: row[key] for key in identity} | {"status": f"failed: {wrong}"}
            measurements += rows
            save(measurements)
    return measurements


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks micro", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes: is everything in order?")
    parser.add_argument("--only", nargs="+", metavar="OP", choices=sorted(SIZES), help=", ".join(sorted(SIZES)))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/micro_cpu.json, or runs/micro.json")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: one a core (%(default)s)")
    parser.add_argument("--seconds", type=float, help="of repeats a measurement (default: 5, --quick 0.1)")
    options = parser.parse_args(argv)
    out = options.out or (ROOT / "runs/micro.json" if options.quick else ROOT / "benchmarks/results/micro_cpu.json")
    seconds = options.seconds if options.seconds is not None else (0.1 if options.quick else 5.0)

    plan = QUICK if options.quick else FULL
    plan = [(case, names) for case, names in plan if options.only is None or case.op in options.only]

    command = "python -m benchmarks micro" + " --quick" * options.quick
    head = results.head("micro", command, threads=options.threads) | {"seconds_of_repeats": seconds}

    def save(measurements: list[dict[str, Any]]) -> None:
        results.write(out, head | {"records": measurements})

    measurements = run(plan, seconds, options.threads, save)
    print(micro_table(measurements))
    if not options.quick:
        print("\n" + target_table(micro_targets(measurements)))
    print(f"\nwritten to {out}")
    return int(any(row["status"] != "ok" for row in measurements))


def _child(request: str) -> None:
    job = json.loads(request)
    torch.set_num_threads(job["threads"])
    print(json.dumps(measure_one(Case(**job["case"]), job["provider"], job["seconds"])))


if __name__ == "__main__":
    _child(sys.argv[1])
