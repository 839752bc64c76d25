"""Training of the retrieval model: recipe, validation, pace, kills, and two processes that train as one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import processes
from helpers.person_trainer import difference, run_folder, small_trainer

from benchmarks.person_retrieval.errors import RunError
from benchmarks.person_retrieval.models import Neck
from benchmarks.person_retrieval.training import (
    LRSchedule,
    Precision,
    Recipe,
    World,
    affordable_epochs,
    describe_groups,
    make_optimizer,
    measure_pace,
    parameter_groups,
)

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def validation(figures: list[float], seen: list[Any] | None = None) -> Any:
    """Stands for an evaluation: the next R1 of `figures` each time, whatever the model is."""
    left = iter(figures)

    def validate(model: torch.nn.Module) -> dict[str, float]:
        torch.rand(3)  # an evaluation that draws random numbers
        if seen is not None:
            seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"R1": next(left), "mAP": 1.0}

    return validate


# ------------------------------------------------------------------------------------------------------ recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, r"--epochs must be a whole number, 1 or more, got 0; "),
        ({"epochs": 2.5}, r"--epochs .* got 2\.5"),
        ({"epochs": True}, r"--epochs .* got True"),
        ({"lr": -1}, r"--lr must be positive and at most 1e\+06, got -1; give another value"),
        ({"lr": 0}, r"--lr .* got 0"),
        ({"lr": math.inf}, r"--lr .* got inf"),
        ({"seed": -1}, r"--seed .* got -1"),
        ({"seed": 2**32}, r"--seed .* below 2\^32"),
        ({"batch_size": 0}, r"--batch-size .* got 0"),
        ({"weight_decay": -1e-9}, r"--weight-decay must be 0 or more"),
        ({"betas": (0.9, 1.0)}, r"--betas .* got \(0\.9, 1\.0\)"),
        ({"eps": 0.0}, r"--eps must be positive"),
        ({"momentum": 1.0}, r"--momentum"),
        ({"warmup_factor": 1.5}, r"--warmup-factor must be between 0 and 1"),
        ({"lr_per": "batch"}, r"--lr-per must be one of epoch, step, got 'batch'"),
        ({"clip_norm": 0.0}, r"--clip-norm"),
        ({"flip": 2}, r"--flip"),
        ({"pad": -1}, r"--pad"),
        ({"per_identity": 0}, r"--per-identity"),
        ({"workers": -1}, r"--workers"),
        ({"optimizer": "lion"}, r"--optimizer must be one of adam, adamw, sgd"),
        ({"precision": "half"}, r"--precision must be one of"),
        ({"sampler": "none"}, r"--sampler"),
        ({"gather": "yes"}, r"--gather must be true, ring or no"),
    ],
)
def test_a_recipe_names_what_makes_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        Recipe(**settings)


def test_the_recipe_is_the_papers() -> None:
    paper = Recipe()
    assert (paper.epochs, paper.batch_size, paper.lr, paper.seed, paper.lr_per) == (60, 64, 1e-5, 1, "epoch")
    assert Recipe(eps=None, clip_norm=None, workers=0, warmup_epochs=0, weight_decay=0) is not None


class Names(torch.nn.Module):
    """Parameters with the names that IRRA's rules read."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = torch.nn.Linear(2, 3)
        self.cross_attn = torch.nn.Linear(2, 5)
        self.mlm_head = torch.nn.Linear(2, 7)
        self.classifier = torch.nn.Linear(2, 11)
        self.frozen = torch.nn.Parameter(torch.zeros(13), requires_grad=False)


def test_groups_follow_the_rules_in_order() -> None:
    groups = parameter_groups(Names(), Recipe(lr=1e-5))
    found = {
        (round(group["lr"] / 1e-5, 6), group["weight_decay"]): sorted(len(x) for x in group["params"])
        for group in groups
    }
    assert found == {
        (1.0, 4e-5): [3],
        (2.0, 0.0): [3, 5],  # biases, those of cross-attention too: the rule of biases comes later
        (5.0, 4e-5): [5, 7, 11],
        (5.0, 0.0): [7, 11],  # the heads' rule comes last and leaves the weight decay
    }
    told = "\n".join(describe_groups(make_optimizer(Names(), Recipe())))
    assert "5e-05, weight decay 0: 18 parameters (biases of classifier, mlm_head)" in told
    assert "46 parameters (cross; classifier, mlm_head)" in told
    merged = parameter_groups(Names(), Recipe(bias_lr_factor=5.0))
    assert len(merged) == 3  # what learns alike is one group


def test_what_starts_from_nothing_is_in_the_fast_groups() -> None:
    trainer = small_trainer()
    names = {id(parameter): name for name, parameter in trainer.trainee.named_parameters()}
    groups = parameter_groups(trainer.trainee, Recipe())
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(names)
    fast = {names[id(p)] for group in groups if group["lr"] == 5e-5 for p in group["params"]}
    assert fast and all(name.startswith("objective.") for name in fast)
    assert all(any(part in name for name in fast) for part in ("classifier", "mlm_head", "cross_attn"))


