"""The options of the commands: what they share, which values they take, and which of them apply.

Options have no default here: `None` is "not given", so that 0 is a value like any other, a data set can have its own
defaults, and an option that does not apply is an error instead of nothing.
"""

import argparse
import math
import os
import shlex
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from .data import LAYOUTS
from .errors import RunError
from .training import Recipe

__all__ = [
    "GATHER", "add_data", "add_objective", "add_recipe", "add_run", "check_applies", "check_recipe_applies",
    "command_of", "invoke", "objective_of", "parser_of", "positive", "recipe_of",
]  # fmt: skip

GATHER: dict[str, bool | str] = {"true": True, "ring": "ring", "no": False}

# Of rendered pedestrians and of a model of 0.5 million parameters; what is not named is the paper's.
RENDERED = Recipe(
    epochs=4, lr=3e-4, lr_factor=3.0, bias_lr_factor=1.0, eps=1e-8, warmup_epochs=0.5, lr_per="step", clip_norm=1.0
)
EPOCHS = {"ICFG-PEDES": 100}  # the others: 60


def _whole(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, got {text}")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text}")
    return value


RECIPE_OPTIONS: dict[str, dict[str, Any]] = {
    "epochs": {"type": int, "help": "60, ICFG-PEDES 100, rendered 4"},
    "batch_size": {"type": int, "help": "64; of one process: two with 32 train as one with 64"},
    "gather": {
        "choices": tuple(GATHER),
        "help": "under torchrun: contrast with the pairs of all processes, with them round a ring, or with the own",
    },
    "optimizer": {"choices": ("adam", "adamw", "sgd")},
    "lr": {"type": float, "help": "of the towers: 1e-5, rendered 3e-4"},
    "lr_factor": {"type": float, "help": "times --lr for cross-modal parts, classifier and mlm head: 5, rendered 3"},
    "bias_lr_factor": {"type": float, "help": "times --lr for biases: 2, rendered 1"},
    "weight_decay": {"type": float},
    "bias_weight_decay": {"type": float},
    "eps": {"type": float, "help": "of Adam (1e-3, as IRRA; rendered 1e-8) and AdamW (1e-8)"},
    "momentum": {"type": float, "help": "of sgd: 0.9"},
    "warmup_epochs": {"type": float, "help": "5, rendered 0.5"},
    "warmup_factor": {"type": float, "help": "of --lr, at the first step: 0.1"},
    "final_factor": {"type": float, "help": "of --lr, where the cosine ends: 0"},
    "lr_per": {"choices": ("epoch", "step"), "help": "how often the learning rate changes: epoch, rendered step"},
    "clip_norm": {"type": float, "help": "of the gradient: none, rendered 1"},
    "flip": {"type": float, "help": "probability of a mirrored image: 0.5"},
    "pad": {"type": int, "help": "pixels around an image of 128 columns before it is cut to size: 10"},
    "erase": {"type": float, "help": "probability of an erased rectangle: 0.5"},
    "sampler": {"choices": ("random", "identity")},
    "per_identity": {"type": int, "help": "captions of a person in a batch, of --sampler identity: 4"},
    "workers": {"type": _whole, "help": "processes that read images: at most 4, rendered 0"},
    "precision": {"choices": ("auto", "float16", "bfloat16", "float32", "float64"), "help": "auto: float16 on CUDA"},
    "seed": {"type": int, "help": "of weights, order, masks and augmentation: 1"},
}


def parser_of(command: str, doc: str | None, *, usage: str = "[options]", epilog: str | None = None) -> Any:
    """Of a command; its usage is one line, beside which an error is seen."""
    prog = f"python -m benchmarks.person_retrieval {command}"
    return argparse.ArgumentParser(prog=prog, usage=f"%(prog)s {usage}", description=doc, epilog=epilog)


def add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to learn from")
    group.add_argument("--dataset", choices=("rendered", *LAYOUTS), default="rendered", help="default: rendered")
    group.add_argument("--root", type=Path, help="folder that holds the data set's folder")
    group.add_argument("--identities", type=positive, help="rendered, in training: 1200")
    group.add_argument("--val-identities", type=positive, help="rendered: 100")
    group.add_argument("--test-identities", type=positive, help="rendered: 750, of whom there are 3000 captions")
    group.add_argument("--weights", help="file or folder of CLIP weights; rendered: the committed ones, or `none`")
    group.add_argument("--tokenizer", type=Path, help="CLIP's vocabulary, where it is not beside the weights")
    group.add_argument("--activation", choices=("quick_gelu", "gelu"), help="of CLIP: LAION's weights need gelu")
    group.add_argument("--tiny", action="store_true", help="no weights but a tiny random CLIP: a dry run")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recipe (the numbers are defaults, the paper's)")
    defaults = Recipe()
    for name, settings in RECIPE_OPTIONS.items():
        told = {"help": f"{getattr(defaults, name)}", **settings}
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, **told)


