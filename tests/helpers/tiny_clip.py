"""A model of images and captions with the methods that docs/integrations names, and batches for it."""

import torch
from torch import Tensor, nn

from fmfa_losses import mask_tokens

IDENTITIES, N, L, D = 6, 5, 8, 64  # N patches besides [CLS]


class TinyCLIP(nn.Module):
    """Both towers share their blocks."""

    embed_dim = D

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.image, self.text, self.norm = nn.Linear(3, D), nn.Embedding(97, D), nn.LayerNorm(D)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.GELU()) for _ in range(2))

    def image_tokens(self, images: Tensor) -> Tensor:
        """[B, 1 + N, D]."""
        return self.after_blocks(self.image(images))

    def text_tokens(self, caption_ids: Tensor) -> Tensor:
        """[B, L, D]; the token at the end knows all of them, as in CLIP."""
        x = self.text(caption_ids % 97)
        return self.after_blocks(x.cumsum(dim=1) / L)

    def after_blocks(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


def training_batch(size: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """With the names of Trainee's arguments on the page of mixed precision."""
    generator = torch.Generator().manual_seed(seed)
    captions = torch.zeros(size, L, dtype=torch.int64)
    for row in range(size):
        words = 2 + row % (L - 3)
        captions[row, 0], captions[row, 1 + words] = 49406, 49407
        captions[row, 1 : 1 + words] = torch.randint(1, 49000, (words,), generator=generator)
    masked_ids, masked_labels = mask_tokens(captions, generator=generator)
    return {
        "images": torch.randn(size, 1 + N, 3, generator=generator),
        "caption_ids": captions,
        "pids": torch.arange(size) // 2 % IDENTITIES,
        "masked_ids": masked_ids,
        "masked_labels": masked_labels,
    }


def rows(batch: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    return {name: x[part] for name, x in batch.items()}


def pooled_images(model: TinyCLIP, images: Tensor) -> Tensor:
    return model.image_tokens(images)[:, 0]


def pooled_texts(model: TinyCLIP, ids: Tensor) -> Tensor:
    return model.text_tokens(ids)[torch.arange(len(ids)), ids.argmax(dim=1)]
