"""The three public data sets as they lie on disk.

    ROOT/CUHK-PEDES/reid_raw.json        [{"split", "captions", "file_path", "id"}, ...]   images under CUHK-PEDES/imgs/
    ROOT/ICFG-PEDES/ICFG-PEDES.json      the same fields                                   images under ICFG-PEDES/imgs/
    ROOT/RSTPReid/data_captions.json     "img_path" instead of "file_path"                 images under RSTPReid/imgs/

ROOT may also be the data set's own folder. ICFG-PEDES has no validation split. What an annotation file must keep is
described in `annotations.py`. Every caption is a pair; training identities are numbered from 0.
"""

from pathlib import Path

import torch

from .annotations import SPLITS, Entry, read_annotations
from .errors import DataError
from .images import ImageFiles
from .split import Split

__all__ = ["LAYOUTS", "read_dataset", "splits_of"]

# annotation file, key of the image path
LAYOUTS = {
    "CUHK-PEDES": ("reid_raw.json", "file_path"),
    "ICFG-PEDES": ("ICFG-PEDES.json", "file_path"),
    "RSTPReid": ("data_captions.json", "img_path"),
}


def splits_of(name: str, root: str | Path) -> set[str]:
    """The splits that the annotations have: "train", "test" and, of some data sets, "val". Raises as `read_dataset`."""
    return {entry.split for entry in _read(name, root)[1]}


def read_dataset(name: str, root: str | Path, split: str) -> Split:
    """One split ("train", "val" or "test") of a public data set; no image is opened, `check_images` does that.

    `notes` counts empty captions that were left out, entries that were merged with an earlier one of the same path and
    identity, paths that have several identities, and identities whose number another split has too.

    Raises:
        DataError: there is no annotation file, it breaks a rule in any split, or it does not have this split.
        ValueError: no such data set, no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    file, everything = _read(name, root)
    entries = [entry for entry in everything if entry.split == split]
    if not entries:
        found = ", ".join(one for one in SPLITS if any(entry.split == one for entry in everything))
        raise DataError(f"{file} has no entries of the split {split!r}, it has {found}; choose one of these")

    numbers: dict[tuple[str, int], int] = {}
    captions: list[str] = []
    caption_images: list[int] = []
    for entry in entries:
        number = numbers.setdefault(entry.image, len(numbers))
        captions += entry.captions
        caption_images += [number] * len(entry.captions)
    image_pids = torch.tensor([pid for _, pid in numbers])
    if split == "train":
        image_pids = torch.unique(image_pids, return_inverse=True)[1]
    elsewhere = {entry.pid for entry in everything if entry.split != split}
    notes = {
        "empty captions left out": sum(entry.empty for entry in entries),
        "repeated images merged": len(entries) - len(numbers),
        "images with several identities": len(numbers) - len({path for path, _ in numbers}),
        "identities with the number of one in another split": len(elsewhere & {pid for _, pid in numbers}),
    }
    files = [file.parent / "imgs" / path for path, _ in numbers]
    return Split(
        ImageFiles(files),
        image_pids,
        captions,
        torch.tensor(caption_images),
        name=f"{name} {split}",
        notes={note: count for note, count in notes.items() if count},
        files=files,
    )


def _read(name: str, root: str | Path) -> tuple[Path, list[Entry]]:
    """The annotation file and its entries."""
    if name not in LAYOUTS:
        raise ValueError(f"dataset must be one of {', '.join(LAYOUTS)}, got {name!r}")
    file, path_key = LAYOUTS[name]
    candidates = (Path(root) / name / file, Path(root) / file)
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        wanted = " nor ".join(map(str, candidates))
        raise DataError(f"{name} needs its annotations, found neither {wanted}; pass --root the folder above {name}/")
    return found, read_annotations(found, path_key)
