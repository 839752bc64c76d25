"""The weights that a run kept, finished or not, read from its folder."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .errors import RunError
from .training import load

__all__ = ["Kept", "kept_weights", "record_of"]


class Kept(NamedTuple):
    """Weights of the model by name, of which epoch, where they are, and what they are in words."""

    weights: dict[str, Tensor]
    epoch: int
    file: Path
    title: str


def record_of(folder: Path) -> dict[str, Any]:
    """run.json of a run of `train`.

    Raises:
        RunError: there is none.
    """
    file = folder / "run.json"
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if "dataset" in record["settings"] and {"run", "commands", "chosen_epochs"} <= record.keys():
            return record
        reason = "it is of another command"
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = getattr(error, "strerror", None) or f"it is no record of a run ({error})"
    raise RunError(f"{folder} must be the folder of a run of `train`, {file} is not its record: {reason}; name another")


def kept_weights(folder: Path, record: dict[str, Any]) -> Kept:
    """The best epoch so far, or the last where nothing selects.

    Raises:
        RunError: no epoch is finished, files of different runs.
    """
    last, best = folder / "checkpoint.pt", folder / "best.pt"
    if not last.exists():
        raise RunError(
            f"{folder} must have finished an epoch, found no {last.name}; wait for it, or name another run: those of a "
            "study keep no weights"
        )
    saved = load(last, keys=("run", "epoch", "best", "trainee"), mmap=True)
    epochs = record["chosen_epochs"] or record["settings"]["recipe"]["epochs"]
    told = "" if saved["epoch"] >= epochs else f" (unfinished: {saved['epoch']} of {epochs} epochs)"
    chosen = saved["best"]
    if chosen is not None and best.exists():
        kept = load(best, keys=("run", "epoch", "model"), mmap=True)
        if (kept["run"], kept["epoch"]) == (record["run"], chosen["epoch"]):
            select = record["settings"].get("select", "val")
            title = f"epoch {int(chosen['epoch'])}, the best on {select}{told}"
            return Kept(kept["model"], int(chosen["epoch"]), best, title)
    # A run may be killed between the two files: then the best epoch is the last.
    if saved["run"] != record["run"] or (chosen is not None and chosen["epoch"] != saved["epoch"]):
        raise RunError(
            f"{best if chosen else last} must be of the run in {folder}/run.json, got none or another run's; "
            "restore the file, or name another run"
        )
    trainee = saved["trainee"].items()
    model = {name.removeprefix("model."): tensor for name, tensor in trainee if name.startswith("model.")}
    return Kept(model, int(saved["epoch"]), last, f"epoch {saved['epoch']}, the last{told}")
