"""What the pictures show: rendered pedestrians, seen by the small pretrained model that is committed with the code."""

from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..person_retrieval.data import Split, rendered_splits
from ..person_retrieval.models.pretrained import load_two_stream

__all__ = ["People", "people", "save"]

SIZE = (96, 32)  # (height, width) in pixels, as the model sees them
SHOWN = (192, 64)  # as they are drawn
COUNT = 40


@dataclass(frozen=True)
class People:
    """40 people, two photographs each, two captions a photograph; D 96, 12 x 4 patches, captions of 40 tokens.

    Attributes:
        image_features, image_tokens: [80, D], [80, 48, D].
        text_features, text_tokens, token_ids: [160, D], [160, 40, D], [160, 40]; captions 2 i and 2 i + 1: of image i.
        image_pids, text_pids: [80], [160].
    """

    model: nn.Module
    tokenizer: Any
    split: Split
    image_features: Tensor
    image_tokens: Tensor
    text_features: Tensor
    text_tokens: Tensor
    token_ids: Tensor
    image_pids: Tensor
    text_pids: Tensor

    def photograph(self, image: int) -> np.ndarray:
        """[H, W, 3] uint8, small enough for a picture of many."""
        return resized(self.split, image, SHOWN)

    def words(self, caption: int) -> list[str]:
        """Of the tokens of a caption without padding, by position; the first and the last are start and end."""
        return ["[start]", *self.tokenizer.words(self.token_ids[caption]), "[end]"]

    def paired(self, images: int) -> tuple[Tensor, Tensor, Tensor]:
        """A training batch: the first images, the first caption of each, and who they are."""
        own = 2 * torch.arange(images)
        return self.image_features[:images], self.text_features[own], self.image_pids[:images]


@cache
@torch.no_grad()
def people() -> People:
    """Rendered and encoded once for all pictures."""
    weights = load_two_stream(None, image_size=SIZE)
    model, tokenizer = weights.build(0).eval(), weights.tokenizer
    split = rendered_splits({"test": COUNT})["test"]
    seen = [resized(split, i, SIZE) for i in range(2 * COUNT)]
    pixels = torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2)
    token_ids = tokenizer(split.captions)
    image_features, image_tokens = model.encode_image(pixels)
    text_features, text_tokens = model.encode_text(token_ids)
    return People(
        model, tokenizer, split, image_features, image_tokens, text_features, text_tokens, token_ids,
        split.image_pids, split.caption_pids,
    )  # fmt: skip


def resized(split: Split, image: int, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(split.photograph(image).resize(size[::-1], Image.Resampling.BILINEAR))


def save(figure: Any, file: Path, *, dpi: int = 120, limit: int = 100_000) -> None:
    """With 256 colours where all of them would take more than `limit` bytes."""
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.08, facecolor="white")
    if drawn.tell() > limit:
        palette = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        drawn = BytesIO()
        palette.save(drawn, format="png", optimize=True)
    file.write_bytes(drawn.getvalue())
