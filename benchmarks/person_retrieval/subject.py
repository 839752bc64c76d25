"""What is tested: the weights of a run or of a file, and a split to test them on."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .data import Pairs
from .errors import RunError
from .hashes import sha256
from .kept import kept_weights, record_of
from .options import add_data, add_objective, add_recipe, add_run, check_applies
from .task import Task, make_task
from .training import World

__all__ = ["Subject", "add_reading", "add_subject", "of_run", "reading", "subject_of"]


@dataclass(frozen=True)
class Subject:
    """Weights and what they are tested on.

    Attributes:
        title: what the weights are, in words.
        about: data set, root, split, weights, their SHA-256, and whether it is a dry run: for result files.
    """

    model: nn.Module
    pairs: Pairs
    tokenizer: Any
    dataset: str
    title: str
    about: dict[str, Any]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Identities, images, captions."""
        split = self.pairs.split
        return split.num_identities, len(split.image_pids), len(split.captions)


def add_subject(parser: argparse.ArgumentParser) -> None:
    """--run, or the options of the data and of the weights; and those of `add_reading`."""
    parser.add_argument("--run", type=Path, metavar="DIR", help="folder of a run: its best epoch on its data set")
    add_data(parser)
    parser.set_defaults(dataset=None)
    add_reading(parser)


def add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--batch-size", type=int, default=128, help="images or captions at a time (%(default)s)")
    parser.add_argument("--workers", type=int, help="processes that read images: at most 4, rendered 0")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def reading(args: argparse.Namespace, dataset: str) -> dict[str, int]:
    """Keyword arguments of `encode`."""
    usual = 0 if dataset == "rendered" else min(4, os.cpu_count() or 1)
    workers = usual if args.workers is None else args.workers
    for name, value, least in (("batch-size", args.batch_size, 1), ("workers", workers, 0)):
        if value < least:
            raise RunError(f"--{name} must be {least} or more, got {value}")
    return {"batch_size": args.batch_size, "workers": workers}


def subject_of(args: argparse.Namespace, world: World, split: str = "test") -> Subject:
    """As the options of `add_subject` say.

    Raises:
        RunError: options that do not go together, missing or broken files.
    """
    if args.run is not None:
        names = data_options() - {"root"}
        given = [f"--{name.replace('_', '-')}" for name in sorted(names) if getattr(args, name) not in (None, False)]
        if given:
            raise RunError(f"{', '.join(given)} must be left out: --run says which data and weights it is of")
        return of_run(args.run, world, split, root=args.root, quiet=args.quiet)
    args.dataset = args.dataset or "rendered"
    check_applies(args)
    if args.dataset != "rendered" and args.weights is None and not args.tiny:
        raise RunError(f"{args.dataset} needs --run or --weights, got neither; --tiny is a dry run without weights")
    task = make_task(_options(quiet=args.quiet, **{name: getattr(args, name) for name in data_options()}), world, split)
    about = _data(task.about, split) | {name: task.about[name] for name in ("weights", "weights_sha256", "dry_run")}
    model = task.build(task.recipe.seed)
    told = task.loaded.removeprefix("weights: ")
    return Subject(model, _pairs(task, split), task.tokenizer, task.dataset, told, about)


def of_run(folder: Path, world: World, split: str = "test", *, root: Path | None = None, quiet: bool = True) -> Subject:
    """The weights that a run kept, finished or not, and a split of its data set.

    Args:
        root: where the data set lies now, if it was moved.

    Raises:
        RunError: no run of `train` with a checkpoint, another run's files, missing or broken data.
    """
    record = record_of(folder)
    settings = record["settings"]
    if root is not None and settings["dataset"] == "rendered":
        raise RunError(f"--root must be left out: {folder} is of rendered pedestrians, which have no files")
    weights, epoch, file, told = kept_weights(folder, record)
    task = make_task(_options(quiet=quiet, **_as_trained(settings, root)), world, split)
    model = task.build(task.recipe.seed)
    model.to(next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point()))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    got = {name: tensor.shape for name, tensor in weights.items()}
    if wrong := sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)):
        raise RunError(
            f"{file} must hold the weights of the model that {folder}/run.json describes, but {len(wrong)} of "
            f"{len(expected)} tensors are missing, too many or of another shape, the first is {wrong[0]}; "
            "name a run whose files belong together"
        )
    model.load_state_dict(weights)
    about = _data(task.about, split) | {
        "weights": file.resolve(), "weights_sha256": sha256(file), "epoch": epoch, "dry_run": settings["dry_run"],
        "trained_from": settings["weights"], "trained_by": record["commands"],
    }  # fmt: skip
    return Subject(model, _pairs(task, split), task.tokenizer, task.dataset, f"{folder}, {told}", about)


def _as_trained(settings: dict[str, Any], root: Path | None) -> dict[str, Any]:
    """Options of the command line that give the data and the model of a run."""
    if settings["dataset"] == "rendered":
        people = settings["rendered"]
        counts = {"identities": people["train"], "val_identities": people["val"], "test_identities": people["test"]}
        weights = {"committed": None, "random": "none"}.get(settings["weights"], settings["weights"])
        return {"dataset": "rendered", "weights": weights, **counts}
    tokenizer = settings.get("tokenizer")
    return {
        "dataset": settings["dataset"], "root": root or Path(settings["root"]), "weights": settings["weights"],
        "tokenizer": Path(tokenizer) if tokenizer else None, "tiny": bool(settings.get("tiny")),
        "activation": settings.get("activation"),
    }  # fmt: skip


def data_options() -> set[str]:
    """Names of the options that say which data and weights."""
    parser = argparse.ArgumentParser()
    add_data(parser)
    return set(vars(parser.parse_args([])))


def _options(**given: Any) -> argparse.Namespace:
    """All that `make_task` reads, with what is given."""
    parser = argparse.ArgumentParser()
    add_data(parser)
    add_recipe(parser)
    add_objective(parser)
    add_run(parser, "")
    return argparse.Namespace(**(vars(parser.parse_args([])) | given))


def _pairs(task: Task, split: str) -> Pairs:
    pairs: Pairs | None = getattr(task, split)
    if pairs is None:
        raise RunError(f"--split must be one that the data set has, {task.dataset} has no {split}; pass --split test")
    return pairs


def _data(about: dict[str, Any], split: str) -> dict[str, Any]:
    return {name: about[name] for name in ("dataset", "root", "rendered") if name in about} | {"split": split}
