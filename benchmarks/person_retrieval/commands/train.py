"""`train`: the objectives of FMFA on a data set, from pretrained weights to the test of the epoch that was kept."""

import argparse
import time

from ..options import add_data, add_objective, add_recipe, add_run, check_applies, command_of, parser_of
from ..runs import run
from ..task import make_task
from ..training import World

__all__ = ["main"]

MINUTES = 3.2  # of the embedded demo on a slow machine


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = parser_of("train", __doc__)
    add_data(parser)
    add_recipe(parser)
    add_objective(parser)
    add_run(parser, "runs/demo")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"rendered: a machine too slow for all epochs trains fewer ({MINUTES}, with --epochs 0: no limit)",
    )
    args = parser.parse_args(argv)
    check_applies(args)
    args.command = command_of("train", argv)
    return args


def main(argv: list[str]) -> int:
    start = time.perf_counter()
    args = arguments(argv)
    world = World.join(args.device)
    task = make_task(args, world)
    minutes = args.minutes
    if minutes is None:
        minutes = MINUTES if args.dataset == "rendered" and args.epochs is None else 0
    seconds = 60 * minutes - (time.perf_counter() - start) if minutes else None
    result = run(task, args.out, args, world, pictures=True, seconds=seconds, whole=not minutes)
    if world.leads:
        report(args, result)
    world.leave()
    return 0


def report(args: argparse.Namespace, result: dict) -> None:
    which = {"val": "the best on the validation split", "test": "the best on the TEST split", "last": "the last"}
    print(f"\nTest split, before training -> after epoch {result['epoch']}, {which[result['selected']]}; in percent:")
    for name in ("t2i", "i2t"):
        before, after = result["before"][name], result[name]
        told = "  ".join(f"{metric} {before[metric]:.2f} -> {value:.2f}" for metric, value in after.items())
        print(f"{name}  {told}")
    print(f"{result['seconds']:.0f} s of training and tests. Written to {args.out}/:")
    names = ("metrics.json", "run.json", "log.txt", "checkpoint.pt", "best.pt", *result["files"])
    print("  " + ", ".join(name for name in names if (args.out / name).exists()))
