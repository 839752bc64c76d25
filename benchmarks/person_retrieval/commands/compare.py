"""`compare`: Figures 6 to 8, what two runs find for the same captions of the same test split.

Captions are never picked by hand. `--choose even` takes them at even distances among all captions; `differ` among those
for which one run ranks the right person first and the other does not, in turn in favour of A and of B, whatever the
two have in number: the figure shows what kind of captions they are, the printed counts say how many.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import RunError
from ..evaluation import Found, encode, find
from ..options import parser_of
from ..outputs import claim
from ..pictures import draw_comparison
from ..subject import Subject, add_reading, of_run, reading
from ..training import World

__all__ = ["choose", "exact_mcnemar", "main"]


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = parser_of("compare", __doc__, usage="RUN RUN [options]")
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN", help="folders of two runs of one data set")
    parser.add_argument("--names", nargs=2, metavar=("A", "B"), help="of the runs, in the figure: their folders'")
    parser.add_argument("--queries", type=int, default=8, help="captions that are drawn (default: %(default)s)")
    parser.add_argument("--top", type=int, default=10, help="images a caption (default: %(default)s)")
    parser.add_argument("--choose", choices=("even", "differ"), default="even", help="default: %(default)s")
    parser.add_argument("--split", choices=("val", "test"), default="test", help="default: %(default)s")
    parser.add_argument("--root", type=Path, help="folder of the data set's folder, if it was moved")
    parser.add_argument("--out", type=Path, default=Path("runs/compare.png"), help="picture (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the picture at --out")
    add_reading(parser)
    args = parser.parse_args(argv)
    for name in ("queries", "top"):
        if getattr(args, name) < 1:
            raise RunError(f"--{name} must be 1 or more, got {getattr(args, name)}")
    if args.out.suffix != ".png":
        raise RunError(f"--out must be a file that ends in .png, got {args.out}")
    args.names = args.names or [_name(run) for run in args.runs]
    if args.names[0] == args.names[1]:
        raise RunError(f"--names must be two, both folders are called {args.names[0]}; give --names A B")
    return args


def main(argv: list[str]) -> int:
    args = arguments(argv)
    claim(args.out, overwrite=args.overwrite)
    world = World.join(args.device)
    device = world.device
    a, b = (of_run(run, world, args.split, root=args.root, quiet=args.quiet) for run in args.runs)
    check_same_data(a, b)
    found = [_found(subject, device, args) for subject in (a, b)]
    first_a, first_b = (one.ranks == 1 for one in found)
    print(f"{a.dataset} {args.split}: {a.pairs.split}\nA: {a.title}\nB: {b.title}\n")
    print(counts(first_a, first_b))
    chosen = choose(first_a, first_b, args.queries, differ=args.choose == "differ")
    if not chosen:
        raise RunError("--choose differ needs captions that differ, A and B find the same; pass --choose even")
    how = {
        "even": "at even distances among all",
        "differ": "in turn found by A alone and by B alone, at even distances",
    }
    title = f"A: {args.names[0]}    B: {args.names[1]}    {a.dataset} {args.split}, captions {how[args.choose]}"
    draw_comparison(args.out, a.pairs, chosen, dict(zip(("A", "B"), found, strict=True)), title)
    print(f"\nWritten: {args.out}")
    return 0


def check_same_data(a: Subject, b: Subject) -> None:
    """Raises unless both are tested on the same images and captions."""
    one, other = a.pairs.split, b.pairs.split
    same = a.dataset == b.dataset and one.captions == other.captions and torch.equal(one.image_pids, other.image_pids)
    if not same:
        told = [f"{subject.dataset}, {subject.pairs.split}" for subject in (a, b)]
        raise RunError(
            f"two runs must be tested on the same captions to be compared, got A: {told[0]}; B: {told[1]}; name runs "
            "of one data set and of as many identities"
        )


def counts(first_a: Tensor, first_b: Tensor) -> str:
    """How many captions find their person first with both, one or none, and whether that may be chance."""
    both, only_a, only_b = (int(x.sum()) for x in (first_a & first_b, first_a & ~first_b, first_b & ~first_a))
    total = len(first_a)
    lines = [
        f"{name:8} {count:7}  {100 * count / total:6.2f} %"
        for name, count in (("both", both), ("only A", only_a), ("only B", only_b),
                            ("neither", total - both - only_a - only_b))
    ]  # fmt: skip
    return "\n".join([
        "Captions that rank their person first:",
        *lines,
        f"McNemar's exact test: p = {exact_mcnemar(only_a, only_b):.3g}, as if captions were independent; those of one "
        "person are not, so the true p is larger. It says nothing about other seeds of the training.",
    ])  # fmt: skip


def exact_mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p value: with n = only_a + only_b fair coins, of a split at least as uneven as this one.

    p = min(1, 2 sum_{i <= min(only_a, only_b)} C(n, i) / 2^n)
    """
    n = only_a + only_b
    term = total = 1
    for i in range(min(only_a, only_b)):
        term = term * (n - i) // (i + 1)
        total += term
    return min(1.0, 2 * total / 2**n)


def choose(first_a: Tensor, first_b: Tensor, queries: int, *, differ: bool) -> list[int]:
    """Captions to draw. Where one side has too few that differ, the other has its place."""
    if not differ:
        return _spread(list(range(len(first_a))), queries)
    sides = [(mine & ~theirs).nonzero().flatten().tolist() for mine, theirs in ((first_a, first_b), (first_b, first_a))]
    wanted = [math.ceil(queries / 2), queries // 2]
    taken = [min(len(side), max(want, queries - len(other)))
             for side, want, other in zip(sides, wanted, sides[::-1], strict=True)]  # fmt: skip
    rows = [_spread(side, count) for side, count in zip(sides, taken, strict=True)]
    return [row[i] for i in range(max(taken)) for row in rows if i < len(row)]


def _spread(candidates: list[int], count: int) -> list[int]:
    """So many at even distances, from the first to the last."""
    places = np.linspace(0, len(candidates) - 1, min(count, len(candidates))).round().astype(int)
    return [candidates[place] for place in places]


def _found(subject: Subject, device: torch.device, args: argparse.Namespace) -> Found:
    texts, images = encode(subject.model.to(device), subject.pairs, device, **reading(args, subject.dataset))
    return find(texts, images, subject.pairs, top=args.top)


def _name(run: Path) -> str:
    return run.resolve().name
