"""FMFA's inline aggregation: patches kept above 1/N of a min-max normalised similarity, then summed by their share.

Found by what it does to one similarity of a function, step by step: `s = matmul(text, patches.transpose(1, 2))`,
`(s - min) / (max - min)`, `where(s > 1 / N, s, 0)`, `s / s.sum(...)`, `matmul(s, patches)`. With any other step, such
as a softmax or another threshold, it is something else.
"""

import ast
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from .expressions import called, changed, own_nodes, product

__all__ = ["aggregation"]

LAST = r"(?:dim=|axis=)?(?:2|-1)"
NAMES = 100  # assigned before, that are remembered
KEPT = rf"{LAST}, (?:keepdim=)?True"


class _Similarity(NamedTuple):
    line: int
    text: str
    patches: str
    steps: int = 0  # of STEPS that were taken


def aggregation(function: ast.AST) -> Iterator[dict[str, Any]]:
    """line, last line, name of the result, text and patches of every aggregation in a function's own statements."""
    found: dict[str, _Similarity] = {}
    known: dict[str, str] = {}  # other names: what they were assigned
    made_of: dict[str, set[str]] = {}  # of which values
    targets: set[ast.AST] = set()
    for node in own_nodes(function):
        pairs = _pairs(node)
        if len(pairs) == 1 and isinstance(node, ast.Assign):
            yield from _result(pairs[0][0].id, node, found)
        for target, value in pairs:
            targets.add(target)
            name = target.id
            similarity = _next(name, value, found, known)
            for stale in [key for key in known if name in made_of[key]]:
                del known[stale]  # it was of the value before
            found.pop(name, None)
            if len(known) >= NAMES:
                known.clear()
            known[name], made_of[name] = ast.unparse(value), _values_in(value)
            if similarity is not None:
                found[name] = similarity
        if node not in targets and not pairs and (other := changed(node)) is not None:
            found.pop(other, None)
            known.pop(other, None)


def _values_in(node: ast.expr) -> set[str]:
    """Names in an expression, but for those of which it takes the size alone."""
    nodes = list(ast.walk(node))
    sized = [n.value for n in nodes if isinstance(n, ast.Attribute) and n.attr in ("size", "shape")]
    return {n.id for n in nodes if isinstance(n, ast.Name) and n not in sized}


def _pairs(node: ast.AST) -> list[tuple[ast.Name, ast.expr]]:
    """(name, value) of `a = x` and of `a, b = x, y`."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1:
        return []
    target, value = node.targets[0], node.value
    targets, values = [target], [value]
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        targets, values = target.elts, value.elts
    names = [one for one in targets if isinstance(one, ast.Name)]
    return list(zip(names, values, strict=True)) if len(names) == len(targets) else []


def _result(name: str, node: ast.Assign, found: dict[str, _Similarity]) -> Iterator[dict[str, Any]]:
    operands = product(node.value)
    if operands is None:
        return
    similarity = found.get(ast.unparse(operands[0]))
    if similarity is not None and similarity.steps == len(STEPS) and similarity.patches == ast.unparse(operands[1]):
        yield {"line": similarity.line, "end": node.lineno, "name": name, "text_tokens": similarity.text,
               "image_tokens": similarity.patches, "code": ast.unparse(node)}  # fmt: skip


def _next(name: str, value: ast.expr, found: dict[str, _Similarity], known: dict[str, str]) -> _Similarity | None:
    """The similarity that `name` is after an assignment, if it is one."""
    operands = product(value)
    if operands is not None:
        patches = _transposed(operands[1])
        return None if patches is None else _Similarity(value.lineno, ast.unparse(operands[0]), patches)
    before = found.get(name)
    if before is None or before.steps == len(STEPS) or not STEPS[before.steps](value, name, before.patches, known):
        return None
    return before._replace(steps=before.steps + 1)


def _is(pattern: str, node: ast.expr, known: dict[str, str]) -> bool:
    """Whether an expression, or what its name was assigned, has this text."""
    text = ast.unparse(node)
    return re.fullmatch(pattern, known.get(text, text)) is not None


def _extreme(name: str, s: str) -> str:
    arguments = rf"(?:torch\.{{0}}\({s}, |{s}\.{{0}}\(){KEPT}\)"
    return rf"{arguments.format(name)}(?:\[0\]|\.values)|{arguments.format('a' + name)}"


def _stretched(value: ast.expr, name: str, _: str, known: dict[str, str]) -> bool:
    if not isinstance(value, ast.BinOp) or not isinstance(value.op, ast.Div):
        return False
    s = re.escape(name)
    above, extent = value.left, value.right
    differences = all(isinstance(part, ast.BinOp) and isinstance(part.op, ast.Sub) for part in (above, extent))
    if not differences:
        return False
    assert isinstance(above, ast.BinOp) and isinstance(extent, ast.BinOp)
    low = _extreme("min", s)
    return (
        ast.unparse(above.left) == name
        and _is(low, above.right, known)
        and _is(_extreme("max", s), extent.left, known)
        and _is(low, extent.right, known)
    )


def _cut(value: ast.expr, name: str, patches: str, known: dict[str, str]) -> bool:
    if called(value) != "where" or not isinstance(value, ast.Call) or len(value.args) != 3:
        return False
    condition, kept, zero = value.args
    s, p = re.escape(name), re.escape(patches)
    number = rf"1(?:\.0)? / (?:{s}(?:\.size\((?:2|-1)\)|\.shape\[(?:2|-1)\])|{p}(?:\.size\(1\)|\.shape\[1\]))"
    return (
        isinstance(condition, ast.Compare)
        and isinstance(condition.ops[0], ast.Gt)
        and len(condition.ops) == 1
        and ast.unparse(condition.left) == ast.unparse(kept) == name
        and _is(number, condition.comparators[0], known)
        and _is(rf"torch\.zeros_like\({s}\)|0(?:\.0)?", zero, known)
    )


def _shared(value: ast.expr, name: str, _: str, known: dict[str, str]) -> bool:
    s = re.escape(name)
    return (
        isinstance(value, ast.BinOp)
        and isinstance(value.op, ast.Div)
        and ast.unparse(value.left) == name
        and _is(rf"(?:torch\.sum\({s}, |{s}\.sum\(){KEPT}\)", value.right, known)
    )


STEPS = (_stretched, _cut, _shared)


def _transposed(node: ast.expr) -> str | None:
    """x of `x.transpose(1, 2)`, in any order and from the end too."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "transpose":
        return None
    swapped = {ast.unparse(argument) for argument in node.args}
    return ast.unparse(node.func.value) if swapped in ({"1", "2"}, {"-1", "-2"}) else None
