"""Candidates for the block tables: what is tried, what is dropped without a GPU, and how the survivors are timed."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import results
from benchmarks.gpu import tune
from benchmarks.gpu.alternatives import value
from benchmarks.gpu.candidates import TABLES
from benchmarks.gpu.run import ROOT


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_candidates_are_entries(table):
    entry = value(table.entry)
    candidates = table.candidates()
    assert len(entry) == len(table.fields) == len(table.values)
    assert len(set(candidates)) == len(candidates)
    assert all(number & (number - 1) == 0 for i, field in enumerate(table.fields) if field != "num_stages"
               for number in table.values[i])  # fmt: skip
    # What was measured of dx; and what has no effect is not varied.
    if table.name == "DX":
        assert {(4, 512, 1, 1), (2, 512, 1, 1)} <= set(candidates)
        assert {candidate[1] for candidate in candidates} == {512}


@pytest.fixture(scope="module")
def compiled():
    chosen = {"DX": [(4, 512, 1, 1)], "MATCH": [(128, 256, 64, 4, 3), value(tune.table_of("MATCH").entry)]}
    return {(t, c): tune.compile_candidate("sm_90", t, c) for t, entries in chosen.items() for c in map(tuple, entries)}


def test_what_spills_never_reaches_a_gpu(compiled):
    assert "spilled" in compiled["MATCH", (128, 256, 64, 4, 3)]["dropped"]
    assert compiled["MATCH", tuple(value(tune.table_of("MATCH").entry))]["dropped"] == "the entry as it stands"
    row = compiled["DX", (4, 512, 1, 1)]
    assert 0 < row["registers"] <= 255
    assert row["threads"] == 32
    assert row["programs"] == min(32, 65536 // (-(-row["registers"] // 8) * 8 * 32))
    assert tune.in_order(list(compiled.values())) == [row]


def test_order_is_nearest_first_and_every_table_in_turn():
    de, dx = (value(tune.table_of(name).entry) for name in ("PRODUCTS", "DX"))

    def row(table, entry, changes, programs=1):
        return {"table": table, "candidate": [n * 2 if i < changes else n for i, n in enumerate(entry)],
                "programs": programs}  # fmt: skip

    far, near, roomy = row("PRODUCTS", de, 3), row("PRODUCTS", de, 1), row("PRODUCTS", de, 1, programs=2)
    other = row("DX", dx, 2)
    dropped = near | {"dropped": "8 spilled"}
    assert tune.in_order([far, near, dropped, other, roomy]) == [roomy, other, near, far]


def test_survivors_are_timed_as_they_come(tmp_path):
    """At toy sizes on the CPU: the entry first, then each candidate; one that cannot run costs itself alone."""
    table = tune.table_of("DX")
    survivors = [{"table": "DX", "candidate": [*c, *value(table.entry)[2:]]} for c in ((3, 128), (16, 128), (8, 64))]
    results.write(tmp_path / "candidates.json", results.head("candidates", "c") | {"records": survivors})
    out = tmp_path / "tuned.json"
    command = [sys.executable, "-m", "benchmarks", "tune", "--time", str(tmp_path / "candidates.json"), "--dry-run"]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    outcomes = json.loads(out.read_text())["records"]
    assert [outcome["status"].partition(":")[0] for outcome in outcomes] == ["ok", "failed", "ok", "ok"]
    assert [outcome.get("entry", False) for outcome in outcomes] == [True, False, False, False]
    assert all(outcome["ms"] > 0 for outcome in outcomes if outcome["status"] == "ok")
    assert "the entry as it stands" in done.stdout
    assert "3 of 3 survivors tried" in done.stdout


def test_time_is_kept(monkeypatch):
    """Nothing is begun when no time is left; a wrong candidate has no time."""
    clock = iter((10.0, 5.0, -1.0))
    made = []

    def fake(table, candidate, entry, dry):
        made.append(candidate)
        return {"table": table.name, "candidate": candidate, "status": "ok", "ms": 1.0}

    monkeypatch.setattr(tune, "time_candidate", fake)
    rows = [{"table": "DX", "candidate": [n, 128, 4, 1]} for n in (1, 2, 4)]
    assert len(list(tune.timed(rows, lambda: next(clock), dry=True))) == 3
    assert made == [None, (1, 128, 4, 1), (2, 128, 4, 1)]


def test_an_entry_that_fails_is_an_outcome(monkeypatch, capsys, tmp_path):
    """It is no survivor, and nothing is compared with it."""
    monkeypatch.setattr(tune, "step_of", lambda job: 1 / 0)
    row = {"table": "DX", "candidate": [1, 128, 4, 1]}
    entry, candidate = tune.timed([row], lambda: 1.0, dry=True)
    assert entry["entry"]
    assert entry["status"] == candidate["status"] == "failed: ZeroDivisionError: division by zero"
    assert "entry" not in candidate
