"""Small questions about expressions that the rules share."""

import ast
from collections.abc import Iterator

from .bindings import FUNCTIONS, chain

__all__ = ["Values", "called", "changed", "is_normalised", "own_nodes", "product", "values"]

Values = dict[str, list[ast.expr]]


def own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function or module in the order of the text, without those of functions and classes inside."""
    pending: list[ast.AST] = list(reversed(getattr(function, "body", [])))
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            pending += reversed(list(ast.iter_child_nodes(node)))


def called(node: ast.expr) -> str | None:
    """The last name of what is called: "argsort" of `torch.argsort(x)` and of `x.argsort()`."""
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else None


def product(node: ast.expr) -> tuple[ast.expr, ast.expr] | None:
    """The operands of `a @ b`, `torch.matmul(a, b)`, `torch.mm(a, b)` and the methods."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        return node.left, node.right
    if isinstance(node, ast.Call) and called(node) in ("matmul", "mm"):
        names = chain(node.func)
        if names is not None and names[0] in ("torch", "np", "numpy") and len(node.args) == 2:
            return node.args[0], node.args[1]
        if isinstance(node.func, ast.Attribute) and len(node.args) == 1:
            return node.func.value, node.args[0]
    return None


def values(function: ast.AST) -> Values:
    """What each name is assigned in a function's own statements, in their order; a change in place is a None."""
    found = Values()
    simple: set[ast.AST] = set()
    for node in own_nodes(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            simple.add(node.targets[0])
            found.setdefault(node.targets[0].id, []).append(node.value)
        elif node not in simple and (other := changed(node)) is not None:
            found.setdefault(other, []).append(ast.copy_location(ast.Constant(None), node))
    return found


def changed(node: ast.AST) -> str | None:
    """The name that `x += y`, `x[i] = y`, `for x in y` or `x.add_(y)` changes."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    target: ast.expr | None = None
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
        target = node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_"):
        target = node.func.value
    while isinstance(target, (ast.Attribute, ast.Subscript)):
        target = target.value
    return target.id if isinstance(target, ast.Name) else None


def is_normalised(node: ast.expr, known: Values) -> bool:
    """Whether the rows have length 1: `F.normalize(...)`, what a name was assigned last, or that of all processes."""
    for _ in range(5):
        if isinstance(node, ast.Name) and node.id in known:
            node = known[node.id][-1]
        elif "gather" in (called(node) or "") and isinstance(node, ast.Call) and node.args:
            node = node.args[0]
    if not isinstance(node, ast.Call) or called(node) != "normalize":
        return False
    options = {k.arg: ast.unparse(k.value) for k in node.keywords}
    return options.get("dim", "1") in ("1", "-1") and options.get("p", "2") in ("2", "2.0") and len(node.args) == 1
