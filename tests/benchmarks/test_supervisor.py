"""The supervisor of the GPU run, with workers that hang, die and lie. They are real processes that import nothing."""

import json
import queue
import re
import subprocess
import sys
import textwrap
import time

import psutil

from benchmarks.cases import Case
from benchmarks.gpu.book import Book, read_records
from benchmarks.gpu.plan import STAGES, Job
from benchmarks.gpu.run import ROOT
from benchmarks.gpu.supervisor import OUT_OF_TIME, Worker, run_jobs, stage_ends

MACHINE = {"cpu": "a CPU", "cores": 2, "threads": 2, "memory_gib": 8}
IDENTITY = {"stage": "d", "kind": "figure", "case": "c", "provider": "p", "dtype": "bf16"}


def job(B, guess=30.0, modes=("eager",)):
    return Job("d", "figure", Case("asdm", B), "reference", "bf16", modes, guess)


def run(tmp_path, jobs, body, *, seconds=60.0, note=None):
    """Statuses by job number with a worker that answers number `n` by `body`; and how many workers were started."""
    script = tmp_path / "worker.py"
    answer = textwrap.indent(textwrap.dedent(body), "    ")
    script.write_text(
        "import json, os, sys, time\n"
        "def say(**line): print(json.dumps(line), flush=True)\n"
        f"def record(**fields): say(record={{**{IDENTITY!r}, 'mode': 'eager', 'status': 'ok', **fields}})\n"
        "say(ready=True)\n"
        f"for line in sys.stdin:\n    n = int(line)\n{answer}\n"
        "    say(done=True)\n"
    )
    statuses, starts = {}, []
    with (tmp_path / "log").open("w") as log:

        def start():
            starts.append(Worker([sys.executable, str(script)], None, log))
            return starts[-1]

        def keep(done, record):
            status = re.sub(r"after \d+ s", "after n s", record["status"])  # of this machine; see `Clocked`
            statuses.setdefault(jobs.index(done), []).append(status)
            if note is not None:
                note(done, record)

        run_jobs(jobs, start, keep, deadline=time.monotonic() + seconds)
    assert all(worker.process.poll() is not None for worker in starts)
    return statuses, len(starts)


