"""Measures the jobs of the GPU benchmark in one process, and writes every record down before the next job starts.

Started by benchmarks/gpu.py, which outlives it: a kernel that takes the process down, or one job that takes too long,
costs that job alone.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import providers
from .cases import inputs
from .measure import DTYPES, PASSES, autocast, disagreement, matmul_precision, measure_cuda
from .plan import Job, gpu_jobs, run_plan
from .providers import COMPILED, REFERENCE, TORCH, TRITON, memory_needed
from .roofline import measure_ceilings

DEVICE = "cuda"

# Relative difference in value and gradient norm beyond which two providers have not computed the same. Rounding flips
# near ties between winners, which changes gradients more than values.
AGREEMENT = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2}


def measure(job: Job) -> dict[str, Any]:
    """The measurement or the reason why there is none; afterwards the device is as empty as before."""
    matmul_precision(job.precision)
    try:
        return {"status": "ok"} | _measure(job)
    except torch.cuda.OutOfMemoryError:
        return {"status": "failed: out of memory"}
    except Exception as error:
        if "illegal memory access" in str(error) or "launch failure" in str(error):
            raise  # the device context is lost, and with it this process
        message = (str(error).splitlines() or [""])[0]
        return {"status": f"failed: {type(error).__name__}: {message:.200}"}
    finally:
        if job.provider == COMPILED:
            torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _measure(job: Job) -> dict[str, Any]:
    fn = providers.provider(job.provider, job.case.op)
    plain = job.provider in (REFERENCE, COMPILED)

    def call(**arguments: Any) -> torch.Tensor:
        if not plain:
            return fn(**arguments)
        with autocast(job.precision, DEVICE):
            return fn(**arguments)

    def make(seed: int) -> dict[str, Any]:
        return inputs(job.case, dtype=DTYPES[job.precision], device=DEVICE, seed=seed)

    step = torch.compiler.cudagraph_mark_step_begin if job.provider == COMPILED else lambda: None
    return measure_cuda(call, make, before_run=step)


def why_not(job: Job, red: set[str]) -> str | None:
    if job.provider == TRITON and job.case.op in red:
        return "the kernel tests failed"
    reason = providers.why_not(job.provider)
    if reason is not None:
        return reason
    case, itemsize = job.case, DTYPES[job.precision].itemsize
    needed = memory_needed(job.provider, case.op, case.B, case.L, case.N, case.D, itemsize)
    free = torch.cuda.mem_get_info()[0]
    if needed > 0.95 * free:
        return f"needs over {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
    return None


def checked(record: dict[str, Any], references: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """The record, without its times where it disagrees with the reference of its case (else the torch path)."""
    if record["status"] != "ok":
        return record
    key = (record["case"], record["dtype"])
    if key not in references and record["provider"] in (REFERENCE, TORCH):
        references[key] = record
    if references.get(key, record) is record:
        return record | {"checked": False}
    wrong = disagreement(record, references[key], AGREEMENT[record["dtype"]])
    if wrong is None:
        return record | {"checked": True}
    kept = {name: value for name, value in record.items() if name not in PASSES}
    return kept | {"status": f"failed: {wrong}"}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--red", nargs="*", default=[], help="operations whose kernel tests failed")
    options = parser.parse_args(argv)
    known = [json.loads(line) for line in options.records.read_text().splitlines()] if options.records.exists() else []
    with options.records.open("a") as file:

        def note(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        if not any("ceilings" in line for line in known):
            note({"ceilings": measure_ceilings(DEVICE)})
        references: dict[tuple[str, str], dict[str, Any]] = {}
        done = [line for line in known if "status" in line]
        for record in done:
            checked(record, references)
        jobs = gpu_jobs()[len(done) :]
        bar = tqdm(total=len(jobs) + len(done), initial=len(done), unit="job")

        def measure_noted(job: Job) -> dict[str, Any]:
            bar.set_description(f"{job.case.name} {job.precision}: {job.provider}")
            note({"begun": len(done) + bar.n - bar.initial})
            return measure(job)

        red = set(options.red)
        records = run_plan(
            jobs, measure_noted, clock=time.time, deadline=options.deadline, why_not=lambda job: why_not(job, red)
        )
        for record in records:
            note(checked(record, references))
            bar.update()
        bar.close()


if __name__ == "__main__":
    main(sys.argv[1:])
