"""What is trained: a model and its objective as one module."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmfa_losses import FMFALoss, FMFAOutput
from fmfa_losses.distributed.handshake import handshake
from fmfa_losses.distributed.peers import Peers
from fmfa_losses.functional import hard_similarity

__all__ = ["Contrastive", "Trainee"]


class Trainee(nn.Module):
    """Model and objective as one module, so that one forward under DDP sees every parameter."""

    def __init__(self, model: nn.Module, objective: FMFALoss) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    @property
    def uses_tokens(self) -> bool:
        """Whether a term depends on patches and words."""
        return bool(self.objective.weights["efa"] or self.objective.weights["irr"])

    def forward(
        self, pixels: Tensor, token_ids: Tensor, masked_ids: Tensor, labels: Tensor, pids: Tensor
    ) -> FMFAOutput:
        image_features, image_tokens = self.model.encode_image(pixels)
        # Captions and masked captions share one pass through the text stream.
        features, tokens = self.model.encode_text(torch.cat([token_ids, masked_ids]))
        text_features, _ = features.chunk(2)
        text_tokens, masked_tokens = tokens.chunk(2)
        return self.objective(
            image_features,
            text_features,
            image_tokens,
            text_tokens,
            pids,
            masked_text_tokens=masked_tokens,
            masked_labels=labels,
            text_mask=self.model.text_mask(token_ids),
        )


class Contrastive(nn.Module):
    """The model alone with contrastive losses: what the objectives of FMFA expect to have happened before.

    A-SDM is a reverse KL divergence. From fresh weights its nearest minimum is a model that finds everything alike; it
    sharpens an alignment, it does not begin one. The paper starts from CLIP, the rendered pedestrians from weights that
    were made so: CLIP's loss on the global features, and FILIP's (arXiv 2111.07783) on tokens, where each word picks
    its best patch.

    Args:
        gather: False contrasts within this process's batch; True and "ring" do so with the images, captions and patches
            of all processes, gathered either way: this model's patches are few.
    """

    uses_tokens = True

    def __init__(self, model: nn.Module, temperature: float = 0.07, *, gather: bool | str = False) -> None:
        super().__init__()
        self.model, self.temperature, self.gather = model, temperature, gather

    def forward(
        self, pixels: Tensor, token_ids: Tensor, masked_ids: Tensor, labels: Tensor, pids: Tensor
    ) -> FMFAOutput:
        image, patches = self.model.encode_image(pixels)
        text, words = self.model.encode_text(token_ids)
        keep = self.model.text_mask(token_ids)
        peers, _ = handshake(self.gather, None, {"image": image, "patches": patches})
        similarity = F.normalize(text, dim=1) @ peers.gather(F.normalize(image, dim=1)).T  # own rows, [b, B]
        token_similarity = hard_similarity(words, peers.gather(patches), x_mask=keep, pool="mean")
        terms = {
            "contrastive": self._contrast(similarity, peers),
            "token_contrastive": self._contrast(token_similarity, peers),
        }
        return FMFAOutput(torch.stack(list(terms.values())).sum(), terms, {})

    def _contrast(self, similarity: Tensor, peers: Peers) -> Tensor:
        """Cross-entropy of the own pairs on the diagonal of [B, B], own rows of which are given, both ways."""
        pairs = peers.offset + torch.arange(len(similarity), device=similarity.device)
        both = [similarity / self.temperature, peers.transpose(similarity) / self.temperature]
        return peers.mean(
            torch.stack([F.cross_entropy(logits, pairs, reduction="none") for logits in both]).mean(dim=0)
        )
