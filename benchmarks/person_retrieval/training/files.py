"""Files that are either old or new, never a part of one."""

import contextlib
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ["remove_partial", "write_aside"]

_PARTIAL = re.compile(r"\..+\.\d+\.partial")


def write_aside(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes beside `path`, to the disk itself, and renames: after a kill or a power failure the file is old or new.

    The name beside has this process's id, so that two processes never write one file.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        _remove(partial)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without it; the file is renamed by now
            raise
    finally:
        os.close(folder)


def remove_partial(folder: Path) -> None:
    """Removes what killed processes left beside their files; the caller holds the folder's lock."""
    for file in folder.iterdir():
        if _PARTIAL.fullmatch(file.name):
            _remove(file)


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):  # the folder is gone or read-only: the caller's own error tells what is wrong
        file.unlink()
