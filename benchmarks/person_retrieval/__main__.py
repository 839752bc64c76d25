"""`python -m benchmarks person-retrieval`: train with all four objectives, then find people by their description."""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fmfa_losses import FMFALoss

from .. import results
from .data import LAYOUTS, Pairs, Split, read_dataset, rendered_splits
from .errors import RunError
from .evaluation import as_dict, chance, draw, encode, evaluate
from .models import TwoStream, WordTokenizer
from .training import (
    Contrastive,
    Log,
    Recipe,
    RunFolder,
    Trainee,
    Trainer,
    World,
    affordable_epochs,
    measure_pace,
    settings_of,
)

# Table 6 of the paper: the baseline has ID, IRR and SDM; A-SDM takes SDM's place, EFA comes in addition.
VARIANTS: dict[str, dict[str, Any]] = {
    "SDM": {"weights": {"efa": 0.0}, "asdm": {"alpha": 0.0}},
    "A-SDM": {"weights": {"efa": 0.0}},
    "SDM + EFA": {"asdm": {"alpha": 0.0}},
    "A-SDM + EFA (FMFA)": {},
}
GATHER: dict[str, bool | str] = {"true": True, "ring": "ring", "no": False}
RENDERED_SIZE = (96, 32)
PAPER_SIZE = (384, 128)
IDENTITY = {"dataset", "root", "weights", "tiny", "identities", "test_identities"}  # beside the recipe
BEGINNING_SHARE = 0.58  # of --minutes


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks person-retrieval", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--epochs", type=int, help="default: 5 on rendered pedestrians, 60 on a data set")
    parser.add_argument("--batch-size", type=int, default=64, help="of one process: two with 32 train as one with 64")
    parser.add_argument(
        "--gather",
        choices=tuple(GATHER),
        default="true",
        help="under torchrun: contrast with the pairs of all processes, with them round a ring, or only with the own",
    )
    parser.add_argument("--lr", type=float, help="default: 2e-4 on rendered pedestrians, 1e-5 on a data set")
    parser.add_argument("--sampler", choices=("random", "identity"), default="random")
    parser.add_argument("--workers", type=int, help="processes that read images (default: 0 rendered, 4 on a data set)")
    parser.add_argument("--float64", action="store_true", help="on a CPU: two processes then equal one beyond doubt")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out holds a run")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    rendered = parser.add_argument_group("rendered pedestrians (the default)")
    rendered.add_argument("--identities", type=int, default=800, help="in training")
    rendered.add_argument("--test-identities", type=int, default=150)
    rendered.add_argument(
        "--minutes",
        type=float,
        default=3.2,
        help="a machine too slow for --epochs gets fewer (default: %(default)s; 0: no limit)",
    )
    rendered.add_argument("--ablation", action="store_true", help="SDM, A-SDM, EFA and both, over several seeds")
    rendered.add_argument("--seeds", type=int, default=3, help="of the ablation")
    real = parser.add_argument_group("a data set")
    real.add_argument("--dataset", choices=tuple(LAYOUTS))
    real.add_argument("--root", type=Path, help="folder that holds the data set's folder")
    real.add_argument(
        "--weights", type=Path, help="folder of a saved CLIPModel; without it weights are random: a dry run"
    )
    real.add_argument("--tiny", action="store_true", help="without --weights: a tiny CLIP instead of ViT-B/16")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "-m", "benchmarks", "person-retrieval", *argv])
    if args.dataset and not args.root:
        parser.error("--dataset needs --root, the folder that holds the data set's folder")
    if args.ablation and (args.dataset or args.resume):
        parser.error("--ablation trains rendered pedestrians from the beginning: no --dataset, no --resume")
    if not args.dataset and (args.root or args.weights or args.tiny):
        parser.error("--root, --weights and --tiny belong to --dataset")
    return args


@dataclass(frozen=True)
class Task:
    """What a run trains on, and how: the rendered pedestrians or a data set."""

    train: Pairs
    test: Pairs
    tokenizer: Any
    beginning: Recipe | None  # of contrastive training first, where the weights are fresh
    recipe: Recipe
    model: Callable[[], nn.Module]
    objective: Callable[..., FMFALoss]  # of the keyword arguments of a variant


