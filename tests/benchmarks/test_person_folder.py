"""The folder of a run: who may use it, what it keeps, what is refused, what is told."""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.person_trainer import recipe, run_folder, small_trainer

from benchmarks.person_retrieval.errors import RunError
from benchmarks.person_retrieval.training import (
    EpochReport,
    Log,
    LRSchedule,
    RunFolder,
    World,
    differences,
    holds_run,
    load,
    save,
)
from benchmarks.person_retrieval.training import settings_of as told


def record(path: Path) -> dict[str, Any]:
    return json.loads((path / "run.json").read_text())


def refused(message: str, path: Path, **settings: Any) -> None:
    with pytest.raises(RunError, match=message), run_folder(path, **settings):
        pass


# ------------------------------------------------------------------------------------------------------ one run


def test_a_folder_is_used_by_one_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with run_folder(path):
        refused(rf"in use by process {os.getpid()} \(the command\); wait for it", path, resume=True)
        with RunFolder(path, record(path)["settings"], resume=True, leads=False) as other:
            assert other.run == record(path)["run"]  # who does not lead asks for no lock
    with run_folder(path, resume=True):
        pass
    assert len(record(path)["commands"]) == 2


def test_a_folder_that_holds_a_run_is_not_overwritten_in_silence(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with run_folder(tmp_path) as folder:
        small_trainer(folder, log=Log(tmp_path)).fit(until=1)
        folder.write_json("metrics.json", {"R1": 1.0})
    first = record(tmp_path)["run"]
    refused("holds a run of `the command`; pass --resume to go on with it, --overwrite to start anew", tmp_path)
    assert holds_run(tmp_path) and folder.checkpoint.is_file()
    (tmp_path / ".checkpoint.pt.123456.partial").write_text("of a process that was killed")
    with run_folder(tmp_path, overwrite=True) as folder:
        assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "notes.txt", "run.json"]
        assert record(tmp_path)["run"] == folder.run != first
    with run_folder(tmp_path, resume=True) as folder:  # killed before its first checkpoint: nothing of the old run
        trainer = small_trainer(folder)
        trainer.resume()
        assert trainer.epoch == 0
    with pytest.raises(RunError, match="got both"):
        run_folder(tmp_path, resume=True, overwrite=True)


def test_what_cannot_be_resumed_or_written_is_told(tmp_path: Path) -> None:
    refused(r"--resume needs a run to go on with, found no .*run\.json; run without", tmp_path / "x", resume=True)
    assert not (tmp_path / "x").exists()
    (tmp_path / "run.json").write_text("[1, 2")
    refused(r"run\.json must be JSON that can be read", tmp_path, resume=True)
    for other in ('{"format": 1}', '{"format": 2, "run": "x"}'):
        (tmp_path / "run.json").write_text(other)
        refused(r"run\.json must be a record of this program", tmp_path, resume=True)
    refused("holds a run; pass --resume", tmp_path)
    (tmp_path / "file").write_text("")
    refused(r"--out must be a folder that can be written to, got .*file.*", tmp_path / "file")
    refused(r"--out must be a folder .*Not a directory", tmp_path / "file" / "below")


# ----------------------------------------------------------------------------------------------------- settings


def test_a_resumed_run_names_every_other_setting(tmp_path: Path) -> None:
    others = {"weights": "A", "weights_sha256": "00", "sizes": {"train": 24}, "objective": {"asdm": {"alpha": 10.0}}}
    with run_folder(tmp_path, others=others):
        pass
    other = {"weights": "B", "weights_sha256": "ff", "sizes": {"train": 23}, "objective": {"asdm": {"alpha": 1.0}}}
    with pytest.raises(RunError) as error, run_folder(tmp_path, resume=True, others=other, lr=2e-3, seed=7):
        pass
    for difference in (
        "--weights was A and is B",
        "the contents (SHA-256) of --weights was 00 and is ff",
        "sizes.train was 24 and is 23",
        "objective.asdm.alpha was 10.0 and is 1.0",
        "--lr was 0.001 and is 0.002",
        "--seed was 1 and is 7",
    ):
        assert difference in str(error.value)
    with run_folder(tmp_path, resume=True, others=others, workers=3):
        pass


