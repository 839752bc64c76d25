"""What a trained model finds: the metrics, and the pictures that show them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fmfa_losses import plot
from fmfa_losses.retrieval import RetrievalMetrics, retrieval_metrics, search

from .data import Pairs

__all__ = ["as_dict", "chance", "draw", "encode", "evaluate"]

# Words that point at nothing in an image.
_SILENT = (
    "a an and away are at back behind by camera carries carrying dressed female footwear guy has he her his holds in",
    "is it its lady male man of on over pedestrian person she side stands standing that the this to towards waits",
    "walking walks wearing wears who with woman young . ,",
)
SILENT = frozenset(word for line in _SILENT for word in line.split())


@torch.no_grad()
def encode(model: nn.Module, pairs: Pairs, device: torch.device, *, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """Features of every caption [P, D] and every image [M, D], on the CPU in float32."""
    model.eval()
    loader = DataLoader(pairs.images(), batch_size)
    with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
        images = [model.encode_image(pixels.to(device))[0].float().cpu() for pixels in loader]  # type: ignore[operator]
        texts = [
            model.encode_text(ids.to(device))[0].float().cpu()  # type: ignore[operator]
            for ids in pairs.token_ids.split(batch_size)
        ]
    return torch.cat(texts), torch.cat(images)


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
    matches = (pairs.split.caption_pids[:, None] == pairs.split.image_pids).sum(dim=1)
    return 100 * float(matches.float().mean()) / len(pairs.split.image_pids)


def draw(
    folder: Path,
    model: nn.Module,
    pairs: Pairs,
    tokenizer: Any,
    features: tuple[Tensor, Tensor],
    history: dict[str, list[float]],
    device: torch.device,
    *,
    queries: int = 6,
    top: int = 5,
) -> dict[str, Path]:
    """Writes loss curves, retrieved images and similarity maps; returns where they are."""
    split = pairs.split
    texts, images = features
    top = min(top, len(images))
    scores, found = search(texts, images, top)
    correct = split.image_pids[found] == split.caption_pids[:, None]
    files = {name: folder / f"{name}.png" for name in ("loss_curves", "retrieval", "similarity_maps")}

    terms = {name: values for name, values in history.items() if not name.endswith("accuracy")}
    plot.loss_curves(terms, smoothing=0.9).savefig(files["loss_curves"], dpi=130)

    # Captions at even distances, not the ones that went well.
    chosen = np.linspace(0, len(split.captions) - 1, min(queries, len(split.captions))).astype(int).tolist()
    strips = [[np.asarray(split.photograph(int(i))) for i in found[q]] for q in chosen]
    plot.retrieval_strips(
        [_sentence(split.captions[q]) for q in chosen], strips, scores[chosen], correct[chosen]
    ).savefig(files["retrieval"], dpi=130)

    # The caption that names the most things, among those that found their person.
    named = [_named(tokenizer.words(ids)) for ids in pairs.token_ids]
    hits = correct[:, 0].nonzero().flatten().tolist() or range(len(named))
    caption = max(hits, key=lambda p: len(named[p]))
    words, positions = zip(*named[caption][:8], strict=True)
    image = int(split.caption_images[caption])
    similarity = _similarity(model, pairs, caption, image, device)[list(positions)]
    picture = np.asarray(split.photograph(image))
    plot.similarity_maps(picture, similarity, tokens=words, grid=model.grid).savefig(files["similarity_maps"], dpi=130)  # type: ignore[arg-type]
    return files


@torch.no_grad()
def _similarity(model: nn.Module, pairs: Pairs, caption: int, image: int, device: torch.device) -> Tensor:
    """Inner products [L, N] of the words of one caption with the patches of one image."""
    model.eval()
    _, patches = model.encode_image(pairs.images()[image][None].to(device))  # type: ignore[operator]
    _, words = model.encode_text(pairs.token_ids[caption][None].to(device))  # type: ignore[operator]
    return (words[0] @ patches[0].T).float().cpu()


def _named(words: list[str]) -> list[tuple[str, int]]:
    """(word, position in the caption's ids) of the words that point at something; SOT stands at position 0."""
    telling = [(word, position + 1) for position, word in enumerate(words) if word not in SILENT]
    return telling or [(word, position + 1) for position, word in enumerate(words)]


def _sentence(caption: str) -> str:
    """Rendered captions are bare words; capitals and full stops make them readable."""
    parts = [part.strip() for part in caption.split(" .") if part.strip()]
    return ". ".join(part[0].upper() + part[1:] for part in parts) + "." if " ." in caption else caption
