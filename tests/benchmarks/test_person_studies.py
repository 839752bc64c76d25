"""Commands of several runs: ablation, sweep, cross and pretraining, at toy size."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.person_folders import folder_of
from PIL import Image

from benchmarks import results
from benchmarks.person_retrieval.__main__ import main
from benchmarks.person_retrieval.commands import ablation, cross, pretrain, sweep
from benchmarks.person_retrieval.models.pretrained import COMMITTED
from benchmarks.person_retrieval.runs import Variant
from benchmarks.person_retrieval.study import columns, differences, markdown
from fmfa_losses import ASDMLoss

SIZES = ["--identities", "8", "--val-identities", "4", "--test-identities", "4"]
TINY = [*SIZES, "--batch-size", "16", "--epochs", "1", "--device", "cpu", "--quiet"]


def record(variant: str, seed: int, value: float) -> dict[str, Any]:
    return {"variant": variant, "seed": seed, "t2i": dict.fromkeys(("R1", "R5", "R10", "mAP", "mINP"), value)}


def test_differences_are_taken_seed_by_seed() -> None:
    records = [record("a", 2, 31.0), record("a", 1, 12.0), record("b", 1, 10.0), record("b", 2, 30.0)]
    assert columns(records, "a")["R1"] == [12.0, 31.0]  # in the order of the seeds, not of the records
    found = differences(records, "a", "b")
    assert found["mean"] == 1.5 and found["std"] == pytest.approx(np.std([2.0, 1.0], ddof=1))
    assert (found["above"], found["seeds"]) == (2, 2)
    lines = markdown(records, ["b", "a"], "b", first="what")
    assert lines[2].startswith("| b | 20.00 ± 14.14 |") and lines[3].endswith("| +1.50 ± 0.71, above in 2 of 2 |")


def test_a_loss_without_its_constant() -> None:
    """Table 8: alpha gap_i in place of 1 + alpha gap_i."""
    torch.manual_seed(0)
    image, text = torch.randn(2, 12, 16, dtype=torch.float64).unbind()
    pids = torch.arange(12)
    settings = sweep.without_constant(10.0)
    ours = settings["weights"]["asdm"] * ASDMLoss(**settings["asdm"])(image, text, pids)
    wanted = ASDMLoss(alpha=10.0)(image, text, pids) - ASDMLoss(alpha=0.0)(image, text, pids)
    assert ours == pytest.approx(float(wanted), rel=1e-5)


@pytest.fixture
def two_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [variant for variant in ablation.VARIANTS if variant.name in ("InfoNCE", "SDM")]
    monkeypatch.setattr(ablation, "VARIANTS", tuple(chosen))


def test_an_ablation_is_paired_and_goes_on_where_it_was_cut_off(
    tmp_path: Path, two_variants: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "study"
    command = ["ablation", *TINY, "--seeds", "2", "--out", str(out)]
    build = Variant.build

    def cut(self: Variant, *arguments: Any) -> Any:
        if self.name == "SDM" and (out / "runs" / "infonce_seed2").exists():
            raise KeyboardInterrupt
        return build(self, *arguments)

    with monkeypatch.context() as once:
        once.setattr(Variant, "build", cut)
        with pytest.raises(KeyboardInterrupt):
            main(command)
    done = (out / "runs" / "sdm_seed1" / "metrics.json").read_bytes()
    with pytest.raises(SystemExit, match=r"infonce_seed1 holds a run.*--resume"):
        main(command)
    with pytest.raises(SystemExit, match=r"must keep its settings.*--lr was 0\.0003 and is 0\.1"):
        main([*command, "--resume", "--lr", "0.1"])
    assert main([*command, "--resume"]) == 0
    assert (out / "runs" / "sdm_seed1" / "metrics.json").read_bytes() == done  # read, not trained again
    report = results.read(out / "ablation.json")
    assert [(r["variant"], r["seed"]) for r in report["records"]] == [
        ("InfoNCE", 1), ("SDM", 1), ("InfoNCE", 2), ("SDM", 2)
    ]  # fmt: skip
    assert "efa" not in report["records"][1]["last_epoch"] and "asdm" in report["records"][1]["last_epoch"]
    assert len({json.dumps(r["before"]) for r in report["records"]}) == 1  # all start from the same weights
    assert (out / "ablation.md").read_text().strip() in capsys.readouterr().out
    assert not list(out.rglob("*.pt"))  # a study keeps figures, not weights
    assert np.asarray(Image.open(out / "ablation.png").convert("L")).std() > 10


def test_a_sweep_trains_every_value(tmp_path: Path) -> None:
    options = [*TINY, "--seeds", "1", "--out", str(tmp_path)]
    assert main(["sweep", "--over", "alpha", "--values", "0", "5", *options]) == 0
    report = results.read(tmp_path / "sweep_alpha.json")
    found = [(r["variant"], r["objective_of_variant"]["asdm"]["alpha"]) for r in report["records"]]
    assert found == [("0", 0), ("5", 5)]
    assert (tmp_path / "sweep_alpha.png").exists()
    with pytest.raises(SystemExit, match="--starts and --over start"):
        main(["sweep", "--over", "start", *options])
    with pytest.raises(SystemExit, match=r"--values must be left out"):
        main(["sweep", "--over", "constant", "--values", "1", *options])


def test_pretraining_makes_weights_that_training_and_sweeps_begin_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Snapshots of every epoch, the same bits again; a sweep over two of them, and over the checkpoint of a run."""
    words = torch.load(COMMITTED, weights_only=True)["vocabulary"]
    monkeypatch.setattr(pretrain, "vocabulary", lambda: words)  # the whole language takes seconds
    command = ["pretrain", "--pictures", "40", "--epochs", "2", "--batch-size", "20", "--device", "cpu", "--quiet"]
    for name in ("a", "b"):
        assert main([*command, "--out", str(tmp_path / name)]) == 0
    first, second = (tmp_path / "a" / f"epoch_{epoch}.pt" for epoch in (1, 2))
    assert second.read_bytes() == (tmp_path / "b" / "epoch_2.pt").read_bytes() != first.read_bytes()
    made = torch.load(second, weights_only=True)
    assert made["model"]["cls"].dtype == torch.float16
    assert (made["made"]["pictures"], made["made"]["epoch"], made["made"]["recipe"]["lr"]) == (40, 2, 2e-3)

    monkeypatch.setattr(sweep, "STARTS", sweep.STARTS[:2])
    out, run = tmp_path / "sweep", tmp_path / "run"
    main(["train", *TINY, "--weights", str(second), "--select", "last", "--out", str(run)])
    starts = [str(first), str(second), str(run / "checkpoint.pt")]
    assert main(["sweep", "--over", "start", "--starts", *starts, *TINY, "--seeds", "1", "--out", str(out)]) == 0
    report = results.read(out / "sweep_start.json")
    assert [record["weights"] for record in report["records"]] == [start for start in starts for _ in range(2)]
    after = json.loads((run / "metrics.json").read_text())["t2i"]
    assert report["records"][-1]["before"]["t2i"] == after  # it begins where the run ended
    assert (out / "sweep_start.png").exists()


