"""`train` from beginning to end: rendered pedestrians, the three layouts on disk, options, two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.person_folders import folder_of
from PIL import Image

from benchmarks import results
from benchmarks.person_retrieval import runs
from benchmarks.person_retrieval.__main__ import main
from benchmarks.person_retrieval.data import LAYOUTS
from benchmarks.person_retrieval.training import Trainer

ROOT = Path(__file__).parents[2]
SIZES = ["--identities", "12", "--val-identities", "4", "--test-identities", "6"]
TINY = [*SIZES, "--batch-size", "16", "--quiet", "--device", "cpu"]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn in one test."""
    monkeypatch.setattr(runs, "draw", lambda *_: {})


def metrics(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = results.read(out / "metrics.json")
    return found


def test_the_embedded_run_writes_metrics_and_three_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", *TINY, "--epochs", "2", "--out", str(tmp_path)]) == 0
    result = metrics(tmp_path)
    for one in (result["t2i"], result["i2t"], result["before"]["t2i"]):
        assert set(one) == {"R1", "R5", "R10", "mAP", "mINP"}
        assert 0 <= one["R1"] <= one["R5"] <= one["R10"] <= 100
        assert 0 < one["mINP"] <= 100 and 0 < one["mAP"] <= 100
    assert result["chance_R1"] == pytest.approx(100 / 6)
    assert all(np.isfinite(value) for value in result["last_epoch"].values())
    assert result["versions"]["torch"] == torch.__version__
    # What it was: data set, weights, seed, and how the epoch was chosen.
    assert (result["dataset"], result["weights"], result["dry_run"]) == ("rendered", "committed", False)
    assert len(result["weights_sha256"]) == 64 and result["recipe"]["seed"] == 1
    best = max(result["records"], key=lambda one: (one["R1"], -one["epoch"]))
    assert (result["selected"], result["epoch"], result["epochs"]) == ("val", best["epoch"], 2)
    told = capsys.readouterr().out
    assert "best Rank-1 on the validation split" in told and "before training: t2i R1" in told
    lines = [line for line in (tmp_path / "log.txt").read_text().splitlines() if line.startswith("epoch")]
    assert len(lines) == 2 and all(word in lines[0] for word in ("id", "irr", "efa", "asdm", "lr", "val R1"))
    for name in ("loss_curves", "retrieval", "similarity_maps"):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert min(picture.shape) > 200 and picture.std() > 10  # something is drawn


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_in_each_layout_trains_resumes_and_is_prolonged(
    name: str, tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root, out, fit = folder_of(tmp_path, name), tmp_path / "out", Trainer.fit

    def interrupted(self: Trainer) -> None:
        fit(self, until=1)
        raise KeyboardInterrupt

    command = ["train", "--dataset", name, "--root", str(root), "--tiny", "--device", "cpu", "--workers", "0"]
    command += ["--quiet", "--batch-size", "8", "--out", str(out)]
    with monkeypatch.context() as stopped:
        stopped.setattr(
            Trainer, "fit", lambda self, **_: (fit(self, until=1), (_ for _ in ()).throw(KeyboardInterrupt))
        )
        with pytest.raises(KeyboardInterrupt):
            main([*command, "--epochs", "2"])
    assert not (out / "metrics.json").exists()
    history = torch.load(out / "checkpoint.pt", weights_only=True)["history"]["loss"]
    assert len(history) == 2
    main([*command, "--epochs", "2", "--resume"])
    result = metrics(out)
    assert (result["steps"], result["epochs"], result["dry_run"]) == (4, 2, True)
    assert result["recipe"]["lr"] == 1e-5 and result["recipe"]["lr_factor"] == 5
    assert (result["dataset"], result["root"]) == (name, str(root.resolve()))
    assert result["selected"] == ("last" if name == "ICFG-PEDES" else "val")
    told = capsys.readouterr().out
    assert "dry run" in told
    assert ("has no validation split" in told) == (name == "ICFG-PEDES")
    main([*command, "--epochs", "3", "--resume"])
    longer = torch.load(out / "checkpoint.pt", weights_only=True)["history"]["loss"]
    assert len(longer) == 6 and longer[:2] == history and metrics(out)["before"] == result["before"]


def test_icfg_trains_100_epochs_and_the_others_60(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.person_retrieval.commands.train import arguments
    from benchmarks.person_retrieval.options import recipe_of

    for name, epochs in (("CUHK-PEDES", 60), ("ICFG-PEDES", 100), ("RSTPReid", 60)):
        recipe = recipe_of(arguments(["--dataset", name, "--root", str(tmp_path)]))
        assert (recipe.epochs, recipe.lr, recipe.batch_size, recipe.seed, recipe.pad) == (epochs, 1e-5, 64, 1, 10)


def test_the_seed_fixes_random_weights(tmp_path: Path, undrawn: None) -> None:
    before = []
    for seed in ("1", "1", "2"):
        torch.manual_seed(len(before))  # another process
        out = tmp_path / str(len(before))
        main(["train", *TINY, "--weights", "none", "--epochs", "1", "--seed", seed, "--out", str(out)])
        before.append(metrics(out)["before"])
    assert before[0] == before[1] != before[2]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--epochs", "0"], r"--epochs must be .*got 0"),
        (["--lr", "0"], r"--lr must be positive"),
        (["--lr", "-1"], r"--lr must be positive"),
        (["--seed", "-1"], r"--seed must be"),
        (["--batch-size", "0"], r"--batch-size must be"),
        (["--root", "x"], r"--root must be left out: rendered pedestrians have no files"),
        (["--tiny"], r"--tiny must be left out"),
        (["--momentum", "0.9"], r"--momentum must be left out: --optimizer adam has none"),
        (["--optimizer", "sgd", "--eps", "1"], r"--eps must be left out"),
        (["--per-identity", "4"], r"--per-identity must be left out"),
        (["--resume", "--overwrite"], r"--overwrite must be left out"),
        (["--gather", "ring"], r"--gather must be left out: one process"),
        (["--loss-weights", "efa"], r"TERM=W"),
        (["--loss-weights", "sdm=1"], r"weights must be one of .*got .sdm."),
        (["--alpha", "-1"], r"alpha must be"),
        (["--minutes", "-1"], r"--minutes must be"),
        (["--device", "cuda"], r"got cuda where torch finds 0"),
        (["--device", "abacus"], r"--device"),
        (["--weights", "nowhere.pt"], r"nowhere\.pt"),
        (["--dataset", "RSTPReid"], r"needs --root"),
        (["--dataset", "RSTPReid", "--root", "nowhere"], r"data_captions"),
        (["--dataset", "RSTPReid", "--root", "x", "--identities", "3"], r"--identities must be left out"),
        (["--dataset", "RSTPReid", "--root", "x", "--minutes", "3"], r"--minutes must be left out"),
        (["--dataset", "RSTPReid", "--root", "x", "--tiny", "--weights", "y"], r"--tiny must be left out"),
        (["--resume"], r"--resume needs a run to go on with"),
    ],
)
def test_what_does_not_fit_is_one_sentence(options: list[str], told: str, tmp_path: Path) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    sizes = [] if "--dataset" in options else SIZES
    with pytest.raises(SystemExit, match=rf"^error: .*{told}"):
        main(["train", *sizes, "--quiet", *options, "--out", str(tmp_path / "out")])
    assert not list(tmp_path.glob("out/*.pt"))


def test_a_second_run_does_not_overwrite_the_first(tmp_path: Path, undrawn: None) -> None:
    command = ["train", *TINY, "--epochs", "1", "--out", str(tmp_path)]
    main(command)
    first = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match=r"holds a run.*--resume.*--overwrite"):
        main(command)
    with pytest.raises(SystemExit, match=r"--identities|rendered.train was 12 and is 13"):
        main([*command, "--resume", "--identities", "13"])
    assert (tmp_path / "checkpoint.pt").read_bytes() == first
    main([*command, "--overwrite", "--lr", "1e-3"])
    assert metrics(tmp_path)["recipe"]["lr"] == 1e-3


