"""Result files: JSON with one measurement a line, so that a change of one number is a change of one line.

A file is replaced as a whole: whoever is killed while writing leaves the one before.
"""

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["load_all", "read", "replace", "write"]


def write(path: Path, result: dict[str, Any]) -> None:
    lines = []
    for key, value in result.items():
        if isinstance(value, list):
            rows = ",\n".join("    " + json.dumps(row, ensure_ascii=False) for row in value)
            lines.append(f'  "{key}": [\n{rows}\n  ]' if value else f'  "{key}": []')
        else:
            lines.append(f'  "{key}": {json.dumps(value, ensure_ascii=False)}')
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, "{\n" + ",\n".join(lines) + "\n}\n")


def replace(path: Path, content: str | bytes) -> None:
    """The new content or, after a kill, the old; never a part."""
    partial = path.with_name(".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def load_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Every result in a folder by file name, in the order of the names."""
    return {path.name: read(path) for path in sorted(folder.glob("*.json"))}
