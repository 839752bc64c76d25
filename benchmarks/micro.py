"""Every operation and loss against its reference on this machine's CPU: time, spread and peak memory.

    python -m benchmarks micro [--quick] [--out FILE]

Each (case, provider) runs in a process of its own, so that its peak memory is its own. Providers of one case must agree
in value and gradient, or their times are not reported. The rate of a large torch.mm, measured before and after, is what
operations are compared with. Packages of the group `peers` are measured where they are installed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import ROOT, providers, results
from .cases import RETRIEVAL, SIZES, Case, inputs, work
from .measure import FINGERPRINT, PASSES, disagreement, matmul_rate, measure_cpu
from .peers import COMPILED_MAXSIM, CPU_PEERS, LATE_INTERACTION, PRODUCT, prepared
from .providers import AUTOTUNED, COMPILED, MEDIUM, OTHER_RESULTS, REFERENCE, RELEASED, TORCH, UNMASKED
from .tables import micro_tables, target_table
from .targets import micro_targets

PEOPLE = 11003  # identities in the training split of CUHK-PEDES
MEASURED = (*FINGERPRINT, "sample", *PASSES, "repeats", "process_mib", "above_inputs_mib")  # by measure_cpu
AGREEMENT = 1e-3  # relative; float32 sums of 1e7 terms in different orders stay well below

# MaxSim as in training, and the forward alone, which is all that some have. torch.compile takes half a minute or more
# for a shape, so it is where it has a backward.
TRAINED, SCORED = (LATE_INTERACTION, TORCH), (LATE_INTERACTION, *COMPILED_MAXSIM, PRODUCT, TORCH)
CAPTIONS = Case("maxsim", 64, mean_length=25)

FULL = [
    (Case("efa", 64), (RELEASED, REFERENCE, TORCH, MEDIUM)),
    (Case("efa", 64, mean_length=25), (UNMASKED, REFERENCE, TORCH, MEDIUM)),
    (Case("efa", 256), (TORCH,)),
    (Case("hard_similarity", 64), (RELEASED, REFERENCE, TORCH)),
    (Case("hard_similarity", 64, gradients=False), (REFERENCE, PRODUCT, TORCH)),
    (RETRIEVAL, (REFERENCE, AUTOTUNED, *TRAINED)),
    (replace(RETRIEVAL, gradients=False), (REFERENCE, *SCORED)),
    (Case("maxsim", 64), (REFERENCE, AUTOTUNED, *TRAINED)),
    (Case("maxsim", 64, gradients=False), (REFERENCE, *SCORED)),
    (CAPTIONS, (REFERENCE, *TRAINED)),
    (replace(CAPTIONS, gradients=False), (REFERENCE, *SCORED)),
    (Case("sparse_aggregate", 64), (REFERENCE, TORCH)),
    (Case("asdm", 64), (REFERENCE, TORCH)),
    (Case("asdm", 1024), (REFERENCE, TORCH)),
    (Case("asdm", 4096), (REFERENCE, TORCH)),
    (Case("asdm", 16384), (TORCH,)),
    (Case("asdm", 32768), (TORCH,)),
    (Case("irr", 16, N=193), (REFERENCE, TORCH)),
    (Case("irr", 16, N=193, mean_length=25), (REFERENCE, TORCH)),
    (Case("irr", 64, N=193, mean_length=25), (TORCH,)),
    (Case("id", 64, V=PEOPLE), (REFERENCE, TORCH)),
    (Case("mask_tokens", 64), (REFERENCE, TORCH)),
]
QUICK = [
    (Case("efa", 4, L=7, N=12, D=64), (RELEASED, REFERENCE, TORCH)),
    (Case("efa", 4, L=7, N=12, D=64, mean_length=3), (UNMASKED, REFERENCE, TORCH)),
    (Case("hard_similarity", 4, L=7, N=12, D=64), (RELEASED, REFERENCE, TORCH)),
    (Case("hard_similarity", 4, L=7, N=12, D=64, gradients=False), (REFERENCE, PRODUCT, TORCH)),
    (Case("maxsim", 4, L=7, N=12, D=64, images=6), (REFERENCE, AUTOTUNED, *TRAINED)),
    (Case("maxsim", 4, L=7, N=12, D=64, mean_length=3, gradients=False), (REFERENCE, *SCORED)),
    (Case("sparse_aggregate", 4, L=7, N=12, D=64), (REFERENCE, TORCH)),
    (Case("asdm", 32, D=64), (REFERENCE, TORCH)),
    (Case("irr", 2, L=7, N=13, D=64, V=100), (REFERENCE, TORCH)),
    (Case("id", 8, D=64, V=50), (REFERENCE, TORCH)),
    (Case("mask_tokens", 4, L=20), (REFERENCE, TORCH)),
]


def measure_one(case: Case, provider: str, seconds: float) -> dict[str, Any]:
    fn = providers.provider(provider, case.op)
    compiled = provider in (COMPILED, AUTOTUNED)
    if not compiled:  # which would compile for two shapes; the compiler counts as their memory
        # A miniature first: what libraries load and allocate once does not count as the case's memory.
        small = replace(case, B=2, L=min(case.L, 9), N=5, D=64, V=min(case.V, 50), images=case.images and 3)
        measure_cpu(fn, prepared(provider, inputs(small)), seconds=0)
    return measure_cpu(fn, prepared(provider, inputs(case)), seconds=seconds, compiled=compiled)


def measure_in_process(case: Case, provider: str, seconds: float, threads: int) -> dict[str, Any]:
    """The measurement, or the reason why there is none."""
    reason = providers.why_not(provider, "cpu")
    if reason:
        return {"status": f"not run: {reason}"}
    return in_process({"case": asdict(case), "provider": provider, "seconds": seconds, "threads": threads})


def in_process(request: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own answers; without a provider the rate of torch.mm."""
    command = [sys.executable, "-m", "benchmarks.micro", json.dumps(request)]
    threads = str(request["threads"])
    environment = os.environ | {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}  # the latter: Rust's packages
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if process.returncode == 0:
        return {"status": "ok"} | json.loads(process.stdout.splitlines()[-1])
    if process.returncode < 0:
        return {"status": f"failed: {signal.Signals(-process.returncode).name}"}
    reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
    return {"status": f"failed (exit {process.returncode}): {reason:.200}"}


