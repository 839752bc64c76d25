"""A trainer of a tiny model on 24 pairs, for what does not depend on size."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.person_retrieval.data import Pairs, Split, rendered_splits
from benchmarks.person_retrieval.models import TwoStream, WordTokenizer
from benchmarks.person_retrieval.training import (
    Contrastive,
    InfoNCE,
    Log,
    Recipe,
    RunFolder,
    Trainee,
    Trainer,
    World,
    settings_of,
)
from fmfa_losses import FMFALoss

TINY = {"epochs": 4, "batch_size": 8, "lr": 1e-3, "eps": 1e-8, "warmup_epochs": 1.0, "lr_per": "step", "clip_norm": 1.0}


@functools.cache
def split() -> Split:
    """24 pairs of six identities; photographs are kept."""
    return rendered_splits({"train": 6}, seed=0)["train"]


def recipe(**settings: Any) -> Recipe:
    return Recipe(**{**TINY, **settings})


def run_folder(
    path: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    world: World | None = None,
    others: dict[str, Any] | None = None,
    **settings: Any,
) -> RunFolder:
    """The folder of a run with a tiny recipe and `settings` of it."""
    world = world or World()
    told = settings_of(recipe(**settings), world, **(others or {}))
    return RunFolder(path, told, resume=resume, overwrite=overwrite, leads=world.leads, command="the command")


def small_trainer(
    folder: RunFolder | None = None,
    *,
    contrastive: bool = False,
    info_nce: bool = False,
    weights: dict[str, float] | None = None,
    world: World | None = None,
    gather: bool | str = False,
    drop: int = 0,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    log: Log | None = None,
    **settings: Any,
) -> Trainer:
    """On 24 pairs without the last `drop`; `settings` of the recipe; `weights` of the terms."""
    train = split()
    kept = len(train.captions) - drop
    train = replace(train, captions=train.captions[:kept], caption_images=train.caption_images[:kept])
    tokenizer = WordTokenizer(train.captions, context_length=40)
    torch.manual_seed(0)
    model = TwoStream(
        tokenizer.vocab_size, context_length=40, image_size=(48, 16), width=32, heads=2, image_depth=1, text_depth=1
    )
    objective = FMFALoss(
        32, 6, vocab_size=tokenizer.vocab_size, weights=weights, irr={"depth": 1, "num_heads": 2}, gather=gather
    )
    trainee: Any = Trainee(model, objective)
    if contrastive or info_nce:
        trainee = (Contrastive if contrastive else InfoNCE)(model, gather=gather)
    pairs = Pairs(train, tokenizer(train.captions), size=(48, 16), seed=0)
    return Trainer(
        trainee,
        pairs,
        recipe(**settings),
        tokens={"mask_id": tokenizer.mask_id, "special_ids": tokenizer.special_ids},
        world=world,
        folder=folder,
        validate=validate,
        selected="val" if validate else "last",
        log=log,
    )


def difference(ours: dict[str, list[float]], theirs: dict[str, list[float]], *, accuracies: bool = False) -> float:
    """The largest relative one of the terms or the accuracies at any step."""
    assert ours.keys() == theirs.keys()
    names = [name for name in ours if name.endswith("accuracy") == accuracies]
    a, b = (np.array([history[name] for name in names]) for history in (ours, theirs))
    assert a.shape == b.shape
    return float((np.abs(a - b) / np.maximum(np.abs(b), 1e-3)).max(initial=0))
