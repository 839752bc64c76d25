"""Imports point down, a leading underscore stays in its folder, and files and functions keep to their sizes."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks import ROOT

# Each folder or file of the package, and what it may import besides itself.
MAY_IMPORT = {
    "kernels": set(),
    "ops": {"kernels"},
    "distributed": {"ops"},
    "retrieval": {"ops"},
    "noise": {"ops"},
    "losses": {"ops", "distributed"},
    "heads": {"ops", "distributed"},
    "cached": {"ops", "distributed"},
    "fmfa": {"ops", "distributed", "losses", "heads"},
    "functional": {"ops", "losses", "heads"},
    "compat": {"ops", "distributed", "losses", "heads", "fmfa", "retrieval"},
    "plot": {"ops", "distributed", "losses", "heads", "fmfa", "retrieval"},
    "integrations": {"ops", "losses", "retrieval"},
    "doctor": {"ops", "distributed", "losses", "heads", "fmfa", "retrieval", "compat"},
}
MAY_IMPORT["__init__"] = MAY_IMPORT["__main__"] = {*MAY_IMPORT, "__init__"}

# What breaks a rule today. A line that is not needed any more fails, so that the lists only become shorter.
UPWARD: set[str] = set()
CIRCLES: set[str] = set()
BORROWED: set[str] = set()
# What tests name although it is private: what kernels share is tested by itself, and so are kernels, whose names it is
# that profiles show.
PRIVATE_IN_TESTS = {
    "benchmarks/test_benchmarks.py: fmfa_losses.kernels._launch",
    "benchmarks/test_stand_in.py: _Recorder",
    "benchmarks/test_stand_in.py: fmfa_losses.kernels._launch",
    "gpu/test_gpu_step.py: fmfa_losses.kernels._matches",
    "interpreter/test_aggregation_kernels.py: fmfa_losses.kernels._scores",
    "interpreter/test_hard_similarity_kernels.py: _cosine_kernel",
    "interpreter/test_hard_similarity_kernels.py: fmfa_losses.kernels._launch",
    "interpreter/test_hard_similarity_kernels.py: fmfa_losses.kernels._matches",
    "interpreter/test_hard_similarity_kernels.py: fmfa_losses.kernels._tile",
    "interpreter/test_similarity_distribution_kernels.py: _prepare_kernel",
    "interpreter/test_similarity_distribution_kernels.py: fmfa_losses.kernels._asdm",
    "interpreter/test_similarity_distribution_kernels.py: fmfa_losses.kernels._launch",
    "ops/test_aggregation.py: fmfa_losses.kernels._launch",
    "ops/test_similarity_distribution.py: _cosines_kernel",
    "ops/test_similarity_distribution.py: _dlogits_kernel",
    "ops/test_similarity_distribution.py: _gradient_kernel",
    "ops/test_similarity_distribution.py: _kept_dlogits_kernel",
    "ops/test_similarity_distribution.py: _kept_gradient_kernel",
    "ops/test_similarity_distribution.py: _prepare_kernel",
    "ops/test_similarity_distribution.py: _row_loss_kernel",
    "ops/test_similarity_distribution.py: _update_kernel",
    "test_kernels.py: fmfa_losses.kernels._launch",
}
NAMED_TUPLE = {"_asdict", "_fields", "_replace"}  # public, whatever their underscores say
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}


class Import(NamedTuple):
    importer: str  # module
    module: str  # where the name comes from
    name: str  # what is imported of it; "" for the module itself
    late: bool  # inside a function, so when it is called


def module_names(root: Path) -> dict[str, Path]:
    """Module -> file. kernels/ installs as fmfa_losses.kernels."""
    files = [*(root / "fmfa_losses").rglob("*.py"), *(root / "kernels").rglob("*.py")]
    names = {}
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        parts = parts if parts[0] == "fmfa_losses" else ("fmfa_losses", *parts)
        names[".".join(parts).removesuffix(".__init__")] = file
    return names


def imports_of(importer: str, file: Path, modules: dict[str, Path]) -> Iterator[Import]:
    """Those of the package's own modules; what type checkers alone see counts as imported with the module."""
    tree = ast.parse(file.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {id(node) for function in functions for node in ast.walk(function)}
    folder = importer if file.name == "__init__.py" else importer.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = folder.split(".")[: len(folder.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*start, *filter(None, [node.module])])
            whole = [f"{source}.{alias.name}" for alias in node.names]
            found = [
                (full, "") if full in modules else (source, alias.name)
                for full, alias in zip(whole, node.names, strict=True)
            ]
        else:
            continue
        for module, name in found:
            if module in modules:
                yield Import(importer, module, name, id(node) in late)


def all_imports(root: Path = ROOT) -> list[Import]:
    modules = module_names(root)
    return [entry for name, file in modules.items() for entry in imports_of(name, file, modules)]


def wing(module: str) -> str:
    """The folder or file of the package's first level."""
    return [*module.split("."), "__init__"][1]


def upward(imports: list[Import]) -> set[str]:
    return {
        f"{entry.importer} -> {entry.module}"
        for entry in imports
        if wing(entry.module) not in MAY_IMPORT[wing(entry.importer)] | {wing(entry.importer)}
    }


def circles(imports: list[Import], allowed: set[str]) -> set[str]:
    """Of modules that import each other when they are imported; an import that points up is reported as that."""
    graph: dict[str, set[str]] = {}
    for entry in imports:
        if not entry.late and f"{entry.importer} -> {entry.module}" not in allowed:
            graph.setdefault(entry.importer, set()).add(entry.module)
    found = set()
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = error.args[1]
            found.add(" <-> ".join(sorted(set(circle))))
            graph[circle[1]].discard(circle[0])
            continue
        return found


def borrowed(imports: list[Import], root: Path = ROOT) -> set[str]:
    """Modules and names with a leading underscore that another folder imports."""
    folder = {name: file.parent for name, file in module_names(root).items()}
    found = set()
    for entry in imports:
        private = any(part.startswith("_") and not part.startswith("__") for part in entry.module.split("."))
        private |= entry.name.startswith("_") and not entry.name.startswith("__")
        if private and folder[entry.importer] != folder[entry.module]:
            found.add(f"{entry.importer} -> {entry.module}{'.' if entry.name else ''}{entry.name}")
    return found


def is_private(name: str) -> bool:
    """Or a part of a dotted name is."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_names(code: str) -> set[str]:
    """What code outside of the package and the benchmarks names of them that starts with an underscore.

    Methods are found by their attribute: of whatever object, unless its expression starts with a module of others.
    """
    tree, found, of_others = ast.parse(code), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] not in ("fmfa_losses", "benchmarks", "helpers"):
                    of_others.add((alias.asname or alias.name).partition(".")[0])
                elif is_private(alias.name):
                    found.add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.partition(".")[0] not in ("fmfa_losses", "benchmarks", "helpers"):
                of_others |= {alias.asname or alias.name for alias in node.names}
            elif is_private(module):
                found.add(module)
            else:
                found |= {f"{module}.{alias.name}" for alias in node.names if is_private(alias.name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in NAMED_TUPLE:
            if ast.unparse(node).partition(".")[0] not in of_others | {"self"}:
                found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr", "patch.object")):
            owner, *names = node.args or [node]
            if ast.unparse(owner).partition(".")[0] not in of_others:
                texts = [name.value for name in names[:1] if isinstance(name, ast.Constant)]
                found |= {text for text in texts if isinstance(text, str) and is_private(text)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # programs that tests start
            imports = re.findall(r"from ((?:fmfa_losses|benchmarks)[\w.]*) import (.*)", node.value)
            found |= {f"{module}.{name}" for module, names in imports for name in re.findall(r"\b_[a-z]\w*", names)}
    return found


def sizes() -> tuple[dict[str, int], dict[str, int]]:
    """Lines of files over 400, and of functions over 60 (kernels 140)."""
    files, functions = {}, {}
    for folder in ("fmfa_losses", "kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text, name = path.read_text(), str(path.relative_to(ROOT))
            if len(text.splitlines()) > 400:
                files[name] = len(text.splitlines())
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    length = (node.end_lineno or 0) - node.lineno + 1
                    if length > (140 if folder == "kernels" else 60):
                        functions[f"{name}: {node.name}"] = length
    return files, functions


def test_imports_point_down():
    assert upward(all_imports()) == UPWARD


def test_no_module_imports_itself_through_others():
    assert circles(all_imports(), UPWARD) == CIRCLES


def test_a_leading_underscore_stays_in_its_folder():
    assert borrowed(all_imports()) == BORROWED


def test_tests_name_nothing_private():
    tests = ROOT / "tests"
    found = {
        f"{file.relative_to(tests)}: {name}"
        for file in tests.rglob("*.py")
        if file != Path(__file__)
        for name in private_names(file.read_text())
    }
    assert found == PRIVATE_IN_TESTS


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from fmfa_losses.ops import _a", {"fmfa_losses.ops._a"}),
        ("from fmfa_losses.ops._a import b", {"fmfa_losses.ops._a"}),
        ("import benchmarks._a", {"benchmarks._a"}),
        ("import benchmarks.gpu as g\ng._a()", {"_a"}),
        ("def test(head):\n    head.part._a(1)", {"_a"}),
        ("monkeypatch.setattr(head, '_a', 1)", {"_a"}),
        ("run('from benchmarks.gpu import _a')", {"benchmarks.gpu._a"}),
        ("import torch\ntorch._a.b()\nx._replace(a=1)\nx.__dict__", set()),
        ("from torch._a import b\nmonkeypatch.setattr(b, '_c', 1)", set()),
        ("from fmfa_losses.__main__ import main", set()),
    ],
)
def test_private_names_are_found(code, found):
    assert private_names(code) == found


@pytest.mark.parametrize("kind", ["files", "functions"])
def test_nothing_outgrows_its_size(kind):
    found, known = (sizes()[0], LONG_FILES) if kind == "files" else (sizes()[1], LONG_FUNCTIONS)
    longer = {name: length for name, length in found.items() if length > known.get(name, 0)}
    assert not longer, "split these, or make them shorter"
    assert not known.keys() - found.keys(), "short enough now: remove them from the list"


def test_functional_is_public_names_alone():
    tree = ast.parse((ROOT / "fmfa_losses" / "functional.py").read_text())
    docstring, *rest = tree.body
    assert isinstance(docstring, ast.Expr)
    imports = [node for node in rest if isinstance(node, ast.ImportFrom)]
    others = [node for node in rest if node not in imports]
    assert [ast.unparse(node.targets[0]) for node in others if isinstance(node, ast.Assign)] == ["__all__"]
    assert len(others) == 1
    names = [alias.asname or alias.name for node in imports for alias in node.names]
    assert sorted(names) == sorted(ast.literal_eval(others[0].value))
    assert not [name for name in names if name.startswith("_")]


def test_the_package_has_at_most_15_entries():
    entries = {path.name for path in (ROOT / "fmfa_losses").iterdir()} - {"__pycache__", "py.typed"}  # an empty mark
    assert len(entries) <= 15, sorted(entries)


def test_the_rules_see_what_breaks_them(tmp_path):
    """Of a package that breaks each rule once."""
    files = {
        "__init__.py": "",
        "ops/__init__.py": "",
        "ops/a.py": "from .b import f",
        "ops/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import a",
        "ops/c.py": "def f():\n    from ..losses import sdm",
        "losses/__init__.py": "",
        "losses/sdm.py": "import fmfa_losses.ops.a\nfrom ..ops.c import _g\nfrom . import _own",
        "losses/_own.py": "",
    }
    for name, text in files.items():
        path = tmp_path / "fmfa_losses" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    imports = all_imports(tmp_path)
    assert upward(imports) == {"fmfa_losses.ops.c -> fmfa_losses.losses.sdm"}
    assert circles(imports, set()) == {"fmfa_losses.ops.a <-> fmfa_losses.ops.b"}
    assert borrowed(imports, tmp_path) == {"fmfa_losses.losses.sdm -> fmfa_losses.ops.c._g"}
