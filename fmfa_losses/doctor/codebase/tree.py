"""The files of a tree as modules that import each other."""

from pathlib import Path
from typing import Any

__all__ = ["Tree"]


BASES = 20  # of a class, that are looked at
NAMESAKES = 1000  # modules of one name that are told apart


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
        named = self._named.setdefault(parts[-1] if parts else "", [])
        if len(named) < NAMESAKES:
            named.append((parts, file))

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
        """The function that is called, where the tree has it, with its file and the functions beside it."""
        home = self._home(file, callee, "definitions")
        if home is None:
            return None
        beside = self.files[home]["definitions"]
        return {**beside[callee["name"]], "file": str(home), "beside": beside}

    def method(self, file: Path, owner: str, name: str) -> list[dict[str, Any]]:
        """The shapes of a method that a class, or the nearest of its bases, defines; none where none does."""
        pending = [(file, owner)]
        for here, owner in pending:  # grows by the bases
            own = self.files[here]["classes"].get(owner)
            if own is None or len(pending) > BASES:
                continue
            if name in own["methods"]:
                shapes: list[dict[str, Any]] = own["methods"][name]
                return shapes
            homes = ((self._home(here, base, "classes"), base["name"]) for base in own["bases"])
            pending += ((home, base) for home, base in homes if home is not None)
        return []

    def _home(self, file: Path, callee: dict[str, Any], kind: str) -> Path | None:
        """The file that defines what is imported; a package may have it from one of its modules."""
        name, home = callee["name"], file
        if not callee["defined"]:
            found = None if callee["module"] is None else self.module(file, callee["level"], callee["module"])
            if found is None:
                return None
            home = found
        for _ in range(3):
            if name in self.files[home][kind]:
                return home
            passed = [(level, dotted) for level, dotted in self.files[home]["imports"] if dotted.endswith(f".{name}")]
            found = self.module(home, passed[0][0], passed[0][1].rpartition(".")[0]) if passed else None
            if found is None or found == home:
                return None
            home = found
        return None

    def is_left_behind(self, file: Path) -> bool:
        """Whether the codebase has gone over to this library and nothing imports the file any more."""
        if self._imported is None:
            adopted = any(_uses_ours(facts) for facts in self.files.values())
            self._imported = self._targets() if adopted else set(self.files)
        if file in self._imported:
            return False
        facts = self.files[file]
        return not facts["script"] and not _uses_ours(facts) and len(self.files) > 1

    def _targets(self) -> set[Path]:
        """Files that another file imports and uses; a package's own imports are for others to use."""
        pairs = (
            (file, self.module(file, *name))
            for file, facts in self.files.items()
            for name in facts["imports" if file.stem == "__init__" else "used"]
        )
        return {target for file, target in pairs if target is not None and target != file}


def _uses_ours(facts: dict[str, Any]) -> bool:
    return any(name.partition(".")[0] == "fmfa_losses" and not level for level, name in facts["imports"])


def _shared(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
