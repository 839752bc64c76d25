"""What the report says of a codebase: lines with suggestions, imports with what to do, names without counterpart."""

from dataclasses import dataclass, field
from pathlib import Path

from .files import LeftOut, Unreadable

__all__ = ["Calls", "Examination", "Finding", "Import", "Missing", "Suggestion"]


@dataclass(frozen=True)
class Suggestion:
    """What to write instead of a call.

    Args:
        write: an expression in names of fmfa_losses, its `functional`, `retrieval` and `compat`, and of the codebase.
        same_value: whether it has the value of the original, up to rounding.
        why: of another value the reason; else what is different otherwise, or where it holds.
    """

    write: str
    same_value: bool
    why: str = ""


@dataclass(frozen=True)
class Finding:
    """One line that can be replaced: where it is, its code, what it returns, and what to write, the same value first.

    Args:
        cell: of a notebook, from 1; `line` is counted in the cell.
        kind: "objective", "aggregation" or "ranking".
        name: the published name, or that of the loss whose equation was recognised.
        note: what to look at before replacing.
    """

    file: Path
    line: int
    code: str
    kind: str
    name: str
    returns: str
    suggestions: tuple[Suggestion, ...]
    note: str = ""
    cell: int | None = None


@dataclass(frozen=True)
class Missing:
    """A name that a codebase calls and fmfa_losses.compat lacks, or has for something else."""

    name: str
    lines: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class Calls:
    """Calls that go to this library after an import was changed.

    Args:
        write: how the function is called then. module: of fmfa_losses.compat. name: of the function in both.
    """

    write: str
    module: str
    name: str
    lines: tuple[int, ...]


@dataclass(frozen=True)
class Import:
    """An import of objectives: what to write so that the calls go to this library.

    Args:
        write: the lines to write, in order. keep: whether the codebase's own import stays.
        calls: what this library has. missing: what it lacks.
        notes: what to look at before the import is changed.
    """

    file: Path
    line: int
    code: str
    write: tuple[str, ...]
    keep: bool
    calls: tuple[Calls, ...]
    missing: tuple[Missing, ...] = ()
    notes: tuple[str, ...] = ()
    cell: int | None = None


@dataclass
class Examination:
    """Everything that was found under a path, and what was not read."""

    path: Path
    findings: list[Finding] = field(default_factory=list)
    imports: list[Import] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    files: int = 0
