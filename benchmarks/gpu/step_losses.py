"""The four losses of the training step from the outputs of both towers: as released, and ours.

Both compute the paper's equations (CUHK-PEDES) with the same heads and no masks, so that values and gradients agree and
implementations are compared. Where released code does something else than the paper (docs/losses.md), it is not done
here: it would cost the same. What it pays for is kept:

    ID      the same in both
    IRR     logits of all B L tokens over the vocabulary, in float32 for the cross-entropy
    A-SDM   whole [B, B] matrices, one after the other, kept for autograd
    EFA     cosines [B, B, N, L] and [B, B, L, L] by products over operands expanded to [B, B, tokens, D]
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fmfa_losses import FMFALoss
from fmfa_losses.ops.options import Backend

from ..providers import REFERENCE, RELEASED, TORCH, TRITON, provider
from .step_model import Batch, Sizes

__all__ = ["LOSSES", "Encoded", "Losses", "heads"]


class Encoded(NamedTuple):
    """Features [B, D] and tokens: patches [B, N, D] without [CLS], words and masked words [B, L, D]."""

    image_features: Tensor
    text_features: Tensor
    patches: Tensor
    words: Tensor
    masked_words: Tensor


Losses = Callable[[FMFALoss, Encoded, Batch], dict[str, Tensor]]


def heads(sizes: Sizes, width: int, device: str, backend: Backend) -> FMFALoss:
    """Our losses with classifier and cross-modal transformer, which both use; weights follow from torch's seed."""
    with torch.device(device):
        return FMFALoss.for_dataset("CUHK-PEDES", width, sizes.identities, vocab_size=sizes.words, backend=backend)


def released(objective: FMFALoss, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
    image, text, patches, words, masked = encoded
    everything = torch.cat([image[:, None], patches], dim=1)  # [CLS] and the patches
    return {
        "id": provider(REFERENCE, "id")(objective.identity, image, text, batch.pids),
        "irr": provider(REFERENCE, "irr")(objective.irr, everything, masked, batch.labels),
        "efa": provider(RELEASED, "efa")(patches, words),
        "asdm": provider(REFERENCE, "asdm")(image, text, batch.pids),
    }


def ours(objective: FMFALoss, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
    image, text, patches, words, masked = encoded
    out = objective(image, text, patches, words, batch.pids, masked_text_tokens=masked, masked_labels=batch.cpu_labels)
    return out.terms


LOSSES: dict[str, Losses] = {RELEASED: released, TORCH: ours, TRITON: ours}
