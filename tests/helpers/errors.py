"""What a message must say: what must hold, what came, and what to do, in any words.

pids must lie in [0, identities = 4), got -100 to 1; number the training identities from 0
------------- invariant ------------      - got --   --------------- remedy --------------
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

Words = str | tuple[str, ...]


def assert_explains(error: BaseException, invariant: Words, got: Words = (), remedy: Words | None = None) -> None:
    """Each part of the message holds its words, which are no patterns. `remedy=()` asks for advice of any words."""
    message = str(error)
    must, came, rest = message.partition(", got ")
    assert came, f"does not say what came: {message}"
    what, advised, advice = rest.rpartition("; ")
    what, advice = (what, advice) if advised else (rest, "")
    assert must and what, message
    assert remedy is None or advice, f"does not say what to do: {message}"
    parts = [("what must hold", must, invariant), ("what came", what, got), ("what to do", advice, remedy or ())]
    for part, text, words in parts:
        for word in (words,) if isinstance(words, str) else words:
            assert word in text, f"{word!r} is not in {part}, {text!r}, of: {message}"


@contextmanager
def explains(
    kind: type[BaseException] | tuple[type[BaseException], ...],
    invariant: Words,
    got: Words = (),
    remedy: Words | None = None,
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    with pytest.raises(kind) as caught:
        yield caught
    assert_explains(caught.value, invariant, got, remedy)
