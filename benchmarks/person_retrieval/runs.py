"""One training from beginning to end: the model as it is, then trained, then tested; and written down."""

import argparse
import contextlib
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmfa_losses import FMFALoss

from .. import results
from .data import Pairs
from .errors import RunError
from .evaluation import as_dict, chance, encode, evaluate
from .outputs import writing
from .pictures import draw
from .task import Task, selection
from .training import (
    InfoNCE,
    Log,
    RunFolder,
    Trainee,
    Trainer,
    World,
    affordable_epochs,
    differences,
    measure_pace,
    plain,
    settings_of,
)

__all__ = ["FMFA", "Variant", "finished", "run", "tested"]


@dataclass(frozen=True)
class Variant:
    """What is trained with: the objectives of FMFA with these keyword arguments over those of the command line."""

    name: str
    objective: dict[str, Any] = field(default_factory=dict)
    contrastive: bool = False  # InfoNCE of CLIP on the global features, and nothing else

    def build(self, task: Task, model: nn.Module, gather: bool | str) -> nn.Module:
        if self.contrastive:
            return InfoNCE(model, task.objective().asdm.temperature, gather=gather)
        return Trainee(model, task.objective(gather=gather, **self.objective))


FMFA = Variant("FMFA")


def run(
    task: Task,
    out: Path,
    args: argparse.Namespace,
    world: World,
    *,
    variant: Variant = FMFA,
    pictures: bool = False,
    seconds: float | None = None,
    whole: bool = False,
) -> dict[str, Any]:
    """Trains, or goes on with what is in `out`; tests the epoch that was kept; writes metrics.json.

    Args:
        pictures: draw loss curves, retrieved images and similarity maps, too.
        seconds: how long it may take; a machine too slow for all epochs trains fewer, aloud.
        whole: all epochs, of a resumed run too that was to train fewer.

    Returns:
        What metrics.json holds; {} on all processes but the leading one.
    """
    chosen, told = selection(args, task)
    settings = all_settings(task, variant, args, world)
    options = {"resume": args.resume, "overwrite": args.overwrite, "leads": world.leads, "command": args.command}
    with RunFolder(out, settings, **options) as folder:
        log = Log(folder.path, quiet=args.quiet, tensorboard=args.tensorboard, leads=world.leads)
        if whole and folder.chosen_epochs is not None:
            log.say(f"all {task.recipe.epochs} epochs are trained, not {folder.chosen_epochs}, on the longer schedule")
            folder.choose_epochs(None)
        start = time.perf_counter()
        model = task.build(task.recipe.seed)
        before = untrained(task, model, world) if world.leads else {}
        testing = time.perf_counter() - start
        torch.manual_seed(task.recipe.seed)
        trainee = variant.build(task, model, world.gather(task.recipe))
        split = {"val": task.val, "test": task.test, "last": None}[chosen]
        trainer = Trainer(
            trainee, task.train, task.recipe, tokens=task.tokens, world=world, folder=folder, log=log, selected=chosen,
            validate=None if split is None else lambda model: tested(model, split, world)["t2i"],
        )  # fmt: skip
        if world.leads and not args.resume:
            announce(log, task, told, before)
        trainer.resume()
        if seconds is not None and folder.chosen_epochs is None and trainer.epoch == 0:
            choose_epochs(trainer, folder, log, seconds - (time.perf_counter() - start), testing)
        trainer.fit()
        result = {"epoch": trainer.select(), "selected": chosen, "before": before}
        if not world.leads:
            return {}
        result = {**tested(model, task.test, world), **result, **told_of(trainer, task, variant), **settings}
        result["seconds"] = round(time.perf_counter() - start, 1)
        if pictures:
            drawn = draw(out, model, task.test, task.tokenizer, trainer.history, world.device)
            result["files"] = [file.name for file in drawn.values()]
        with writing(folder.path / "metrics.json"):
            results.write(folder.path / "metrics.json", results.head("training", args.command) | result)
    return result


def told_of(trainer: Trainer, task: Task, variant: Variant) -> dict[str, Any]:
    """What metrics.json holds beside metrics and settings."""
    return {
        "chance_R1": chance(task.test),
        "epochs": trainer.epochs,
        "steps": len(trainer.history["loss"]),
        "last_epoch": last_epoch(trainer),
        "data": sizes(task),
        "variant": asdict(variant),
        "hyperparameters": hyperparameters(trainer.trainee.objective),
        "parameters": sum(p.numel() for p in trainer.trainee.model.parameters()),
        "device": str(trainer.world.device),
        "loaded": task.loaded,
        "records": trainer.validations,  # an epoch each
    }


def hyperparameters(objective: nn.Module) -> dict[str, Any]:
    """As they were trained with, whoever chose them: the command line, the variant or the data set."""
    if not isinstance(objective, FMFALoss):
        return {"temperature": objective.temperature}
    asdm, efa = objective.asdm, objective.efa
    return {
        "weights": objective.weights,
        "asdm": {"alpha": asdm.alpha, "temperature": asdm.temperature},
        "efa": {name: getattr(efa, name) for name in ("margin_text", "margin_image", "sparsity", "pool_scale")},
    }


