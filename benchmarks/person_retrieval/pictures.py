"""Pictures of a run: its loss curves, what captions find, and where words are on an image."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fmfa_losses import plot

from .data import Pairs, Split
from .errors import RunError
from .evaluation import Found, encode, find

__all__ = ["draw", "draw_comparison"]

DPI = 130

# Words that point at nothing in an image.
_SILENT = (
    "a an and away are at back behind by camera carries carrying dressed female footwear from guy has he her his holds",
    "in is it its lady male man of on over pedestrian person she side stands standing that the this to towards waits",
    "walking walks wearing wears who with woman young . ,",
)
SILENT = frozenset(word for line in _SILENT for word in line.split())


def draw(
    folder: Path,
    model: nn.Module,
    pairs: Pairs,
    tokenizer: Any,
    history: dict[str, list[float]],
    device: torch.device,
    *,
    queries: int = 6,
    top: int = 5,
) -> dict[str, Path]:
    """Writes loss curves, retrieved images and similarity maps; returns where they are.

    Args:
        history: terms and accuracies by step.
        queries: captions whose images are drawn, at even distances among all, not the ones that went well.
    """
    files = {name: folder / f"{name}.png" for name in ("loss_curves", "retrieval", "similarity_maps")}
    terms = {name: values for name, values in history.items() if not name.endswith("accuracy")}
    _save(plot.loss_curves(terms, smoothing=0.9), files["loss_curves"])

    found = find(*encode(model, pairs, device), pairs, top=top)
    count = len(pairs.split.captions)
    chosen = np.linspace(0, count - 1, min(queries, count)).astype(int).tolist()
    captions = [_sentence(pairs.split.captions[p]) for p in chosen]
    _save(_strips(captions, pairs, [(p, found) for p in chosen]), files["retrieval"])

    # The caption that names the most things, among those that found their person.
    named = [_named(tokenizer.words(ids)) for ids in pairs.token_ids]
    hits = (found.ranks == 1).nonzero().flatten().tolist() or range(len(named))
    caption = max(hits, key=lambda p: len(named[p]))
    words, positions = zip(*named[caption][:8], strict=True)
    image = int(pairs.split.caption_images[caption])
    similarity = _similarity(model, pairs, caption, image, device)[list(positions)]
    figure = plot.similarity_maps(
        _photograph(pairs.split, image), similarity, tokens=words, grid=model.grid,  # type: ignore[arg-type]
    )  # fmt: skip
    told = textwrap.fill(f"“{_sentence(pairs.split.captions[caption])}”", 120)
    figure.text(
        0.01, 1.0, f"{told}\n"
        "Similarity of words to patches, before and after EFA's threshold; patches without colour were left out.",
        va="bottom", ha="left", fontsize=10, parse_math=False,
    )  # fmt: skip
    _save(figure, files["similarity_maps"], bbox_inches="tight")
    return files


def draw_comparison(file: Path, pairs: Pairs, captions: Sequence[int], found: Mapping[str, Found], title: str) -> None:
    """For every caption a strip of images for each of `found`, below each other; the rank of the first right image.

    Raises:
        RunError: the file cannot be written.
    """
    rows, labels = [], []
    for caption in captions:
        for number, (name, one) in enumerate(found.items()):
            told = f"{name}, right at rank {int(one.ranks[caption])}"
            labels.append(told if number else f"{told}: “{_sentence(pairs.split.captions[caption])}”")
            rows.append((caption, one))
    figure = _strips(labels, pairs, rows)
    figure.text(0.01, 1.0, title, va="bottom", ha="left", fontsize=10, parse_math=False)
    _save(figure, file, bbox_inches="tight")


def _strips(labels: list[str], pairs: Pairs, rows: Sequence[tuple[int, Found]]) -> Any:
    split = pairs.split
    images = [[_photograph(split, int(i)) for i in found.images[caption]] for caption, found in rows]
    scores = torch.stack([found.scores[caption] for caption, found in rows])
    right = torch.stack([split.image_pids[found.images[p]] == split.caption_pids[p] for p, found in rows])
    return plot.retrieval_strips(labels, images, scores, right)


def _photograph(split: Split, image: int) -> Any:
    """[384, 128, 3], in the proportions that the model sees: those of real data differ from image to image."""
    return np.asarray(split.photograph(image).resize((128, 384)))


def _save(figure: Any, file: Path, **options: Any) -> None:
    try:
        figure.savefig(file, dpi=DPI, **options)
    except OSError as error:
        raise RunError(f"{file} must be a file that can be written, got {error.strerror}; make room") from error


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
