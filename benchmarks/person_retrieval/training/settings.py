"""What a run is a function of, and what may change when it is resumed."""

import json
from dataclasses import asdict
from typing import Any

from .precision import Precision
from .recipe import Recipe
from .world import World

__all__ = ["differences", "plain", "settings_of"]

FREE = {"out", "recipe.workers"}  # change nothing of what is computed
TOGETHER = {"processes", "recipe.batch_size"}  # their product is what counts
EPOCHS = "recipe.epochs"


def settings_of(recipe: Recipe, world: World, **others: Any) -> dict[str, Any]:
    """Recipe, precision and processes of a run, and `others`: data set, weights and their hash, sizes, objective."""
    precision = Precision(recipe.precision, world.device).name
    return {"recipe": asdict(recipe), "precision": precision, "processes": world.size, **others}


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives them back: lists for tuples, strings for paths."""
    result: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return result


def differences(before: dict[str, Any], now: dict[str, Any], trained: int) -> tuple[list[str], list[str]]:
    """What forbids to resume, and what differs and may: each a sentence.

    Args:
        before, now: plain settings.
        trained: epochs done.
    """
    old, new = _flat(before), _flat(now)
    forbidden, allowed = [], []
    for key in dict.fromkeys([*old, *new]):
        was, is_ = (_told(side, key) for side in (old, new))
        if was == is_ or key in FREE | TOGETHER or (key == "recipe.precision" and "precision" in old):
            continue
        if key != EPOCHS:
            forbidden.append(f"{_spelled(key)} was {was} and is {is_}")
        elif new.get(key, 0) > trained:
            allowed.append(f"--epochs was {was} and is {is_}: from here on the learning rate follows the new schedule")
        else:
            forbidden.append(f"--epochs was {was} and is {is_}, but must be more than the {trained} trained already")
    batches = [side.get("recipe.batch_size", 0) * side.get("processes", 1) for side in (old, new)]
    if batches[0] != batches[1]:
        forbidden.append(f"--batch-size of all processes together was {batches[0]} and is {batches[1]}")
    elif old.get("processes") != new.get("processes"):
        allowed.append(
            f"the number of processes was {_told(old, 'processes')} and is {_told(new, 'processes')}; "
            f"their batch is {batches[0]} as before"
        )
    return forbidden, allowed


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _told(side: dict[str, Any], key: str) -> str:
    value = side.get(key)
    return "not set" if value is None else str(value)


def _spelled(key: str) -> str:
    """As the command line spells it, if it does."""
    *parents, name = key.split(".")
    if parents not in ([], ["recipe"]):
        return key
    if name.endswith("_sha256"):
        return f"the contents (SHA-256) of --{name.removesuffix('_sha256').replace('_', '-')}"
    return f"--{name.replace('_', '-')}"
