"""Losses of image-text pairs with the call of pytorch-metric-learning's losses."""

import inspect
from typing import Any

import torch
from torch import Tensor

from ..losses.loss import Loss
from ..ops.checks import check_flag, describe, integer_ids
from ..ops.module import Module

__all__ = ["PairLoss"]


class PairLoss(Module):
    """Calls a loss of this library as pytorch-metric-learning calls its own.

        PairLoss(loss)(image_features, pids, ref_emb=text_features)  =  loss(image_features, text_features, pids)

    Row i of embeddings and row i of ref_emb are a pair. Where ref_emb cannot be passed, as in MultipleLosses,
    `stacked=True` takes images and texts in one tensor. For several processes build `loss` with gather=True;
    DistributedLossWrapper and CrossBatchMemory refuse this class.

    Args:
        loss: one of image features, text features and pids: ASDMLoss(), TALLoss(), ...
        stacked: embeddings are [2B, D], the images and then their texts, and labels [2B]; there is no ref_emb.
    Inputs:
        embeddings: [B, D] image features.
        labels: [B] integer pids.
        indices_tuple: None. These losses weigh all pairs of the batch, so there is nothing to select.
        ref_emb: [B, D] text features.
        ref_labels: None or the labels. Values are compared, for which the host waits on an accelerator, where it is
            another tensor than labels, and with stacked=True.
    Returns:
        What `loss` returns.
    Raises:
        TypeError: a loss that does not take image features, text features and pids; labels that are no integer tensor.
        ValueError: indices of a miner, no ref_emb (or, with stacked=True, one), labels of a pair that differ.
    Example:
        >>> from fmfa_losses import ASDMLoss
        >>> image, text, pids = torch.eye(3), torch.eye(3), torch.arange(3)
        >>> value = PairLoss(ASDMLoss())(image, pids, ref_emb=text)
        >>> torch.equal(value, ASDMLoss()(image, text, pids))
        True
    """

    loss: Loss
    stacked: bool

    def __init__(self, loss: Loss, *, stacked: bool = False) -> None:
        super().__init__()
        taken = tuple(inspect.signature(loss.forward).parameters)[:3] if isinstance(loss, Loss) else ()
        if taken != ("image_features", "text_features", "pids"):
            raise TypeError(
                "loss must take image_features, text_features and pids, as ASDMLoss() does, got "
                f"{describe(loss)}; call another loss by itself and add the values"
            )
        self.loss, self.stacked = loss, check_flag("stacked", stacked)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        if indices_tuple is not None:
            raise ValueError(
                f"indices_tuple must be None, got {describe(indices_tuple)}: {type(self.loss).__name__} weighs all "
                "pairs of the batch itself; leave the miner out"
            )
        if self.stacked:
            embeddings, ref_emb = _halves("embeddings", embeddings, ref_emb)
            if labels is not None:
                labels, ref_labels = _halves("labels", labels, ref_labels)
        if ref_emb is None:
            raise ValueError(
                "ref_emb must be the text features [B, D] of the images in embeddings, got None; pass "
                "ref_emb=text_features, or build PairLoss(..., stacked=True) and pass images and texts in one tensor"
            )
        if not (ref_labels is None or ref_labels is labels) and not _equal(labels, ref_labels):
            raise ValueError(
                "labels of image i and text i must be equal, because they are a pair, got "
                f"{describe(labels)} and {describe(ref_labels)} with other values; for negatives of earlier batches "
                "pass a fmfa_losses.NegativesQueue to the loss itself"
            )
        value: Tensor = self.loss(embeddings, ref_emb, labels)
        return value


def _equal(labels: Tensor | None, ref_labels: Tensor) -> bool:
    of_images, of_texts = integer_ids("labels", labels, "B"), integer_ids("ref_labels", ref_labels, "B")
    return torch.equal(of_images, of_texts.to(of_images))


def _halves(name: str, both: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of the images and rows of the texts."""
    if other is not None or len(both) % 2:
        raise ValueError(
            f"{name} must hold the images and then their texts, 2B rows and no second tensor, got {describe(both)} and "
            f"{describe(other)}; build PairLoss without stacked=True to pass them as embeddings and ref_emb"
        )
    images, texts = both.chunk(2)
    return images, texts
