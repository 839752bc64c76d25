"""Expressions in canonical form: sums, products and transposes in one way. `canonical.py` reads code into it."""

from typing import Any

__all__ = [
    "MINUS",
    "Tree",
    "UnknownError",
    "elementwise",
    "equal",
    "linear",
    "matmul",
    "product_of",
    "quotient",
    "reshaped",
    "size",
    "sum_of",
    "transposed",
    "unit",
]

Tree = tuple[Any, ...]
MINUS = ("const", -1.0)


class UnknownError(Exception):
    """The function is not straight-line code of known operations."""


def size(tree: Tree) -> int:
    """Nodes of an expression."""
    return 1 + sum(size(part) for part in tree if isinstance(part, tuple))


def sum_of(terms: list[Tree]) -> Tree:
    flat = [inner for term in terms for inner in (term[1:] if term[0] == "add" else (term,))]
    flat = [term for term in flat if term != ("const", 0.0)]
    return flat[0] if len(flat) == 1 else ("add", *flat)


def product_of(factors: list[Tree]) -> Tree:
    """Numbers are multiplied and stand first, or go into the terms of a sum."""
    flat = [inner for factor in factors for inner in (factor[1:] if factor[0] == "mul" else (factor,))]
    number = 1.0
    for factor in flat:
        if factor[0] == "const":
            number *= factor[1]
    others = [factor for factor in flat if factor[0] != "const"]
    if not others:
        return ("const", number)
    if number != 1.0 and len(others) == 1 and others[0][0] == "add":
        return sum_of([product_of([("const", number), term]) for term in others[0][1:]])
    if number != 1.0:
        others.insert(0, ("const", number))
    return others[0] if len(others) == 1 else ("mul", *others)


def quotient(a: Tree, b: Tree) -> Tree:
    if b[0] == "const" and b[1]:
        return product_of([a, ("const", 1 / b[1])])
    if b == ("norm", a, 1, True):
        return ("unit", a)
    return product_of([a, ("inv", b)])


def unit(x: Tree, options: dict[str, Any]) -> Tree:
    if options != {"p": 2, "dim": 1}:
        raise UnknownError
    return ("unit", x)


def matmul(a: Tree, b: Tree) -> Tree:
    """Scales of an operand of length 1 go in front: (s * unit(x)) @ y = s * (unit(x) @ y)."""
    scales: list[Tree] = []
    for operand in (a, b):
        if operand[0] == "mul":
            matrices = [f for f in operand[1:] if f[0] not in ("const", "inv") and not _is_scale(f)]
            if len(matrices) == 1:
                scales += (f for f in operand[1:] if f is not matrices[0])
    a, b = (_matrix(operand) for operand in (a, b))
    return product_of([*scales, ("mm", a, b)])


def _matrix(operand: Tree) -> Tree:
    if operand[0] == "mul":
        matrices = [f for f in operand[1:] if f[0] not in ("const", "inv") and not _is_scale(f)]
        return matrices[0] if len(matrices) == 1 else operand
    return operand


def _is_scale(factor: Tree) -> bool:
    """A parameter that is named as one: nothing else says that it is a number."""
    inner = factor[1] if factor[0] == "exp" else factor
    return (
        isinstance(inner, tuple)
        and inner[0] in ("param", "free")
        and any(part in inner[1].rpartition(".")[2] for part in ("scale", "temp", "tau"))
    )


def transposed(x: Tree) -> Tree:
    if x[0] == "t":
        inner: Tree = x[1]
        return inner
    if x[0] == "mm":
        return ("mm", transposed(x[2]), transposed(x[1]))
    scaled = x[0] == "mul" and all(f[0] in ("mm", "const", "inv") or _is_scale(f) for f in x[1:])
    if scaled and sum(f[0] == "mm" for f in x[1:]) == 1:
        return ("mul", *(transposed(f) if f[0] == "mm" else f for f in x[1:]))
    if x[0] == "eq" and x[1] == transposed(x[2]):
        return x
    return ("t", x)


def equal(a: Tree, b: Tree) -> Tree:
    """Of `(p - p.t()) == 0` too."""
    if b == ("const", 0.0) and a[0] == "add" and len(a) == 3:
        one, other = a[1:]
        negated = product_of([MINUS, other])
        return ("eq", one, negated)
    return ("eq", a, b)


def elementwise(name: str, x: Tree) -> Tree:
    if name == "log" and x[0] == "softmax":
        return ("log_softmax", x[1])
    if name == "exp" and x[0] == "log_softmax":
        return ("softmax", x[1])
    return (name, x)


def linear(operation: tuple[str, int], x: Tree) -> Tree:
    """A sum or mean: terms and numbers come out of it, `mean` of all of a matrix stays."""
    name, dim = operation
    if x[0] == "add":
        return sum_of([linear(operation, term) for term in x[1:]])
    if x[0] == "mul" and x[1][0] == "const":
        return product_of([x[1], linear(operation, product_of(list(x[2:])))])
    if x[0] == "const":
        raise UnknownError
    return (name, x, dim)


def reshaped(x: Tree, arguments: list[str]) -> Tree:
    if not arguments:  # `x.view(*shape)` has one, `x.view(size=shape)` none
        raise UnknownError
    shape = arguments[0].strip("()[]").split(", ") if len(arguments) == 1 else arguments
    if shape[-1] == "1" and len(shape) <= 2:  # [B, 1], and unsqueeze(1)
        return ("col", x) if x[0] != "col" else x
    if shape[0] == "1" and len(shape) == 2:
        return transposed(("col", x)) if x[0] != "col" else transposed(x)
    raise UnknownError
