"""Does the jobs of `benchmarks gpu` in one process; each line of standard input is the number of a job.

Answers one line of JSON at a time on what was its standard output: {"ready": true}, {"record": {...}} as soon as there
is one, {"done": true} after the last of a job, {"lost": true} when the device does not answer any more and another
process must go on. Everything that libraries print goes to standard error. benchmarks/gpu/supervisor.py starts it.
"""

import argparse
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import torch

from ..cases import inputs, leaves
from ..measure import AGREEMENT, DTYPES, cotangent, disagreement, fingerprint, matmul_precision
from ..providers import PEERS, TORCH, TRITON, provider
from . import alone, alternatives, device, device_tests, exact, figures, stand_in_cuda, step
from .plan import Job, gpu_jobs
from .predictions import predicted
from .roofline import measure_ceilings

__all__ = ["do", "main", "records"]

TEST_WORKERS = 8


def records(job: Job, *, dry: bool) -> Iterator[dict[str, Any]]:
    """The records of a job, each as soon as it is there."""
    matmul_precision(job.precision)
    for record in KINDS[job.kind](job, dry):
        mode = record.pop("mode", job.modes[0])
        identity = next(i for i in job.identities if i.get("mode", mode) == mode)
        yield identity | record


def _ceilings(job: Job, dry: bool) -> Iterator[dict[str, Any]]:
    yield {"status": "ok", "ceilings": measure_ceilings(device.NAME)}


def _exact(job: Job, dry: bool) -> Iterator[dict[str, Any]]:
    assert job.case is not None
    yield exact.check(job.case, job.precision, device.NAME)


def step_of(job: Job) -> Callable[[], tuple[Any, ...]]:
    """Forward and backward of our kernels on one set of inputs."""
    assert job.case is not None
    fn = provider(TRITON, job.case.op)
    arguments = inputs(job.case, dtype=DTYPES[job.precision], device=device.NAME)

    def step() -> tuple[Any, ...]:
        value = fn(**arguments)
        return value.detach(), torch.autograd.grad(value, leaves(arguments), cotangent(value))

    return step


def _kernels(job: Job, dry: bool) -> Iterator[dict[str, Any]]:
    assert job.case is not None
    for record in alone.measure(step_of(job), often=1 if dry else alone.IN_A_GRAPH):
        expected = predicted(job.case.op, job.case.B, job.precision, record["kernel"])
        if expected is not None:
            record |= {"predicted": expected.after, "before_ms": expected.before, "change": expected.change}
        yield record


def _alternative(job: Job, dry: bool) -> Iterator[dict[str, Any]]:
    """The table's entry and the other one in turn, twice; the better of two medians each."""
    assert job.alternative is not None
    row = alternatives.ALTERNATIVES[job.alternative]
    entries = {"entry": alternatives.value(row), "other": row.other}
    step, found = step_of(job), {}
    times: dict[str, list[float]] = {name: [] for name in entries}
    often = 1 if dry else alone.IN_A_GRAPH
    for name in [*entries] * (1 if dry else 2):
        with alternatives.swapped(row, entries[name]):
            kernels, (value, grads) = alone.kernels_of(step)
            found[name] = fingerprint(value, grads) | {"provider": name}
            if row.kernels:
                spreads = [alone.time_kernel(kernels[kernel], often) for kernel in row.kernels]
                times[name].append(sum(spread["median"] for spread in spreads))
            else:
                times[name].append(alone.time_step(step, often)["median"])
    record = {**{name: _plain(entry) for name, entry in entries.items()}, "predicted": row.predicted}
    wrong = disagreement(found["other"], found["entry"], AGREEMENT[job.precision])
    if wrong is not None:
        yield record | {"status": f"failed: {wrong}"}
    else:
        best = {f"{name}_ms": float(f"{min(values):.4g}") for name, values in times.items()}
        yield record | best | {"status": "ok"}


def _plain(entry: Any) -> Any:
    return list(entry) if isinstance(entry, tuple) else entry


def _figure(job: Job, dry: bool) -> Iterator[dict[str, Any]]:
    assert job.case is not None
    reason = figures.why_not(job.case, job.provider, job.precision)
    if reason is not None:
        for mode in job.modes:
            yield {"mode": mode, "status": f"not run: {reason}"}
        return
    timing = {"seconds": 0.0, "least": 1} if dry else {}
    # A dry run has interpreted the kernels in stages a to c; here it would take minutes.
    name = TORCH if dry and job.provider == TRITON else job.provider
    ran = {} if name == job.provider else {"ran": name}
    try:
        for mode, record in figures.figures(job.case, name, job.precision, job.modes, timing):
            yield {"mode": mode} | ran | record
    except Exception as error:
        if not dry or job.provider not in PEERS:
            raise
        why = (str(error).splitlines() or [""])[0]
        for mode in job.modes:
            yield {"mode": mode, "status": f"not run: needs CUDA ({type(error).__name__}: {why:.80})"}


def _tests(job: Job, dry: bool) -> Iterator[dict[str, Any]]:
    yield from device_tests.run_tests(0 if dry else TEST_WORKERS)


def _step(job: Job, dry: bool) -> Iterator[dict[str, Any]]:
    yield from step.measure(job, dry=dry)


def _largest(job: Job, dry: bool) -> Iterator[dict[str, Any]]:
    yield from step.largest_batch(job, dry=dry)


KINDS: dict[str, Callable[[Job, bool], Iterator[dict[str, Any]]]] = {
    "ceilings": _ceilings, "exact": _exact, "kernels": _kernels, "alternative": _alternative, "figure": _figure,
    "tests": _tests, "step": _step, "largest": _largest,
}  # fmt: skip


def do(job: Job, write: Callable[[dict[str, Any]], None], *, dry: bool) -> bool:
    """Writes the records of a job, a failure among them; whether the device can be used afterwards."""
    failed = ""
    try:
        for record in records(job, dry=dry):
            write(record)
    except torch.cuda.OutOfMemoryError:
        write({"status": "failed: out of memory"})
    except Exception as error:
        message = (str(error).splitlines() or [""])[0]
        write({"status": f"failed: {type(error).__name__}: {message:.200}"})
        failed = str(error)
    return device.usable_after(failed)


def end_with(parent: int) -> None:
    """This process and all that it started end when the supervisor is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(0, signal.SIGKILL)


def main(argv: list[str], requests: TextIO, replies: TextIO) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", nargs="*")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(argv)
    if options.dry_run:
        stand_in_cuda.install()

    def reply(line: dict[str, Any]) -> None:
        replies.write(json.dumps(line) + "\n")
        replies.flush()

    jobs = gpu_jobs(options.stage, dry=options.dry_run)
    torch.cuda.synchronize()  # the device's context
    gc.freeze()  # what is there by now stays, and need not be looked through after every job
    reply({"ready": True})
    for line in requests:
        usable = do(jobs[int(line)], lambda record: reply({"record": record}), dry=options.dry_run)
        reply({"done": True} if usable else {"lost": True})
        if not usable:
            return


if __name__ == "__main__":
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.argv[1:], sys.stdin, answers)
