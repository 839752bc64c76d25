"""The files of a tree as modules that import each other."""

from pathlib import Path
from typing import Any

__all__ = ["Tree"]


class Tree:
    """Facts of files, and what their imports mean under the folder that was given."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[Path, dict[str, Any]] = {}
        self._named: dict[str, list[tuple[tuple[str, ...], Path]]] = {}  # last part of the dotted name -> modules
        self._imported: set[Path] | None = None

    def add(self, file: Path, facts: dict[str, Any]) -> None:
        self.files[file] = facts
        parts = self._parts(file)
        if parts:
            self._named.setdefault(parts[-1], []).append((parts, file))

    def _parts(self, file: Path) -> tuple[str, ...]:
        """("model", "objectives") of model/objectives.py; a package is its folder."""
        if file == self.path:
            return (file.stem,)
        parts = file.relative_to(self.path).with_suffix("").parts
        return parts[:-1] if parts[-1] == "__init__" else parts

    def module(self, file: Path, level: int, name: str) -> Path | None:
        """The file that `name`, imported in `file`, is; None when it is not in the tree."""
        wanted = tuple(name.split(".")) if name else ()
        if level:
            here = self._parts(file)
            package = here if file.stem == "__init__" else here[:-1]
            if level - 1 > len(package):
                return None
            wanted = (*package[: len(package) - (level - 1)], *wanted)
        if not wanted:
            return None
        own = self._parts(file)
        named = self._named.get(wanted[-1], ())
        matches = [(parts, found) for parts, found in named if parts[-len(wanted) :] == wanted]
        # Of several with this name the one with which the file shares most of its path.
        return max(matches, key=lambda match: _shared(match[0], own))[1] if matches else None

    def definition(self, file: Path, callee: dict[str, Any]) -> dict[str, Any] | None:
        """The function that is called, where the tree has it: line, parameters, results, shape and file."""
        home: Path | None = file
        if not callee["defined"]:
            home = None if callee["module"] is None else self.module(file, callee["level"], callee["module"])
        if home is None:
            return None
        definition = self.files[home]["definitions"].get(callee["name"])
        return None if definition is None else {**definition, "file": str(home)}

    def is_left_behind(self, file: Path) -> bool:
        """Whether the codebase has gone over to this library and nothing imports the file any more."""
        if self._imported is None:
            self._imported = set()
            ours = False
            for other, facts in self.files.items():
                for level, name in facts["imports"]:
                    ours |= name.partition(".")[0] == "fmfa_losses" and not level
                    target = self.module(other, level, name)
                    if target is not None and target != other:
                        self._imported.add(target)
            if not ours:
                self._imported.update(self.files)
        if file in self._imported:
            return False
        facts = self.files[file]
        uses_ours = any(name.partition(".")[0] == "fmfa_losses" for _, name in facts["imports"])
        return not facts["script"] and not uses_ours and len(self.files) > 1


def _shared(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
