"""What keeps a function of a published name from being the published one: its parameters, results and defaults."""

import ast
from typing import Any

from .shape_advice import PARAMETERS, SHAPES, chosen
from .source.published import PUBLISHED

__all__ = ["own_defaults", "published_shape", "why_not"]

# Of every equation: the parameters of the published function by those of the equation.
PLACES = PARAMETERS | {
    "identity": {"image_logits": "image_logits", "text_logits": "text_logits", "pids": "labels"},
    "words": {"scores": "scores", "labels": "labels"},
}


def published_shape(name: str, definition: dict[str, Any]) -> dict[str, Any] | None:
    """The shape of a definition whose body is the equation of the published function; None where it is not."""
    shapes = (s for s in definition["shapes"] if SHAPES.get(s["name"]) == name and s["given"] is None)
    return next(shapes, None)


def why_not(call: dict[str, Any], name: str, definition: dict[str, Any] | None) -> str | None:
    """Why a call of a published name is not for the published function; None when it is."""
    published = PUBLISHED[name]
    if definition is not None:
        there = definition["parameters"]
        if not _fits(name, definition) or len(there) < len(published.required):
            return f"yours takes ({', '.join(there)}), the published one ({', '.join(published.parameters)})"
        if definition["results"] not in (published.results, None):
            return f"yours returns {definition['results']} results, the published one {published.results}"
    if call["targets"] not in (None, published.results):
        return f"{call['targets']} results are taken, the published one has {published.results}"
    if call["unpacked"]:
        return None
    given = list(zip(published.parameters, call["arguments"], strict=False))
    names = [name for name, _ in given] + list(call["keywords"])
    if len(call["arguments"]) > len(published.parameters) or len(set(names)) < len(names):
        return f"{len(call['arguments'])} arguments are passed, the published one takes {len(published.parameters)}"
    unknown = sorted(set(names) - set(published.parameters))
    if unknown:
        return f"the published one takes no {', '.join(unknown)}"
    lacking = [name for name in published.required if name not in names]
    if lacking:
        return f"the published one needs {', '.join(lacking)} too"
    return None


def _fits(name: str, definition: dict[str, Any]) -> bool:
    """Whether the parameters are the published ones, in their order; other names only where the body shows the place.

    Many codebases have corrected IRRA's image_fetures: the call, by position, is the same.
    """
    there, published = definition["parameters"], PUBLISHED[name].parameters
    if len(there) > len(published):
        return False
    shape = published_shape(name, definition)
    places = PLACES[shape["name"]] if shape else {}
    means = {own: places[key] for key, own in shape["arguments"].items()} if shape else {}
    return all(own == other or means.get(own) == other for own, other in zip(there, published, strict=False))


def own_defaults(call: dict[str, Any], name: str, definition: dict[str, Any] | None) -> dict[str, str]:
    """The values that a call takes from its own function where the published one has others, by published name."""
    if definition is None:
        return {}
    published = PUBLISHED[name]
    there = dict(zip(published.parameters, definition["parameters"], strict=False))
    own = {key: definition["defaults"][at] for key, at in there.items() if at in definition["defaults"]}
    shape = published_shape(name, definition)
    if shape is not None:
        at = {PLACES[shape["name"]][key]: value for key, value in shape["arguments"].items()}
        used = chosen([shape], call)  # without soft labels their factor is not used
        own = {key: value for key, value in own.items() if used is None or key in at}
        own |= {key: value for key, value in at.items() if key not in there}  # a number in the body
    passed = {*published.parameters[: len(call["arguments"])], *call["keywords"]}
    return {
        key: value
        for key, value in own.items()
        if key not in passed and key in published.defaults and not _same(value, published.defaults[key])
    }


def _same(one: str, other: str) -> bool:
    try:
        return bool(ast.literal_eval(one) == ast.literal_eval(other))
    except ValueError:
        return one == other
