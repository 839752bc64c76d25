"""The states of random generators, saved before a computation and restored before it runs again.

torch's default generators, of the CPU and of CUDA, always take part. Others are named, because nothing can find them:

    torch.Generator, numpy.random.RandomState, the module numpy.random      get_state(), set_state(state)
    random.Random, the module random                                        getstate(), setstate(state)
    numpy.random.Generator                                                  bit_generator.state
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..ops.checks import describe

__all__ = ["RandomStates"]

ACCESSORS = (("get_state", "set_state"), ("getstate", "setstate"))


class RandomStates:
    """Saves and restores torch's default generators and those given.

    Args:
        generators: a list or tuple of objects as the head of this file names them.

    Raises:
        TypeError: no list or tuple, or an object in it that has no state to restore.
    """

    def __init__(self, generators: Sequence[object]) -> None:
        if not isinstance(generators, (list, tuple)):
            raise TypeError(
                f"generators must be a list or tuple of random generators, got {describe(generators)}; pass "
                "(generator,) for a single one"
            )
        self.accessors = [_accessors(generator) for generator in generators]

    def save(self) -> list[Any]:
        on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        cuda = torch.cuda.get_rng_state_all() if on_cuda else []
        return [torch.get_rng_state(), cuda, *(get() for get, _ in self.accessors)]

    def restore(self, states: list[Any]) -> None:
        cpu, cuda, *others = states
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        for (_, put), state in zip(self.accessors, others, strict=True):
            put(state)


def _accessors(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    """Functions that give and take the state of a generator."""
    for names in ACCESSORS:
        get, put = (getattr(generator, name, None) for name in names)
        if callable(get) and callable(put) and _works(get):
            return get, put
    bits = getattr(generator, "bit_generator", None)
    if hasattr(bits, "state"):
        return functools.partial(getattr, bits, "state"), functools.partial(setattr, bits, "state")
    raise TypeError(
        "generators must be objects of torch.Generator, numpy.random.Generator, numpy.random.RandomState or "
        f"random.Random, or the modules numpy.random and random, got {describe(generator)}; pass the object that the "
        "numbers are drawn from"
    )


def _works(get: Callable[[], Any]) -> bool:
    """random.SystemRandom has no state, and a class is no generator."""
    try:
        get()
    except (NotImplementedError, TypeError):
        return False
    return True
