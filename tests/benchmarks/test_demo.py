"""The retrieval run, small: rendered pedestrians, the three layouts on disk, resuming, two processes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import processes
from helpers.person_folders import folder_of
from PIL import Image

from benchmarks import results
from benchmarks.person_retrieval.__main__ import main
from benchmarks.person_retrieval.data import LAYOUTS, Pairs, rendered_splits
from benchmarks.person_retrieval.models import Neck, TwoStream, WordTokenizer
from benchmarks.person_retrieval.pedestrians import HEIGHT, WIDTH, caption, make_identities, render
from benchmarks.person_retrieval.training import Beginner, Recipe, Trainee, Trainer, World, parameter_groups
from fmfa_losses import FMFALoss

ROOT = Path(__file__).parents[2]
TINY_RUN = [
    "--identities",
    "12",
    "--test-identities",
    "6",
    "--batch-size",
    "16",
    "--epochs",
    "2",
    "--quiet",
    "--device",
    "cpu",
]


# --------------------------------------------------------------------------------------------------- pedestrians


def test_the_same_seed_draws_the_same_pixels_and_another_does_not() -> None:
    who = make_identities(3, seed=5)[2]
    first, again, other = (np.asarray(render(who, seed=(5, 2, n)).image) for n in (0, 0, 1))
    assert first.shape == (HEIGHT, WIDTH, 3)
    assert (first == again).all()
    assert np.abs(first.astype(int) - other.astype(int)).mean() > 5


def test_no_two_people_share_a_description_and_lookalikes_exist() -> None:
    people = make_identities(300, seed=1)
    assert people == make_identities(300, seed=1)
    assert len({who.described() for who in people}) == 300
    keys = [(who.upper, who.upper_color, who.lower, who.lower_color) for who in people]
    assert len(set(keys)) < 300  # people whom only shoes, hair, hat or bag tell apart


def test_captions_tell_only_what_is_seen() -> None:
    people = make_identities(200, seed=2)
    photos = [render(who, seed=(2, i, 0)) for i, who in enumerate(people[:60])]
    for i, (who, photo) in enumerate(zip(people, photos, strict=False)):
        texts = [caption(who, photo, seed=(2, i, wording)) for wording in range(6)]
        assert len(set(texts)) > 3
        assert texts[0] == caption(who, photo, seed=(2, i, 0))
        told = " ".join(texts)
        assert not (photo.feet_hidden and any(word in told for word in ("shoes", "sneakers", "footwear")))
        assert not (photo.view != "front" and any(word in told for word in ("glasses", "logo", "emblem", "print")))
        assert not (who.bag == "none" and "bag" in told)
        assert photo.walking or "walk" not in told


def test_no_test_identity_is_in_training() -> None:
    train, test = rendered_splits(8, 5, images=2, test_images=2, seed=3)
    people = make_identities(13, seed=3)
    assert not {who.described() for who in people[:8]} & {who.described() for who in people[8:]}
    assert (train.num_identities, test.num_identities) == (8, 5)
    assert len(train.captions) == 2 * len(train.image_pids) == 32
    # The split's photographs are those of its own people.
    assert (np.asarray(test.photograph(1)) == np.asarray(render(people[8], seed=(3, 8, 1)).image)).all()
    assert test.image_pids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert test.caption_pids.tolist() == [pid for pid in range(5) for _ in range(4)]


# ------------------------------------------------------------------------------------------------------- reading


def test_tokenizer_keeps_eot_and_marks_the_unknown() -> None:
    tokenizer = WordTokenizer(["a red coat .", "a T-shirt"], context_length=5)
    ids = tokenizer(["a red coat and a red coat", "t-shirt zebra"])
    assert ids.shape == (2, 5)
    assert ids[0, -1] == tokenizer.eot_id == tokenizer.vocab_size - 1
    assert tokenizer.words(ids[1]) == ["t-shirt", "?"]
    assert tokenizer.mask_id == tokenizer.vocab_size - 3


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_in_each_layout_trains_and_resumes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = folder_of(tmp_path, name)
    out, fit = tmp_path / "out", Trainer.fit
    command = ["--dataset", name, "--root", str(root), "--tiny", "--device", "cpu", "--workers", "0", "--quiet"]
    command += ["--batch-size", "8", "--epochs", "2", "--out", str(out)]
    monkeypatch.setattr("benchmarks.person_retrieval.__main__.draw", lambda *_: {})  # drawn in the rendered run
    with monkeypatch.context() as stopped:
        stopped.setattr(Trainer, "fit", lambda self, **_: fit(self, until=1))
        main(command)
    first = json.loads((out / "metrics.json").read_text())
    assert (first["steps"], first["epochs"]) == (2, 1)
    assert set(first["last_epoch"]) >= {"loss", "id", "irr", "efa", "asdm"}
    assert first["recipe"]["lr"] == 1e-5 and first["recipe"]["fast_factor"] == 5
    history = torch.load(out / "checkpoint.pt", weights_only=True)["history"]["loss"]

    main([*command, "--resume"])
    result = json.loads((out / "metrics.json").read_text())
    assert (result["steps"], result["epochs"]) == (4, 2)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["history"]["loss"][:2] == history
    assert "dry run" in capsys.readouterr().out


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="data_captions"):
        main(["--dataset", "RSTPReid", "--root", str(tmp_path / "nowhere"), "--device", "cpu"])
    root = folder_of(tmp_path, "RSTPReid")
    (root / "RSTPReid" / "imgs" / "cam" / "0001_0.png").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"1 of 8 images [^\n]*\n.*0001_0\.png.* 0 bytes"):
        main(["--dataset", "RSTPReid", "--root", str(root), "--device", "cpu", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="--resume needs a checkpoint"):
        main([*TINY_RUN, "--resume", "--out", str(tmp_path / "empty")])


# ------------------------------------------------------------------------------------------------------ training


def small_trainer(
    file: Path | None,
    *,
    beginner: bool = False,
    world: World | None = None,
    gather: bool | str = False,
    drop: int = 0,
    **settings: Any,
) -> Trainer:
    """On 24 pairs without the last `drop`; `settings` of the recipe."""
    train, _ = rendered_splits(6, 1, images=2, seed=0)
    kept = len(train.captions) - drop
    train = replace(train, captions=train.captions[:kept], caption_images=train.caption_images[:kept])
    tokenizer = WordTokenizer(train.captions, context_length=40)
    torch.manual_seed(0)
    model = TwoStream(
        tokenizer.vocab_size, context_length=40, image_size=(48, 16), width=32, heads=2, image_depth=1, text_depth=1
    )
    objective = FMFALoss(32, 6, vocab_size=tokenizer.vocab_size, irr={"depth": 1, "num_heads": 2}, gather=gather)
    trainee = Beginner(model, gather=gather) if beginner else Trainee(model, objective)
    pairs = Pairs(train, tokenizer(train.captions), size=(48, 16), seed=0)
    recipe = Recipe(**{"epochs": 4, "batch_size": 8, "lr": 1e-3, "warmup_epochs": 1.0, "clip_norm": 1.0, **settings})
    tokens = {"mask_id": tokenizer.mask_id, "special_ids": tokenizer.special_ids}
    return Trainer(trainee, pairs, recipe, tokens=tokens, world=world, checkpoint=file, quiet=True)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole = small_trainer(None)
    whole.fit()
    stopped = small_trainer(tmp_path / "state.pt")
    stopped.fit(until=2)
    torch.manual_seed(123)  # another process
    resumed = small_trainer(None)
    resumed.resume(tmp_path / "state.pt")
    resumed.fit()
    assert resumed.history == whole.history
    ours, theirs = resumed.trainee.state_dict(), whole.trainee.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_resumed_run_keeps_its_recipe(tmp_path: Path) -> None:
    stopped = small_trainer(tmp_path / "state.pt")
    stopped.fit(until=1)
    other = small_trainer(None)
    other.recipe = Recipe(epochs=4, batch_size=8, lr=2e-3)
    with pytest.raises(ValueError, match=r"lr was 0\.001 and is 0\.002"):
        other.resume(tmp_path / "state.pt")
    more = small_trainer(None)  # as many processes as there are must have the same batch together
    more.recipe, more.world = replace(more.recipe, batch_size=4), World(rank=1, size=2)
    more.resume(tmp_path / "state.pt")
    assert more.epoch == 1
    more.world = World(rank=1, size=4)
    with pytest.raises(ValueError, match=r"batch_size.* 8 .* 16"):
        more.resume(tmp_path / "state.pt")


def test_the_contrastive_beginning_learns() -> None:
    trainer = small_trainer(None, beginner=True)
    trainer.epochs = 12
    trainer.fit()
    losses = trainer.history["contrastive"]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


def test_modules_that_start_from_nothing_learn_five_times_as_fast() -> None:
    trainer = small_trainer(None)
    slow, fast = parameter_groups(trainer.trainee, Recipe(lr=1e-5))
    assert (slow["lr"], fast["lr"]) == (1e-5, 5e-5)
    names = {id(parameter): name for name, parameter in trainer.trainee.named_parameters()}
    quick = {names[id(parameter)] for parameter in fast["params"]}
    assert quick and all(name.startswith("objective.") for name in quick)
    assert any("classifier" in name for name in quick) and any("mlm_head" in name for name in quick)
    assert len(slow["params"]) + len(fast["params"]) == len(names)


def test_the_learning_rate_warms_up_and_falls_on_a_cosine() -> None:
    trainer = small_trainer(None)
    steps = trainer.steps_per_epoch
    (factor, *_) = trainer.scheduler.lr_lambdas
    factors = [factor(step) for step in range(4 * steps + 1)]
    assert factors[0] == pytest.approx(0.1) and factors[steps] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.0, abs=1e-12)
    assert factors[(1 + 4) * steps // 2] == pytest.approx(0.5, abs=0.1)
    assert all(a >= b for a, b in zip(factors[steps:], factors[steps + 1 :], strict=False))


# ----------------------------------------------------------------------------------- two processes train as one

GLOO = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no Gloo")

# Batches of all processes of 8 of 24 pairs, and one of all 23, of which the processes have 11 and 12.
CASES: list[dict[str, Any]] = [
    {"beginner": True, "gather": True, "batch_size": 8},
    {"beginner": True, "gather": "ring", "batch_size": 32, "drop": 1},
    {"gather": True, "batch_size": 8, "sampler": "identity"},
    {"gather": "ring", "batch_size": 8},
    {"gather": True, "batch_size": 32, "drop": 1},
    {"gather": False, "batch_size": 8},
]


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def histories() -> list[dict[str, list[float]]]:
    """Every term and accuracy of the first steps of every case, in float64, in as many processes as there are."""
    found = []
    alone = not dist.is_initialized()
    world = World() if alone else World(dist.get_rank(), dist.get_world_size())
    for case in CASES:
        settings = {**case, "batch_size": case["batch_size"] // world.size}
        if alone:
            settings["gather"] = False
        with float64():
            trainer = small_trainer(None, world=world, epochs=2, **settings)
            trainer.fit()
        found.append(trainer.history)
    return found


def difference(ours: dict[str, list[float]], theirs: dict[str, list[float]], *, accuracies: bool = False) -> float:
    """The largest relative one of the terms or the accuracies at any step."""
    assert ours.keys() == theirs.keys()
    names = [name for name in ours if name.endswith("accuracy") == accuracies]
    a, b = (np.array([history[name] for name in names]) for history in (ours, theirs))
    assert a.shape == b.shape
    return float((np.abs(a - b) / np.maximum(np.abs(b), 1e-3)).max(initial=0))


@GLOO
def test_two_processes_train_as_one() -> None:
    """In float64, where the order of the sums, the only difference, is out of sight."""
    alone = histories()
    for together in processes.run(2, histories):
        assert isinstance(together, list), together
        for case, ours, theirs in zip(CASES, together, alone, strict=True):
            assert len(ours["loss"]) == (6 if case["batch_size"] == 8 else 2)
            if not case["gather"]:
                assert difference(ours, theirs) > 1e-3  # each for itself is another training
                continue
            assert difference(ours, theirs) < 1e-9, case
            assert difference(ours, theirs, accuracies=True) < 1e-6, case  # they are float32


def necks() -> list[torch.Tensor]:
    """Output, gradient and running statistics of a neck for this process's rows, 3 and 6 of 9; all of them alone."""
    generator = torch.Generator().manual_seed(5)
    x, weight = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64).unbind()
    if dist.is_initialized():
        x, weight = (rows[:3] if dist.get_rank() == 0 else rows[3:] for rows in (x, weight))
    x = (x + 30).requires_grad_()
    neck = Neck(4).double()
    y = neck(x)
    neck(x.detach() * 2)
    (y * weight).sum().backward()
    assert neck.eval()(x[:1]).shape == (1, 4)  # evaluation asks nobody
    return [y.detach(), x.grad, neck.running_mean, neck.running_var, neck.num_batches_tracked]


