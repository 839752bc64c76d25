"""The three public data sets as they lie on disk.

    ROOT/CUHK-PEDES/reid_raw.json        [{"split", "captions", "file_path", "id"}, ...]   images under CUHK-PEDES/imgs/
    ROOT/ICFG-PEDES/ICFG-PEDES.json      the same fields                                   images under ICFG-PEDES/imgs/
    ROOT/RSTPReid/data_captions.json     "img_path" instead of "file_path"                 images under RSTPReid/imgs/

ROOT may also be the data set's own folder. Every caption is a pair; training identities are numbered from 0.
"""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .split import Split

__all__ = ["LAYOUTS", "read_dataset"]

# annotation file, key of the image path
LAYOUTS = {
    "CUHK-PEDES": ("reid_raw.json", "file_path"),
    "ICFG-PEDES": ("ICFG-PEDES.json", "file_path"),
    "RSTPReid": ("data_captions.json", "img_path"),
}


def read_dataset(name: str, root: str | Path, split: str) -> Split:
    """One split ("train", "val" or "test") of a public data set.

    Raises:
        FileNotFoundError: the annotation file or an image is missing; the message names what was looked for.
        ValueError: unknown data set, or an annotation without the fields of its layout.
    """
    if name not in LAYOUTS:
        raise ValueError(f"dataset must be one of {', '.join(LAYOUTS)}, got {name!r}")
    file, path_key = LAYOUTS[name]
    folders = (Path(root) / name, Path(root))
    folder = next((folder for folder in folders if (folder / file).is_file()), None)
    if folder is None:
        wanted = " nor ".join(str(folder / file) for folder in folders)
        raise FileNotFoundError(
            f"{name} needs its annotations, found neither {wanted}; pass --root the folder above {name}/"
        )
    with open(folder / file, encoding="utf-8") as stream:
        entries: list[dict[str, Any]] = json.load(stream)
    for entry in entries:
        missing = {"split", "captions", "id", path_key} - entry.keys()
        if missing:
            raise ValueError(
                f"every entry of {folder / file} must have {sorted(missing)}, got one with {sorted(entry)}"
            )
    entries = [entry for entry in entries if entry["split"] == split]
    if not entries:
        raise ValueError(f"{folder / file} must have entries of the split {split!r}, got none")

    # One entry an image in CUHK-PEDES and RSTPReid, but nothing forbids two: images are told apart by their path.
    paths: dict[str, int] = {}
    pids: list[int] = []
    captions: list[str] = []
    caption_images: list[int] = []
    for entry in entries:
        path = entry[path_key]
        if path not in paths:
            paths[path] = len(paths)
            pids.append(int(entry["id"]))
        for text in entry["captions"]:
            captions.append(text)
            caption_images.append(paths[path])
    files = [folder / "imgs" / path for path in paths]
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise FileNotFoundError(
            f"{len(absent)} of {len(files)} images of {name} {split} are missing, the first is {absent[0]}"
        )
    image_pids = torch.tensor(pids)
    if split == "train":
        image_pids = torch.unique(image_pids, return_inverse=True)[1]
    return Split(lambda i: Image.open(files[i]).convert("RGB"), image_pids, captions, torch.tensor(caption_images))