def test_what_was_learnt_on_one_world_is_tested_on_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cross, "PICTURES", 12)
    command = ["cross", *TINY, "--out", str(tmp_path / "rendered")]
    assert main(command) == 0
    rows = results.read(tmp_path / "rendered" / "cross.json")["records"]
    assert [row["test"] for row in rows] == ["rendered", "rendered catalogue"]
    assert rows[1]["before"] != rows[1]["after"]
    assert (tmp_path / "rendered" / "cross.md").read_text().strip() in capsys.readouterr().out
    checkpoint = (tmp_path / "rendered" / "checkpoint.pt").read_bytes()
    assert main([*command, "--resume"]) == 0  # a finished run is only tested
    assert (tmp_path / "rendered" / "checkpoint.pt").read_bytes() == checkpoint

    for name in ("RSTPReid", "ICFG-PEDES"):
        folder_of(tmp_path / "data", name)
    disk = ["cross", "--dataset", "RSTPReid", "--root", str(tmp_path / "data"), "--tiny", "--epochs", "1", "--quiet"]
    disk += ["--batch-size", "8", "--device", "cpu", "--workers", "0"]
    assert main([*disk, "--out", str(tmp_path / "disk")]) == 0
    assert [row["test"] for row in results.read(tmp_path / "disk" / "cross.json")["records"]] == [
        "RSTPReid", "ICFG-PEDES"
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="CUHK-PEDES needs its annotations"):
        main([*disk, "--on", "CUHK-PEDES", "--out", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="--on must name other data sets"):
        main([*disk, "--on", "RSTPReid", "--out", str(tmp_path / "other")])