@GLOO
def test_necks_normalise_over_the_rows_of_all_processes() -> None:
    reference = torch.nn.BatchNorm1d(4, affine=False).double()
    assert reference.state_dict().keys() == Neck(4).state_dict().keys()
    expected, (first, second) = necks(), processes.run(2, necks)
    assert isinstance(first, list) and isinstance(second, list), (first, second)
    got = [torch.cat(parts) for parts in zip(first[:2], second[:2], strict=True)]
    for ours in ([*got, *first[2:]], [*got, *second[2:]]):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------- the whole run


def test_the_embedded_run_writes_metrics_and_three_pictures(tmp_path: Path) -> None:
    main([*TINY_RUN, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "metrics.json").read_text())
    for direction in ("t2i", "i2t"):
        one = result[direction]
        assert set(one) == {"R1", "R5", "R10", "mAP", "mINP"}
        assert 0 <= one["R1"] <= one["R5"] <= one["R10"] <= 100
        assert 0 < one["mINP"] <= 100 and 0 < one["mAP"] <= 100
    assert result["chance_R1"] == pytest.approx(100 / 6)
    assert all(np.isfinite(value) for value in result["last_epoch"].values())
    assert result["versions"]["torch"] == torch.__version__
    for name in ("loss_curves", "retrieval", "similarity_maps"):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert min(picture.shape) > 200 and picture.std() > 10  # something is drawn


