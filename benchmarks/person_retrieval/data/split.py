"""Images, captions, and who is on which: what every data set comes down to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

__all__ = ["Photograph", "Split"]

Photograph = Callable[[int], Image.Image]


@dataclass(frozen=True)
class Split:
    """Images [M], each with an identity, and captions [P], each of one image.

    `photograph(i)` is image i as it was taken, in RGB; `captions[p]` describes image `caption_images[p]`. `notes`
    counts what reading has handled, in words; `files` are the image files, None where images are not read but drawn.
    """

    photograph: Photograph
    image_pids: Tensor
    captions: list[str]
    caption_images: Tensor
    name: str = ""
    notes: dict[str, int] = field(default_factory=dict)
    files: list[Path] | None = None

    @property
    def caption_pids(self) -> Tensor:
        return self.image_pids[self.caption_images]

    @property
    def num_identities(self) -> int:
        return len(self.image_pids.unique())

    def __str__(self) -> str:
        sizes = f"{self.num_identities} identities, {len(self.image_pids)} images, {len(self.captions)} captions"
        notes = ", ".join(f"{words}: {count}" for words, count in self.notes.items())
        return f"{sizes} ({notes})" if notes else sizes