def test_each_optimizer_has_its_own_eps() -> None:
    def eps(**settings: Any) -> float:
        return make_optimizer(Names(), Recipe(**settings)).param_groups[0]["eps"]

    assert (eps(), eps(optimizer="adamw"), eps(eps=1e-6)) == (1e-3, 1e-8, 1e-6)
    sgd = make_optimizer(Names(), Recipe(optimizer="sgd", momentum=0.5))
    assert isinstance(sgd, torch.optim.SGD) and {group["momentum"] for group in sgd.param_groups} == {0.5}
    small_trainer(optimizer="sgd", epochs=1).fit()


def test_the_learning_rate_warms_up_and_falls_on_a_cosine() -> None:
    irra = LRSchedule(60, Recipe())
    assert [irra(epoch) for epoch in range(6)] == pytest.approx([0.1, 0.28, 0.46, 0.64, 0.82, 1.0])
    assert irra(2.9) == irra(2)  # one learning rate an epoch
    assert irra(32.5) == pytest.approx(0.5, abs=0.02) and 0 < irra(59) < 0.001
    by_step = LRSchedule(4, Recipe(warmup_epochs=1, lr_per="step", final_factor=0.2))
    assert [by_step(progress) for progress in (0.5, 2.5, 4)] == pytest.approx([0.55, 0.6, 0.2])
    assert LRSchedule(4, Recipe())(2) == 1.0  # warm-up is half of a short run
    assert LRSchedule(1, Recipe(warmup_epochs=0))(0) == 1.0

    trainer = small_trainer(epochs=2, lr_per="epoch", lr=0.1)
    rates = [trainer.optimizer.param_groups[0]["lr"] for epoch in (0, 1) for _ in trainer.steps(epoch)]
    assert rates == pytest.approx([0.01] * 3 + [0.1] * 3)


# --------------------------------------------------------------------------------------------------- precision


def test_precisions_that_a_cpu_has_and_one_that_it_has_not() -> None:
    with pytest.raises(RunError, match="--precision must be bfloat16, float32 or float64 on a CPU, got float16"):
        small_trainer(precision="float16")
    assert Precision("auto", CPU).name == "float32"
    losses = {}
    for name in ("float32", "bfloat16", "float64"):
        trainer = small_trainer(precision=name, epochs=1)
        assert {p.dtype for p in trainer.trainee.parameters()} == {Precision(name, CPU).weights}
        assert not trainer.scaler.is_enabled()
        trainer.fit()
        losses[name] = trainer.history["loss"]
    assert torch.get_default_dtype() == torch.float32
    assert losses["float32"] != losses["float64"] == pytest.approx(losses["float32"], rel=1e-3)
    assert losses["float32"][0] != losses["bfloat16"][0] == pytest.approx(losses["float32"][0], rel=0.1)


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(RunError, match="--device must be a CPU or a CUDA device, got 'gpu'"):
        World.join("gpu")
    with pytest.raises(RunError, match="--device must be one that is there, got cuda:99 where torch finds"):
        World.join("cuda:99")


# -------------------------------------------------------------------------------------------------- validation