def untrained(task: Task, model: nn.Module, world: World) -> dict[str, Any]:
    """Metrics of the model as it is before training: zero-shot, where its weights are pretrained."""
    key = task.recipe.seed if task.about["weights"] in (None, "random") else None
    if key not in task.before:
        task.before[key] = tested(model, task.test, world)
    return task.before[key]


def tested(model: nn.Module, pairs: Pairs, world: World) -> dict[str, dict[str, float]]:
    """Both directions, in percent."""
    return as_dict(evaluate(*encode(model.to(world.device), pairs, world.device), pairs))


def announce(log: Log, task: Task, told: str, before: dict[str, Any]) -> None:
    """What is trained on, with, and how it starts."""
    for name in ("train", "val", "test"):
        pairs = getattr(task, name)
        log.say(f"{name + ':':6} {pairs.split if pairs else 'no such split'}")
    log.say(task.loaded)
    if task.about["dry_run"]:
        log.say("no --weights: random weights, a dry run that shows only that everything runs")
    log.say(f"before training: t2i R1 {before['t2i']['R1']:.2f} on the test split, by chance {chance(task.test):.2f}")
    log.say(told)


def choose_epochs(trainer: Trainer, folder: RunFolder, log: Log, seconds: float, testing: float) -> None:
    """As many epochs as this machine trains in `seconds`, measured before the first step.

    Args:
        testing: how long one test took, as many seconds as the last one will take; pictures come after it.
    """
    log.say("measuring some steps on this machine, to choose how many epochs are trained")
    pace = measure_pace(trainer)
    left = max(0.0, seconds - 2 * testing)
    epochs = affordable_epochs(pace, trainer.steps_per_epoch, left / 60, trainer.epochs, besides=testing / 4)
    epochs = trainer.world.least(epochs)
    needed = pace * trainer.steps_per_epoch + testing / 4
    fit = f"fit into the {left:.0f} s that are left of --minutes"
    log.say(
        f"{pace:.2f} s a step, {trainer.steps_per_epoch} steps and {needed:.0f} s an epoch: "
        + (
            f"{epochs} of {trainer.epochs} epochs {fit}"
            if needed <= left
            else f"none {fit}, one is trained all the same"
        )
    )
    if epochs < trainer.epochs:
        folder.choose_epochs(epochs)
        trainer.epochs = epochs


def sizes(task: Task) -> dict[str, dict[str, Any]]:
    splits = {name: getattr(task, name) for name in ("train", "val", "test")}
    return {
        name: {
            "identities": pairs.split.num_identities, "images": len(pairs.split.image_pids),
            "captions": len(pairs.split.captions), "notes": pairs.split.notes,
        }
        for name, pairs in splits.items() if pairs is not None
    }  # fmt: skip


def finished(out: Path, task: Task, variant: Variant, args: argparse.Namespace, world: World) -> dict[str, Any] | None:
    """What metrics.json of a run with these settings holds; None where the run has not come to its end.

    Raises:
        RunError: another run is in `out`, or a broken file.
    """
    if not (out / "metrics.json").exists():
        return None
    found, settings = _metrics(out / "metrics.json"), plain(all_settings(task, variant, args, world))
    # Not those in run.json: a run that is prolonged has the new ones there, and here the former until its end.
    before = {name: found.get(name) for name in settings}
    forbidden, _ = differences(before, settings, trained=found["epochs"])
    if forbidden:
        raise RunError(
            f"a study must keep its settings; in {out} {'; '.join(forbidden)}; give the former ones, or another --out"
        )
    return found if found["recipe"]["epochs"] == task.recipe.epochs and not _prolonged(out, found) else None


def _metrics(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        reason = "it is of something else"
        if isinstance(found, dict) and {"t2i", "i2t", "before", "epochs", "recipe"} <= found.keys():
            return found
    except (OSError, ValueError) as error:
        reason = str(error)
    raise RunError(f"{file} must be the metrics of a run, {reason}; remove it, and --resume goes on with that run")


def _prolonged(out: Path, found: dict[str, Any]) -> bool:
    """Whether the run went on after its metrics were written: towards more epochs."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # whoever goes on with it tells
        record = json.loads((out / "run.json").read_text(encoding="utf-8"))
        return bool(record["settings"]["recipe"]["epochs"] != found["recipe"]["epochs"])
    return False


def all_settings(task: Task, variant: Variant, args: argparse.Namespace, world: World) -> dict[str, Any]:
    chosen, _ = selection(args, task)
    return settings_of(task.recipe, world, select=chosen, variant=asdict(variant), **task.about)


def last_epoch(trainer: Trainer) -> dict[str, float]:
    """Means of every term and accuracy over the steps of the last epoch."""
    return {name: statistics.fmean(values[-trainer.steps_per_epoch :]) for name, values in trainer.history.items()}
