"""One batch as a trained model gives it: a word of a caption lies near a patch of its image, padding near none.

Everything is float64, so that a rounded number is the same on every processor.
"""

from dataclasses import dataclass

import torch

from fmfa_losses import mask_tokens

B, ROWS, COLUMNS, L, D, VOCABULARY = 32, 12, 6, 24, 64, 40
N = ROWS * COLUMNS
START, END, PAD, MASK = 49406, 49407, 0, 49405


@dataclass
class Batch:
    """What a step has: features and tokens of a model, and what the loader gave."""

    image_features: torch.Tensor
    text_features: torch.Tensor
    cls_and_patches: torch.Tensor
    text_tokens: torch.Tensor
    token_ids: torch.Tensor
    text_mask: torch.Tensor
    pids: torch.Tensor
    masked_text_tokens: torch.Tensor
    masked_labels: torch.Tensor

    @property
    def image_tokens(self):
        return self.cls_and_patches[:, 1:]

    def arguments(self, **changed):
        """Everything that check_batch takes, with some of it changed; None leaves one out."""
        names = ("image_features", "text_features", "image_tokens", "text_tokens", "masked_text_tokens")
        names += ("masked_labels", "text_mask", "token_ids", "pids")
        return {**{name: getattr(self, name) for name in names}, "logit_scale": 50.0, **changed}


def make(persons: int = 28, *, seed: int = 0, pad: int = PAD, images_a_person: int = 0) -> Batch:
    """B pairs; words are chosen patches of the own image with noise, the end token is the caption's feature."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    which = torch.arange(B) // images_a_person if images_a_person else torch.arange(B) % persons
    person = noise(B, D)[which]
    image = person + 0.5 * noise(B, D)
    text = image + 0.7 * noise(B, D)
    patches = image[:, None] + 2 * noise(B, N, D)
    lengths = torch.randint(8, L - 4, (B,), generator=generator)
    ids = torch.randint(1, VOCABULARY, (B, L), generator=generator)
    column = torch.arange(L)
    ids[:, 0] = START
    ids = torch.where(column == lengths[:, None] - 1, END, ids)
    ids = torch.where(column >= lengths[:, None], pad, ids)
    seen = torch.randint(N, (B, L), generator=generator)
    words = patches[torch.arange(B)[:, None], seen] + 0.5 * noise(B, L, D)
    words[torch.arange(B), lengths - 1] = text
    words = torch.where(
        (column < lengths[:, None])[..., None], words, 2 * noise(L, D)
    )  # padding knows its position alone
    masked_ids, labels = mask_tokens(ids, mask_id=MASK, special_ids=(START, END), generator=generator)
    masked = torch.where((masked_ids != ids)[..., None], noise(D), words)
    return Batch(
        image_features=9 / 8 * image,
        text_features=text,
        cls_and_patches=torch.cat([9 / 8 * image[:, None], patches], dim=1),
        text_tokens=words,
        token_ids=ids,
        text_mask=column < lengths[:, None],
        pids=which * 37 + 11,
        masked_text_tokens=masked,
        masked_labels=labels,
    )


BATCH = make()
