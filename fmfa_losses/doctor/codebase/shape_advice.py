"""What to write for a function of another name that computes an equation of this library."""

from typing import Any

from .findings import Suggestion
from .suggestions import advice, operand

__all__ = ["PARAMETERS", "SHAPES", "chosen", "shape_advice"]

# The published function that an equation of `source/equations.py` is.
SHAPES = {
    "sdm": "compute_sdm",
    "cmpm": "compute_cmpm",
    "itc": "compute_itc",
    "identity": "compute_id",
    "words": "compute_mlm",
}
ALL = "; gather=True is for torch.distributed alone, and the mean over the ranks has the value"
MEAN = "a scalar, the mean of both directions"
# Of sdm, cmpm and itc: the parameters of the published function by those of the equation.
PARAMETERS = {
    "sdm": {"image": "image_fetures", "text": "text_fetures", "pids": "pid", "scale": "logit_scale", "eps": "epsilon"},
    "cmpm": {"image": "image_embeddings", "text": "text_embeddings", "pids": "labels", "eps": "epsilon"},
    "itc": {"image": "image_features", "text": "text_features", "scale": "logit_scale"},
}


def chosen(shapes: list[dict[str, Any]], call: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]] | None:
    """(the shape that holds for the arguments of a call, the text of each argument); None when none holds."""
    if call["unpacked"]:
        return None
    for shape in shapes:
        given = dict(zip(shape["parameters"], call["arguments"], strict=False)) | call["keywords"]
        passed = [name for name in shape["optional"] if given.get(name, "None") not in ("None", "False")]
        few = len(call["arguments"]) <= len(shape["parameters"])
        if few and passed == ([shape["given"]] if shape["given"] else []):
            return shape, shape["defaults"] | given
    return None


def shape_advice(shapes: list[dict[str, Any]], call: dict[str, Any]) -> tuple[str, str, tuple[Suggestion, ...]] | None:
    """(equation, what the function returns, what to write); None where the call does not say enough."""
    found = chosen(shapes, call)
    if found is None:
        return None
    shape, given = found
    # An attribute, self.epsilon, is one in the class alone; a parameter must be passed.
    at = {key: given.get(name, name) for key, name in shape["arguments"].items()}
    free = [name for name in shape["arguments"].values() if "." in name and not name.replace(".", "").isdigit()]
    if (free and call["class"] is None) or any(at[k] in shape["parameters"] and at[k] not in given for k in at):
        return None
    name = shape["name"]
    if name in PARAMETERS:
        defaults = {"epsilon": "1e-8", "image_id": "None", "factor": "0.3", "use_weight": "False"}
        arguments = defaults | {PARAMETERS[name][key]: _plain(value) for key, value in at.items()}
        found_advice = advice(SHAPES[name], "", arguments)
        return name, found_advice.returns, found_advice.suggestions
    suggestion = _of_loss(name, at, call)
    return None if suggestion is None else (name, MEAN, (suggestion,))


def _plain(number: str) -> str:
    return "1e-8" if number == "1e-08" else number


def _of_loss(name: str, at: dict[str, str], call: dict[str, Any]) -> Suggestion | None:
    gather = ALL.removeprefix("; ")
    if name in ("itc_gather", "nitc_gather"):
        features = f"{at['image']}, {at['text']}"
        scale = f"logit_scale=1 / {operand(at['inverse'])}"
        if name == "itc_gather":
            return Suggestion(f"ITCLoss(gather=True)({features}, {scale})", True, gather)
        write = f'ITCLoss(targets="identity", gather=True)({features}, {at["pids"]}, {scale})'
        return Suggestion(write, True, gather)
    if name == "unit_nitc_soft":
        needed = ["image", "text", "image_s", "text_s"]
        if not {at[key] for key in needed} <= set(call["normalised"]):
            return None
        teacher = f"momentum_features=({at['image_s']}, {at['text_s']})"
        write = (
            f'ITCLoss(targets="identity", softlabel_ratio={at["ratio"]}{_gather(at, "image")})'
            f"({at['image']}, {at['text']}, pids, {teacher}, logit_scale={at['scale']})"
        )
        return Suggestion(write, True, f"pids: the ids that {at['q']} is made of{ALL}")
    if name == "unit_simclr" and {at["a"], at["b"]} <= set(call["normalised"]):
        write = f"SimCLRLoss({at['tau']}{_gather(at, 'a')})({at['a']}, {at['b']})"
        return Suggestion(write, True, f"where {at['labels']} is the index of each sample among all{ALL}")
    return None


def _gather(at: dict[str, str], key: str) -> str:
    return "" if at[key] == at[f"{key}_all"] else ", gather=True"
