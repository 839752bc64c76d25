"""What commands refuse before the first step, what a study takes for finished, what a kill leaves."""

import argparse
import errno
import json
import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.person_folders import folder_of

from benchmarks import results
from benchmarks.person_retrieval import runs
from benchmarks.person_retrieval.__main__ import main
from benchmarks.person_retrieval.commands import pretrain, sweep
from benchmarks.person_retrieval.errors import RunError
from benchmarks.person_retrieval.models.pretrained import COMMITTED
from benchmarks.person_retrieval.outputs import writing
from benchmarks.person_retrieval.runs import FMFA, Variant, finished
from benchmarks.person_retrieval.study import differences, over, told
from benchmarks.person_retrieval.training import Recipe, World

SIZES = ["--identities", "2", "--val-identities", "1", "--test-identities", "1"]


def error_of(*argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--quiet"])
    return str(stopped.value.code)


# ------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("train --epochs 2 --minutes 1", "--minutes must be left out: --epochs"),
        ("train --lr 1e300", "--lr must be positive and at most 1e+06"),
        ("train --pad 1000000", "--pad must be a whole number from 0 to 384"),
        ("train --device meta", "--device must be a CPU or a CUDA device"),
        ("train --loss-weights efa=1 efa=2", "--loss-weights must name a term once"),
        ("train --loss-weights id=0 irr=0 efa=0 asdm=0", "--loss-weights must leave something"),
        ("sweep --over alpha --alpha 3", "--alpha must be left out: --over alpha sets it"),
        ("sweep --over lambda --pool-scale 3", "--pool-scale must be left out"),
        ("sweep --over constant --loss-weights asdm=3", "--loss-weights asdm=3 must be left out"),
        ("sweep --over start --starts none --margins 1 1", "--margins must be left out"),
        ("sweep --over start --starts none none", "--starts must name each weights once"),
        ("sweep --over start --starts none nowhere.pt", "nowhere.pt"),
        ("pretrain --momentum 0.9", "--momentum must be left out: --optimizer adam"),
        ("pretrain --gather no", "--gather must be left out: one process"),
    ],
)
def test_what_has_no_effect_or_no_sense_is_refused(command: str, wanted: str, tmp_path: Path) -> None:
    name, *options = command.split()
    device = [] if "--device" in options else ["--device", "cpu"]
    out = tmp_path / "out"
    assert wanted in error_of(name, *options, *device, "--out", str(out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("values", "wanted"), [("0.5 nan", "alpha must be a finite number"), ("1 1", "what is compared must differ")]
)
def test_a_sweep_looks_at_every_value_before_it_trains_one(values: str, wanted: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["sweep", "--over", "alpha", *SIZES, "--device", "cpu", "--out", str(out), "--values", *values.split()]
    assert wanted in error_of(*command)
    assert not out.exists()


def test_the_last_seed_is_looked_at_before_the_first_trains(tmp_path: Path) -> None:
    command = ["ablation", *SIZES, "--device", "cpu", "--out", str(tmp_path / "out"), "--seed", str(2**32 - 1)]
    assert "--seed must be a whole number" in error_of(*command)


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    root = folder_of(tmp_path, "ICFG-PEDES")
    command = ["--dataset", "ICFG-PEDES", "--root", str(root), "--tiny", "--device", "cpu"]
    assert "--split must be one that the data set has" in error_of("evaluate", *command, "--split", "val")
    file = root / "ICFG-PEDES" / "ICFG-PEDES.json"
    file.write_text(json.dumps([one for one in json.loads(file.read_text()) if one["split"] != "test"]))
    assert "has no entries of the split 'test'" in error_of("train", *command, "--out", str(tmp_path / "out"))


def test_several_processes_are_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RunError, match="must be started by torchrun"):
        World.join("cpu")


# ------------------------------------------------------------------------------------------------------- studies


@pytest.fixture
def of_epochs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Asks what is found in a folder whose metrics are of two epochs, by a study of so many."""
    settings = {"recipe": {**asdict(Recipe(epochs=2)), "epochs": 2}, "processes": 1}

    def write(name: str, content: dict[str, Any]) -> None:
        (tmp_path / name).write_text(json.dumps(content))

    def ask(epochs: int, *, recorded: int = 2) -> Any:
        recipe = {**settings["recipe"], "epochs": epochs}
        monkeypatch.setattr(runs, "all_settings", lambda *_: {**settings, "recipe": recipe})
        write("run.json", {"settings": {**settings, "recipe": {**recipe, "epochs": recorded}}})
        return finished(tmp_path, SimpleNamespace(recipe=Recipe(epochs=epochs)), FMFA, argparse.Namespace(), World())

    write("metrics.json", {"t2i": {}, "i2t": {}, "before": {}, "epochs": 2, **settings})
    return ask


def test_a_study_takes_figures_of_as_many_epochs_alone(of_epochs: Any, tmp_path: Path) -> None:
    assert of_epochs(2)["epochs"] == 2
    assert of_epochs(3) is None  # prolonged
    assert of_epochs(3, recorded=3) is None  # and killed on the way: run.json is new, the metrics are the former
    assert of_epochs(2, recorded=3) is None
    with pytest.raises(RunError, match="--epochs was 2 and is 1, but must be more than the 2 trained already"):
        of_epochs(1)
    for broken in ("", "{", "null", '{"a": 1}'):
        (tmp_path / "metrics.json").write_text(broken)
        with pytest.raises(RunError, match=r"metrics\.json must be the metrics of a run"):
            of_epochs(2)


def test_one_seed_has_no_spread() -> None:
    assert told([50.0]) == "50.00" and told([40.0, 60.0]) == "50.00 ± 14.14"
    assert "unknown spread" in over([1]) and over([1, 2]) == "mean ± standard deviation over 2 seeds"
    records = [{"variant": name, "seed": 1, "t2i": dict.fromkeys(("R1", "R5", "R10", "mAP", "mINP"), x)}
               for name, x in (("a", 2.0), ("b", 1.0))]  # fmt: skip
    assert differences(records, "a", "b")["told"] == "+1.00, above in 1 of 1"


def test_baselines_have_the_hyperparameters_of_what_they_are_compared_with() -> None:
    """InfoNCE the temperature of A-SDM; A-SDM without the constant the alpha of the data set."""
    task: Any = SimpleNamespace(objective=lambda **_: SimpleNamespace(asdm=SimpleNamespace(temperature=0.5, alpha=1.0)))
    built: Any = Variant("InfoNCE", contrastive=True).build(task, torch.nn.Identity(), False)
    assert built.objective.temperature == 0.5
    (_, without), _ = sweep.variants_of(argparse.Namespace(over="constant", alpha=None), task)
    assert without.objective == sweep.without_constant(1.0)


# --------------------------------------------------------------------------------------------------- kills, disks


def test_pretraining_that_was_killed_between_checkpoint_and_weights_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = torch.load(COMMITTED, weights_only=True)["vocabulary"]
    monkeypatch.setattr(pretrain, "vocabulary", lambda: words)
    command = ["pretrain", "--pictures", "4", "--epochs", "1", "--device", "cpu", "--quiet", "--out", str(tmp_path)]
    main(command)
    file = tmp_path / "epoch_1.pt"
    whole = file.read_bytes()
    file.unlink()
    main([*command, "--resume"])
    assert file.read_bytes() == whole
    (tmp_path / "epoch_7.pt").write_bytes(b"of a longer run")
    main([*command, "--overwrite"])
    assert sorted(one.name for one in tmp_path.glob("epoch_*.pt")) == ["epoch_1.pt"]


def test_a_full_disk_keeps_the_former_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.json"
    results.write(file, {"R1": 1.0})
    former = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(RunError, match=r"metrics\.json must be a file that can be written, got No space left"),
        writing(file),
    ):
        results.write(file, {"R1": 2.0})
    assert [one.name for one in tmp_path.iterdir()] == ["metrics.json"] and file.read_bytes() == former
