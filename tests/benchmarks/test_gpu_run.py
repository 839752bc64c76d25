"""The prepared GPU run as a whole, at toy sizes on the CPU: every stage, every record, and a kill in the middle."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil

from benchmarks.gpu.about import LEGEND
from benchmarks.gpu.book import UNSEEN, missing, read_records
from benchmarks.gpu.kernel_work import FLOPS
from benchmarks.gpu.plan import STAGES, gpu_jobs
from benchmarks.gpu.run import ROOT
from benchmarks.gpu.supervisor import OUT_OF_TIME
from benchmarks.providers import RELEASED, TORCH, TRITON
from benchmarks.results import of_kind

# The peers' functions in PyTorch, under the names and with the arguments of their packages.
SCORE = """
import torch
def score(q, d):
    return torch.einsum("ild,jkd->ijlk", q.float(), d.float()).amax(-1).sum(-1)
"""
PEERS = {
    "late_interaction_kernels": SCORE
    + "def maxsim(Q, D, q_mask=None, d_mask=None, *, normalize=False, backward=None):\n"
    + "    assert not normalize\n    return score(Q, D)\n"
    + "class MaxSimScorer:\n"  # what it runs on a CPU
    + "    def __init__(self, *, normalize):\n        assert not normalize\n"
    + "    def __call__(self, Q, D, q_mask=None, d_mask=None):\n        return score(Q, D)\n",
    "flash_maxsim": SCORE
    + "def flash_maxsim_batched_train(Q, D, shared_docs=True, doc_lengths=None, query_lengths=None):\n"
    + "    return score(Q, D)\n",
}


def make_wheels(folder: Path) -> Path:
    folder.mkdir()
    for name, source in PEERS.items():
        with zipfile.ZipFile(folder / f"{name}-9.9-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", source)
            wheel.writestr(f"{name}-9.9.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    return folder


def start(out: Path, *options: str, **popen) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", "--out", str(out), *options]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, text=True, env=env, stdout=subprocess.PIPE, **popen)


def test_dry_run(tmp_path):
    """The whole run, with minutes to spare. One test: pytest-xdist would run a fixture on each worker."""
    wheels, out = make_wheels(tmp_path / "wheels"), tmp_path / "out"
    with start(out, "--minutes", "30", "--wheels", str(wheels), stderr=subprocess.STDOUT) as process:
        printed = process.communicate()[0]
    it_has_every_record(out, printed, process.returncode)
    it_writes_every_file(out, printed)
    it_measures_what_it_says(out)


def it_has_every_record(out, printed, code):
    records = read_records(out / "records.jsonl")
    identities = [identity for job in gpu_jobs(dry=True) for identity in job.identities]
    assert missing(records, identities) == []
    failed = [record for record in records if record["status"] != "ok"]
    assert failed == [], printed
    assert code == 0
    assert UNSEEN not in printed
    assert {record["stage"] for record in records} == {stage.letter for stage in STAGES}
    assert not [record for record in records if record["status"] == OUT_OF_TIME]


def it_writes_every_file(out, printed):
    plots = {"gpu_time.png", "gpu_memory.png", "gpu_roof.png"}
    assert {path.name for path in out.iterdir()} == {"gpu.json", "gpu.md", "records.jsonl", "log.txt", *plots}
    result = json.loads((out / "gpu.json").read_text())
    assert result["dry_run"]
    records = read_records(out / "records.jsonl")
    assert result["records"] == records
    assert {record["kind"] for record in records} == {
        "exact", "ceilings", "kernels", "alternative", "figure", "tests", "step", "largest"
    }  # fmt: skip
    log = (out / "log.txt").read_text()
    assert all(line in log for line in printed.splitlines())
    assert "sha256 of triton_key: " in printed
    assert "flash_maxsim-9.9, late_interaction_kernels-9.9" in printed
    assert result["versions"]["flash-maxsim"] == "9.9"
    page = (out / "gpu.md").read_text()
    assert "A dry run at toy sizes" in page
    assert "### The whole training step" in page
    assert LEGEND in page
    for word in (result["commit"], result["date"], result["machine"]["gpu"], f"torch {result['versions']['torch']}"):
        assert word in page
        assert word in printed
    assert "replaced by the torch path" in printed
    assert of_kind(result, "exact")[0]["errors"].keys() == {"value", "dimage", "dtext"}


def it_measures_what_it_says(out):
    records = read_records(out / "records.jsonl")
    figures = [record for record in records if record["kind"] == "figure"]
    for record in figures:
        assert record["both"]["median"] > 0
        assert {"value", "gradient_norm", "compiled", "compile_s", "first_call_s", "checked"} <= record.keys()
        assert ("above_mib" in record) == ("forward" in record) == (record["mode"] == "eager")
    assert {record.get("ran", TRITON) for record in figures if record["provider"] == TRITON} == {TORCH}
    assert {"late-interaction-kernels", "flash-maxsim"} <= {record["provider"] for record in figures}
    steps = [record for record in records if record["kind"] == "step"]
    assert {(record["provider"], record["checked"]) for record in steps} == {(RELEASED, False), (TRITON, True)}
    assert {record.get("ran", RELEASED) for record in steps} == {RELEASED, TORCH}
    # Kernels are interpreted: their errors are those of float32 and float16, and their work is counted.
    for record in records:
        if record["kind"] == "exact":
            assert 0 < record["errors"]["value"] < record["budgets"]["value"]
        if record["kind"] == "kernels":
            assert record["bytes"] > 0
    kernels = [record for record in records if record["kind"] == "kernels"]
    counted = {record["kernel"] for record in kernels if record["flops"] > 0}  # at one of its sizes
    assert counted == set(FLOPS) - {"_persistent_match_kernel"}  # of an alternative
    assert {"_update_kernel", "_dlogits_kernel", "_pool_kernel", "_prepare_kernel"} <= {
        record["kernel"] for record in kernels
    }


def test_killed_in_the_middle_keeps_every_record(tmp_path):
    """SIGKILL, which no program can prepare for: the files are whole, and no worker stays."""
    out = tmp_path / "out"
    process = start(out, "--minutes", "6", "--stage", "a", "d", start_new_session=True, stderr=subprocess.DEVNULL)
    printed = []
    try:
        for line in process.stdout:
            printed.append(line)
            if sum(" s  a  " in line for line in printed) == 3:
                break
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    records = read_records(out / "records.jsonl")
    assert len(records) >= 3
    result = json.loads((out / "gpu.json").read_text())
    # The kill may fall between the two files, not more than one record apart.
    assert len(records) - 1 <= len(result["records"]) <= len(records)
    assert of_kind(result, "exact")[0]["case"] in (out / "gpu.md").read_text()
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            assert worker.status() == psutil.STATUS_ZOMBIE
