"""An examination as text, and as JSON whose schema docs/doctor.md describes."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from .findings import Examination, Finding, Import

__all__ = ["SCHEMA", "as_dict", "as_text"]

SCHEMA = 1  # goes up when a field changes its meaning or goes away; new fields may come at any time
IMPORTS = "The same values by the import:"
LINES = "Line by line, in names of fmfa_losses, its functional and retrieval, and `from fmfa_losses import compat`:"


def as_text(found: Examination) -> Iterator[str]:
    """The lines of the report: imports, which change the least, then line by line, then what was not read."""
    if not found.findings:
        yield f"{found.path}: no call that this library replaces"
    if found.imports:
        yield IMPORTS
    for item in found.imports:
        yield from _import(item)
    if found.findings:
        yield from [""] * bool(found.imports)
        yield LINES
    for finding in found.findings:
        yield from _finding(finding)
    for unread in found.unreadable:
        yield f"{unread.file}: not read: {unread.reason}"
    for left_out in found.left_out:
        yield f"{left_out.file}: left out: {left_out.reason}"


def _where(item: Finding | Import) -> str:
    cell = "" if item.cell is None else f"cell {item.cell}:"
    return f"{item.file}:{cell}{item.line}: {item.code}"


def _finding(finding: Finding) -> Iterator[str]:
    yield _where(finding)
    yield f"    returns       {finding.returns}"
    for suggestion in finding.suggestions:
        yield f"    {'same value' if suggestion.same_value else 'another value':<13} {suggestion.write}"
        if suggestion.why:
            yield f"                  {suggestion.why}"
    if finding.note:
        yield f"    first         {finding.note}"


def _import(item: Import) -> Iterator[str]:
    yield _where(item)
    one = len(item.write) == 1
    yield f"    {'write below' if item.keep else 'write':<13} {item.write[0]}"
    yield from (f"                  {line}" for line in item.write[1:])
    for call in item.calls:
        renamed = "." in call.write and " as " not in item.write[0]  # `import model.objectives` has no such name here
        if item.keep or not one or renamed:
            yield f"    call          {call.write} for {call.name}, {_lines(call.lines)}"
    for missing in item.missing:
        yield f"    keep yours    {missing.name}, {_lines(missing.lines)}: {missing.why}"
    for note in item.notes:
        yield f"    first         {note}"


def _lines(lines: Iterable[int]) -> str:
    numbers = [str(line) for line in lines]
    return f"line{'s' * (len(numbers) > 1)} {', '.join(numbers)}"


def as_dict(found: Examination) -> dict[str, Any]:
    """The same for programs: paths as text, sequences as lists."""
    return {
        "path": str(found.path),
        "files": found.files,
        "findings": [_plain(asdict(finding)) for finding in found.findings],
        "imports": [_plain(asdict(item)) for item in found.imports],
        "unreadable": [_plain(asdict(item)) for item in found.unreadable],
        "left_out": [_plain(asdict(item)) for item in found.left_out],
    }


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "file": str(fields["file"])}