def ended(pid):
    """A zombie has ended, too: it waits for whoever adopted it."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_every_job_gets_its_records(tmp_path):
    statuses, starts = run(tmp_path, [job(1), job(2, modes=("eager", "graph"))], """
        record()
        if n == 1: record(mode="graph")
    """)  # fmt: skip
    assert statuses == {0: ["ok"], 1: ["ok", "ok"]}
    assert starts == 1


def test_a_job_that_hangs_is_killed_at_twice_its_guess(tmp_path):
    """It costs itself alone, and what it had found is kept; so is what it started."""
    child = tmp_path / "child"
    jobs = [job(1), job(2, guess=2.0, modes=("eager", "graph")), job(3)]
    statuses, starts = run(tmp_path, jobs, f"""
        record()
        if n == 1:
            import subprocess
            open({str(child)!r}, "w").write(str(subprocess.Popen(["sleep", "600"]).pid))
            time.sleep(600)
    """)  # fmt: skip
    assert statuses == {0: ["ok"], 1: ["ok", "failed: stopped after n s, twice its guess"], 2: ["ok"]}
    assert starts == 2
    assert ended(int(child.read_text()))
    # A kill after the last record is said as well.
    statuses, _ = run(tmp_path, [job(2, guess=1.0)], "record(); time.sleep(600)")
    assert statuses == {0: ["ok", "failed: stopped after n s, twice its guess"]}


def test_a_worker_that_dies_costs_its_job(tmp_path):
    statuses, starts = run(tmp_path, [job(1), job(2), job(3)], """
        if n == 1: os.abort()
        record()
    """)  # fmt: skip
    assert statuses == {0: ["ok"], 1: ["failed: the process died with exit code -6"], 2: ["ok"]}
    assert starts == 2


def test_a_lost_device_gets_another_worker(tmp_path):
    statuses, starts = run(tmp_path, [job(1), job(2)], """
        if n == 0:
            say(record={"status": "failed: RuntimeError: illegal memory access"})
            say(lost=True)
            sys.exit()
        record()
    """)  # fmt: skip
    assert statuses == {0: ["failed: RuntimeError: illegal memory access"], 1: ["ok"]}
    assert starts == 2


def test_a_job_that_says_nothing_is_recorded(tmp_path):
    assert run(tmp_path, [job(1)], "pass")[0] == {0: ["failed: the worker wrote no record"]}
    assert run(tmp_path, [job(1)], "say(record={'status': 'failed: X'})")[0] == {0: ["failed: X"]}


def test_the_deadline_is_kept(tmp_path):
    """A job that runs into it is stopped, one that cannot end before it is not begun, a shorter one still is."""
    jobs = [job(1, guess=0.1), job(2, guess=50), job(3, guess=0.1), job(4, guess=6.0)]
    body = "time.sleep(600 if n == 3 else 0); record()"
    statuses, _ = run(tmp_path, jobs, body, seconds=10.0)
    assert statuses == {0: ["ok"], 1: [OUT_OF_TIME], 2: ["ok"], 3: [f"{OUT_OF_TIME}, stopped after n s"]}


def test_no_worker_starts(tmp_path):
    jobs = [job(n) for n in range(1, 6)]
    with (tmp_path / "log").open("w") as log:
        statuses = []
        run_jobs(
            jobs,
            lambda: Worker([sys.executable, "-c", "raise SystemExit(3)"], None, log),
            lambda done, record: statuses.append(record["status"]),
            deadline=time.monotonic() + 60,
        )
    assert statuses == ["failed: the worker did not start"] * 3 + ["not run: no worker starts"] * 2


class Clocked:
    """A worker whose job number `n` takes `seconds[n]` of a clock that nothing else moves."""

    def __init__(self, seconds, clock):
        self.seconds, self.clock, self.lines, self.due = seconds, clock, [{"ready": True}], 0.0

    def send(self, line):
        self.due = self.clock[0] + self.seconds[int(line)]
        self.lines = [{"record": {"kind": "figure", "mode": "eager", "status": "ok"}}, {"done": True}]

    def next(self, seconds):
        if self.due > self.clock[0] + seconds:
            self.clock[0] += seconds
            raise queue.Empty
        self.clock[0] = max(self.clock[0], self.due)
        return self.lines.pop(0)

    def kill(self):
        self.due = 0.0


def clocked(jobs, seconds, deadline, **options):
    """[(job's number, status, when)] in the order of the records."""
    clock, found = [0.0], []

    def note(job, record):
        found.append((jobs.index(job), record["status"], clock[0]))

    run_jobs(jobs, lambda: Clocked(seconds, clock), note, deadline=deadline, clock=lambda: clock[0], **options)
    return found


def staged(letter, n, guess, **options):
    return Job(letter, "figure", Case("asdm", n), "reference", "bf16", ("eager",), guess, **options)


def test_a_stage_leaves_the_later_ones_their_seconds():
    given = {stage.letter: stage.seconds for stage in STAGES}
    ends = stage_ends(["d", "f", "h"], 0.0, 1000.0)
    assert ends == {"d": 1000 - given["f"] - given["h"], "f": 1000 - given["h"], "h": 1000}
    ends = stage_ends(["d", "f", "h"], 0.0, (given["d"] + given["f"] + given["h"]) / 2)
    assert ends["d"] == given["d"] / 2  # all fewer, where it is too short
    # d: 1 s too late for its second job, which is begun when all stages are over and there is room.
    end = 500 - given["h"]
    jobs = [staged("d", 2, 300), staged("d", 4, 30), staged("h", 8, 75)]
    assert clocked(jobs, [end - 29, 10, 20], 500) == [(0, "ok", end - 29), (2, "ok", end - 9), (1, "ok", end + 1)]
    # And what a stage leaves goes on to the next.
    assert clocked(jobs, [1, 1, 20], 500) == [(0, "ok", 1), (1, "ok", 2), (2, "ok", 22)]
    # Without room at the end it is said once.
    late = clocked(jobs, [end - 29, 10, 95], 500)
    assert late == [(0, "ok", end - 29), (2, "ok", end + 66), (1, OUT_OF_TIME, end + 66)]


def test_prebuilt_kernels_fit_into_less():
    jobs = [staged("d", 2, 30, prebuilt=3.0)]
    assert clocked(jobs, [2], 20)[0][1] == OUT_OF_TIME
    assert clocked(jobs, [2], 20, prebuilt=True)[0][1] == "ok"
    # They are killed where the others are.
    assert clocked(jobs, [59], 100, prebuilt=True)[0][1] == "ok"
    assert clocked(jobs, [61], 100, prebuilt=True)[0][1] == "failed: stopped after 60 s, twice its guess"


def test_what_is_worth_having_in_part_is_stopped_at_the_end_of_its_stage():
    """The tests leave torch.compile its seconds; a job that is worth nothing in part may end late by its guess."""
    h = next(stage.seconds for stage in STAGES if stage.letter == "h")
    tests = staged("g", 2, 150, prebuilt=20, whole=False)
    found = clocked([tests, staged("h", 4, 75)], [1000, 70], 200, prebuilt=True)
    assert found == [(0, f"stopped after {200 - h:.0f} s, out of time: what came is kept", 200 - h), (1, "ok", 270 - h)]
    assert clocked([tests], [10], 30) == [(0, "ok", 10)]  # whether kernels are prebuilt or not
    late = clocked([staged("f", 2, 50), staged("g", 4, 50), staged("h", 8, 75)], [90, 1, 1], 240)
    assert late[0] == (0, "ok", 90)
    assert clocked([staged("h", 2, 50)], [90], 80) == [(0, f"{OUT_OF_TIME}, stopped after 80 s", 80)]


def test_every_record_is_on_disk_when_the_next_comes(tmp_path, capsys, request):
    """records.jsonl, gpu.json and gpu.md, after each record; what cannot be shown is kept all the same."""
    head = {"kind": "gpu", "command": "c", "date": "d", "commit": "abc", "machine": MACHINE, "versions": {}, "note": ""}
    book, seen = Book(tmp_path / "out", head), []
    request.addfinalizer(book.close)

    def note(done, record):
        book.note(record | {"first_call_s": 0.0, "compiled": 0, "op": "asdm", "B": 1, "D": 4, "value": 1.0,
                            "gradient_norm": 1.0, "both": {"median": 1.0, "p20": 1.0, "p80": 1.0}})  # fmt: skip
        on_disk = json.loads((tmp_path / "out" / "gpu.json").read_text())
        seen.append((len(read_records(tmp_path / "out" / "records.jsonl")), len(on_disk["records"])))
        assert "| c " in (tmp_path / "out" / "gpu.md").read_text()

    run(tmp_path, [job(1), job(2)], "record()", note=note)
    assert seen == [(1, 1), (2, 2)]
    book.note({"stage": "c", "kind": "alternative", "status": "ok"})
    assert "a record that cannot be shown: KeyError" in capsys.readouterr().out
    assert len(read_records(tmp_path / "out" / "records.jsonl")) == 3


def test_a_worker_in_the_middle_of_a_job_ends_with_its_supervisor(tmp_path):
    """SIGKILL to the supervisor while the worker hangs: neither the worker nor what it started stays."""
    worker = textwrap.dedent("""
        import os, subprocess, threading, time
        from benchmarks.gpu.worker import end_with
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
        print(os.getpid(), subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL).pid, flush=True)
        time.sleep(600)
    """)
    supervisor = textwrap.dedent(f"""
        import subprocess, sys, time
        subprocess.Popen([sys.executable, "-c", {worker!r}], start_new_session=True)
        time.sleep(600)
    """)
    with subprocess.Popen([sys.executable, "-c", supervisor], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        pids = process.stdout.readline().split()
        process.kill()
    assert [ended(int(pid)) for pid in pids] == [True, True]
