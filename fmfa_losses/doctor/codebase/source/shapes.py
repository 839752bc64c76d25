"""Which equation a function computes, whatever its name: found only where the canonical forms are the same."""

import ast
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from .algebra import Tree, UnknownError
from .canonical import result
from .equations import EQUATIONS

__all__ = ["Shape", "defaults", "recognise"]

STEPS = 20_000  # of matching one function with one equation
NODES = 1500  # a longer function is no equation
SYMMETRIC = {
    "sdm": ("image", "text"),
    "cmpm": ("image", "text"),
    "itc": ("image", "text"),
    "identity": ("image_logits", "text_logits"),
}
Bound = dict[str, Tree]


class Shape(NamedTuple):
    """The equation, and what its parameters are in the function: the text of a parameter, a number or an attribute.

    It holds when of the `optional` parameters, those that are None unless passed, `given` alone is passed.
    """

    name: str
    arguments: dict[str, str]
    parameters: list[str]
    defaults: dict[str, str]
    optional: list[str]
    given: str | None = None


_PATTERNS: dict[str, Tree] = {}


def _patterns() -> dict[str, Tree]:
    if not _PATTERNS:
        for function in ast.parse(EQUATIONS).body:
            assert isinstance(function, ast.FunctionDef)
            _PATTERNS[function.name] = result(function)
    return _PATTERNS


def defaults(function: ast.FunctionDef) -> dict[str, str]:
    """The text of every default."""
    a = function.args
    found = {p.arg: ast.unparse(d) for p, d in zip(a.args[::-1], a.defaults[::-1], strict=False)}
    return found | {p.arg: ast.unparse(d) for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True) if d is not None}


def recognise(function: ast.FunctionDef, *, method: bool = False) -> list[Shape]:
    """The equation of a function with its optional arguments left out, and with one of them passed."""
    a = function.args
    if (
        function.decorator_list
        or a.vararg
        or a.kwarg
        or a.posonlyargs
        or next(islice(ast.walk(function), NODES, None), None)
    ):
        return []
    parameters = [argument.arg for argument in (*a.args, *a.kwonlyargs)][1 if method else 0 :]
    if not 2 <= len(parameters) <= 14:
        return []
    values = defaults(function)
    optional = [name for name, default in values.items() if default in ("None", "False")]
    found = []
    for given in (None, *optional):
        try:
            tree = result(function, given)
        except (UnknownError, RecursionError, ArithmeticError, LookupError, TypeError, ValueError):
            continue  # an unforeseen expression makes the function unknown, and not its file unread
        matched = _matched(tree)
        if matched is not None:
            name, arguments = matched
            found.append(Shape(name, _image_first(name, arguments, parameters), parameters, values, optional, given))
    return found


def _image_first(name: str, arguments: dict[str, str], parameters: list[str]) -> dict[str, str]:
    """The arguments of an equation with the same value when image and text change places: by name, then by order."""
    if name not in SYMMETRIC or not {arguments[key] for key in SYMMETRIC[name]} <= set(parameters):
        return arguments
    pair = sorted(
        (arguments[key] for key in SYMMETRIC[name]),
        key=lambda own: ("text" in own or "txt" in own, parameters.index(own)),
    )
    return arguments | dict(zip(SYMMETRIC[name], pair, strict=True))


def _matched(tree: Tree) -> tuple[str, dict[str, str]] | None:
    """The equation that an expression is, and what its parameters are."""
    for name, pattern in _patterns().items():
        matcher = _Matcher()
        try:
            bound = next(matcher(pattern, tree, {}), None)
        except UnknownError:
            bound = None
        if bound is None or not all(value[0] in ("param", "free", "const") for value in bound.values()):
            continue
        taken = [value[1] for value in bound.values() if value[0] == "param"]
        if len(set(taken)) == len(taken):
            return name, {key: _text(value) for key, value in bound.items()}
    return None


def _text(value: Tree) -> str:
    return str(value[1]) if value[0] != "const" else repr(value[1])


class _Matcher:
    """Patterns in the order of sums and products that fits; every way, as the first one may not fit the rest."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, pattern: Tree, tree: Tree, bound: Bound) -> Iterator[Bound]:
        self.steps += 1
        if self.steps > STEPS:
            raise UnknownError
        if pattern[0] == "param":
            if pattern[1] not in bound:
                yield {**bound, pattern[1]: tree}
            elif bound[pattern[1]] == tree:
                yield bound
        elif pattern[0] != tree[0] or len(pattern) != len(tree):
            return
        elif pattern[0] in ("const", "free"):
            if pattern == tree:
                yield bound
        elif pattern[0] in ("add", "mul", "eq"):
            yield from self._unordered(pattern[1:], tree[1:], bound)
        else:
            yield from self._ordered(pattern[1:], tree[1:], bound)

    def _ordered(self, patterns: Tree, trees: Tree, bound: Bound) -> Iterator[Bound]:
        if not patterns:
            yield bound
        elif not isinstance(patterns[0], tuple) or not isinstance(trees[0], tuple):
            if patterns[0] == trees[0]:
                yield from self._ordered(patterns[1:], trees[1:], bound)
        else:
            for more in self(patterns[0], trees[0], bound):
                yield from self._ordered(patterns[1:], trees[1:], more)

    def _unordered(self, patterns: Tree, trees: Tree, bound: Bound) -> Iterator[Bound]:
        if not patterns:
            yield bound
            return
        # What is no parameter first: a parameter fits anything.
        index = max(range(len(patterns)), key=lambda i: patterns[i][0] != "param")
        first, rest = patterns[index], patterns[:index] + patterns[index + 1 :]
        for i, tree in enumerate(trees):
            for more in self(first, tree, bound):
                yield from self._unordered(rest, trees[:i] + trees[i + 1 :], more)
