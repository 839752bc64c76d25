"""Kernels prebuilt for a machine with a GPU are found there, whatever folder and checkout they came from."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel for this platform")
import triton

from benchmarks import ROOT, results, stand_in
from benchmarks.gpu import prebuild
from benchmarks.gpu.candidates import tables
from benchmarks.gpu.plan import Job, gpu_jobs
from benchmarks.providers import TRITON


def run(checkout, out):
    command = [sys.executable, "-m", "benchmarks", "prebuild", "--out", str(out), "--only", "asdm, B 128 D 512 bf16"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("prebuilt") / "out"
    assert "3 kernels compiled, 0 found" in run(ROOT, out)
    return out


@pytest.fixture
def without_variables(monkeypatch):
    for name in prebuild.environment():
        monkeypatch.delenv(name)


def test_installed_kernels_are_hits(folder, tmp_path, monkeypatch, without_variables):
    moved = shutil.copytree(folder, tmp_path / "carried")
    prebuild.install(moved, tmp_path / "cache")
    shutil.rmtree(moved)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    hits = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda cache_hit, **_: hits.append(cache_hit))
    with stand_in.gpu(compile=True):
        prebuild.run(prebuild.jobs(only="asdm, B 128 D 512 bf16")[0])
    assert hits == [True] * 3


def test_usable_says_why_not(folder, tmp_path, monkeypatch, without_variables):
    assert prebuild.usable(folder) is None
    about = json.loads((folder / prebuild.ABOUT).read_text())
    assert sorted(path.name for path in folder.iterdir()) == [prebuild.KERNELS, prebuild.ABOUT]
    assert about["kernels"] == 3
    assert 10_000 < about["bytes"] < 200_000
    assert "holds no prebuilt kernels" in prebuild.usable(tmp_path)
    shutil.copy(folder / prebuild.KERNELS, tmp_path)
    (tmp_path / prebuild.ABOUT).write_text(json.dumps(about | {"triton_key": "other"}))
    assert prebuild.usable(tmp_path).startswith("prebuilt for another triton_key: 'other'")
    assert prebuild.usable(folder, "another key").startswith("prebuilt for another triton_key")
    (tmp_path / prebuild.ABOUT).write_text(json.dumps(about))
    assert prebuild.usable(tmp_path) is None
    (tmp_path / prebuild.KERNELS).write_bytes(b"cut off")
    assert "is not the file" in prebuild.usable(tmp_path)
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    assert prebuild.usable(folder).startswith("prebuilt for another environment")


def edited(checkout, file, change):
    path = checkout / "kernels" / file
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))


def test_another_checkout_a_moved_folder_and_an_edited_table_compile_nothing(folder, tmp_path):
    """What an edit changes is compiled anew, and nothing else."""
    checkout, prebuilt = tmp_path / "checkout", shutil.copytree(folder, tmp_path / "prebuilt")
    for name in ("benchmarks", "fmfa_losses", "kernels"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    edited(checkout, "gather_gradient.py", lambda text: text.replace("(2, 512, 1, 1)", "(4, 512, 1, 1)"))
    script = f"""
import benchmarks
from benchmarks.gpu import prebuild, triton_cache
print(prebuild.usable({str(prebuilt)!r}))
print(triton_cache.prepare(__import__('pathlib').Path({str(prebuilt)!r}))[1])
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout.splitlines()
    assert done[0] == "None"
    assert done[1].endswith("its key agrees; 3 kernels, from before kernels/ was last edited: what changed is compiled")
    assert "\n0 kernels compiled, 3 found" in run(checkout, prebuilt)
    assert (prebuilt / prebuild.KERNELS).read_bytes() == (folder / prebuild.KERNELS).read_bytes()


def test_candidates_are_prebuilt_too(tmp_path):
    entry = tables()["DX"].entry
    rows = [{"table": "DX", "candidate": [8, 512, 2, 1]}, {"table": "DX", "candidate": [2, 512, 2, 1]}]
    dropped = rows[0] | {"dropped": "8 spilled"}
    results.write(tmp_path / "candidates.json", results.head("candidates", "c") | {"records": [*rows, dropped]})
    others = prebuild.candidates(tmp_path / "candidates.json", entry.precision)
    assert others == [(entry, (8, 512, 2, 1)), (entry, (2, 512, 2, 1))]
    assert prebuild.candidates(tmp_path / "candidates.json", "fp32") == prebuild.candidates(None, "bf16") == []
    with stand_in.gpu() as device:
        prebuild.run(Job("c", "kernels", entry.case, precision="bf16"), others)
    assert len([kernel for kernel in device.compiled if kernel.name == "_dx_kernel"]) == 3


def test_key_of_a_wheel(tmp_path, monkeypatch):
    """libtriton's hash is the wheel's; any other file must be the same."""
    package = tmp_path / "triton"
    (package / "_C").mkdir(parents=True)
    (package / "__init__.py").write_text("one")
    (package / "_C" / "libtriton.so").write_bytes(b"ours")
    ours, theirs = (hashlib.sha256(data).hexdigest() for data in (b"ours", b"theirs"))
    monkeypatch.setattr(triton, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr(prebuild, "own_key", lambda: f"3.0-a-{ours}-b")

    def wheel(source):
        with zipfile.ZipFile(tmp_path / "triton.whl", "w") as archive:
            archive.writestr("triton/__init__.py", source)
            archive.writestr("triton/_C/libtriton.so", b"theirs")
            archive.writestr("triton-3.0.dist-info/RECORD", "whatever")
        return Path(tmp_path / "triton.whl")

    assert prebuild.wheel_key(wheel("one")) == f"3.0-a-{theirs}-b"
    with pytest.raises(ValueError, match=r"triton/__init__\.py differs"):
        prebuild.wheel_key(wheel("two"))


def test_every_job_of_the_prepared_run_is_built():
    """All of our kernels' jobs, at batches that no machine minds, without compiling: each launches something."""
    ours = [job for job in gpu_jobs() if (job.case or job.step) and job.provider == TRITON]
    wanted = {(job.kind, job.precision, job.alternative) for job in ours}
    jobs = prebuild.jobs()
    kinds = {"figure", "kernels"}  # the same step
    assert {(job.precision, job.alternative) for job in jobs} == {(p, a) for _, p, a in wanted}
    assert {job.kind for job in jobs} >= {kind for kind, _, _ in wanted} - kinds
    assert {job.case.op for job in jobs if job.case} == {"efa", "asdm", "maxsim", "hard_similarity", "sparse_aggregate"}
    for job in jobs:
        with stand_in.gpu() as device:
            prebuild.run(job)
        assert len(device.launches) >= 2, job
