"""Splits of rendered pedestrians: the street, where people are searched for, and pictures in general.

Who is in a split, how the photographs look and what is written follow from integers; no identity is in two splits.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from PIL import Image

from ..pedestrians import CATALOGUE, STUDIO, alt_text, caption, make_identities, render
from .split import Split

__all__ = ["catalogue_split", "rendered_splits"]

PHOTOGRAPHS, CAPTIONS = 2, 2  # of a person, of a photograph
Progress = Callable[[Iterable[Any]], Iterable[Any]]


def rendered_splits(
    people: Mapping[str, int], *, seed: int = 0, only: str | None = None, progress: Progress = iter
) -> dict[str, Split]:
    """Splits of the street by name; `people` says how many identities each has.

    They follow each other in one list of distinct people. Each person has two photographs, each of two captions. With
    `only` that split is rendered and returned alone.
    """
    everybody = make_identities(sum(people.values()), seed=seed)
    splits, first = {}, 0
    drawn = sum(count for name, count in people.items() if only in (None, name))
    done = iter(progress(range(drawn * PHOTOGRAPHS)))
    for name, count in people.items():
        if only not in (None, name):
            first += count
            continue
        photos, texts = [], []
        for who in range(first, first + count):
            for number in range(PHOTOGRAPHS):
                photo = render(everybody[who], seed=(seed, who, number))
                photos.append(photo.image)
                texts += [caption(everybody[who], photo, seed=(seed, who, number, k)) for k in range(CAPTIONS)]
                next(done)
        splits[name] = _split(f"rendered {name}", photos, texts, PHOTOGRAPHS, CAPTIONS)
        first += count
    next(done, None)  # closes a progress bar
    return splits


def catalogue_split(count: int, *, size: tuple[int, int], seed: int, progress: Progress = iter) -> Split:
    """Pictures in general: `count` people, each photographed once and described in one line.

    Other frequencies of clothes and colours, other sentences, better light and no look-alikes. Pictures are kept at
    `size`, (height, width): there are many.
    """
    people = make_identities(count, seed=seed, lookalikes=0.0, wardrobe=CATALOGUE)
    photos, texts = [], []
    for who, person in enumerate(progress(people)):
        photo = render(person, seed=(seed, who, 0, 1), camera=STUDIO)
        photos.append(photo.image.resize(size[::-1], Image.Resampling.BILINEAR))
        texts.append(alt_text(person, photo, seed=(seed, who, 0, 1)))
    return _split("rendered catalogue", photos, texts, 1, 1)


def _split(name: str, photos: list[Any], texts: list[str], photographs: int, captions: int) -> Split:
    pids = torch.arange(len(photos)) // photographs
    return Split(photos.__getitem__, pids, texts, torch.arange(len(photos)).repeat_interleave(captions), name=name)
