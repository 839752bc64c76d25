"""What a name of a file is bound to where it is called: an import, a function of the file, or something unknown."""

import ast
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Callee", "Scopes", "chain"]

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


class Callee(NamedTuple):
    """A function that is called: `name` of a module, or of the file itself where `module` is None.

    `level` counts the dots of a relative import; `line` and `text` are the import's, of line 0 where there is none.
    """

    name: str
    module: str | None = None
    level: int = 0
    line: int = 0
    text: str = ""
    star: bool = False
    defined: bool = False  # by a function of this file


class _Import(NamedTuple):
    prefix: str  # what the local name stands for: "model.objectives"
    level: int
    line: int
    text: str


class _Scope:
    def __init__(self, node: ast.AST | None, body: list[ast.stmt] | list[ast.expr]) -> None:
        self.is_class = isinstance(node, ast.ClassDef)
        self.imports: dict[str, _Import] = {}
        self.functions: set[str] = set()
        self.others: set[str] = set()
        self.stars: list[_Import] = []
        if isinstance(node, FUNCTIONS):
            a = node.args
            every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            self.others |= {argument.arg for argument in every}
        for inner in _own(body):
            self._bind(inner)

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                prefix = alias.name if alias.asname else alias.name.partition(".")[0]
                self.imports[alias.asname or prefix] = _Import(prefix, 0, node.lineno, ast.unparse(node))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                text = ast.unparse(node)
                if alias.name == "*":
                    self.stars.append(_Import(node.module or "", node.level, node.lineno, text))
                else:
                    prefix = f"{node.module}.{alias.name}" if node.module else alias.name
                    self.imports[alias.asname or alias.name] = _Import(prefix, node.level, node.lineno, text)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self.functions.add(node.name)
        elif isinstance(node, ast.ClassDef):
            self.others.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            self.others.add(node.id)


def _own(body: list[ast.stmt] | list[ast.expr]) -> Iterator[ast.AST]:
    """Nodes of a scope, without what is inside its functions and classes."""
    pending: list[ast.AST] = list(body)
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            pending += ast.iter_child_nodes(node)


def chain(node: ast.expr) -> list[str] | None:
    """["a", "b", "c"] of `a.b.c`; None of anything else."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else None


class Scopes:
    """The scopes around the node that is visited, the innermost last."""

    def __init__(self, modules: list[ast.Module]) -> None:
        self.stack = [_Scope(None, [statement for module in modules for statement in module.body])]

    def enter(self, node: ast.AST) -> None:
        body = [node.body] if isinstance(node, ast.Lambda) else getattr(node, "body", [])
        self.stack.append(_Scope(node, body))

    def leave(self) -> None:
        self.stack.pop()

    def callee(self, function: ast.expr) -> Callee | None:
        """Of this library's own functions, of methods and of what a variable holds: None."""
        names = chain(function)
        if names is None:
            return None
        root, attributes = names[0], names[1:]
        for scope in reversed(self.stack):
            if scope.is_class and scope is not self.stack[-1]:
                continue
            if root in scope.imports:
                return _imported(scope.imports[root], attributes)
            if root in scope.others:
                return None
            if root in scope.functions:
                return None if attributes else Callee(root, defined=True)
        if attributes:
            return None
        stars = [star for scope in self.stack for star in scope.stars]
        if any(_is_ours(star.prefix) for star in stars):
            return None
        if stars:
            last = stars[-1]
            return Callee(root, last.prefix, last.level, last.line, last.text, star=True)
        return Callee(root)


def _imported(found: _Import, attributes: list[str]) -> Callee | None:
    module, _, name = ".".join([found.prefix, *attributes]).rpartition(".")
    if _is_ours(found.prefix) and not found.level:
        return None
    return Callee(name, module, found.level, found.line, found.text)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "fmfa_losses"
