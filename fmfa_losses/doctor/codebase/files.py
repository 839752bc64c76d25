"""The Python files and notebooks of a tree that nobody vouches for: bounded, and what is left out is named.

Links to folders are not followed, pipes and devices not opened. Copies of other people's packages are left out: what a
package calls is not for the owner of the codebase to change.
"""

import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LeftOut", "Limits", "Unreadable", "contents", "files"]

# Built or installed; not named in the report, as the owner of a codebase does not count them as its own.
SKIPPED = {"__pycache__", "node_modules", "site-packages", "dist-packages", "build", "dist", "venv", "env"}
VENDORED = {
    "_vendor",
    "3rdparty",
    "extern",
    "third-party",
    "third_party",
    "thirdparty",
    "vendor",
    "vendored",
    "vendors",
}
# Packages that codebases copy, and files that only the package has side by side. A folder with a setup.py is no sign:
# many a codebase has one itself.
COPIES = {
    "clip": {"clip.py", "simple_tokenizer.py", "__init__.py"},
    "open_clip": {"factory.py", "tokenizer.py", "__init__.py"},
    "transformers": {"modeling_utils.py", "__init__.py"},
    "torchreid": {"__init__.py", "metrics"},
    "fastreid": {"__init__.py", "modeling"},
    "timm": {"__init__.py", "models"},
}
SIZE = {".py": 2**20, ".ipynb": 2**25}  # bytes; a notebook holds its pictures


@dataclass(frozen=True)
class Unreadable:
    """A file or folder that could not be read, or cells of a notebook, and why."""

    file: Path
    reason: str


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that was not read on purpose, and why; of a limit, the first thing beyond it."""

    file: Path
    reason: str


@dataclass(frozen=True)
class Limits:
    """How much of a tree is read.

    Args:
        entries: names in folders. files: Python files and notebooks. size: their bytes. seconds: of all.
        calls: of interest, in all files.
    """

    entries: int = 1_000_000
    files: int = 20_000
    size: int = 2**29
    seconds: float = 300.0
    calls: int = 20_000

    def reached(self, begun: float, entries: int, files: int, size: int) -> str | None:
        """Which limit is reached by a reading that began at time.monotonic() = `begun`, in words; None when none is."""
        if time.monotonic() - begun > self.seconds:
            return f"the limit of {self.seconds:g} s is reached"
        for count, limit, name in (
            (entries, self.entries, "names in folders"),
            (files, self.files, "files"),
            (size, self.size, "bytes"),
        ):
            if count >= limit:
                return f"the limit of {limit} {name} is reached"
        return None


def files(path: Path, limits: Limits) -> Iterator[tuple[Path, bytes] | Unreadable | LeftOut]:
    """(file, contents) of `path`, or of what is in and under it, in order; no recursion, as a tree may be deep."""
    if not os.path.isdir(path):
        source = contents(path)
        yield source if isinstance(source, Unreadable) else (path, source)
        return
    begun = time.monotonic()
    pending, entries, read, size = [path], 0, 0, 0
    while pending:
        folder = pending.pop()
        listed = _listed(folder, limits.entries - entries)
        if isinstance(listed, Unreadable):
            yield listed
            continue
        folders, names, seen = listed
        entries += seen
        left_out = None if folder == path else _vendored(folder, {*folders, *names})
        if left_out is not None:
            yield left_out
            continue
        installed = {name for n in folders if n.endswith(".dist-info") for name in _names_of(n)}
        for name in names:
            reason = limits.reached(begun, entries, read, size)
            if reason is not None:
                yield LeftOut(folder / name, f"{reason}: this and what comes after was not read")
                return
            source = contents(folder / name)
            if isinstance(source, Unreadable):
                yield source
                continue
            read, size = read + 1, size + len(source)
            yield folder / name, source
        for name in reversed(folders):
            if name.startswith(".") or name in SKIPPED or name.endswith(".dist-info"):
                continue
            if name.lower() in installed:
                yield LeftOut(folder / name, "an installed package: its dist-info is beside it")
            else:
                pending.append(folder / name)
        if pending and (reason := limits.reached(begun, entries, read, size)) is not None:
            yield LeftOut(pending[-1], f"{reason}: this and what comes after was not read")
            return


def _listed(folder: Path, most: int) -> tuple[list[str], list[str], int] | Unreadable:
    """Names of folders and of files to read, sorted, and how many names there were; up to `most`."""
    folders: list[str] = []
    names: list[str] = []
    seen = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if seen >= most:
                    break
                seen += 1
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif entry.name.endswith(tuple(SIZE)):
                    names.append(entry.name)
    except OSError as error:
        return _failed(folder, error)
    return sorted(folders), sorted(names), seen


def _vendored(folder: Path, inside: set[str]) -> LeftOut | None:
    if folder.name.lower() in VENDORED:
        return LeftOut(folder, "a folder for other people's packages")
    if COPIES.get(folder.name, {""}) <= inside:
        return LeftOut(folder, f"a copy of the package {folder.name}")
    return None


def _names_of(dist_info: str) -> set[str]:
    """Folders that a distribution of this name may have installed."""
    name = dist_info.removesuffix(".dist-info").partition("-")[0].lower()
    return {name, name.replace("_", "-"), name.replace("-", "_")}


def contents(file: Path) -> bytes | Unreadable:
    """The bytes of a regular file up to a size."""
    limit = SIZE[".ipynb" if file.suffix == ".ipynb" else ".py"]
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
            return Unreadable(file, "not a regular file")
        if status.st_size <= limit:
            with open(file, "rb") as stream:
                source = stream.read(limit + 1)
            if len(source) <= limit:
                return source
    except OSError as error:
        return _failed(file, error)
    return Unreadable(file, f"{status.st_size / 2**20:.1f} MiB, more than the {limit / 2**20:.0f} MiB that are read")


def _failed(file: Path, error: OSError) -> Unreadable:
    return Unreadable(file, f"{type(error).__name__}: {error.strerror or error}")
