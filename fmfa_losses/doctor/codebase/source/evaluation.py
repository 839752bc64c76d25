"""Where a codebase ranks a gallery and compares identities: `rank(similarity, q_pids, g_pids)`, or the same inline.

An `argsort` alone says nothing. It is a ranking where its result indexes gallery ids that are compared with query ids.
"""

import ast
from collections.abc import Iterator
from typing import Any

from .bindings import Scopes
from .expressions import Values, called, is_normalised, own_nodes, product, values

__all__ = ["inline", "rankings"]

RANK = ("similarity", "q_pids", "g_pids", "max_rank", "get_mAP")


def rankings(function: ast.AST, scopes: Scopes) -> Iterator[dict[str, Any]]:
    """Facts of every ranking in a function's own statements: the scores, both ids, and where the scores come from."""
    found = list(_calls(function, scopes))
    own = inline(function)
    found += [own] if own is not None else []
    known = values(function) if found else {}
    always = {node.value for node in getattr(function, "body", []) if isinstance(node, ast.Assign)}
    for scores, ranking in found:
        yield {**ranking, **_origin(scores, known, always)}


def _calls(function: ast.AST, scopes: Scopes) -> Iterator[tuple[ast.expr, dict[str, Any]]]:
    for node in own_nodes(function):
        if not isinstance(node, ast.Call):
            continue
        callee = scopes.callee(node.func)
        if callee is None or callee.name != "rank" or any(isinstance(a, ast.Starred) for a in node.args):
            continue
        given = dict(zip(RANK, node.args, strict=False)) | {k.arg: k.value for k in node.keywords if k.arg}
        if not set(RANK[:3]) <= given.keys():
            continue
        yield (
            given["similarity"],
            {
                "line": node.lineno,
                "code": ast.unparse(node)[:300],
                "inline": False,
                "callee": callee._asdict(),
                "arguments": [ast.unparse(a) for a in node.args],
                "keywords": {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg},
                "named": {k.arg for k in node.keywords} >= set(RANK[:3]),
                "scores": ast.unparse(given["similarity"]),
                "queries": ast.unparse(given["q_pids"]),
                "gallery": ast.unparse(given["g_pids"]),
            },
        )


def inline(function: ast.AST) -> tuple[ast.expr, dict[str, Any]] | None:
    """order = argsort(scores, dim=1, descending=True); gallery_ids[order] == query_ids."""
    orders: dict[str, tuple[ast.Call, ast.expr]] = {}
    ranked: dict[str, tuple[str, str]] = {}  # name of gallery_ids[order] -> (gallery ids, order)
    for node in own_nodes(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
            scores = _sorted(value)
            if scores is not None:
                assert isinstance(value, ast.Call)
                orders[name] = value, scores
            elif (taken := _taken(value, orders)) is not None:
                ranked[name] = taken
        compared = _compared(node)
        for one, other in (compared, compared[::-1]) if compared else ():
            taken = ranked.get(one.id) if isinstance(one, ast.Name) else _taken(one, orders)
            queries = _column(other)
            if taken is not None and queries is not None:
                call, scores = orders[taken[1]]
                return scores, {"line": call.lineno, "code": ast.unparse(call)[:300], "inline": True, "callee": None,
                        "scores": ast.unparse(scores), "queries": queries, "gallery": taken[0],
                        "function": getattr(function, "name", None)}  # fmt: skip
    return None


def _sorted(node: ast.expr) -> ast.expr | None:
    """What an argsort of rows, the highest first, sorts."""
    if not isinstance(node, ast.Call) or called(node) != "argsort":
        return None
    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
    assert isinstance(node.func, (ast.Attribute, ast.Name))
    function = isinstance(node.func, ast.Name) or ast.unparse(node.func.value) == "torch"
    positional = node.args[1:] if function else node.args
    dim = keywords.get("dim") or (ast.unparse(positional[0]) if positional else "-1")
    if keywords.get("descending") != "True" or dim not in ("1", "-1"):
        return None
    if not function:
        return node.func.value  # type: ignore[union-attr]
    return node.args[0] if node.args else None


def _taken(node: ast.expr, orders: dict[str, Any]) -> tuple[str, str] | None:
    """(gallery ids, order) of `gallery_ids[order]`, also of `order.cpu()`."""
    if not isinstance(node, ast.Subscript):
        return None
    index = node.slice
    while isinstance(index, ast.Call) and isinstance(index.func, ast.Attribute) and index.func.attr in ("cpu", "to"):
        index = index.func.value
    if isinstance(index, ast.Name) and index.id in orders:
        return ast.unparse(node.value), index.id
    return None


def _compared(node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq):
        return node.left, node.comparators[0]
    if isinstance(node, ast.Call) and called(node) in ("eq", "equal") and isinstance(node.func, ast.Attribute):
        if len(node.args) == 1:
            return node.func.value, node.args[0]
        if len(node.args) == 2:
            return node.args[0], node.args[1]
    return None


def _column(node: ast.expr) -> str | None:
    """The ids of `ids.view(-1, 1)`, `ids[:, None]` and the like: without a column one query alone is compared."""
    column = False
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr not in ("view", "reshape", "unsqueeze", "to", "expand_as", "cpu"):
            break
        column |= node.func.attr in ("view", "reshape", "unsqueeze")
        node = node.func.value
    if isinstance(node, ast.Subscript) and "None" in ast.unparse(node.slice):
        return ast.unparse(node.value)
    return ast.unparse(node) if column else None


# Where scores come from


def _origin(scores: ast.expr, known: Values, always: set[ast.expr]) -> dict[str, Any]:
    """features: [queries, gallery] that the scores are a product of; normalised; fused: the scores are a sum.

    Features that change after the product are none; what is normalised under a condition counts as not normalised.
    """
    node, turned = scores, False
    for _ in range(10):  # names that stand for each other
        if isinstance(node, ast.Call) and called(node) == "t" and isinstance(node.func, ast.Attribute):
            node, turned = node.func.value, not turned
        elif isinstance(node, ast.Attribute) and node.attr == "T":
            node, turned = node.value, not turned
        elif isinstance(node, ast.Name) and len(known.get(node.id, ())) == 1:
            node = known[node.id][0]
        else:
            break
    operands = product(node)
    gallery = None if operands is None else _rows(operands[1])
    if operands is None or gallery is None:
        sums = (n for n in ast.walk(node) if isinstance(n, ast.BinOp) and isinstance(n.op, (ast.Add, ast.Sub)))
        return {"features": None, "normalised": False, "fused": any(sums)}
    features = [operands[0], gallery]
    assigned = [known[n.id] for f in features for n in ast.walk(f) if isinstance(n, ast.Name) and n.id in known]
    if any(value.lineno > node.lineno for every in assigned for value in every):
        return {"features": None, "normalised": False, "fused": False}
    normalised = all(is_normalised(feature, known) for feature in features)
    normalised &= all(every[-1] in always for every in assigned)
    names = [ast.unparse(feature) for feature in features]
    return {"features": names[::-1] if turned else names, "turned": turned, "normalised": normalised, "fused": False}


def _rows(node: ast.expr) -> ast.expr | None:
    """x of `x.t()` or `x.T`."""
    if isinstance(node, ast.Call) and called(node) == "t" and isinstance(node.func, ast.Attribute):
        return node.func.value
    return node.value if isinstance(node, ast.Attribute) and node.attr == "T" else None
