"""Splits of rendered pedestrians."""

from collections.abc import Callable
from typing import Any

import torch

from ..pedestrians import caption, make_identities, render
from .split import Split

__all__ = ["rendered_splits"]


def rendered_splits(
    train: int, test: int, *, images: int = 2, test_images: int = 2, seed: int = 0, progress: Callable[..., Any] = iter
) -> tuple[Split, Split]:
    """Training and test split of rendered pedestrians; every photograph has two captions.

    The test identities come after the training ones in one list of distinct people: none is in both.
    """
    people = make_identities(train + test, seed=seed)
    plan = [(who, photo) for who in range(train) for photo in range(images)]
    plan += [(who, photo) for who in range(train, train + test) for photo in range(test_images)]
    photos, captions = [], []
    for who, number in progress(plan):
        photo = render(people[who], seed=(seed, who, number))
        photos.append(photo.image)
        captions.append([caption(people[who], photo, seed=(seed, who, number, wording)) for wording in range(2)])

    def part(start: int, stop: int, first: int) -> Split:
        texts = [text for pair in captions[start:stop] for text in pair]
        pids = torch.tensor([who - first for who, _ in plan[start:stop]])
        return Split(photos[start:stop].__getitem__, pids, texts, torch.arange(stop - start).repeat_interleave(2))

    cut = train * images
    return part(0, cut, 0), part(cut, len(plan), train)
