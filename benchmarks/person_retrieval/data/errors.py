"""What is wrong with a data set on disk, told in one error."""

from collections.abc import Sequence

from ..errors import RunError

__all__ = ["DataError", "listed"]

SHOWN = 5


class DataError(RunError):
    """Annotations or images on disk are not what they must be.

    A DataLoader raises the error of a worker again, with the worker's traceback before the message; here the message
    alone is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip())


def listed(problems: Sequence[str]) -> str:
    """The first five, a line each, and how many more there are."""
    lines = [*problems[:SHOWN], *([f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])]
    return "".join(f"\n  {line}" for line in lines)
