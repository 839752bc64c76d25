"""The largest batch that a card with less memory than this one would take.

PyTorch's allocator is given no more than the card would have; what does not fit then fails as it would there, after the
allocator has tried to do without what it keeps in reserve.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["CARDS", "fits", "largest", "limited"]

# GiB for tensors by what a card is called, in GB. Drivers show 24564, 49140 and 81559 MiB (80.0, of an H100 in the
# cloud 79.1 GiB); one GiB is left to the CUDA context and its libraries. A card that also draws a desktop has less.
CARDS = {24: 23.0, 48: 47.0, 80: 78.0}
# What libraries say that could not allocate; PyTorch has an exception of its own.
SAID = ("out of memory", "ALLOC_FAILED", "unable to find an engine")


def largest(fits: Callable[[int], bool], *, unit: int, start: int, most: int) -> int:
    """The largest multiple of `unit` that fits, up to `most`; 0 where not even one unit does.

    Doubles from `start` until one does not fit, then halves the distance. `start` and `most` are multiples of `unit`,
    and what is smaller than a batch that fits fits, too. No size is tried twice.
    """
    good, bad = 0, most + unit
    size = start
    while size < bad:
        if not fits(size):
            bad = size
            break
        good, size = size, min(2 * size, most) if size < most else bad
    while bad - good > unit:
        size = good + (bad - good) // unit // 2 * unit
        good, bad = (size, bad) if fits(size) else (good, size)
    return good


def fits(step: Callable[[], object], forget: Callable[[], object]) -> bool:
    """Whether the step runs; where memory runs out, `forget` gives back what it had come to, and so does the cache."""
    try:
        step()
        torch.cuda.synchronize()
        return True
    except RuntimeError as error:
        if not (isinstance(error, torch.cuda.OutOfMemoryError) or any(words in str(error) for words in SAID)):
            raise
    # The exception is gone by here, and with it the frames that held tensors.
    forget()
    gc.collect()
    torch.cuda.empty_cache()
    return False


@contextmanager
def limited(gib: float) -> Iterator[None]:
    """Inside, this process gets that much memory for tensors. The card must have as much."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()  # what is kept counts
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
