"""What is looked at once, before the first step: that every image can be read, and how many captions are cut."""

import copy
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import DataError, listed
from .images import read_image
from .split import Split

__all__ = ["check_images", "too_long"]


def check_images(split: Split, *, workers: int = 0, progress: Callable[..., Any] | None = None) -> Split:
    """Reads and decodes every image file of a split once; returns the split with what is unusual counted in `notes`.

    A decoder fills in what a damaged JPEG lacks in the middle: such a file is found only where its decoder complains.

    Args:
        workers: threads (Pillow decodes several images at a time); 0: as many as this process may use processors.
        progress: wraps the list that is iterated over, as `tqdm` does.

    Raises:
        DataError: images that cannot be read, how many, and the first five with their reasons.
    """
    if split.files is None:  # drawn, not read
        return split
    pool = ThreadPoolExecutor(workers or _processors())
    try:
        looks = [pool.submit(_look, file) for file in split.files]
        found = [look.result() for look in (progress or iter)(looks)]
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt too
    failures = [one for one in found if isinstance(one, str)]
    if failures:
        raise DataError(
            f"{len(failures)} of {len(found)} images of {split.name} cannot be read, every image must:"
            f"{listed(failures)}"
        )
    return replace(split, notes={**split.notes, **Counter(words for remarks in found for words in remarks)})


def too_long(tokenizer: Any, captions: Sequence[str], token_ids: Tensor | None = None) -> int:
    """How many captions have more tokens, SOT and EOT counted, than the `context_length` that `tokenizer` cuts them to.

    Args:
        token_ids: `tokenizer(captions)` [P, L], where it is at hand: rows with padding need no second look.
    """
    length = tokenizer.context_length
    if token_ids is not None:
        full = (token_ids[:, -1] == tokenizer.eot_id).nonzero().flatten().tolist()
        captions = [captions[p] for p in full]
    if not captions:
        return 0
    # With room for one token more, EOT is last only in a row that would fill it or still be cut.
    longer = copy.copy(tokenizer)
    longer.context_length = length + 1
    rows = longer(captions)
    if rows.shape[1] != length + 1:
        raise ValueError(
            f"a tokenizer must read its context_length when it is called, got {rows.shape[1]} ids for {length + 1}"
        )
    return int((rows[:, -1] == tokenizer.eot_id).sum())


def _look(file: Path) -> list[str] | str:
    """Remarks, or why the image cannot be read."""
    remarks: list[str] = []
    try:
        read_image(file, remarks.append)
    except DataError as error:
        return str(error)
    return remarks


def _processors() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
