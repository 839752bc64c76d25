"""A tensor that is still in its file."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["Stored"]


class Stored(NamedTuple):
    """What is known of it without reading it; `read` gives it, in the file's own dtype."""

    shape: tuple[int, ...]
    dtype: str  # "float16", "float32", ...
    read: Callable[[], Tensor]