def test_the_ablation_tells_mean_and_spread_of_every_variant(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main([*TINY_RUN, "--epochs", "1", "--ablation", "--seeds", "2", "--out", str(tmp_path)])
    report = results.read(tmp_path / "ablation.json")
    assert [row["variant"] for row in report["table"]] == ["SDM", "A-SDM", "SDM + EFA", "A-SDM + EFA (FMFA)"]
    for row in report["table"]:
        runs = [record for record in report["records"] if record["variant"] == row["variant"]]
        assert [run["seed"] for run in runs] == [0, 1]
        values = [run["t2i"]["R1"] for run in runs]
        assert row["R1"]["mean"] == pytest.approx(np.mean(values))
        assert row["R1"]["std"] == pytest.approx(np.std(values, ddof=1))
        assert ("efa" in runs[0]["last_epoch"]) == ("EFA" in row["variant"])
    written = (tmp_path / "ablation.md").read_text()
    assert "±" in written and written.strip() in capsys.readouterr().out


@GLOO
def test_torchrun_trains_as_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself, both phases, in float32: the order of sums differs, and every step builds on the last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--identities", "4", "--test-identities", "2", "--epochs", "2", "--quiet", "--device", "cpu"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command += ["-m", "benchmarks", "person-retrieval", *options, "--batch-size", "8", "--gather", "ring"]
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
    result = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert result["processes"] == 2 and result["recipe"]["gather"] == "ring"
    assert result["steps"] == 2  # 16 pairs, 2 x 8 at a time, two epochs
    monkeypatch.setattr("benchmarks.person_retrieval.__main__.draw", lambda *_: {})  # drawn by the others
    main([*options, "--batch-size", "16", "--out", str(tmp_path / "one")])
    for name, steps in (("beginning.pt", 4), ("checkpoint.pt", 2)):
        ours, theirs = (torch.load(tmp_path / run / name, weights_only=True)["history"] for run in ("two", "one"))
        assert len(ours["loss"]) == steps
        assert difference(ours, theirs) < 1e-4, name
