"""EFA beside other work: the load is there while it is wanted and gone after, and the figures are those of it."""

import json
import subprocess
import sys

import psutil
import pytest

from benchmarks import busy, providers, report
from benchmarks.cases import inputs
from benchmarks.measure import measure_cpu
from benchmarks.providers import REFERENCE, TORCH


def test_a_result_has_every_setting(tmp_path, capsys, monkeypatch):
    def measure(case, provider, seconds, threads):
        load.append(len(psutil.Process().children()) - before)
        return {"status": "ok"} | measure_cpu(providers.provider(provider, case.op), inputs(case), seconds=seconds)

    load, before, out = [], len(psutil.Process().children()), tmp_path / "busy.json"
    monkeypatch.setattr(busy, "measure_in_process", measure)
    assert busy.main(["--quick", "--threads", "2", "--seconds", "0", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [(row["provider"], row["threads"], row["others"], row["status"]) for row in result["records"]] == [
        (name, *setting, "ok") for name in (REFERENCE, TORCH) for setting in ((1, 0), (2, 0), (2, 1))
    ]
    assert load == [0, 0, 1] * 2
    assert not any("sample" in row for row in result["records"])
    table = busy.busy_tables(result["records"])
    assert table in capsys.readouterr().out
    assert table in report.render({"busy.json": result}, tmp_path / "plots")


def test_the_load_is_at_work_and_ends():
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(KeyError), busy.other_work(2):
        others = [child for child in psutil.Process().children() if child.pid not in before]
        assert len(others) == 2
        assert all(other.cpu_times().user > 0 for other in others)
        raise KeyError
    assert not any(other.is_running() for other in others)


def test_the_load_ends_with_a_process_that_is_killed():
    code = (
        "from benchmarks.busy import other_work\nimport time\nwith other_work(1): print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "1\n"
        (other,) = psutil.Process(process.pid).children()
        process.kill()
    assert not psutil.wait_procs([other], timeout=20)[1]


def test_a_load_that_cannot_start_is_said(monkeypatch):
    monkeypatch.setattr(busy, "COUNT", "raise SystemExit(3)")
    with pytest.raises((RuntimeError, psutil.NoSuchProcess)), busy.other_work(1):
        pass


def test_times_slower_are_those_of_all_threads():
    rows = [
        {"case": "efa", "provider": TORCH, "threads": threads, "others": others, "status": "ok",
         "both": {"median": ms, "p20": ms, "p80": ms}}
        for threads, others, ms in ((1, 0, 1300.0), (2, 0, 1000.0), (2, 1, 2100.0))
    ]  # fmt: skip
    assert [(entry["measured"], entry["met"]) for entry in busy.busy_targets(rows)] == [("2.10x", False)]
    assert busy.busy_table(rows).splitlines()[-1].split("|")[-2].strip() == "2.10"
    rows[2]["both"]["median"] = 1500.0
    assert busy.busy_targets(rows)[0]["met"] is True
    rows[2]["status"] = "failed"
    assert [(entry["measured"], entry["met"]) for entry in busy.busy_targets(rows)] == [("not measured", None)]