def counted(case: Case) -> dict[str, Any]:
    """Operations that the case needs by pass, in 10^9; nothing where they are not counted."""
    least = work(case, itemsize=4)
    if least is None:
        return {}
    passes = least if case.gradients else {"forward": least["forward"]}
    return {"gflop": {key: float(f"{needed.flops / 1e9:.5g}") for key, needed in passes.items()}}


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
                identity = {"case": case.name, **case.as_dict(), "provider": name, "dtype": "fp32", **counted(case)}
                rows.append(identity | measure_in_process(case, name, seconds, threads))
                bar.update()
            measurements += agreed(rows)
            save(measurements)
    return measurements


def agreed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measurements of one case; one that does not agree with the first has no time: no speed of a wrong result."""
    compared = [row for row in rows if row["status"] == "ok" and row["provider"] not in OTHER_RESULTS]
    found = []
    for row in rows:
        wrong = None
        if row in compared[1:] and row["op"] != "mask_tokens":  # which tokens are masked is random
            wrong = disagreement(row, compared[0], AGREEMENT)
        dropped = MEASURED if wrong else ("sample",)
        found.append({key: value for key, value in row.items() if key not in dropped})
        if wrong:
            found[-1]["status"] = f"failed: {wrong}"
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks micro", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes: is everything in order?")
    parser.add_argument("--only", nargs="+", metavar="OP", choices=sorted(SIZES), help=", ".join(sorted(SIZES)))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/micro_cpu.json, or runs/micro.json")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: one a core (%(default)s)")
    parser.add_argument("--seconds", type=float, help="of repeats a measurement (default: 2, --quick 0.1)")
    options = parser.parse_args(argv)
    out = options.out or (ROOT / "runs/micro.json" if options.quick else ROOT / "benchmarks/results/micro_cpu.json")
    seconds = options.seconds if options.seconds is not None else (0.1 if options.quick else 2.0)

    plan = QUICK if options.quick else FULL
    plan = [(case, names) for case, names in plan if options.only is None or case.op in options.only]

    command = "python -m benchmarks micro" + " --quick" * options.quick
    head = results.head("micro", command, threads=options.threads) | {"seconds_of_repeats": seconds}
    size = 256 if options.quick else 2048
    rate = mm_gflops(options.threads, size)

    def save(measurements: list[dict[str, Any]]) -> None:
        results.write(out, head | {"mm_gflops": rate, "records": measurements})

    measurements = run(plan, seconds, options.threads, save)
    rate = max(rate, mm_gflops(options.threads, size))  # other work on the machine makes it smaller, nothing larger
    save(measurements)
    print(micro_tables(measurements, rate))
    if not options.quick:
        print("\n" + target_table(micro_targets(measurements)))
    print(f"\nwritten to {out}")
    failed = {row["provider"] for row in measurements if row["status"].startswith("failed")}
    return int(not failed <= {AUTOTUNED, *CPU_PEERS})  # what others got wrong is a row, and no failure of the run


def mm_gflops(threads: int, size: int) -> float:
    return float(in_process({"threads": threads, "size": size})["gflops"])


def _child(request: str) -> None:
    job = json.loads(request)
    torch.set_num_threads(job["threads"])
    if "provider" in job:
        print(json.dumps(measure_one(Case(**job["case"]), job["provider"], job["seconds"])))
    else:
        print(json.dumps({"gflops": float(f"{matmul_rate(job['size']) / 1e9:.4g}")}))


if __name__ == "__main__":
    _child(sys.argv[1])
