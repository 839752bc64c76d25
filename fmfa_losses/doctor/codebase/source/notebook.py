"""The code cells of a notebook as modules; lines of IPython become `pass`, so that the numbers of the others stay."""

import ast
import re
import warnings
from typing import Any

__all__ = ["code_cells", "parse", "parse_cell"]

PYTHON_MAGICS = {"%%capture", "%%prun", "%%time", "%%timeit"}  # what follows is Python; after any other it is not
MAGIC_LINE = re.compile(r"\s*[%!?]|[^#'\"]*\?\s*$")
MAGIC_VALUE = re.compile(r"([\w.,\s]+=\s*)[%!]")


def parse(source: str | bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the code that is parsed
        return ast.parse(source)


def code_cells(notebook: Any) -> list[tuple[int, str]]:
    """(number among all cells from 1, text) of the code cells, format 3 or 4."""
    if not isinstance(notebook, dict):
        raise ValueError("not a notebook")
    metadata = notebook.get("metadata", {})
    language = metadata.get("language_info", {}).get("name") or metadata.get("kernelspec", {}).get("language")
    if language and "python" not in language.lower():
        raise ValueError(f"a notebook in {language}")
    sheets = [notebook] if "cells" in notebook else notebook.get("worksheets", [])
    cells = [cell for sheet in sheets for cell in sheet["cells"]]
    if not sheets:
        raise ValueError("a notebook without cells")
    found = []
    for number, cell in enumerate(cells, start=1):
        if cell["cell_type"] == "code":
            text = cell.get("source", cell.get("input", ""))
            found.append((number, text if isinstance(text, str) else "".join(text)))
    return found


def parse_cell(text: str) -> ast.Module:
    try:
        return parse(text)
    except SyntaxError:
        return parse(_without_magics(text))


def _without_magics(text: str) -> str:
    lines = text.split("\n")
    first = next((i for i, line in enumerate(lines) if line.strip()), 0)
    if lines[first].startswith("%%"):
        if lines[first].split()[0] not in PYTHON_MAGICS:
            return ""
        lines[first] = ""
    continued = False
    for i, line in enumerate(lines):
        value = MAGIC_VALUE.match(line)
        if continued:
            lines[i] = ""
        elif value:
            lines[i] = value[1] + "None"
        elif MAGIC_LINE.match(line):
            lines[i] = line[: len(line) - len(line.lstrip())] + "pass"
        else:
            continue
        continued = line.rstrip().endswith("\\")
    return "\n".join(lines)
