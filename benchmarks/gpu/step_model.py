"""What the training step trains on: CLIP with random weights, and a batch of random images and captions.

CLIP comes from `benchmarks/person_retrieval`, which builds it with `transformers`: `towers` is all that depends on
either.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmfa_losses import mask_tokens

from ..cases import Case, lengths

__all__ = ["PAPER", "TOY", "Batch", "Sizes", "batch", "towers", "why_not"]


@dataclass(frozen=True)
class Sizes:
    """Of model and data; the captions have words of which the last three are mask, start and end, as CLIP's."""

    image: tuple[int, int] = (384, 128)
    words: int = 49408
    identities: int = 11003  # CUHK-PEDES
    L: int = 77
    tiny: bool = False


PAPER = Sizes()
TOY = Sizes(image=(48, 16), words=60, identities=7, tiny=True)
CAPTION = 25  # tokens on average


class Batch(NamedTuple):
    """On the device: pixels [B, 3, H, W] uint8; token_ids, masked_ids and labels [B, L]; pids [B]. On the CPU: labels.

    Nobody waits for labels: released code moves the whole batch to the device, ours wants them on the CPU.
    """

    pixels: Tensor
    token_ids: Tensor
    masked_ids: Tensor
    labels: Tensor
    pids: Tensor
    cpu_labels: Tensor


def why_not() -> str | None:
    """The reason why there is no model here, or None."""
    return None if importlib.util.find_spec("transformers") else "needs transformers"


def towers(sizes: Sizes, device: str) -> nn.Module:
    """`encode_image(pixels)` and `encode_text(token_ids)` of ViT-B/16, or of a tiny model of as many words.

    The weights follow from torch's seed. They are drawn on the device, which is much faster than to bring them there.
    """
    from ..person_retrieval.models.weights import load_clip

    vocabulary = (f"w{number}" for number in range(sizes.words - 5))  # what the tokenizer adds: padding, ?, and three
    with torch.device(device):
        model: nn.Module = load_clip(None, vocabulary, image_size=sizes.image, tiny=sizes.tiny)[0]
    return model.train()


def batch(sizes: Sizes, B: int, device: str, seed: int = 0) -> Batch:
    """B pairs, every identity twice; captions of 25 tokens on average, of which IRR masks 15 %."""
    generator = torch.Generator().manual_seed(seed)
    V, L = sizes.words, sizes.L
    mask, start, end = V - 3, V - 2, V - 1
    # Large patches of colour, so that images differ.
    colours = torch.randint(256, (B, 3, 6, 2), generator=generator, dtype=torch.uint8)
    pixels = nn.functional.interpolate(colours, size=sizes.image)
    token_ids = torch.randint(2, mask, (B, L), generator=generator)
    last = lengths(Case("mask_tokens", B, L=L, mean_length=CAPTION), seed).clamp(3, L)[:, None] - 1
    place = torch.arange(L)
    token_ids = token_ids.where(place < last, 0).where(place != last, end)
    token_ids[:, 0] = start
    names: dict[str, Any] = {"mask_id": mask, "special_ids": (0, start, end)}
    masked_ids, labels = mask_tokens(token_ids, generator=generator, **names)
    pids = torch.arange(B) // 2 % sizes.identities
    return Batch(*(x.to(device) for x in (pixels, token_ids, masked_ids, labels, pids)), labels)
