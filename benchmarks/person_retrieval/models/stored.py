"""A tensor that is still in its file, and the names of those in a file."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Stored", "leaves"]

MOST, LONGEST = 100_000, 1000  # entries, and letters of a name


class Stored(NamedTuple):
    """What is known of it without reading it; `read` gives it, in the file's own dtype."""

    shape: tuple[int, ...]
    dtype: str  # "float16", "float32", ...
    read: Callable[[], Tensor]


def leaves(root: Any, inside: Callable[[Any], Mapping[Any, Any] | None]) -> Iterator[tuple[str, Any]]:
    """What has nothing inside, in order and by dotted names.

    Raises:
        ValueError: there is no end to it: strangers' files may hold what holds itself, or two of what holds two.
    """
    waiting, seen = [("", root)], 1
    while waiting:
        name, node = waiting.pop()
        children = inside(node)
        if children is None:
            yield name, node
            continue
        seen += len(children)
        named = [(f"{name}.{key}" if name else str(key), child) for key, child in children.items()]
        if seen > MOST or any(len(longer) > LONGEST for longer, _ in named):
            raise ValueError(f"it has more than {MOST} modules and tensors, or names of more than {LONGEST} letters")
        waiting += reversed(named)
