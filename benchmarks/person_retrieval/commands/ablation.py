"""`ablation`: Table 6 of the paper, with paired seeds; mean and spread, whatever comes out."""

import argparse

from ..options import add_data, add_objective, add_recipe, add_run, check_applies, command_of, parser_of
from ..paper import table_6
from ..runs import Variant
from ..study import add_seeds, heading, markdown, paired_runs, seeds_of, write
from ..study_plots import draw_variants
from ..task import make_task
from ..training import World

__all__ = ["BASE", "FIRST", "VARIANTS", "main"]

WITHOUT_EFA = {"weights": {"efa": 0.0}}
# ID and IRR beside all but the first; A-SDM takes the place of SDM, EFA comes in addition.
VARIANTS = (
    Variant("InfoNCE", contrastive=True),
    Variant("SDM", {**WITHOUT_EFA, "asdm": {"alpha": 0.0}}),
    Variant("A-SDM", WITHOUT_EFA),
    Variant("SDM + EFA", {"asdm": {"alpha": 0.0}}),
    Variant("A-SDM + EFA (FMFA)"),
)
BASE = "SDM"
FIRST = "objectives (ID and IRR beside all but InfoNCE)"


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = parser_of("ablation", __doc__)
    add_data(parser)
    add_recipe(parser)
    add_objective(parser)
    add_run(parser, "runs/ablation")
    add_seeds(parser)
    args = parser.parse_args(argv)
    check_applies(args)
    args.command = command_of("ablation", argv)
    return args


def main(argv: list[str]) -> int:
    args = arguments(argv)
    world = World.join(args.device)
    task = make_task(args, world)
    seeds = seeds_of(args, task)
    records = paired_runs(task, VARIANTS, seeds, args, world)
    if world.leads:
        names = [variant.name for variant in VARIANTS]
        lines = [
            *heading(task, seeds, records, args),
            *markdown(records, names, BASE, first=FIRST),
            *table_6(task.dataset),
        ]
        draw_variants(
            args.out / "ablation.png", records, names, f"{task.dataset}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
        )
        write(args.out, "ablation", args.command, lines, {"records": records})
    world.leave()
    return 0
