"""What a run trains and tests on, and with: splits, tokenizer, model, recipe and objective of a data set."""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn
from tqdm import tqdm

from fmfa_losses import FMFALoss

from .data import Augmentation, Pairs, Split, check_images, read_dataset, rendered_splits, splits_of, too_long
from .errors import RunError
from .models.pretrained import COMMITTED, load_two_stream
from .options import objective_of, recipe_of
from .training import Recipe, World

__all__ = [
    "PAPER_SIZE", "RENDERED_SIZE", "Task", "check_objective", "make_task", "progress_bar", "reseeded", "selection",
]  # fmt: skip

RENDERED_SIZE = (96, 32)
PAPER_SIZE = (384, 128)
RENDERED_SEED = 0  # of the pedestrians: every run sees the same people, whatever its own seed
Progress = Callable[..., Any]


@dataclass
class Task:
    """What a run trains and tests on, and with.

    Attributes:
        train, val, test: pairs; val is None where the data set has no such split.
        build: seed -> the model as it is before training: pretrained, or random by that seed.
        objective: keyword arguments of FMFALoss -> objective; they come after those of the command line.
        loaded: what the weights are and what was taken of them, for the log.
        about: what says which data, weights and objective these are, in run.json and metrics.json.
        before: metrics of the model before training, by the seed of random weights: once for all runs of a study.
    """

    dataset: str
    train: Pairs
    val: Pairs | None
    test: Pairs
    tokenizer: Any
    recipe: Recipe
    build: Callable[[int], nn.Module]
    objective: Callable[..., FMFALoss]
    loaded: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    before: dict[Any, dict[str, Any]] = field(default_factory=dict)

    @property
    def tokens(self) -> dict[str, Any]:
        """What masking asks of the tokenizer."""
        return {"mask_id": self.tokenizer.mask_id, "special_ids": self.tokenizer.special_ids}


def make_task(args: argparse.Namespace, world: World, only: str | None = None) -> Task:
    """Reads and checks everything that the run will need.

    Args:
        only: the one split that will be used; `train` and the others may be None then, or unchecked.

    Raises:
        RunError: what is missing or broken, before the first step.
    """
    progress = progress_bar(args, world)
    return _rendered(args, progress, only) if args.dataset == "rendered" else _on_disk(args, progress, only)


def progress_bar(args: argparse.Namespace, world: World) -> Progress:
    """Over anything that is counted; silent where nobody watches."""
    return partial(tqdm, disable=args.quiet or not world.leads or not sys.stderr.isatty(), leave=False)


def reseeded(task: Task, seed: int) -> Task:
    """The same task for a run with another seed."""
    train = copy(task.train)
    train.seed = seed
    return replace(task, train=train, recipe=replace(task.recipe, seed=seed))


def selection(args: argparse.Namespace, task: Task) -> tuple[str, str]:
    """By which split an epoch is chosen, and the sentence that says so."""
    chosen = args.select or ("val" if task.val else "last")
    if chosen == "val" and task.val is None:
        raise RunError(f"--select val needs a validation split, {task.dataset} has none; pass --select last or test")
    told = {
        "val": "the epoch with the best Rank-1 on the validation split is kept, and tested once",
        "test": "the epoch with the best Rank-1 on the TEST split is kept, as published codebases do: a biased figure",
        "last": "the last epoch is kept" + ("" if task.val else f": {task.dataset} has no validation split"),
    }
    return chosen, told[chosen]


def _rendered(args: argparse.Namespace, progress: Progress, only: str | None) -> Task:
    recipe, weights = recipe_of(args), load_two_stream(args.weights, image_size=RENDERED_SIZE)
    # In this order: the people to test on are the same however many there are to train on.
    counts = {"test": args.test_identities or 750, "val": args.val_identities or 100, "train": args.identities or 1200}
    given, tokenizer = objective_of(args, weights.patches), weights.tokenizer
    words = {"vocab_size": tokenizer.vocab_size, "irr": {"depth": 1, "num_heads": weights.heads}}

    def objective(**variant: Any) -> FMFALoss:
        return FMFALoss(weights.embed_dim, counts["train"], **words, **merged(given, variant))

    check_objective(objective)
    splits = rendered_splits(counts, seed=RENDERED_SEED, only=only, progress=progress)
    pairs = _all_pairs(splits, tokenizer, recipe, RENDERED_SIZE, keep=True)
    about = {
        "dataset": "rendered", "rendered": {**counts, "seed": RENDERED_SEED}, **weights.about, "dry_run": False,
        "objective": given,
    }  # fmt: skip
    told = f"weights: {about['weights']}" + (f", {COMMITTED.name}" if about["weights"] == "committed" else "")
    return Task("rendered", *pairs, tokenizer, recipe, weights.build, objective, told, about)