def test_settings_that_may_differ() -> None:
    one = told(recipe(batch_size=8), World(), dataset="rendered")
    two = told(recipe(batch_size=4), World(size=2), dataset="rendered")
    forbidden, allowed = differences(one, two, 0)
    assert forbidden == [] and "processes was 1 and is 2; their batch is 8 as before" in allowed[0]
    (forbidden, _) = differences(one, told(recipe(batch_size=4), World(size=4), dataset="rendered"), 0)
    assert forbidden == ["--batch-size of all processes together was 8 and is 16"]
    (forbidden, _) = differences(one, told(recipe(batch_size=8, precision="bfloat16"), World(), dataset=None), 0)
    assert forbidden == ["--precision was float32 and is bfloat16", "--dataset was rendered and is not set"]
    assert differences(one, told(recipe(batch_size=8, precision="float32"), World(), dataset="rendered"), 0)[0] == []


def test_a_run_is_prolonged_also_after_its_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with run_folder(tmp_path, epochs=2) as folder:
        first = small_trainer(folder, epochs=2)
        first.fit()
    refused("--epochs was 2 and is 1, but must be more than the 2 trained already", tmp_path, resume=True, epochs=1)
    with run_folder(tmp_path, resume=True, epochs=3) as folder:
        longer = small_trainer(folder, epochs=3)
        longer.resume()
        assert longer.epoch == 2
        longer.fit()
    assert "--epochs was 2 and is 3: from here on the learning rate follows the new schedule" in capsys.readouterr().out
    assert longer.epoch == 3 and longer.history["loss"][:6] == first.history["loss"]
    assert record(tmp_path)["settings"]["recipe"]["epochs"] == 3
    last = LRSchedule(3, recipe(epochs=3))(2 + 2 / 3)  # the longer schedule, one step before its end
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * last)


def test_a_chosen_number_of_epochs_is_kept(tmp_path: Path) -> None:
    with run_folder(tmp_path, epochs=8) as folder:
        folder.choose_epochs(5)
    with run_folder(tmp_path, resume=True, epochs=8) as folder:
        assert folder.epochs == small_trainer(folder, epochs=8).epochs == 5
    with run_folder(tmp_path, resume=True, epochs=12) as folder:  # who asks for another number gets it
        assert folder.epochs == 12


# -------------------------------------------------------------------------------------------------- checkpoints


