"""Splits of images and captions: the three public data sets as they lie on disk, and the rendered pedestrians.

    ROOT/CUHK-PEDES/reid_raw.json        [{"split", "captions", "file_path", "id"}, ...]   images under CUHK-PEDES/imgs/
    ROOT/ICFG-PEDES/ICFG-PEDES.json      the same fields                                   images under ICFG-PEDES/imgs/
    ROOT/RSTPReid/data_captions.json     "img_path" instead of "file_path"                 images under RSTPReid/imgs/

ROOT may also be the data set's own folder. Every caption is a pair; training identities are numbered from 0.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .pedestrians import caption, make_identities, render

__all__ = [
    "LAYOUTS",
    "Batches",
    "IdentitySampler",
    "Pairs",
    "RandomSampler",
    "Split",
    "read_dataset",
    "rendered_splits",
]

# annotation file, key of the image path
LAYOUTS = {
    "CUHK-PEDES": ("reid_raw.json", "file_path"),
    "ICFG-PEDES": ("ICFG-PEDES.json", "file_path"),
    "RSTPReid": ("data_captions.json", "img_path"),
}

ERASED = (123, 117, 104)  # the colour of an erased rectangle: the mean of photographs

Photograph = Callable[[int], Image.Image]


@dataclass(frozen=True)
class Split:
    """Images [M], each with an identity, and captions [P], each of one image.

    `photograph(i)` is image i as it was taken; `captions[p]` describes image `caption_images[p]`.
    """

    photograph: Photograph
    image_pids: Tensor
    captions: list[str]
    caption_images: Tensor

    @property
    def caption_pids(self) -> Tensor:
        return self.image_pids[self.caption_images]

    @property
    def num_identities(self) -> int:
        return len(self.image_pids.unique())

    def __str__(self) -> str:
        return f"{self.num_identities} identities, {len(self.image_pids)} images, {len(self.captions)} captions"


# ---------------------------------------------------------------------------------------------------- from a folder


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


# ------------------------------------------------------------------------------------------------------- rendered


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


# ------------------------------------------------------------------------------------------------ what a step reads


class Pairs(Dataset[dict[str, Tensor]]):
    """Training pairs: an augmented image (uint8), its caption's ids, its identity, its index.

    The augmentation of a pair follows from (seed, epoch, index), whichever worker draws it.

    Args:
        size: (height, width) the images are resized to.
        keep: hold the resized images in memory.
    """

    def __init__(
        self,
        split: Split,
        token_ids: Tensor,
        *,
        size: tuple[int, int],
        seed: int = 0,
        augment: bool = True,
        keep: bool = False,
    ) -> None:
        self.split, self.token_ids, self.size, self.seed, self.augment = split, token_ids, size, seed, augment
        self.epoch = 0
        self.kept = [self._read(i) for i in range(len(split.image_pids))] if keep else None

    def __len__(self) -> int:
        return len(self.split.captions)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = int(self.split.caption_images[index])
        pixels = self.kept[image] if self.kept is not None else self._read(image)
        if self.augment:
            pixels = _augment(pixels, np.random.default_rng([self.seed, self.epoch, index]))
        return {
            "pixels": _channels_first(pixels),
            "token_ids": self.token_ids[index],
            "pids": self.split.image_pids[image],
            "index": torch.tensor(index),
        }

    def images(self) -> "Images":
        return Images(self)

    def _read(self, image: int) -> np.ndarray:
        photo = self.split.photograph(image)
        return np.asarray(photo.resize((self.size[1], self.size[0]), Image.Resampling.BICUBIC))


class Images(Dataset[Tensor]):
    """Every image of a split once, as the model takes it: the gallery."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs.split.image_pids)

    def __getitem__(self, index: int) -> Tensor:
        kept = self.pairs.kept
        return _channels_first(self.pairs._read(index) if kept is None else kept[index])


def _channels_first(pixels: np.ndarray) -> Tensor:
    """[H, W, 3] -> [3, H, W], uint8."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _augment(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Flip, shift within a padded frame, and erase a rectangle, each half of the time; [H, W, 3] stays as it is."""
    height, width, _ = pixels.shape
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < 0.5:
        pad_y, pad_x = max(1, height * 10 // 384), max(1, width * 10 // 128)
        padded = np.pad(pixels, ((pad_y, pad_y), (pad_x, pad_x), (0, 0)), mode="edge")
        y, x = rng.integers(2 * pad_y + 1), rng.integers(2 * pad_x + 1)
        pixels = padded[y : y + height, x : x + width]
    if rng.random() < 0.5:
        area, ratio = rng.uniform(0.02, 0.25) * height * width, np.exp(rng.uniform(np.log(0.3), np.log(3.3)))
        h, w = min(height, int(np.sqrt(area * ratio))), min(width, int(np.sqrt(area / ratio)))
        y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
        pixels = pixels.copy()
        pixels[y : y + h, x : x + w] = ERASED
    return pixels


class RandomSampler(Sampler[int]):
    """Every pair once, in an order that follows from (seed, epoch)."""

    def __init__(self, count: int, *, seed: int = 0) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.count, generator=generator).tolist())


class IdentitySampler(Sampler[int]):
    """Runs of `per_identity` captions of each identity, so that a batch has several captions of each person.

    Draws by (seed, epoch).
    """

    def __init__(self, pids: Tensor, *, per_identity: int = 4, seed: int = 0) -> None:
        self.pids, self.per_identity, self.seed, self.epoch = pids, per_identity, seed, 0

    def __len__(self) -> int:
        counts = torch.bincount(self.pids)
        return int((counts // self.per_identity).sum()) * self.per_identity

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100003 + self.epoch)
        shuffled = torch.randperm(len(self.pids), generator=generator)
        by_pid = shuffled[self.pids[shuffled].argsort(stable=True)]
        groups = [
            group[: len(group) // self.per_identity * self.per_identity].view(-1, self.per_identity)
            for group in by_pid.split(torch.bincount(self.pids).tolist())
        ]
        dealt = torch.cat(groups)
        return iter(dealt[torch.randperm(len(dealt), generator=generator)].flatten().tolist())


class Batches(Sampler[list[int]]):
    """Slice `rank` of every batch of all processes.

    W processes with batches of b read, in rank order, the batches of one process with W b. What is left over at the end
    of an epoch is dropped; fewer pairs than W b are one batch, cut as evenly as they go.
    """

    def __init__(
        self, sampler: RandomSampler | IdentitySampler, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        self.sampler, self.rank, self.world_size = sampler, rank, world_size
        self.whole = min(batch_size * world_size, len(sampler))  # the batch of all processes
        if self.whole < world_size:
            raise ValueError(
                f"every process must get a pair of every batch, got {len(sampler)} pairs for {world_size} processes; "
                "start fewer"
            )

    def set_epoch(self, epoch: int) -> None:
        self.sampler.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler) // self.whole

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        start, stop = (self.whole * rank // self.world_size for rank in (self.rank, self.rank + 1))
        for first in range(0, len(self) * self.whole, self.whole):
            yield order[first + start : first + stop]