def _on_disk(args: argparse.Namespace, progress: Progress, only: str | None) -> Task:
    from .models.weights import load_clip  # transformers, which the rendered pedestrians do without

    recipe = recipe_of(args)
    names = sorted(splits_of(args.dataset, args.root) | {"train", "test"}, key=("train", "val", "test").index)
    splits = {name: read_dataset(args.dataset, args.root, name) for name in names}
    options = {"tokenizer": args.tokenizer, "activation": args.activation, "seed": recipe.seed}
    try:
        captions = splits["train"].captions
        model, tokenizer, report = load_clip(
            args.weights, captions, image_size=PAPER_SIZE, tiny=bool(args.tiny), **options
        )
    except (FileNotFoundError, ValueError) as error:
        raise RunError(f"--weights: {error}") from error
    rows, columns = model.grid
    given = objective_of(args, rows * columns)

    def objective(**variant: Any) -> FMFALoss:
        sizes = (args.dataset, model.embed_dim, splits["train"].num_identities)
        return FMFALoss.for_dataset(*sizes, vocab_size=tokenizer.vocab_size, **merged(given, variant))

    check_objective(objective)
    for name in [name for name in splits if only in (None, name)]:
        splits[name] = check_images(splits[name], progress=progress)
    for split in splits.values():
        if long := too_long(tokenizer, split.captions):
            split.notes["captions over 77 tokens, cut"] = long
    about = {
        "dataset": args.dataset, "root": str(args.root.resolve()), "root_sha256": digest(splits),
        "weights": args.weights, "weights_sha256": report.sha256, "activation": args.activation,
        "tokenizer": None if args.tokenizer is None else str(args.tokenizer),
        "tiny": bool(args.tiny), "dry_run": args.weights is None, "objective": given,
    }  # fmt: skip
    pairs = _all_pairs(splits, tokenizer, recipe, PAPER_SIZE)
    return Task(args.dataset, *pairs, tokenizer, recipe, lambda _: deepcopy(model), objective, str(report), about)


def digest(splits: dict[str, Split]) -> str:
    """SHA-256 of what the annotations say, which a resumed run must find as it was; not of the images' bytes."""
    said = [
        (name, split.captions, split.caption_images.tolist(), split.image_pids.tolist())
        for name, split in splits.items()
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def check_objective(build: Callable[[], FMFALoss]) -> None:
    """Builds it once, so that its hyperparameters are checked before anything is read or computed."""
    try:
        objective = build()
    except (TypeError, ValueError) as error:
        raise RunError(f"the objective's options do not fit: {error}") from error
    if not any(objective.weights.values()):
        raise RunError("--loss-weights must leave something to train with, every term has 0; give one of them more")


def _all_pairs(
    splits: dict[str, Split], tokenizer: Any, recipe: Recipe, size: tuple[int, int], *, keep: bool = False
) -> tuple[Any, Any, Any]:
    augmentation = Augmentation(flip=recipe.flip, pad=recipe.pad, erase=recipe.erase)
    read = {
        name: Pairs(
            split, tokenizer(split.captions), size=size, seed=recipe.seed, keep=keep,
            augmentation=augmentation if name == "train" else None,
        )
        for name, split in splits.items()
    }  # fmt: skip
    return read.get("train"), read.get("val"), read.get("test")


def merged(given: dict[str, Any], variant: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of FMFALoss: those of the command line, and over them those of a variant."""
    parts = given | variant
    both = [key for key in given.keys() & variant.keys() if isinstance(given[key], dict)]
    return parts | {key: {**given[key], **variant[key]} for key in both}
