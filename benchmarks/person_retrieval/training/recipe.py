"""How to train: the paper's recipe, and what may differ from it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ..errors import RunError

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the paper's, which are IRRA's. ICFG-PEDES trains 100 epochs.

    Raises:
        RunError: a value that makes no sense, named as the command line spells it.
    """

    epochs: int = 60
    batch_size: int = 64  # of one process
    gather: bool | str = True  # of the objectives, where there is more than one process: True, "ring" or False
    optimizer: str = "adam"
    lr: float = 1e-5
    lr_factor: float = 5.0  # of what starts from nothing: names with cross, classifier, mlm_head
    bias_lr_factor: float = 2.0
    weight_decay: float = 4e-5
    bias_weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float | None = None  # None: IRRA's own of the optimizer, 1e-3 of Adam and 1e-8 of AdamW
    momentum: float = 0.9  # of SGD
    warmup_epochs: float = 5.0
    warmup_factor: float = 0.1
    final_factor: float = 0.0
    lr_per: str = "epoch"  # the learning rate changes after every epoch, as IRRA's, or after every step
    clip_norm: float | None = None
    flip: float = 0.5  # probability
    pad: int = 10  # pixels
    erase: float = 0.5  # probability
    sampler: str = "random"
    per_identity: int = 4  # of the sampler "identity"
    workers: int = 0
    precision: str = "auto"
    seed: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            wanted, fits = RULES[field.name]
            value = getattr(self, field.name)
            if not fits(value):
                raise RunError(f"--{field.name.replace('_', '-')} must be {wanted}, got {value!r}; {REMEDY}")


REMEDY = "give another value, or leave the option out"
Rule = tuple[str, Callable[[Any], bool]]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _at_least(least: int) -> Rule:
    return f"a whole number, {least} or more", lambda value: _whole(value) and value >= least


def _one_of(*names: str) -> Rule:
    return f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names


# More would overflow float32, in which optimizers multiply two of them.
MOST = 1e6
POSITIVE: Rule = ("positive and finite", lambda value: _number(value) and value > 0)
NOT_NEGATIVE: Rule = ("0 or more and finite", lambda value: _number(value) and value >= 0)
STEP: Rule = (f"positive and at most {MOST:g}", lambda value: _number(value) and 0 < value <= MOST)
DECAY: Rule = (f"0 or more and at most {MOST:g}", lambda value: _number(value) and 0 <= value <= MOST)
FRACTION: Rule = ("between 0 and 1", lambda value: _number(value) and 0 <= value <= 1)
BELOW_ONE: Rule = ("0 or more and below 1", lambda value: _number(value) and 0 <= value < 1)


def _optional(rule: Rule) -> Rule:
    return rule[0], lambda value: value is None or rule[1](value)


# Of every field, in words and as a test.
RULES: dict[str, Rule] = {
    "epochs": _at_least(1),
    "batch_size": _at_least(1),
    "gather": ("true, ring or no", lambda value: value is True or value is False or value == "ring"),
    "optimizer": _one_of("adam", "adamw", "sgd"),
    "lr": STEP,
    "lr_factor": STEP,
    "bias_lr_factor": STEP,
    "weight_decay": DECAY,
    "bias_weight_decay": DECAY,
    "betas": (
        "two numbers, 0 or more and below 1",
        lambda value: isinstance(value, tuple) and len(value) == 2 and all(BELOW_ONE[1](beta) for beta in value),
    ),
    "eps": _optional(STEP),
    "momentum": BELOW_ONE,
    "warmup_epochs": NOT_NEGATIVE,
    "warmup_factor": FRACTION,
    "final_factor": FRACTION,
    "lr_per": _one_of("epoch", "step"),
    "clip_norm": _optional(POSITIVE),
    "flip": FRACTION,
    # Of an image 384 high: a wider frame would leave crops without any of it.
    "pad": ("a whole number from 0 to 384", lambda value: _whole(value) and 0 <= value <= 384),
    "erase": FRACTION,
    "sampler": _one_of("random", "identity"),
    "per_identity": _at_least(1),
    "workers": _at_least(0),
    "precision": _one_of("auto", "float16", "bfloat16", "float32", "float64"),
    # What is drawn from a seed multiplies it, and generators take 64 bits.
    "seed": ("a whole number, 0 or more and below 2^32", lambda value: _whole(value) and 0 <= value < 2**32),
}
