"""`sweep`: one hyperparameter at a time, everything else as in the paper: Figure 4, Tables 7 and 8; and where training
starts from, which says when A-SDM helps.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..models.pretrained import load_two_stream
from ..options import add_data, add_objective, add_recipe, add_run, check_applies, command_of, parser_of
from ..paper import FIGURE_4, table_7, table_8
from ..runs import Variant
from ..study import add_seeds, columns, differences, heading, markdown, over, paired_runs, seeds_of, slug, told, write
from ..study_plots import draw_starts, draw_sweep
from ..task import RENDERED_SIZE, Task, make_task, selection
from ..training import World

__all__ = ["STARTS", "SWEEPS", "main", "start_table", "without_constant"]

Objective = dict[str, Any]
# w_i = c + alpha gap_i with c so small that it is absent: A-SDM with alpha / c, and c as its weight in the sum.
ABSENT = 1e-6


def without_constant(alpha: float) -> Objective:
    return {"weights": {"asdm": ABSENT}, "asdm": {"alpha": alpha / ABSENT}}


def _weight(term: str) -> Callable[[float, int], Objective]:
    return lambda value, patches: {"weights": {term: value}}


# name -> (values of the paper, what a value is, keyword arguments of FMFALoss from value and number of patches)
SWEEPS: dict[str, tuple[tuple[float, ...], str, Callable[[float, int], Objective]]] = {
    "alpha": ((0, *FIGURE_4["alpha"]), "alpha", lambda value, patches: {"asdm": {"alpha": value}}),
    "sigma": (
        FIGURE_4["sigma"], "sigma N",
        lambda value, patches: {"efa": {"sparsity": value / patches}},
    ),
    "lambda": (FIGURE_4["lambda"], "lambda", lambda value, patches: {"efa": {"pool_scale": value}}),
    "weight-asdm": ((0.1, 0.5, 1, 5, 10), "weight of A-SDM", _weight("asdm")),
    "weight-efa": ((0, 0.1, 0.5, 1, 5, 10), "weight of EFA", _weight("efa")),
}  # fmt: skip
# What a sweep sets in every run: options, and a term's weight.
REPLACED: dict[str, tuple[tuple[str, ...], str]] = {
    "alpha": (("alpha",), ""), "sigma": (("sigma",), ""), "lambda": (("pool_scale",), ""),
    "weight-asdm": ((), "asdm"), "weight-efa": ((), "efa"), "constant": ((), "asdm"),
    "start": (("alpha", "sigma", "pool_scale", "margins"), "efa"),
}  # fmt: skip
STARTS = (
    Variant("SDM", {"weights": {"efa": 0.0}, "asdm": {"alpha": 0.0}}),
    Variant("A-SDM, alpha 1", {"weights": {"efa": 0.0}, "asdm": {"alpha": 1.0}}),
    Variant("A-SDM, alpha 10", {"weights": {"efa": 0.0}, "asdm": {"alpha": 10.0}}),
)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = parser_of("sweep", __doc__, usage="--over WHAT [options]")
    add_data(parser)
    add_recipe(parser)
    add_objective(parser)
    add_run(parser, "runs/sweep")
    add_seeds(parser)
    parser.add_argument("--over", choices=(*SWEEPS, "constant", "start"), required=True, help="what is changed")
    parser.add_argument("--values", type=float, nargs="+", help="of it, instead of the paper's")
    parser.add_argument("--starts", nargs="+", help="of --over start: weights to begin from, the weakest first")
    args = parser.parse_args(argv)
    check_applies(args)
    if args.values and args.over not in SWEEPS:
        raise RunError(f"--values must be left out: --over {args.over} has none")
    if bool(args.starts) != (args.over == "start"):
        raise RunError("--starts and --over start must be given together; --starts names the weights to begin from")
    if args.starts and args.weights:
        raise RunError("--weights must be left out: --starts names the weights to begin from")
    if len({slug(start) for start in args.starts or ()}) < len(args.starts or ()):
        raise RunError(f"--starts must name each weights once, in words that differ, got {' '.join(args.starts)}")
    check_not_swept(args)
    args.command = command_of("sweep", argv)
    return args


def check_not_swept(args: argparse.Namespace) -> None:
    """Raises where a hyperparameter is given that every run of this sweep replaces."""
    options, term = REPLACED[args.over]
    wrong = [f"--{name.replace('_', '-')}" for name in options if getattr(args, name) is not None]
    wrong += [f"--loss-weights {one}" for one in args.loss_weights or () if one.partition("=")[0] == term]
    if wrong:
        raise RunError(f"{', '.join(wrong)} must be left out: --over {args.over} sets it in every run")


def main(argv: list[str]) -> int:
    args = arguments(argv)
    world = World.join(args.device)
    (starts if args.over == "start" else values)(args, world)
    world.leave()
    return 0


def values(args: argparse.Namespace, world: World) -> None:
    """Everything but one number as the paper has it."""
    task = make_task(args, world)
    seeds = seeds_of(args, task)
    variants, what = variants_of(args, task)
    records = paired_runs(task, variants, seeds, args, world, prefix=f"{args.over} ", what=what)
    if not world.leads:
        return
    names = [variant.name for variant in variants]
    lines = heading(task, seeds, records, args) + markdown(records, names, None, first=what)
    lines += {"weight-asdm": table_7, "weight-efa": table_7, "constant": table_8}.get(args.over, list)()
    if args.over == "constant":
        lines += ["", f"In the logs of `alpha gap` the term asdm stands before its weight of {ABSENT:g}."]
    draw_sweep(args.out / f"sweep_{args.over}.png", records, names, what, task.dataset)
    write(args.out, f"sweep_{args.over}", args.command, lines, {"over": args.over, "records": records})


def variants_of(args: argparse.Namespace, task: Task) -> tuple[list[Variant], str]:
    if args.over == "constant":
        alpha = task.objective().asdm.alpha
        if not alpha:
            raise RunError("--alpha must be positive for --over constant: without the constant nothing would be left")
        return [Variant("1 + alpha gap"), Variant("alpha gap", without_constant(alpha))], "weight of a query"
    grid, what, objective = SWEEPS[args.over]
    rows, columns = task.build(task.recipe.seed).grid
    return [Variant(f"{value:g}", objective(value, rows * columns)) for value in args.values or grid], what


def check_start(args: argparse.Namespace, start: str) -> None:
    """Raises before the first run where there are no such weights."""
    if args.dataset == "rendered":
        load_two_stream(start, image_size=RENDERED_SIZE)
    elif not Path(start).exists():
        raise RunError(f"--starts must name weights, there are none at {start}")


def starts(args: argparse.Namespace, world: World) -> None:
    """The same objectives from weights that are aligned more and more."""
    records = []
    for start in args.starts:
        check_start(args, start)
    for start in args.starts:
        args.weights = start
        task = make_task(args, world)
        variants = [Variant(f"{variant.name} from {start}", variant.objective) for variant in STARTS]
        seeds = seeds_of(args, task)
        records += paired_runs(task, variants, seeds, args, world)
    if not world.leads:
        return
    lines = [
        f"Text-to-image R1 on {task.dataset} test, {task.test.split}, in percent; {over(seeds)}; "
        f"differences to SDM seed by seed. Of every run {selection(args, task)[1]}.",
        "",
        *start_table(records, args.starts),
    ]
    draw_starts(args.out / "sweep_start.png", records, args.starts, [variant.name for variant in STARTS])
    content = {"over": "start", "starts": args.starts, "records": records}
    write(args.out, "sweep_start", args.command, lines, content)


def start_table(records: list[dict[str, Any]], starts: list[str]) -> list[str]:
    """A line for each of the weights: Rank-1 before training, after it, and what A-SDM adds to SDM."""
    lines = [
        f"| weights | R1 before | {' | '.join(variant.name for variant in STARTS)} | A-SDM 1 - SDM | A-SDM 10 - SDM |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for start in starts:
        names = [f"{variant.name} from {start}" for variant in STARTS]
        before = next(r["before"]["t2i"]["R1"] for r in records if r["variant"] == names[0])
        cells = [told(columns(records, name)["R1"]) for name in names]
        cells += [differences(records, name, names[0])["told"] for name in names[1:]]
        lines.append(f"| {start} | {before:.2f} | {' | '.join(cells)} |")
    return lines
