"""Files that a command writes: looked at before anything is computed, written whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import results
from .errors import RunError

__all__ = ["claim", "write_result", "writing"]


def claim(file: Path, *, overwrite: bool) -> None:
    """Creates the folder and makes sure that `file` can be written.

    Raises:
        RunError: it cannot, or it is there already.
    """
    if file.exists() and not overwrite:
        raise RunError(f"{file} must not be there yet; pass --overwrite to replace it, or another --out")
    trial = file.with_name(f".{file.name}.trial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise _unwritable(file, error) from error


def write_result(file: Path, kind: str, command: str, about: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Head, `about` and `records`, as all result files."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in about.items()}
    with writing(file):
        results.write(file, results.head(kind, command) | plain | {"records": records})
    print(f"\nWritten: {file}")


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Around what writes `file`: RunError where it cannot."""
    try:
        yield
    except OSError as error:
        raise _unwritable(file, error) from error


def _unwritable(file: Path, error: OSError) -> RunError:
    return RunError(f"{file} must be a file that can be written, got {error.strerror}; make room or give another --out")
