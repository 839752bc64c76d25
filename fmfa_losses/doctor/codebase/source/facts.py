"""The facts of one source: what it imports, which functions it defines, and which of interest it calls.

Plain dictionaries and lists, as they leave this process as JSON. What they mean together is for `examination.py`.
"""

import ast
import hashlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from .aggregation import aggregation
from .bindings import Callee, Scopes, chain
from .evaluation import inline, rankings
from .expressions import Values, is_normalised, values
from .published import BODIES, PUBLISHED
from .shapes import Shape, defaults, recognise

__all__ = ["Cell", "digest", "facts", "short"]

LENGTH = 300  # characters of code that are quoted
MOST = 2000  # calls of one source that are reported
LOSS = re.compile("loss|contrast")  # in the name of an inherited method that is looked up
ARGUMENTS = 50  # of a call; one with more is none of ours


class Cell(NamedTuple):
    """A module, or a cell of a notebook with its number."""

    number: int | None
    tree: ast.Module


def facts(cells: list[Cell], source: bytes) -> dict[str, Any]:
    """imports, definitions, classes, calls, rankings, aggregations, and whether it is a script, and was cut."""
    visitor = _Visitor(cells, source)
    for cell in cells:
        visitor.cell = cell.number
        visitor.visit(cell.tree)
    trees = [cell.tree for cell in cells]
    found: dict[str, list[dict[str, Any]]] = {"calls": visitor.calls, "rankings": visitor.rankings,
                                              "aggregations": visitor.aggregations}  # fmt: skip
    return {
        "imports": sorted({name for tree in trees for name in _imports(ast.walk(tree))}),
        "used": sorted(_used(trees)),
        "definitions": visitor.definitions,
        "classes": visitor.classes,
        "script": any(cell.number is not None or _is_script(cell.tree) for cell in cells),
        "others": visitor.others(),
        "cut": any(len(items) > MOST for items in found.values()),
        **{name: items[:MOST] for name, items in found.items()},
    }


def short(text: str) -> str:
    return text if len(text) <= LENGTH else text[:LENGTH] + " ..."


def _quoted(node: ast.AST) -> str:
    return short(ast.unparse(node))


def _used(trees: list[ast.Module]) -> set[tuple[int, str]]:
    """The imports without those of `from a import b` where nothing reads b: test.py of IRRA imports an Evaluator."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    kept = [node for node in nodes if not isinstance(node, ast.ImportFrom)
            or any(alias.name == "*" or (alias.asname or alias.name) in read for alias in node.names)]  # fmt: skip
    return set(_imports(kept))


def _imports(nodes: Iterable[ast.AST]) -> list[tuple[int, str]]:
    """(level, dotted name) of modules that may be imported: of `from a import b` both a and a.b."""
    found: list[tuple[int, str]] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
            found += ((node.level, f"{node.module}.{a.name}" if node.module else a.name) for a in node.names)
    return found


def _is_script(tree: ast.Module) -> bool:
    """Whether the module does something when it is run: statements at its top that call functions, or a main guard."""
    return any(isinstance(node, (ast.If, ast.For, ast.While, ast.With)) or
               (isinstance(node, (ast.Expr, ast.Assign)) and isinstance(node.value, ast.Call))
               for node in tree.body)  # fmt: skip


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


def _results(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int | None:
    """How many results every `return` of a function has; None where they differ."""
    returned = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return) and inner.value]
    counts = {len(value.elts) if isinstance(value, ast.Tuple) else 1 for value in returned}
    return counts.pop() if len(counts) == 1 else None


def digest(node: ast.FunctionDef) -> str:
    """Of a function's body without its docstring; spaces, brackets and moves to a device change nothing."""
    documented = ast.get_docstring(node, clean=False) is not None
    text = "\n".join(ast.unparse(statement) for statement in node.body[documented:])
    return hashlib.sha256(re.sub(r"[\s()]", "", re.sub(r"\.(cuda|cpu)\(\)", "", text)).encode()).hexdigest()[:16]