def add_objective(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("objective (defaults: the paper's for the data set)")
    group.add_argument("--alpha", type=float, help="of A-SDM: 10, RSTPReid 1")
    group.add_argument("--tau", type=float, help="temperature of A-SDM: 0.02")
    group.add_argument("--sigma", type=float, metavar="C", help="sparsity of EFA, in 1/N: 1")
    group.add_argument("--pool-scale", type=float, help="lambda of EFA: 1")
    group.add_argument("--margins", type=float, nargs=2, metavar=("TEXT", "IMAGE"), help="of EFA: by data set")
    group.add_argument("--loss-weights", nargs="+", metavar="TERM=W", help="of id, irr, efa, asdm: 1 each")


def add_run(parser: argparse.ArgumentParser, out: str, *, select: bool = True) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, default=Path(out), help="folder of the results (default: %(default)s)")
    group.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    group.add_argument("--quiet", action="store_true", help="no progress bar")
    group.add_argument("--overwrite", action="store_true", help="replace the run that is in --out")
    group.add_argument("--resume", action="store_true", help="go on with the run that is in --out")
    group.add_argument("--tensorboard", action="store_true", help="write scalars for TensorBoard into --out")
    if select:
        group.add_argument(
            "--select",
            choices=("val", "test", "last"),
            help="which epoch is kept: the best on the validation split (default), the best on the test split as "
            "published codebases do, or the last (default of ICFG-PEDES, which has no validation split)",
        )


def recipe_of(args: argparse.Namespace, base: Recipe | None = None) -> Recipe:
    """`base`, or else the recipe of the data set, with what was given."""
    if base is None:
        rendered = args.dataset == "rendered"
        base = (
            RENDERED if rendered else Recipe(epochs=EPOCHS.get(args.dataset, 60), workers=min(4, os.cpu_count() or 1))
        )
    given = {field.name: getattr(args, field.name, None) for field in fields(Recipe)}
    if given["gather"] is not None:
        given["gather"] = GATHER[given["gather"]]
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def objective_of(args: argparse.Namespace, patches: int) -> dict[str, Any]:
    """Keyword arguments of FMFALoss, as far as they were given."""
    asdm = {"alpha": args.alpha, "temperature": args.tau}
    text, image = args.margins or (None, None)
    sparsity = None if args.sigma is None else args.sigma / patches
    efa = {"sparsity": sparsity, "pool_scale": args.pool_scale, "margin_text": text, "margin_image": image}
    parts: dict[str, Any] = {
        name: {key: value for key, value in part.items() if value is not None}
        for name, part in (("asdm", asdm), ("efa", efa))
    }
    weights = list(map(_weight, args.loss_weights or ()))
    parts["weights"] = dict(weights)
    if len(parts["weights"]) < len(weights):
        raise RunError(f"--loss-weights must name a term once, got {' '.join(args.loss_weights)}")
    return {name: part for name, part in parts.items() if part}


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise RunError(f"--loss-weights must be TERM=W such as efa=0.5, got {text!r}") from None


def check_applies(args: argparse.Namespace) -> None:
    """Raises where an option was given that has no effect beside the others."""
    given, refuse = _given(args), partial(_refuse, _given(args))
    rendered = args.dataset == "rendered"
    refuse(
        ("root", "tokenizer", "activation", "tiny"),
        not rendered,
        "rendered pedestrians have no files; name a --dataset",
    )
    of_rendered = ("identities", "val_identities", "test_identities", "minutes")
    refuse(of_rendered, rendered, f"{args.dataset} is not rendered")
    if not rendered and "root" not in given:
        raise RunError(f"--dataset {args.dataset} needs --root, the folder that holds {args.dataset}/")
    refuse(("tiny",), not given & {"weights", "starts"}, "weights say which model it is")
    minutes = getattr(args, "minutes", None)
    if minutes is not None and not 0 <= minutes < math.inf:
        raise RunError(f"--minutes must be 0 or more, got {minutes:g}; 0 is no limit")
    refuse(("minutes",), "epochs" not in given, "--epochs says how many are trained; pass one of them")
    check_recipe_applies(args)


def check_recipe_applies(args: argparse.Namespace) -> None:
    """`check_applies`, of the options of `add_recipe` and `add_run` alone."""
    given, refuse = _given(args), partial(_refuse, _given(args))
    refuse(("gather",), "RANK" in os.environ, "one process has nobody to gather from; start several with torchrun")
    refuse(("overwrite",), "resume" not in given, "--resume goes on with the run that --overwrite removes")
    optimizer = getattr(args, "optimizer", None) or "adam"
    refuse(("momentum",), optimizer == "sgd", f"--optimizer {optimizer} has none")
    refuse(("eps",), optimizer != "sgd", "--optimizer sgd has none")
    sampler = getattr(args, "sampler", None) or "random"
    refuse(("per_identity",), sampler == "identity", "--sampler random draws single captions")


def _given(args: argparse.Namespace) -> set[str]:
    return {name for name, value in vars(args).items() if value is not None and value is not False}


def _refuse(given: set[str], names: Iterable[str], unless: bool, why: str) -> None:
    wrong = [f"--{name.replace('_', '-')}" for name in names if name in given]
    if wrong and not unless:
        raise RunError(f"{', '.join(wrong)} must be left out: {why}")


def invoke(action: Callable[[], int | None]) -> int:
    """Runs a command; what its user can mend becomes one line."""
    try:
        return action() or 0
    except RunError as error:
        raise SystemExit(f"error: {error}") from None


def command_of(name: str, argv: list[str]) -> str:
    """As it is typed, for result files."""
    return shlex.join(["python", "-m", "benchmarks.person_retrieval", name, *argv])
