"""What is tested: the weights of a run or of a file, and a split to test them on."""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .data import Pairs
from .errors import RunError
from .options import add_data, add_objective, add_recipe, add_run, check_applies
from .task import Task, make_task
from .training import Log, load

__all__ = ["Subject", "add_reading", "add_subject", "of_run", "reading", "subject_of"]

_DATA = ("dataset", "root", "identities", "val_identities", "test_identities", "weights", "tokenizer", "tiny")


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
    parser.add_argument("--workers", type=int, help="processes that read images: 4, rendered 0")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def reading(args: argparse.Namespace, dataset: str) -> dict[str, int]:
    """Keyword arguments of `encode`."""
    workers = args.workers if args.workers is not None else 0 if dataset == "rendered" else 4
    for name, value, least in (("batch-size", args.batch_size, 1), ("workers", workers, 0)):
        if value < least:
            raise RunError(f"--{name} must be {least} or more, got {value}")
    return {"batch_size": args.batch_size, "workers": workers}


def subject_of(args: argparse.Namespace, split: str = "test") -> Subject:
    """As the options of `add_subject` say.

    Raises:
        RunError: options that do not go together, missing or broken files.
    """
    if args.run is not None:
        names = ("dataset", "identities", "val_identities", "test_identities", "weights", "tokenizer", "tiny")
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) not in (None, False)]
        if given:
            raise RunError(f"{', '.join(given)} must be left out: --run says which data and weights it is of")
        return of_run(args.run, split, root=args.root, quiet=args.quiet)
    args.dataset = args.dataset or "rendered"
    check_applies(args)
    if args.dataset != "rendered" and args.weights is None and not args.tiny:
        raise RunError(f"{args.dataset} needs --run or --weights, got neither; --tiny is a dry run without weights")
    task = make_task(_options(**{name: getattr(args, name) for name in _DATA}), Log(quiet=args.quiet))
    weights = task.about["weights"]
    told = {None: "random", "random": "random", "committed": "the committed ones"}.get(weights, str(weights))
    about = _data(task.about, split) | {name: task.about[name] for name in ("weights", "weights_sha256", "dry_run")}
    model = task.build(task.recipe.seed)
    return Subject(model, _pairs(task, split), task.tokenizer, task.dataset, told, about)


def of_run(folder: Path, split: str, *, root: Path | None = None, quiet: bool = True) -> Subject:
    """The weights that a run selected, finished or not: the best epoch so far, or the last where nothing selects.

    Args:
        root: where the data set lies now, if it was moved.

    Raises:
        RunError: no run of `train` with a checkpoint, another run's files, missing or broken data.
    """
    record = _record(folder)
    settings = record["settings"]
    if root is not None and settings["dataset"] == "rendered":
        raise RunError(f"--root must be left out: {folder} is of rendered pedestrians, which have no files")
    state, epoch, file, told = _selected(folder, record)
    task = make_task(_options(**_as_trained(settings, root)), Log(quiet=quiet))
    model = task.build(task.recipe.seed)
    model.to(next(tensor.dtype for tensor in state.values() if tensor.is_floating_point()))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(f"{file} must hold weights of the model that {folder}/run.json describes; {error}") from error
    about = _data(task.about, split) | {
        "weights": file.resolve(), "weights_sha256": _sha256(file), "epoch": epoch, "dry_run": settings["dry_run"],
        "trained_from": settings["weights"], "trained_by": record["commands"],
    }  # fmt: skip
    return Subject(model, _pairs(task, split), task.tokenizer, task.dataset, f"{folder}, {told}", about)


def _record(folder: Path) -> dict[str, Any]:
    file = folder / "run.json"
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if "dataset" in record["settings"] and {"run", "commands", "chosen_epochs"} <= record.keys():
            return record
        reason = "it is of another command"
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = getattr(error, "strerror", None) or f"it is no record of a run ({error})"
    raise RunError(f"{folder} must be the folder of a run of `train`, {file} is not its record: {reason}; name another")


def _selected(folder: Path, record: dict[str, Any]) -> tuple[dict[str, Tensor], int, Path, str]:
    """Weights, epoch, file, and what they are in words."""
    last, best = folder / "checkpoint.pt", folder / "best.pt"
    if not last.exists():
        raise RunError(f"{folder} must have finished an epoch, found no {last.name}; wait for it, or name another run")
    saved = load(last, keys=("run", "epoch", "best", "trainee"), mmap=True)
    epochs = record["chosen_epochs"] or record["settings"]["recipe"]["epochs"]
    told = "" if saved["epoch"] >= epochs else f" (unfinished: {saved['epoch']} of {epochs} epochs)"
    chosen = saved["best"]
    if chosen is not None and best.exists():
        kept = load(best, keys=("run", "epoch", "model"), mmap=True)
        if (kept["run"], kept["epoch"]) == (record["run"], chosen["epoch"]):
            select = record["settings"].get("select", "val")
            return (
                kept["model"],
                int(chosen["epoch"]),
                best,
                f"epoch {int(chosen['epoch'])}, the best on {select}{told}",
            )
    # A run may be killed between the two files: then the best epoch is the last.
    if saved["run"] != record["run"] or (chosen is not None and chosen["epoch"] != saved["epoch"]):
        raise RunError(
            f"{best if chosen else last} must be of the run in {folder}/run.json, got none or another run's; "
            "restore the file, or name another run"
        )
    model = {name[6:]: tensor for name, tensor in saved["trainee"].items() if name.startswith("model.")}
    return model, int(saved["epoch"]), last, f"epoch {saved['epoch']}, the last{told}"


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
    }  # fmt: skip


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


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
