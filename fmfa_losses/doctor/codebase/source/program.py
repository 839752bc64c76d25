"""The program that parses: it answers a source with the facts of `facts.py`, as one line of JSON.

It uses the standard library alone and is started by `../parser.py`, which says why.
"""

import json
import sys
from typing import Any

from .facts import Cell, facts, short
from .notebook import code_cells, parse, parse_cell

__all__ = ["serve"]

RECURSION = 5000  # a thousand chained calls
MEMORY = 2**30  # bytes of address space, where the system can limit it


def of_module(source: bytes) -> tuple[dict[str, Any], str | None]:
    """The facts of a Python file, and why a part of it could not be read."""
    return facts([Cell(None, parse(source))], source), None


def of_notebook(source: bytes) -> tuple[dict[str, Any], str | None]:
    """The facts of the code cells; a cell that is no Python is named and the others are read."""
    cells = code_cells(json.loads(source))
    trees = []
    failed = []
    for number, text in cells:
        try:
            trees.append(Cell(number, parse_cell(text)))
        except Exception as error:  # the parser of foreign code fails in many ways
            failed.append(f"cell {number}: {_reason(error)}")
    unread = f"{len(failed)} of {len(cells)} code cells, {failed[0]}" if failed else None
    return facts(trees, source), unread


def _reason(error: Exception) -> str:
    if isinstance(error, SyntaxError):
        error.filename = None  # "<unknown>": the parser got no file
    return short(f"{type(error).__name__}: {error}".removesuffix(": "))


def serve() -> None:
    """Answers each request, a line (notebook or module, number of bytes) and the bytes, with one line of JSON."""
    sys.setrecursionlimit(RECURSION)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):  # a system without such limits
        pass
    for line in iter(sys.stdin.buffer.readline, b""):
        kind, length = line.split()
        source = sys.stdin.buffer.read(int(length))
        answer: tuple[dict[str, Any] | None, str | None]
        try:
            answer = (of_notebook if kind == b"notebook" else of_module)(source)
        except Exception as error:  # the parser fails in many ways on foreign bytes
            answer = None, _reason(error)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()
