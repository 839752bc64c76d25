"""What a trained model finds, by the cosine of global features: features, metrics, and the first images of captions."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fmfa_losses.retrieval import RetrievalMetrics, retrieval_metrics, search

from .data import Pairs
from .errors import RunError

__all__ = [
    "Found",
    "as_dict",
    "chance",
    "encode",
    "encode_images",
    "encode_texts",
    "evaluate",
    "find",
    "image_batches",
    "joined",
    "text_batches",
]

QUERIES = 512  # ranked at a time


def encode(
    model: nn.Module, pairs: Pairs, device: torch.device, *, batch_size: int = 128, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Features of every caption [P, D] and every image [M, D], on the CPU in float32 or better.

    Raises:
        RunError: a feature is not finite.
    """
    texts = encode_texts(model, pairs, device, batch_size=batch_size)
    return texts, encode_images(model, pairs, device, batch_size=batch_size, workers=workers)


def encode_texts(model: nn.Module, pairs: Pairs, device: torch.device, *, batch_size: int = 128) -> Tensor:
    """[P, D], as `encode`."""
    return joined("captions", [x for x, _, _ in text_batches(model, pairs, device, batch_size=batch_size)])


def encode_images(
    model: nn.Module, pairs: Pairs, device: torch.device, *, batch_size: int = 128, workers: int = 0
) -> Tensor:
    """[M, D], as `encode`."""
    batches = image_batches(model, pairs, device, batch_size=batch_size, workers=workers)
    return joined("images", [x.clone() for x, _ in batches])  # a view of [CLS] would keep all patches


@torch.no_grad()
def text_batches(
    model: nn.Module, pairs: Pairs, device: torch.device, *, batch_size: int = 128
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Captions in their order: features [b, D], words [b, L, D] and which of them are no padding [b, L]."""
    model.eval()
    for ids in pairs.token_ids.split(batch_size):
        ids = ids.to(device)
        with _precision(device):
            features, words = model.encode_text(ids)  # type: ignore[operator]
        yield features, words, model.text_mask(ids)  # type: ignore[operator]


@torch.no_grad()
def image_batches(
    model: nn.Module, pairs: Pairs, device: torch.device, *, batch_size: int = 128, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images in their order: features [b, D] and patches [b, N, D].

    Args:
        workers: processes that read images.
    """
    model.eval()
    loader = DataLoader(
        pairs.images(),
        batch_size,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # a loader draws a number even where it shuffles nothing
    )
    for pixels in loader:
        with _precision(device):
            features, patches = model.encode_image(pixels.to(device, non_blocking=True))  # type: ignore[operator]
        yield features, patches


def evaluate(texts: Tensor, images: Tensor, pairs: Pairs) -> RetrievalMetrics:
    return retrieval_metrics(texts, images, pairs.split.caption_pids, pairs.split.image_pids, ranks=(1, 5, 10))


def as_dict(metrics: RetrievalMetrics) -> dict[str, dict[str, float]]:
    """Percent, by direction."""
    return {
        name: {**{f"R{k}": value for k, value in one.cmc.items()}, "mAP": one.mAP, "mINP": one.mINP}
        for name, one in (("t2i", metrics.t2i), ("i2t", metrics.i2t))
    }


def chance(pairs: Pairs) -> float:
    """Rank-1 in percent of captions that point at an image blindly."""
    _, counts = pairs.split.image_pids.unique(return_counts=True)
    people = torch.searchsorted(pairs.split.image_pids.unique(), pairs.split.caption_pids)
    return 100 * float(counts[people].double().mean()) / len(pairs.split.image_pids)


class Found(NamedTuple):
    """What every caption finds: the first images [P, k], their cosines [P, k], and the rank of the first right one."""

    images: Tensor
    scores: Tensor
    ranks: Tensor  # [P], from 1


def find(texts: Tensor, images: Tensor, pairs: Pairs, *, top: int) -> Found:
    """Equal cosines rank by image index, lower first, as in the metrics."""
    pids, top = pairs.split.image_pids, min(top, len(images))
    parts = []
    for features, own in zip(texts.split(QUERIES), pairs.split.caption_pids.split(QUERIES), strict=True):
        scores, order = search(features, images, len(images))
        right = pids[order] == own[:, None]  # a caption's own image is in the gallery
        parts.append((order[:, :top], scores[:, :top], right.int().argmax(dim=1) + 1))
    return Found(*(torch.cat(part) for part in zip(*parts, strict=True)))


def joined(what: str, blocks: list[Tensor]) -> Tensor:
    """Features of all `what`, on the CPU in float32 or better; RunError where one is not finite."""
    features = torch.cat([block.to("cpu", torch.promote_types(block.dtype, torch.float32)) for block in blocks])
    broken = int((~features.isfinite().all(dim=1)).sum())
    if broken:
        raise RunError(
            f"features must be finite, those of {broken} of {len(features)} {what} are not: the weights are of a run "
            "that diverged, or too large for float16; take other weights, or --device cpu"
        )
    return features


def _precision(device: torch.device) -> torch.autocast:
    """Half precision on a GPU. Entered for each batch: a generator must not leave it on for its caller."""
    return torch.autocast(device.type, torch.float16, enabled=device.type == "cuda")
