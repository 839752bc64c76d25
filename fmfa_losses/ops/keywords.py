"""Keywords that a function does not take: the error names the part that takes them, or the nearest one."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from .checks import did_you_mean
from .options import MOVED

__all__ = ["check_keywords", "keywords_checked"]

P = ParamSpec("P")
T = TypeVar("T")


def check_keywords(
    name: str, given: Mapping[str, Any], function: Callable[..., Any], parts: Mapping[str, type]
) -> None:
    """Every keyword is one that `function` takes; `parts` by the keywords that take a mapping of their arguments."""
    known = [word for word in inspect.signature(function).parameters if word != "self"]
    for word in given:
        if word not in known:
            pairs = [
                f'{term}={{"{word}": ...}}'
                for term, cls in parts.items()
                if term in known and word in inspect.signature(cls).parameters
            ]
            hint = f"; use {MOVED[word]}." if word in MOVED else did_you_mean(word, known) or "."
            if pairs:
                hint = f"; pass {' or '.join(pairs)}."
            raise TypeError(f"{name} takes no {word!r}{hint} It takes {', '.join(known)}")


def keywords_checked(parts: Mapping[str, type]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator of a class's function, whose error for an unknown keyword names the class."""

    def of(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            check_keywords(function.__qualname__.split(".")[0], kwargs, function, parts)
            return function(*args, **kwargs)

        return checked

    return of
