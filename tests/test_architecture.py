"""Imports point down, a leading underscore stays in its folder, and files and functions keep to their sizes."""

import ast
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
    "losses": {"ops", "distributed"},
    "heads": {"ops", "distributed"},
    "cached": {"ops", "distributed"},
    "fmfa": {"ops", "distributed", "losses", "heads"},
    "functional": {"ops", "losses", "heads"},
    "compat": {"ops", "distributed", "losses", "heads", "fmfa", "retrieval"},
    "plot": {"ops", "distributed", "losses", "heads", "fmfa", "retrieval"},
    "doctor": {"ops", "distributed", "losses", "heads", "fmfa", "retrieval", "compat"},
}
MAY_IMPORT["__init__"] = MAY_IMPORT["__main__"] = {*MAY_IMPORT, "__init__"}

# What breaks a rule today. A line that is not needed any more fails, so that the lists only become shorter.
UPWARD: set[str] = set()
CIRCLES: set[str] = set()
BORROWED: set[str] = set()
LONG_FILES = {
    "kernels/aggregation.py": 522,
    "kernels/hard_similarity.py": 568,
    "kernels/asdm_tiles.py": 605,
}
LONG_FUNCTIONS = {
    "fmfa_losses/ops/similarity_distribution/api.py: similarity_distribution_loss": 64,
    "kernels/asdm_tiles.py: _gradient_kernel": 143,
}


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


def test_the_package_has_at_most_14_entries():
    entries = {path.name for path in (ROOT / "fmfa_losses").iterdir()} - {"__pycache__"}
    assert len(entries) <= 14, sorted(entries)


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
