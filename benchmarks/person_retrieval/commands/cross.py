"""`cross`: train on one data set, test on the others: how far what was learnt carries.

The run in --out is trained, or gone on with, as `train` does; one that is finished is only tested.
"""

import argparse
from pathlib import Path
from typing import Any

from ... import results
from ...tables import markdown
from ..data import LAYOUTS, Pairs, catalogue_split, check_images, read_dataset
from ..errors import RunError
from ..kept import kept_weights, record_of
from ..options import add_data, add_objective, add_recipe, add_run, check_applies, command_of, parser_of
from ..outputs import writing
from ..runs import FMFA, finished, run, tested
from ..task import Task, make_task, progress_bar
from ..training import World

__all__ = ["main"]

CATALOGUE = "rendered catalogue"  # pictures in general, as those of the pretraining, of other people
PICTURES, SEED = 1500, 11


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = parser_of("cross", __doc__)
    add_data(parser)
    add_recipe(parser)
    add_objective(parser)
    add_run(parser, "runs/cross")
    parser.add_argument(
        "--on", nargs="+", choices=tuple(LAYOUTS), help="test on these (default: all others that lie in --root)"
    )
    args = parser.parse_args(argv)
    check_applies(args)
    if args.dataset == "rendered" and args.on:
        raise RunError(f"--on must be left out: rendered pedestrians are tested on {CATALOGUE}")
    if args.dataset in (args.on or ()):
        raise RunError(f"--on must name other data sets than --dataset, got {args.dataset} in both")
    args.command = command_of("cross", argv)
    return args


def main(argv: list[str]) -> int:
    args = arguments(argv)
    world = World.join(args.device)
    task = make_task(args, world)
    others = others_of(args, task, world)  # read and checked before the first step
    result = finished(args.out, task, FMFA, args, world) if args.resume else None
    if result is None:
        result = run(task, args.out, args, world)
    if world.leads:
        report(args, task, others, result, world)
    world.leave()
    return 0


def others_of(args: argparse.Namespace, task: Task, world: World) -> dict[str, Pairs]:
    """Test pairs of the other data sets, in the tokens and the size of this one."""
    progress = progress_bar(args, world)
    if args.dataset == "rendered":
        splits = {CATALOGUE: catalogue_split(PICTURES, size=task.test.size, seed=SEED, progress=progress)}
    else:
        names = args.on or [name for name in LAYOUTS if name != args.dataset and lies_in(args.root, name)]
        if not names:
            raise RunError(f"--root must hold another data set to test on, got {args.root} with {args.dataset} alone")
        splits = {name: read_dataset(name, args.root, "test") for name in names}
        splits = {name: check_images(split, progress=progress) for name, split in splits.items()}
    return {name: Pairs(split, task.tokenizer(split.captions), size=task.test.size) for name, split in splits.items()}


def lies_in(root: Path, name: str) -> bool:
    return (root / name / LAYOUTS[name][0]).is_file()


def report(
    args: argparse.Namespace, task: Task, others: dict[str, Pairs], result: dict[str, Any], world: World
) -> None:
    """A line a data set: before training on this one, and after."""
    before, after = task.build(task.recipe.seed), task.build(task.recipe.seed)
    after.load_state_dict(kept_weights(args.out, record_of(args.out)).weights)
    rows = [{"test": task.dataset, "before": result["before"], "after": {k: result[k] for k in ("t2i", "i2t")}}]
    for name, pairs in others.items():
        rows.append({"test": name, "before": tested(before, pairs, world), "after": tested(after, pairs, world)})
    metrics = list(rows[0]["after"]["t2i"])
    header = [f"trained on {task.dataset}, tested on", *metrics]
    cells = [
        [row["test"], *(f"{row['before']['t2i'][m]:.2f} → {row['after']['t2i'][m]:.2f}" for m in metrics)]
        for row in rows
    ]
    table = markdown(header, cells)
    with writing(args.out / "cross.json"):
        results.write(args.out / "cross.json", results.head("cross", args.command) | {"records": rows})
        results.replace(args.out / "cross.md", table + "\n")
    print(f"\nText to image, percent, before training → after.\n\n{table}\n\nWritten: {args.out / 'cross.json'}, .md")
