"""docs/experiments.md says what the results files say."""

from typing import Any

from benchmarks import ROOT, results
from benchmarks.person_retrieval.commands import ablation, sweep
from benchmarks.person_retrieval.models.pretrained import COMMITTED
from benchmarks.person_retrieval.study import markdown

PAGE = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    assert f"benchmarks/results/{name}" in PAGE
    return results.read(ROOT / "benchmarks" / "results" / name)


def test_table_6() -> None:
    records = read("ablation_rendered_cpu.json")["records"]
    names = [variant.name for variant in ablation.VARIANTS]
    for line in markdown(records, names, ablation.BASE, first=ablation.FIRST):
        assert line in PAGE
    assert len({record["seed"] for record in records}) >= 5
    assert {record["data"]["test"]["captions"] for record in records} == {3000}


def test_where_training_starts() -> None:
    for name in ("sweep_start_rendered_cpu.json", "sweep_start_3000_rendered_cpu.json"):
        result = read(name)
        for line in sweep.start_table(result["records"], result["starts"]):
            assert line in PAGE


def test_alpha() -> None:
    records = read("sweep_alpha_rendered_cpu.json")["records"]
    names = list(dict.fromkeys(record["variant"] for record in records))
    for line in markdown(records, names, None, first="alpha"):
        assert line in PAGE


def test_the_weights_are_those_that_are_described() -> None:
    import hashlib

    sha256 = hashlib.sha256(COMMITTED.read_bytes()).hexdigest()
    assert sha256 in PAGE
    assert {record["weights_sha256"] for record in read("ablation_rendered_cpu.json")["records"]} == {sha256}


def test_the_embedded_run() -> None:
    result = read("demo_rendered_cpu.json")
    for name in ("R1", "mAP"):
        assert f"{result['before']['t2i'][name]:.1f}" in PAGE and f"{result['t2i'][name]:.1f}" in PAGE
    assert result["t2i"]["R1"] > result["before"]["t2i"]["R1"] + 5
