"""Several variants with several seeds, paired.

Every variant of a seed starts from the same weights, with the same order, masks and augmentation, so that differences
between variants are seen beside their spread.
"""

import argparse
import re
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .. import results
from .errors import RunError
from .outputs import writing
from .runs import Variant, finished, run
from .task import Task, check_objective, reseeded, selection
from .training import World

__all__ = [
    "add_seeds",
    "columns",
    "differences",
    "heading",
    "markdown",
    "mean_and_spread",
    "over",
    "paired_runs",
    "seeds_of",
    "slug",
    "told",
]

METRICS = ("R1", "R5", "R10", "mAP", "mINP")
Record = dict[str, Any]


def add_seeds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=5, help="how many, from --seed on (default: %(default)s)")


def seeds_of(args: argparse.Namespace, task: Task) -> list[int]:
    if args.seeds < 1:
        raise RunError(f"--seeds must be 1 or more, got {args.seeds}; give how many runs each variant gets")
    seeds = list(range(task.recipe.seed, task.recipe.seed + args.seeds))
    reseeded(task, seeds[-1])  # an error now instead of after the other runs
    return seeds


def paired_runs(
    task: Task,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    args: argparse.Namespace,
    world: World,
    *,
    prefix: str = "",
    what: str = "",
) -> list[Record]:
    """One record a run, seed by seed. Runs that are finished are read, one that was cut off goes on: with --resume.

    Args:
        prefix: of the runs' folders, which two studies in one --out must not share.
        what: of what the names of the variants are values, for the log.

    Raises:
        RunError: before the first run, where a variant's hyperparameters make no sense or two would share a folder.
    """
    for variant in variants:
        if not variant.contrastive:
            check_objective(partial(task.objective, **variant.objective))
    if len({slug(variant.name) for variant in variants}) < len(variants):
        raise RunError(f"what is compared must differ, got {', '.join(variant.name for variant in variants)}")
    records: list[Record] = []
    number, count = 0, len(seeds) * len(variants)
    for seed in seeds:
        for variant in variants:
            number += 1
            named = f"{what} {variant.name}".strip() + f", seed {seed}"
            folder = args.out / "runs" / f"{slug(prefix + variant.name)}_seed{seed}"
            result = finished(folder, reseeded(task, seed), variant, args, world) if args.resume else None
            if result is None:
                if world.leads:
                    print(f"\nRun {number} of {count}: {named}", flush=True)
                result = run(reseeded(task, seed), folder, each(args, folder), world, variant=variant)
            drop_weights(folder, world)
            if world.leads:
                records.append(
                    {**result, "variant": variant.name, "seed": seed, "objective_of_variant": variant.objective}
                )
                one = result["t2i"]
                print(f"{named}: test R1 {one['R1']:.2f}  mAP {one['mAP']:.2f}", flush=True)
    return records


def each(args: argparse.Namespace, folder: Path) -> argparse.Namespace:
    """The options of one run of a study: one that has not begun is not resumed."""
    return argparse.Namespace(**vars(args) | {"resume": args.resume and (folder / "run.json").exists()})


def drop_weights(folder: Path, world: World) -> None:
    """A study keeps figures: 25 runs of CLIP would leave 50 GB behind."""
    for name in ("checkpoint.pt", "best.pt"):
        if world.leads:
            (folder / name).unlink(missing_ok=True)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "_", name.lower()).strip("_")


def columns(records: Sequence[Record], variant: str) -> dict[str, list[float]]:
    """Of every metric, text to image, the values of a variant by seed."""
    found = sorted((record for record in records if record["variant"] == variant), key=lambda record: record["seed"])
    return {metric: [record["t2i"][metric] for record in found] for metric in METRICS}


def mean_and_spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation, of the sample."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def told(values: Sequence[float], sign: str = "") -> str:
    """Mean and spread for a table; one value has no spread."""
    found = mean_and_spread(values)
    return f"{found['mean']:{sign}.2f}" + (f" ± {found['std']:.2f}" if len(values) > 1 else "")


def over(seeds: Sequence[int]) -> str:
    """What `told` tells of these seeds."""
    return f"mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "one seed, of unknown spread"


def differences(records: Sequence[Record], variant: str, base: str, metric: str = "R1") -> dict[str, Any]:
    """Seed by seed, variant less base: mean, standard deviation, and in how many seeds it is above."""
    ours, theirs = (columns(records, name)[metric] for name in (variant, base))
    values = [a - b for a, b in zip(ours, theirs, strict=True)]
    above = sum(value > 0 for value in values)
    text = f"{told(values, '+')}, above in {above} of {len(values)}"
    return {**mean_and_spread(values), "above": above, "seeds": len(values), "told": text}


def markdown(records: Sequence[Record], names: Sequence[str], base: str | None, *, first: str) -> list[str]:
    """A table, a variant a line: mean and standard deviation of every metric, and R1 less that of `base`, paired."""
    against = f" | R1 less {base}, seed by seed" if base else ""
    lines = [f"| {first} | {' | '.join(METRICS)}{against} |", f"|---|{'---:|' * len(METRICS)}{'---:|' if base else ''}"]
    for name in names:
        cells = [told(values) for values in columns(records, name).values()]
        if base:
            cells.append("" if name == base else differences(records, name, base)["told"])
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def heading(task: Task, seeds: Sequence[int], records: Sequence[Record], args: argparse.Namespace) -> list[str]:
    """What stands above a study's table."""
    return [
        f"Text to image on {task.dataset} test, {task.test.split}, in percent; {over(seeds)}. "
        f"Before training R1 is {records[0]['before']['t2i']['R1']:.2f}. "
        f"Of every run {selection(args, task)[1]}.",
        "",
    ]


def write(out: Path, name: str, command: str, lines: list[str], content: dict[str, Any]) -> None:
    """NAME.json and NAME.md; the table on the terminal."""
    text = "\n".join(lines) + "\n"
    with writing(out / f"{name}.json"):
        results.write(out / f"{name}.json", results.head(name, command) | content)
        results.replace(out / f"{name}.md", text)
    print(f"\n{text}\nWritten: {out / name}.json, .md, .png")