def test_the_number_of_epochs_is_chosen_before_training_and_kept(
    tmp_path: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(runs, "measure_pace", lambda trainer: 100.0)
    command = ["train", *TINY, "--minutes", "3", "--out", str(tmp_path)]
    main(command)
    told = capsys.readouterr().out
    assert "100.00 s a step, 3 steps and " in told and "one is trained all the same" in told
    assert metrics(tmp_path)["epochs"] == 1
    main([*command, "--resume"])
    assert metrics(tmp_path)["epochs"] == 1
    main([*command[:-4], "--minutes", "0", *command[-2:], "--resume"])
    assert (metrics(tmp_path)["epochs"], metrics(tmp_path)["steps"]) == (4, 12)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="two processes need Gloo")
def test_torchrun_trains_as_one_process(tmp_path: Path, undrawn: None) -> None:
    """In float32: the order of sums differs, and every step builds on the last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["train", "--identities", "4", "--val-identities", "2", "--test-identities", "2", "--epochs", "2"]
    options += ["--quiet", "--device", "cpu"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command += ["-m", "benchmarks.person_retrieval", *options, "--batch-size", "8", "--gather", "ring"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Written to") == 1
    result = metrics(tmp_path / "two")
    assert result["processes"] == 2 and result["recipe"]["gather"] == "ring"
    assert result["steps"] == 2  # 16 pairs, 2 x 8 at a time, two epochs
    main([*options, "--batch-size", "16", "--out", str(tmp_path / "one")])
    ours, theirs = (
        torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)["history"] for run in ("two", "one")
    )
    assert len(ours["loss"]) == 2
    for name, values in ours.items():
        assert name.endswith("accuracy") or values == pytest.approx(theirs[name], rel=1e-4)
