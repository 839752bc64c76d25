"""What to write for an import of objectives: one module of compat where it has all that is called, else several."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .findings import Calls, Import, Missing
from .source.published import MODULES

__all__ = ["Imported", "import_advice"]


@dataclass
class Imported:
    """An import of a file and the calls that go through it."""

    line: int
    code: str
    cell: int | None
    star: bool
    names: bool  # whether functions are imported by name, and not their module
    local: str  # how a function is called: "objectives.{}" or "{}"
    called: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # names that compat has
    aliases: dict[str, str] = field(default_factory=dict)  # what a function that is imported by name is called
    missing: dict[tuple[str, str], list[int]] = field(default_factory=lambda: defaultdict(list))  # (name, why)
    notes: list[str] = field(default_factory=list)


def modules_for(names: Iterable[str]) -> dict[str, str]:
    """{name: module of compat}; one module where one has them all, otherwise as few as there must be."""
    names = set(names)
    for module, has in MODULES.items():
        if names <= has:
            return dict.fromkeys(names, module)
    chosen: dict[str, str] = {}
    while left := names - chosen.keys():
        module = max(MODULES, key=lambda m: len(MODULES[m] & left))
        if not MODULES[module] & left:
            raise ValueError(f"compat must have every name that is called, got {sorted(left)}")
        chosen.update(dict.fromkeys(MODULES[module] & left, module))
    return chosen


def import_advice(file: Path, imported: Imported) -> Import:
    """The lines to write for an import, in order."""
    modules = modules_for(imported.called)
    grouped: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for name, lines in imported.called.items():
        plain = name.partition("(")[0]
        grouped[modules[name]].setdefault(plain, []).extend(lines)
    keep = bool(imported.missing) or imported.star or bool(_besides(imported))
    write = _by_name(grouped, imported.aliases) if imported.names else _by_module(grouped, imported, keep)
    missing = tuple(Missing(name, tuple(lines), why) for (name, why), lines in sorted(imported.missing.items()))
    notes = tuple(dict.fromkeys(imported.notes))
    calls = tuple(
        Calls(_called(module, imported, len(grouped) > 1 or keep) + imported.aliases.get(name, name), module, name,
              tuple(sorted(lines)))
        for module, names in grouped.items() for name, lines in names.items()
    )  # fmt: skip
    return Import(file, imported.line, imported.code, tuple(write), keep, calls, missing, notes, imported.cell)


def _besides(imported: Imported) -> set[str]:
    """What is imported by the same line, by name, and not replaced."""
    if not imported.names:
        return set()
    names = {part.partition(" as ")[0].strip() for part in imported.code.partition(" import ")[2].split(",")}
    return names - {name.partition("(")[0] for name in imported.called}


def _called(module: str, imported: Imported, aliased: bool) -> str:
    """What stands before the name of a function afterwards: "irra_objectives."."""
    if imported.names:
        return ""
    return f"{module}_objectives." if aliased else f"{imported.local}." if "." not in imported.local else f"{module}."


def _by_name(grouped: dict[str, dict[str, list[int]]], aliases: dict[str, str]) -> list[str]:
    def named(name: str) -> str:
        return name if aliases.get(name, name) == name else f"{name} as {aliases[name]}"

    return [
        f"from fmfa_losses.compat.{module} import {', '.join(map(named, sorted(names)))}"
        for module, names in grouped.items()
    ]


def _by_module(grouped: dict[str, dict[str, list[int]]], imported: Imported, keep: bool) -> list[str]:
    local = imported.local
    if len(grouped) == 1 and not keep:
        return [f"from fmfa_losses.compat import {next(iter(grouped))} as {local}" if "." not in local else
                f"from fmfa_losses.compat import {next(iter(grouped))}"]  # fmt: skip
    return [f"from fmfa_losses.compat import {module} as {module}_objectives" for module in grouped]