class _Visitor(ast.NodeVisitor):
    def __init__(self, cells: list[Cell], source: bytes) -> None:
        # Most files have no such word, and need not be searched for what is made of it.
        self.ranks = b"rank" in source or b"argsort" in source
        self.aggregates = b"where" in source and b"transpose" in source
        self.cell: int | None = None
        self.scopes = Scopes([cell.tree for cell in cells])
        self.calls: list[dict[str, Any]] = []
        self.rankings: list[dict[str, Any]] = []
        self.aggregations: list[dict[str, Any]] = []
        self.attributes: list[tuple[Callee, int]] = []  # of imported modules, with their lines
        self.targets: dict[ast.AST, int] = {}  # of calls whose result is unpacked
        self.around: list[dict[str, Any]] = []  # the classes around, as in `classes`
        self.classes: dict[str, dict[str, Any]] = {}
        self.definitions: dict[str, dict[str, Any]] = {}
        self.top: set[ast.AST] = set()
        self.shapes: dict[str, list[Shape]] = {}
        self.functions: list[ast.FunctionDef | ast.Module] = []  # around
        self.known: tuple[ast.AST | None, Values] = None, {}  # what names are assigned in the one that was asked last
        for node in (node for cell in cells for node in cell.tree.body):
            if isinstance(node, ast.FunctionDef):
                self.top.add(node)
                shapes = recognise(node)
                if shapes:
                    self.shapes[node.name] = shapes
                self.definitions[node.name] = {
                    "line": node.lineno,
                    "parameters": _parameters(node),
                    "defaults": defaults(node),
                    "results": _results(node),
                    "ranks": self.ranks and inline(node) is not None,
                    "shapes": [shape._asdict() for shape in shapes],
                    "digest": digest(node) if node.name in BODIES else "",
                }

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        # The body of a published function is replaced with it; a method of the same name belongs to the model.
        replaced = node in self.top and node.name in PUBLISHED and node.name != "rank"
        if not replaced and not (node in self.top and node.name in self.shapes):
            self.scopes.enter(node)
            self._statements(node)
            self.scopes.leave()

    def visit_Module(self, node: ast.Module) -> None:
        self._statements(node)

    def _statements(self, node: ast.FunctionDef | ast.Module) -> None:
        """What is found in all of a function's statements, then what is in each."""
        self.functions.append(node)
        if self.ranks:
            self.rankings += ({**found, "cell": self.cell} for found in rankings(node, self.scopes))
        if self.aggregates:
            self.aggregations += ({**found, "cell": self.cell} for found in aggregation(node))
        self.generic_visit(node)
        self.functions.pop()

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._inside(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._inside(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        methods = {m.name: recognise(m, method=True) for m in node.body if isinstance(m, ast.FunctionDef)}
        own = {
            "name": node.name,
            "bases": [callee._asdict() for base in node.bases if (callee := self._base(base)) is not None],
            "methods": {name: [shape._asdict() for shape in shapes] for name, shapes in methods.items()},
        }
        self.classes.setdefault(node.name, own)
        self.around.append(own)
        self._inside(node)
        self.around.pop()

    def _base(self, node: ast.expr) -> Callee | None:
        """A base class: an imported one, or one of this file."""
        callee = self.scopes.callee(node)
        return Callee(node.id, defined=True) if callee is None and isinstance(node, ast.Name) else callee

    def _inside(self, node: ast.AST) -> None:
        self.scopes.enter(node)
        self.generic_visit(node)
        self.scopes.leave()

    def visit_Assign(self, node: ast.Assign) -> None:
        target = node.targets[0]
        if isinstance(node.value, ast.Call) and isinstance(target, (ast.Tuple, ast.List)):
            self.targets[node.value] = len(target.elts)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        callee = self.scopes.callee(node)
        if callee is not None and callee.module and callee.name not in PUBLISHED:
            self.attributes.append((callee, node.lineno))
        self.generic_visit(node)

    def others(self) -> list[dict[str, Any]]:
        """What is used besides of modules of which published functions are called."""
        callees = [call["callee"] for call in self.calls if call["callee"]["name"] in PUBLISHED]
        modules = {(callee["line"], callee["text"], callee["module"]) for callee in callees}
        found = ((c, line) for c, line in self.attributes if (c.line, c.text, c.module) in modules)
        return [{"callee": callee._asdict(), "line": line} for callee, line in found][:MOST]

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if len(self.calls) > MOST or len(node.args) + len(node.keywords) > ARGUMENTS:
            return
        method = self._method(node)
        if method is not None:
            self._add(node, Callee(method), [], self.around[-1]["name"])
            return
        callee = self.scopes.callee(node.func)
        if callee is None or callee.name == "rank":
            return
        shapes = self.shapes.get(callee.name, []) if callee.defined else []
        known = callee.name in PUBLISHED
        imported = callee.module is not None and not callee.star
        if shapes or known or (imported and (callee.name.startswith("compute_") or callee.name.endswith("_loss"))):
            self._add(node, callee, shapes)

    def _method(self, node: ast.Call) -> str | None:
        """The name in `self.calc_contrastive(...)`, where that may be an equation: of the class or of its bases."""
        names = chain(node.func)
        if not self.around or names is None or len(names) != 2 or names[0] != "self":
            return None
        own, bases = self.around[-1]["methods"], self.around[-1]["bases"]
        equation = own[names[1]] if names[1] in own else bases and LOSS.search(names[1])
        return names[1] if equation else None

    def _add(self, node: ast.Call, callee: Callee, shapes: list[Shape], owner: str | None = None) -> None:
        unpacked = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
        self.calls.append(
            {
                "line": node.lineno,
                "cell": self.cell,
                "code": _quoted(node),
                "callee": callee._asdict(),
                "class": owner,
                "shapes": [shape._asdict() for shape in shapes],
                "normalised": self._normalised(node) if shapes or owner or callee.module else [],
                "function": _quoted(node.func),
                "arguments": [_quoted(argument) for argument in node.args],
                "keywords": {k.arg: _quoted(k.value) for k in node.keywords if k.arg is not None},
                "unpacked": unpacked,
                "targets": self.targets.get(node),
            }
        )

    def _normalised(self, node: ast.Call) -> list[str]:
        """Texts of the arguments that have length 1, as far as the functions around say."""
        if self.known[0] is not self.functions[-1]:
            self.known = self.functions[-1], values(self.functions[-1])
        arguments = [*node.args, *(k.value for k in node.keywords)]
        return [_quoted(argument) for argument in arguments if is_normalised(argument, self.known[1])]