def test_the_best_epoch_is_kept_and_the_earlier_of_equals(tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    with run_folder(tmp_path) as folder:
        trainer = small_trainer(folder, validate=validation([10.0, 30.0, 30.0, 20.0], seen))
        trainer.fit()
        assert [entry["R1"] for entry in trainer.validations] == [10.0, 30.0, 30.0, 20.0]
        assert trainer.best == {"epoch": 2, "R1": 30.0, "mAP": 1.0}
        best = torch.load(folder.best, weights_only=True)
        assert best["epoch"] == 2 and all(torch.equal(best["model"][name], seen[1][name]) for name in seen[1])
        assert trainer.select() == 2
    chosen = trainer.trainee.model.state_dict()
    assert all(torch.equal(chosen[name], seen[1][name]) for name in chosen)
    assert any(not torch.equal(chosen[name], seen[3][name]) for name in chosen)

    alone = small_trainer(validate=validation([10.0, 30.0, 30.0, 20.0]))  # without a folder
    alone.fit()
    assert alone.select() == 2
    assert all(torch.equal(alone.trainee.model.state_dict()[name], seen[1][name]) for name in seen[1])
    blind = small_trainer()
    blind.fit()
    assert blind.select() == 4 and blind.history == trainer.history  # looking changes nothing


def test_a_loss_that_is_no_number_is_named_and_the_checkpoint_stands(tmp_path: Path) -> None:
    with run_folder(tmp_path) as folder:
        trainer = small_trainer(folder)
        trainer.fit(until=1)
        saved = folder.checkpoint.read_bytes()
        with torch.no_grad():
            trainer.trainee.objective.identity.classifier.weight[0, 0] = math.nan
        with pytest.raises(RunError, match=r"id was nan, loss was nan at step 1 of 3 of epoch 2 .* epoch 1 stands"):
            trainer.fit()
        assert folder.checkpoint.read_bytes() == saved and len(trainer.history["loss"]) == 3


def test_batches_that_cannot_be_made_are_told() -> None:
    with pytest.raises(RunError, match="--per-identity must be at most the captions of an identity, got 5"):
        small_trainer(sampler="identity", per_identity=5)


# -------------------------------------------------------------------------------------------------------- pace


def test_measuring_the_pace_changes_nothing() -> None:
    plain = small_trainer(epochs=1)
    rng = torch.get_rng_state()
    plain.fit()
    measured = small_trainer(epochs=1)
    assert torch.equal(torch.get_rng_state(), rng)
    assert measure_pace(measured, steps=4) > 0  # more steps than an epoch has
    assert torch.equal(torch.get_rng_state(), rng)
    measured.fit()
    assert measured.history == plain.history
    ours, theirs = measured.trainee.state_dict(), plain.trainee.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_epochs_that_a_machine_affords() -> None:
    assert affordable_epochs(0.31, 90, 2.4, 8) == 5
    assert affordable_epochs(0.31, 90, 2.4, 8, besides=3.0) == 4
    assert affordable_epochs(1e-6, 90, 2.4, 8) == 8
    assert affordable_epochs(100.0, 90, 2.4, 8) == 1


# ------------------------------------------------------------------------------------------------------- kills


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_run_killed_at_any_moment_and_resumed_is_the_run_that_was_not(tmp_path: Path) -> None:
    """Killed before every step and file operation, and amid a checkpoint: history, weights, best epoch, log."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/helpers/person_kills.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["wrong"] == [], done.stderr[-3000:]
    # The record of the run: 3; an epoch: two steps, and 4 for each of checkpoint and best weights.
    assert report["moments"] == 3 + 2 * (2 + 4 + 4)
    assert len(report["lines"]) == report["best"] == 2
    assert report["outlived"] == 0  # a reader of a killed run does not keep the folder


def test_the_contrastive_objective_learns() -> None:
    trainer = small_trainer(contrastive=True, epochs=12)
    trainer.fit()
    losses = trainer.history["contrastive"]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


# ----------------------------------------------------------------------------------- two processes train as one

GLOO = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no Gloo")

# Batches of all processes of 8 of 24 pairs, and one of all 23, of which the processes have 11 and 12.
CASES: list[dict[str, Any]] = [
    {"contrastive": True, "gather": True, "batch_size": 8},
    {"contrastive": True, "gather": "ring", "batch_size": 32, "drop": 1},
    {"gather": True, "batch_size": 8, "sampler": "identity"},
    {"gather": "ring", "batch_size": 8},
    {"gather": True, "batch_size": 32, "drop": 1},
    # Nothing depends on patches and words, so that some parameters of the model get no gradient.
    {"info_nce": True, "gather": True, "batch_size": 8},
    {"weights": {"irr": 0.0, "efa": 0.0}, "gather": True, "batch_size": 8},
    {"gather": False, "batch_size": 8},
]


def histories(path: Path) -> tuple[list[dict[str, list[float]]], dict[str, list[float]], Any]:
    """In as many processes as there are, in float64: terms and accuracies of every case, and of a run that is resumed.

    Then what must be the same in all processes: validations, the pace, the selected epoch.
    """
    found = []
    alone = not dist.is_initialized()
    world = World() if alone else World(dist.get_rank(), dist.get_world_size())
    for case in CASES:
        settings = {**case, "batch_size": case["batch_size"] // world.size}
        if alone:
            settings["gather"] = False
        trainer = small_trainer(world=world, epochs=2, precision="float64", **settings)
        trainer.fit()
        found.append(trainer.history)
    figures = [30.0, 20.0] if world.leads else []  # who does not lead would find nothing to say
    judged = small_trainer(world=world, epochs=2, batch_size=8 // world.size, validate=validation(figures))
    pace = measure_pace(judged, steps=2)
    judged.fit()
    settings = {"epochs": 2, "batch_size": 8 // world.size, "precision": "float64"}
    for until in (1, 2):
        with run_folder(path, resume=until == 2, world=world, **settings) as folder:
            resumed = small_trainer(folder, world=world, gather=not alone, **settings)
            resumed.resume()
            assert resumed.epoch == until - 1
            resumed.fit(until=until)
            if not alone:
                dist.barrier()  # the next run starts when this one has ended
    return found, resumed.history, (judged.validations, pace, judged.select())


@GLOO
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """In float64, where the order of the sums, the only difference, is out of sight."""
    alone, resumed, (validations, _, best) = histories(tmp_path / "one")
    both = processes.run(2, histories, tmp_path / "two")
    for result in both:
        assert isinstance(result, tuple), result
        assert result[2] == (validations, both[0][2][1], best)  # what the leading process finds, and the slower pace
        assert len(result[1]["loss"]) == 6 and difference(result[1], resumed) < 1e-9
        for case, ours, theirs in zip(CASES, result[0], alone, strict=True):
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
