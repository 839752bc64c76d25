"""Finds the lines of a codebase that this library replaces, in bounded time and memory for any file.

Nothing of the codebase is imported or run. Only regular files up to a size are opened, and a separate process parses
them (see `source_calls.py`): a file that crashes it, or takes longer than a limit, is reported as unreadable.
"""

import contextlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Timer
from typing import Any

from . import source_calls

__all__ = ["Finding", "Unreadable", "scan"]

SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "build", "dist", "venv", "env"}
SIZE = {".py": 2**20, ".ipynb": 2**25}  # bytes; a notebook holds its pictures
SECONDS = 20  # to parse one file


@dataclass(frozen=True)
class Finding:
    """One line that can be replaced: where it is, its code, and what to write instead."""

    file: Path
    line: int
    code: str
    write: str
    module: str | None = None  # of fmfa_losses.compat that has the same function
    cell: int | None = None  # of a notebook, from 1; `line` is counted in the cell


@dataclass(frozen=True)
class Unreadable:
    """A file or folder that could not be read, or cells of a notebook, and why."""

    file: Path
    reason: str


def scan(path: Path) -> Iterator[Finding | Unreadable]:
    """Every call of a published objective, every inline aggregation and every sorting evaluator under `path`.

    Python files and notebooks; folders that are hidden, built or installed are left out, links to folders not followed.
    """
    parser = _Parser()
    try:
        for item in _files(path):
            source = _contents(item) if isinstance(item, Path) else item
            if isinstance(source, Unreadable):
                yield source
                continue
            assert isinstance(item, Path)
            calls, unread = parser(source, notebook=item.suffix == ".ipynb")
            yield from (Finding(item, *call) for call in calls)
            if unread is not None:
                yield Unreadable(item, unread)
    finally:
        parser.end()


def _files(path: Path) -> Iterator[Path | Unreadable]:
    """`path`, or the files in and under it in order; no recursion, as a tree may be deeper than Python's stack."""
    if not os.path.isdir(path):
        yield path
        return
    pending = [path]
    while pending:
        folder = pending.pop()
        folders: list[str] = []
        files: list[str] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if not entry.name.startswith(".") and entry.name not in SKIPPED_FOLDERS:
                            folders.append(entry.name)
                    elif entry.name.endswith(tuple(SIZE)):
                        files.append(entry.name)
        except OSError as error:
            yield _failed(folder, error)
        yield from (folder / name for name in sorted(files))
        pending += (folder / name for name in sorted(folders, reverse=True))


def _contents(file: Path) -> bytes | Unreadable:
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


class _Parser:
    """`source_calls.py` as a process, started when it is needed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, source: bytes, *, notebook: bool) -> tuple[list[list[Any]], str | None]:
        """The calls found in a source, as fields of a Finding, and why it could not be read."""
        fresh = self.process is None
        process = self.process = self.process or self._start()
        assert process.stdin is not None and process.stdout is not None
        late = Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = Timer(SECONDS, give_up)
        timer.start()
        answer = b""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"%s %d\n" % (b"notebook" if notebook else b"module", len(source)) + source)
            process.stdin.flush()
            answer = process.stdout.readline()
        timer.cancel()
        if answer.endswith(b"\n"):
            calls, unread = json.loads(answer)
            return calls, unread
        code = self.end()
        if late.is_set():
            return [], f"not parsed within {SECONDS} s"
        if not fresh:  # the crash may be due to a file before
            return self(source, notebook=notebook)
        return [], f"the parser died of it ({f'signal {-code}' if code < 0 else f'exit status {code}'})"

    def _start(self) -> "subprocess.Popen[bytes]":
        # -I: neither the current folder nor the environment adds a module; -S: nor does an installation.
        command = [sys.executable, "-I", "-S", "-W", "ignore", source_calls.__file__]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, close_fds=True
        )

    def end(self) -> int:
        """Its exit status; negative is a signal."""
        process, self.process = self.process, None
        if process is None:
            return 0
        with process, contextlib.suppress(BrokenPipeError):
            assert process.stdin is not None
            process.stdin.close()
        return process.returncode
