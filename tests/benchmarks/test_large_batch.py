"""The benchmark of large batches: its records, its table, and that it sees a loss that differs in blocks."""

import pytest

from benchmarks import large_batch, results


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(large_batch, "LOSSES", {"TAL": large_batch.LOSSES["TAL"]})


def test_every_case_has_a_record_and_a_line(few, tmp_path, capsys):
    out = tmp_path / "large.json"
    assert large_batch.main(["--pairs", "48", "--whole", "24", "--out", str(out)]) == 0
    records = results.read(out)["records"]
    assert [(row["loss"], row["pairs"], row["way"].split()[0]) for row in records] == [
        ("TAL", 48, "blocks"), ("TAL", 24, "blocks"), ("TAL", 24, "whole"), ("TAL", 24, "blocks"),
    ]  # fmt: skip
    assert all(row["process_mib"] > 50 and row["backward_seconds"] > 0 for row in records if "process_mib" in row)
    assert records[-1]["error"] < 1e-9
    lines = capsys.readouterr().out.strip().splitlines()[-2:]
    assert [line.split("|")[1].strip() for line in lines] == ["TAL", "TAL"]


def test_a_process_that_fails_says_why(few):
    with pytest.raises(RuntimeError, match="KeyError"):
        large_batch.in_process("no such loss", 8, "blocks")
