"""Runs jobs in a worker process and keeps to the time: a job that hangs is killed at twice its estimated seconds.

A job that crashes the worker loses only itself. Every stage has its seconds; what it does not use goes to later stages.
A job that does not fit into its stage waits until all stages are over, and starts if it fits then.
A worker is any program that speaks the protocol of benchmarks/gpu/worker.py.
"""

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TextIO

from .plan import STAGES, Job

__all__ = ["OUT_OF_TIME", "Worker", "run_jobs", "stage_ends"]

OUT_OF_TIME = "not run: out of time"
START_SECONDS = 90.0  # for a worker to import torch and to reach the device
GIVE_UP = 3  # workers that did not start, one after the other


class Worker:
    """A process of its own group, whose lines arrive in a queue."""

    def __init__(self, command: Sequence[str], env: dict[str, str] | None, log: TextIO, cwd: Any = None) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1, env=env, cwd=cwd,
            start_new_session=True,
        )  # fmt: skip
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.listener = threading.Thread(target=self._read, daemon=True)
        self.listener.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines, suppress(ValueError):  # a process was killed while it wrote its last line
            for line in lines:
                self.lines.put(json.loads(line))
        self.lines.put(None)

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # its end arrives in the queue
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next line; None when the process has ended. Raises queue.Empty when the time is over."""
        return self.lines.get(timeout=max(0.0, seconds))

    def ended(self) -> int:
        """Exit code of a process that has closed its output: its own, if it ends by itself."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        self.kill()
        return self.process.returncode

    def kill(self) -> None:
        """With everything that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a process that the driver holds goes when it lets go
            self.process.wait(timeout=5)
        self.listener.join(timeout=5)
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]


@dataclass
class _Run:
    start: Callable[[], Worker]
    note: Callable[[Job, dict[str, Any]], None]
    deadline: float
    clock: Callable[[], float]
    prebuilt: bool
    ends: dict[str, float]  # when a stage must leave the time to those after it
    worker: Worker | None = None
    not_started: int = 0

    def ready(self) -> str | None:
        """A worker that waits for jobs; or why there is none."""
        if self.worker is not None:
            return None
        self.worker = self.start()
        try:
            line = self.worker.next(min(START_SECONDS, self.deadline - self.clock()))
        except queue.Empty:
            line = None
        if line is not None and "ready" in line:
            self.not_started = 0
            return None
        self.not_started += 1
        self.end_worker()
        return "failed: the worker did not start"

    def end_worker(self) -> None:
        assert self.worker is not None
        self.worker.kill()
        self.worker = None

    def fits(self, job: Job, end: float) -> bool:
        return self.clock() + job.seconds(self.prebuilt) <= end

    def do(self, number: int, job: Job, end: float) -> None:
        """Notes a record for every identity of the job, come what may; it is stopped at `end`."""
        open_identities = job.identities
        reason = "not run: no worker starts" if self.not_started >= GIVE_UP else None
        if reason is None and not self.fits(job, end):
            reason = OUT_OF_TIME
        if reason is None:
            reason = self.ready()
        if reason is None:
            reason = self.ask(number, job, open_identities, end)
        if reason is not None:
            for identity in open_identities or job.identities[-1:]:
                self.note(job, identity | {"status": reason})

    def ask(self, number: int, job: Job, open_identities: list[dict[str, Any]], end: float) -> str | None:
        """Sends the job and notes its records; what is left to say, of the identities that got none or of the job."""
        assert self.worker is not None
        began = self.clock()
        # What is worth nothing in part may end late by its guess at most.
        limit = min(began + 2 * job.guess, max(end, began + job.guess) if job.whole else end, self.deadline)
        self.worker.send(str(number))
        while True:
            try:
                line = self.worker.next(limit - self.clock())
            except queue.Empty:
                self.end_worker()
                took = self.clock() - began
                stopped = f"stopped after {took:.0f} s"
                if limit < began + 2 * job.guess:
                    return f"{OUT_OF_TIME}, {stopped}" if job.whole else f"{stopped}, out of time: what came is kept"
                return f"failed: {stopped}, twice its guess"
            if line is None:
                code, self.worker = self.worker.ended(), None
                return f"failed: the process died with exit code {code}"
            if "record" in line:
                self.keep(job, line["record"], open_identities)
            else:
                if "lost" in line:
                    self.end_worker()
                return "failed: the worker wrote no record" if open_identities else None

    def keep(self, job: Job, record: dict[str, Any], open_identities: list[dict[str, Any]]) -> None:
        if "kind" not in record:  # a failure of the whole job: for each that has no record yet
            for identity in open_identities or job.identities[-1:]:
                self.note(job, identity | record)
            open_identities.clear()
            return
        mode = record.get("mode")
        open_identities[:] = [identity for identity in open_identities if identity.get("mode") != mode]
        self.note(job, record)


def stage_ends(letters: Sequence[str], now: float, deadline: float) -> dict[str, float]:
    """When each of these stages must end, so that those after it have their seconds, or as many times fewer."""
    given = {stage.letter: stage.seconds for stage in STAGES}
    scale = min(1.0, max(0.0, deadline - now) / max(1e-9, sum(given[letter] for letter in letters)))
    return {
        letter: deadline - scale * sum(given[later] for later in letters[number + 1 :])
        for number, letter in enumerate(letters)
    }


def run_jobs(
    jobs: Sequence[Job],
    start: Callable[[], Worker],
    note: Callable[[Job, dict[str, Any]], None],
    *,
    deadline: float,
    prebuilt: bool = False,
    clock: Callable[[], float] = time.monotonic,
    stage_done: Callable[[str], None] = lambda letter: None,
) -> None:
    """`note(job, record)` once at least for every identity of every job, as soon as it is there."""
    ends = stage_ends(list(dict.fromkeys(job.stage for job in jobs)), clock(), deadline)
    run = _Run(start, note, deadline, clock, prebuilt, ends)
    waiting: list[tuple[int, Job]] = []
    try:
        for number, job in enumerate(jobs):
            if run.fits(job, ends[job.stage]):
                run.do(number, job, ends[job.stage])
            else:
                waiting.append((number, job))
            if number + 1 == len(jobs) or jobs[number + 1].stage != job.stage:
                stage_done(job.stage)
        for number, job in waiting:
            run.do(number, job, deadline)
    finally:
        if run.worker is not None:
            run.end_worker()