def test_broken_and_foreign_checkpoints_are_named(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    save(file, {"epoch": 1, "x": torch.arange(1000)})
    whole = file.read_bytes()
    assert torch.equal(load(file, keys=("epoch",))["x"], torch.arange(1000))
    with pytest.raises(RunError, match=r"checkpoint\.pt must hold epoch, history, lacks history"):
        load(file, keys=("epoch", "history"))
    for broken in (b"", whole[: len(whole) // 2], whole[:-1], b"hello", b"PK\x03\x04"):
        file.write_bytes(broken)
        with pytest.raises(RunError, match=r"checkpoint\.pt must be a whole checkpoint .* restore the file"):
            load(file)
    for foreign in ({"model": torch.zeros(2)}, [1, 2], {"format": "something"}):
        torch.save(foreign, file)
        with pytest.raises(RunError, match=r"checkpoint\.pt must be a checkpoint of this program"):
            load(file)
    torch.save({"format": "person_retrieval 1"}, file)
    with pytest.raises(RunError, match=r"must be of version 'person_retrieval 2', got 'person_retrieval 1'"):
        load(file)
    torch.save({"format": "person_retrieval 2", "run": os.system}, file)  # a pickle that would import something
    with pytest.raises(RunError, match="must be a whole checkpoint"):
        load(file)
    with pytest.raises(RunError, match="found none"):
        load(tmp_path / "none.pt")


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writes fail in the middle of a checkpoint."""
    with run_folder(tmp_path) as folder:
        trainer = small_trainer(folder)
        trainer.fit(until=1)
        whole = folder.checkpoint.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, limits[1]))
        try:
            with pytest.raises(
                RunError,
                match=r"checkpoint\.pt could not be written: File too large; nothing .* epoch 1 stands; make room",
            ):
                trainer.fit()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert folder.checkpoint.read_bytes() == whole
        assert not list(tmp_path.glob(".*.partial"))
        folder.checkpoint.unlink()
        for file in tmp_path.iterdir():
            file.unlink()
        tmp_path.rmdir()
        with pytest.raises(RunError, match="No such file or directory"):
            save(folder.checkpoint, {"epoch": 2})


def test_a_checkpoint_or_best_weights_of_another_run_are_refused(tmp_path: Path) -> None:
    figures = iter([2.0, 1.0, 2.0, 1.0])
    for name in "ab":
        with run_folder(tmp_path / name) as folder:
            small_trainer(folder, validate=lambda _: {"R1": next(figures)}).fit(until=2)
    ours, theirs = (tmp_path / name / "best.pt" for name in "ab")
    kept = ours.read_bytes()

    def resume() -> None:
        with run_folder(tmp_path / "a", resume=True) as folder:
            small_trainer(folder, validate=lambda _: {"R1": 0.0}).resume()

    resume()
    ours.write_bytes(theirs.read_bytes())
    with pytest.raises(RunError, match=r"best\.pt must hold the weights of epoch 1 of this run, got others"):
        resume()
    ours.unlink()
    with pytest.raises(RunError, match=r"must be a checkpoint at .*best\.pt, found none"):
        resume()
    ours.write_bytes(kept)
    (tmp_path / "a" / "checkpoint.pt").write_bytes((tmp_path / "b" / "checkpoint.pt").read_bytes())
    with pytest.raises(RunError, match=r"must be of the run in run\.json beside it, got another run's"):
        resume()


# ---------------------------------------------------------------------------------------------------------- log


def report(epoch: int, loss: float = 1.0) -> EpochReport:
    means = {"loss": loss, "efa": 12.5, "mlm_accuracy": 0.125}
    return EpochReport(epoch, 20, means, [1e-5, 5e-5, 1e-5], 2.0, 128, {"R1": 50.0}, (1, 50.0), "val")


def test_a_line_an_epoch_in_columns_and_none_twice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = str(report(3))
    assert line == (
        "epoch  3/20  loss    1.0000  efa   12.5000  lr 1.00e-05 5.00e-05  mlm  12.5 %  val R1  50.00 (best  50.00, "
        "epoch  1)      2.0 s    64.0 images/s"
    )
    assert len(str(report(12, 1234.5))) == len(line)
    log = Log(tmp_path)
    log.say("begun")
    for epoch in (1, 2):
        log.epoch(report(epoch))
    with open(tmp_path / "log.txt", "a") as file:
        file.write("epoch  3/20  lo")  # a process killed while it wrote
    again = Log(tmp_path)
    again.begin(1)
    again.epoch(report(2, 3.0))
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines == ["begun", str(report(1)), str(report(2, 3.0))]
    assert capsys.readouterr().out.splitlines() == ["begun", *(str(report(e)) for e in (1, 2)), str(report(2, 3.0))]
    Log(tmp_path, leads=False).say("not told")
    assert "not told" not in capsys.readouterr().out + (tmp_path / "log.txt").read_text()


def test_bars_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Log().bars
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert Log().bars and not Log(quiet=True).bars and not Log(leads=False).bars
    assert Log(quiet=True).bar(3).disable


def test_curves_for_tensorboard_have_each_epoch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, epochs in ((0, (1, 2, 3)), (1, (2, 3, 4))):  # killed with a checkpoint of the first epoch
        log = Log(tmp_path, tensorboard=True)
        log.begin(done)
        for epoch in epochs:
            log.epoch(report(epoch, loss=float(10 * done + epoch)))
        log.close()
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in curves.Scalars("train/loss")] == [(1, 1.0), (2, 12.0), (3, 13.0), (4, 14.0)]
    assert {"val/R1", "learning_rate/0", "train/mlm_accuracy"} <= set(curves.Tags()["scalars"])


def test_tensorboard_that_is_not_there_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RunError, match="--tensorboard needs the package tensorboard, which is not installed"):
        Log(tmp_path, tensorboard=True)
    with pytest.raises(RunError, match="--tensorboard needs a folder"):
        Log(tensorboard=True)