def rendered_task(args: argparse.Namespace, progress: Callable[..., Any]) -> Task:
    train, test = rendered_splits(args.identities, args.test_identities, seed=0, progress=progress)
    tokenizer = WordTokenizer(train.captions, context_length=40)
    recipe = Recipe(
        epochs=args.epochs or 5,
        batch_size=args.batch_size,
        gather=GATHER[args.gather],
        lr=args.lr or 2e-4,
        eps=1e-8,
        warmup_epochs=0.5,
        lr_per="step",
        clip_norm=1.0,
        sampler=args.sampler,
        workers=args.workers or 0,
        precision="float64" if args.float64 else "auto",
        seed=args.seed,
    )
    beginning = replace(recipe, epochs=recipe.epochs * 12 // 5, lr=2e-3, warmup_epochs=1.0, sampler="random")
    model = partial(TwoStream, tokenizer.vocab_size, context_length=tokenizer.context_length, image_size=RENDERED_SIZE)

    def objective(**variant: Any) -> FMFALoss:
        irr = {"depth": 1, "num_heads": 3}
        return FMFALoss(96, train.num_identities, vocab_size=tokenizer.vocab_size, irr=irr, **variant)

    pairs = partial(Pairs, size=RENDERED_SIZE, seed=args.seed, keep=True)
    return Task(*_both(pairs, train, test, tokenizer), tokenizer, beginning, recipe, model, objective)


def dataset_task(args: argparse.Namespace) -> Task:
    from .models.clip import load_clip  # transformers, which the rendered pedestrians do without

    train, test = (read_dataset(args.dataset, args.root, split) for split in ("train", "test"))
    clip, tokenizer = load_clip(args.weights, train.captions, image_size=PAPER_SIZE, tiny=args.tiny)
    recipe = Recipe(
        epochs=args.epochs or 60,
        batch_size=args.batch_size,
        gather=GATHER[args.gather],
        lr=args.lr or 1e-5,
        sampler=args.sampler,
        workers=4 if args.workers is None else args.workers,
        precision="float64" if args.float64 else "auto",
        seed=args.seed,
    )

    def objective(**variant: Any) -> FMFALoss:
        return FMFALoss.for_dataset(
            args.dataset, clip.embed_dim, train.num_identities, vocab_size=tokenizer.vocab_size, **variant
        )

    pairs = partial(Pairs, size=PAPER_SIZE, seed=args.seed)
    return Task(*_both(pairs, train, test, tokenizer), tokenizer, None, recipe, lambda: clip, objective)


def _both(pairs: Callable[..., Pairs], train: Split, test: Split, tokenizer: Any) -> tuple[Pairs, Pairs]:
    return pairs(train, tokenizer(train.captions)), pairs(test, tokenizer(test.captions), augment=False)


def begin(args: argparse.Namespace, task: Task, world: World, *, folder: RunFolder | None) -> nn.Module:
    """The model to train: CLIP with its weights, or a fresh model after its contrastive beginning."""
    torch.manual_seed(task.recipe.seed)
    model = task.model()
    if task.beginning and not (folder and folder.resuming and folder.checkpoint.is_file()):
        contrastive = Contrastive(model, gather=world.gather(task.beginning))
        log = Log(quiet=args.quiet, leads=world.leads)
        trainer = Trainer(contrastive, task.train, task.beginning, log=log, **common(task, world))
        limit(args, trainer, BEGINNING_SHARE)
        trainer.fit()
    return model


def limit(args: argparse.Namespace, trainer: Trainer, share: float) -> None:
    """Chooses fewer epochs where not all fit into a share of --minutes; runs to be compared have no limit."""
    if args.dataset or args.ablation or args.resume or not args.minutes:
        return
    pace, minutes = measure_pace(trainer), args.minutes * share
    epochs = affordable_epochs(pace, trainer.steps_per_epoch, minutes, trainer.epochs)
    trainer.log.say(f"{pace:.2g} s a step: {epochs} of {trainer.epochs} epochs fit into {minutes:.1f} minutes")
    trainer.epochs = epochs
    if trainer.folder:
        trainer.folder.choose_epochs(epochs)


def run(
    args: argparse.Namespace,
    task: Task,
    world: World,
    model: nn.Module,
    *,
    variant: dict[str, Any],
    folder: RunFolder | None,
) -> dict[str, Any]:
    """Trains `model` with one variant of the objectives and evaluates it; writes into `folder`, if there is one."""
    start = time.perf_counter()
    torch.manual_seed(task.recipe.seed)
    trainee = Trainee(model, task.objective(gather=world.gather(task.recipe), **variant))
    log = Log(folder.path if folder else None, quiet=args.quiet, leads=world.leads)
    trainer = Trainer(trainee, task.train, task.recipe, folder=folder, log=log, **common(task, world))
    before = None
    trainer.resume()
    limit(args, trainer, 1 - BEGINNING_SHARE)
    if not trainer.epoch and task.beginning and world.leads:
        before = as_dict(evaluate(*encode(model, task.test, world.device), task.test))
    trainer.fit()
    trained = time.perf_counter() - start
    if not world.leads:
        return {}
    texts, images = encode(trainee.model, task.test, world.device)
    metrics = evaluate(texts, images, task.test)
    last = -trainer.steps_per_epoch
    result = {
        **as_dict(metrics),
        "before": before,  # after the contrastive beginning alone
        "chance_R1": chance(task.test),
        "last_epoch": {name: statistics.fmean(values[last:]) for name, values in trainer.history.items()},
        "epochs": trainer.epoch,
        "steps": len(trainer.history["loss"]),
        "seconds": {"training": round(trained, 1)},
        "data": {
            name: {"identities": s.num_identities, "images": len(s.image_pids), "captions": len(s.captions)}
            for name, s in (("train", task.train.split), ("test", task.test.split))
        },
        "beginning": asdict(task.beginning) if task.beginning else None,
        "recipe": asdict(task.recipe),
        "objective": {**variant, "terms": [name for name, weight in trainee.objective.weights.items() if weight]},
        "parameters": sum(p.numel() for p in trainee.model.parameters()),
        "processes": world.size,
        "device": str(world.device),
    }
    if folder:
        files = draw(
            folder.path, trainee.model, task.test, task.tokenizer, (texts, images), trainer.history, world.device
        )
        result["files"] = {name: file.name for name, file in files.items()}
        told = f", before these objectives {before['t2i']['R1']:.2f}" if before else ""
        print(f"\n{metrics}\n     t2i R1 of chance {result['chance_R1']:.2f}{told}\n")
    return result


def common(task: Task, world: World) -> dict[str, Any]:
    """What every Trainer of this run is given."""
    tokens = {"mask_id": task.tokenizer.mask_id, "special_ids": task.tokenizer.special_ids}
    return {"tokens": tokens, "world": world}


def ablation(args: argparse.Namespace, task: Task, world: World) -> None:
    """Table 6: every variant with every seed; mean and standard deviation, whatever comes out."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for seed in range(args.seed, args.seed + args.seeds):
        seeded = _with_seed(task, seed)
        begun = begin(args, seeded, world, folder=None)  # where every variant starts from
        for name, variant in VARIANTS.items():
            result = run(args, seeded, world, deepcopy(begun), variant=variant, folder=None)
            if world.leads:
                runs[name].append(result)
                print(
                    f"seed {seed}  {name:<20} R1 {result['t2i']['R1']:.2f}  mAP {result['t2i']['mAP']:.2f}", flush=True
                )
    if not world.leads:
        return
    table = {name: mean_and_spread([result["t2i"] for result in found]) for name, found in runs.items()}
    lines = [
        f"Text to image, {task.test.split}; mean ± standard deviation over {args.seeds} seeds, percent.\n",
        f"| objectives beside ID and IRR | {' | '.join(table['SDM'])} |",
        f"|---|{'---:|' * len(table['SDM'])}",
    ]
    for name, row in table.items():
        cells = " | ".join("{mean:.2f} ± {std:.2f}".format(**cell) for cell in row.values())
        lines.append(f"| {name} | {cells} |")
    head = results.head("ablation", args.command)
    rows = [{"variant": name, **row} for name, row in table.items()]
    seeds = range(args.seed, args.seed + args.seeds)
    records = [
        {"variant": name, "seed": seed, **result}
        for name, found in runs.items()
        for seed, result in zip(seeds, found, strict=True)
    ]
    results.write(args.out / "ablation.json", head | {"table": rows, "records": records})
    (args.out / "ablation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n" + "\n".join(lines) + f"\n\nWritten: {args.out / 'ablation.json'}, {args.out / 'ablation.md'}")


def mean_and_spread(metrics: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of every metric, over the seeds."""
    columns = {name: [one[name] for one in metrics] for name in metrics[0]}
    return {
        name: {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}
        for name, values in columns.items()
    }


def _with_seed(task: Task, seed: int) -> Task:
    task.train.seed = seed
    beginning = replace(task.beginning, seed=seed) if task.beginning else None
    return replace(task, beginning=beginning, recipe=replace(task.recipe, seed=seed))


def main(argv: list[str] | None = None) -> None:
    start = time.perf_counter()
    args = arguments(argv)
    try:
        world = World.join(args.device)
        if args.dataset:
            task = dataset_task(args)
        else:
            task = rendered_task(
                args, partial(tqdm, desc="rendering", unit="photo", disable=args.quiet or not world.leads)
            )
    except (FileNotFoundError, ValueError, RunError) as error:
        sys.exit(f"error: {error}")
    if world.leads:
        print(f"train: {task.train.split}\ntest:  {task.test.split}", flush=True)
        if args.dataset and not args.weights:
            print("no --weights: random weights, a dry run that shows only that everything runs", flush=True)
    if args.ablation:
        ablation(args, task, world)
    else:
        asked = {name: value for name, value in vars(args).items() if name in IDENTITY}
        settings = settings_of(task.recipe, world, **asked)
        try:
            told = {"resume": args.resume, "overwrite": args.overwrite, "command": args.command}
            with RunFolder(args.out, settings, leads=world.leads, **told) as folder:
                model = begin(args, task, world, folder=folder)
                result = run(args, task, world, model, variant={}, folder=folder)
        except RunError as error:
            sys.exit(f"error: {error}")
        if world.leads:
            result["seconds"]["total"] = round(time.perf_counter() - start, 1)
            results.write(args.out / "metrics.json", results.head("training", args.command) | result)
            print(f"{result['seconds']['total']:.0f} s. Written to {args.out}/:")
            for name in ("metrics.json", *result["files"].values(), "checkpoint.pt"):
                print(f"  {args.out / name}")
    world.leave()


if __name__ == "__main__":
    main()
