"""Saving and loading the state of a run.

There is one checkpoint. It is replaced as a whole, so that a second one would only guard against a disk that lies.
"""

from pathlib import Path
from typing import Any

import torch

from ..errors import RunError
from .files import write_aside

__all__ = ["load", "save"]

FORMAT = "person_retrieval 2"


def save(path: Path, state: dict[str, Any], *, stands: str = "what was there before stands") -> None:
    """Replaces `path` by `state`.

    Args:
        stands: for the error, what a user still has.

    Raises:
        RunError: no room, no permission, no folder; what was written aside is removed.
    """
    try:
        write_aside(path, lambda file: torch.save({"format": FORMAT, **state}, file))
    except (OSError, RuntimeError) as error:  # of the system, of torch's zip writer
        raise RunError(
            f"{path} could not be written: {_reason(error)}; {stands}; make room there, then go on with --resume"
        ) from error


def load(path: Path, *, keys: tuple[str, ...] = (), mmap: bool = False) -> dict[str, Any]:
    """The state in `path`, on the CPU. No code in the file is run.

    Args:
        keys: what it must hold.
        mmap: read tensors when they are used, for a look at numbers alone.

    Raises:
        RunError: truncated, empty, of something else, of another version.
    """
    remedy = "restore the file, or start anew with --overwrite"
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise RunError(f"there must be a checkpoint at {path}, found none; {remedy}") from error
    except MemoryError:
        raise
    except Exception as error:  # bytes of something else lead an unpickler to any of them
        raise RunError(
            f"{path} must be a whole checkpoint of this program, got a file that is truncated or of something else "
            f"({path.stat().st_size if path.is_file() else 0:,} bytes); {remedy}"
        ) from error
    version = state.get("format") if isinstance(state, dict) else None
    if not isinstance(version, str) or not version.startswith("person_retrieval "):
        raise RunError(f"{path} must be a checkpoint of this program, got a file of something else; {remedy}")
    if version != FORMAT:
        raise RunError(f"{path} must be of version {FORMAT!r}, got {version!r}; {remedy}")
    missing = [key for key in keys if key not in state]
    if missing:
        raise RunError(f"{path} must hold {', '.join(keys)}, lacks {', '.join(missing)}; {remedy}")
    return state


def _reason(error: BaseException) -> str:
    """What the system said, which torch's zip writer may have covered with its own complaint."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return (cause and cause.strerror) or (str(error).splitlines() or [repr(error)])[0]
