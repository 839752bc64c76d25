"""What a training step and an evaluation read: pixels, token ids, identities."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .augmentation import Augmentation
from .split import Split

__all__ = ["Images", "Pairs"]


class Pairs(Dataset[dict[str, Tensor]]):
    """Pairs: an image [3, H, W] uint8, its caption's ids [L], its identity, its index.

    The augmentation of a pair follows from (seed, epoch, index), whichever worker draws it.

    Args:
        token_ids: of the captions, [P, L].
        size: (height, width) the images are resized to.
        augmentation: for training; None leaves images as they are.
        keep: hold the resized images in memory.
        resample: the filter that resizes, as Pillow applies it: over all pixels that fall into one.
    """

    def __init__(
        self,
        split: Split,
        token_ids: Tensor,
        *,
        size: tuple[int, int],
        seed: int = 0,
        augmentation: Augmentation | None = None,
        keep: bool = False,
        resample: Image.Resampling = Image.Resampling.BILINEAR,
    ) -> None:
        self.split, self.token_ids, self.size, self.seed = split, token_ids, size, seed
        self.augmentation, self.resample = augmentation, resample
        self.epoch = 0
        self.kept = [self._read(i) for i in range(len(split.image_pids))] if keep else None

    def __len__(self) -> int:
        return len(self.split.captions)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = int(self.split.caption_images[index])
        pixels = self.kept[image] if self.kept is not None else self._read(image)
        if self.augmentation is not None:
            pixels = self.augmentation(pixels, np.random.default_rng([self.seed, self.epoch, index]))
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
        return np.asarray(photo.resize((self.size[1], self.size[0]), self.resample))


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
