"""The three public data sets in small: rendered pedestrians in their layouts."""

import json
from functools import cache
from io import BytesIO
from pathlib import Path

from benchmarks.person_retrieval.data import LAYOUTS
from benchmarks.person_retrieval.pedestrians import caption, make_identities, render

__all__ = ["SIZE", "folder_of"]

SIZE = (24, 72)  # width, height of every image


def folder_of(root: Path, name: str, *, train: int = 4, val: int = 2, test: int = 2, images: int = 2) -> Path:
    """Writes so many identities of each split in the layout of `name` below `root`, and returns `root`.

    Identity i of all has the id 100 + 7 i; image n of it is cam/{i:04d}_{n}.png and has two captions. ICFG-PEDES has no
    validation split and gets none.
    """
    annotations, path_key = LAYOUTS[name]
    splits = ["train"] * train + ["val"] * (0 if name == "ICFG-PEDES" else val) + ["test"] * test
    (root / name / "imgs" / "cam").mkdir(parents=True, exist_ok=True)
    entries = []
    for i, split in enumerate(splits):
        for number in range(images):
            path = f"cam/{i:04d}_{number}.png"
            file, captions = _photograph(len(splits), i, number)
            (root / name / "imgs" / path).write_bytes(file)
            entries.append({"id": 100 + 7 * i, path_key: path, "split": split, "captions": captions})
    (root / name / annotations).write_text(json.dumps(entries), encoding="utf-8")
    return root


@cache
def _photograph(people: int, i: int, number: int) -> tuple[bytes, list[str]]:
    """Photograph `number` of identity i of so many, as a PNG file, and its captions."""
    who = make_identities(people, seed=9)[i]
    photo, file = render(who, seed=(9, i, number)), BytesIO()
    photo.image.resize(SIZE).save(file, "PNG")
    return file.getvalue(), [caption(who, photo, seed=(9, i, number, wording)) for wording in range(2)]
