"""Scores of captions and images beyond the cosine of global features, and their metrics.

    global(q, g) = cos(t_q, v_g)                                             features of EOT and [CLS]
    token(q, g)  = mean_l max_n cos(w_ql, p_gn)                              every word takes its best patch
    fused(q, g)  = ( global(q, g) + token(q, g) ) / 2

l runs over the tokens that `text_mask` keeps, SOT and EOT among them, as in EFA; n over all patches.

"global" ranks by the first, "fused" by the last; both directions have the same scores. "rerank" ranks by global, then
orders the first k anew by fused; what follows keeps its order. Texts that search images and images that search texts
have each their own first k. Equal scores rank by gallery index, lower first, among the first k too: k = 1 is "global",
k >= G is "fused". Fused and reranked scores are matrices that go through `similarity_metrics`; a model with two
branches of features, such as RDE, needs none: `fmfa_losses.retrieval.fused_metrics` takes both.

Memory: [Q, G] scores in float32, of "rerank" for both directions, and the words of all captions, in float16 where CLIP
runs on a GPU. Patches are encoded a batch at a time, in a second pass over the images, and never kept: on the test
split of CUHK-PEDES (3074 images, 192 patches, 512 wide) they would be 0.6 GB in float16, of ICFG-PEDES 3.9 GB. The
words of CUHK-PEDES (6156 captions, 77 tokens at most) are 0.5 GB, twice that while they are put together; its scores
are 76 MB.
Work: "fused" compares all words with all patches, 1e14 operations on CUHK-PEDES, too many for a CPU; "rerank" does so
for k images a caption and k captions an image, about 1/60 of it for k = 32.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmfa_losses.functional import hard_similarity
from fmfa_losses.retrieval import RetrievalMetrics, search, similarity_metrics

from .data import Pairs
from .evaluation import encode_images, evaluate, image_batches, joined, text_batches

__all__ = ["SCORES", "Captions", "describe_score", "encode_captions", "fused_scores", "metrics_by", "reranked_scores"]

SCORES = ("global", "fused", "rerank")
BLOCK = 256  # captions that are compared with a batch of images at a time


class Captions(NamedTuple):
    """All captions, as the model sees them."""

    features: Tensor  # [P, D], on the CPU
    words: Tensor  # [P, L, D], where the model is; the longest caption has L tokens
    mask: Tensor  # [P, L] bool, beside the words; True = a token, False = padding


def describe_score(score: str, top_k: int) -> str:
    return {
        "global": "the cosine of global features",
        "fused": "the mean of the cosine of global features and the token similarity",
        "rerank": f"the cosine of global features, and the first {top_k} anew by its mean with the token similarity",
    }[score]


def metrics_by(
    score: str,
    model: nn.Module,
    pairs: Pairs,
    device: torch.device,
    *,
    top_k: int = 32,
    batch_size: int = 128,
    workers: int = 0,
) -> RetrievalMetrics:
    """Metrics of both directions by one of SCORES.

    Args:
        top_k: the k of "rerank", at least 1.

    Raises:
        RunError: a feature is not finite.
    """
    captions = encode_captions(model, pairs, device, batch_size=batch_size)
    images = encode_images(model, pairs, device, batch_size=batch_size, workers=workers)
    if score == "global":
        return evaluate(captions.features, images, pairs)
    again = image_batches(model, pairs, device, batch_size=batch_size, workers=workers)
    patches = (patches for _, patches in again)
    if score == "fused":
        t2i = fused_scores(captions, images, patches)
        i2t = t2i.T
    else:
        t2i, i2t = reranked_scores(captions, images, patches, top_k=top_k)
    text_pids, image_pids = pairs.split.caption_pids, pairs.split.image_pids
    return RetrievalMetrics(
        similarity_metrics(t2i, text_pids, image_pids), similarity_metrics(i2t, image_pids, text_pids)
    )


def encode_captions(model: nn.Module, pairs: Pairs, device: torch.device, *, batch_size: int = 128) -> Captions:
    keep: Tensor = model.text_mask(pairs.token_ids)  # type: ignore[operator]
    longest = int(keep.any(dim=0).nonzero().max()) + 1
    blocks = [
        (features, words[:, :longest], mask[:, :longest])
        for features, words, mask in text_batches(model, pairs, device, batch_size=batch_size)
    ]
    features, words, mask = zip(*blocks, strict=True)
    return Captions(joined("captions", list(features)), torch.cat(words), torch.cat(mask))


@torch.no_grad()
def fused_scores(captions: Captions, images: Tensor, patches: Iterable[Tensor], *, block_size: int = BLOCK) -> Tensor:
    """[P, M], on the CPU.

    Args:
        images: global features [M, D], on the CPU.
        patches: of all images in their order, in blocks [b, N, D], beside the words.
        block_size: captions that are compared with a block of patches at a time.
    """
    scores = _cosines(captions.features, images)
    first = 0
    for block in patches:
        columns = slice(first, first + len(block))
        for start in range(0, len(scores), block_size):
            rows = slice(start, start + block_size)
            scores[rows, columns] = (scores[rows, columns] + _token_similarity(captions, rows, block)) / 2
        first += len(block)
    return scores


@torch.no_grad()
def reranked_scores(
    captions: Captions, images: Tensor, patches: Iterable[Tensor], *, top_k: int, block_size: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Of texts that search images [P, M], and of images that search texts [M, P], on the CPU; arguments as above.

    The first k of a query have the scores k + 1 to 2, by their new places; all others their cosines, which are below.
    """
    texts = captions.features
    cosines_t2i, first_t2i = search(texts, images, min(top_k, len(images)))
    cosines_i2t, first_i2t = search(images, texts, min(top_k, len(texts)))
    fused_t2i, fused_i2t = torch.empty_like(cosines_t2i), torch.empty_like(cosines_i2t)
    # For each image the captions that have it among their first: one run of `by_image`.
    by_image = first_t2i.flatten().argsort(stable=True)
    ends = torch.bincount(first_t2i.flatten(), minlength=len(images)).cumsum(dim=0).tolist()
    image = 0
    for block in patches:
        for one in block.split(1):
            slots = by_image[ends[image - 1] if image else 0 : ends[image]]
            rows = torch.cat([slots // first_t2i.shape[1], first_i2t[image]])
            tokens = torch.cat([_token_similarity(captions, part, one)[:, 0] for part in rows.split(block_size)])
            fused_t2i.view(-1)[slots] = (cosines_t2i.view(-1)[slots] + tokens[: len(slots)]) / 2
            fused_i2t[image] = (cosines_i2t[image] + tokens[len(slots) :]) / 2
            image += 1
    return _placed(texts, images, first_t2i, fused_t2i), _placed(images, texts, first_i2t, fused_i2t)


def _placed(queries: Tensor, gallery: Tensor, first: Tensor, fused: Tensor) -> Tensor:
    """Cosines [Q, G], and over those of the `first` [Q, k] integers in the order of their `fused` scores [Q, k]."""
    scores = _cosines(queries, gallery)
    first, order = first.sort(dim=1)  # equal scores by gallery index, for the sort below is stable
    places = fused.gather(1, order).sort(dim=1, descending=True, stable=True).indices
    values = torch.arange(first.shape[1] + 1, 1, -1, dtype=scores.dtype).expand_as(first)
    return scores.scatter_(1, first.gather(1, places), values)


def _token_similarity(captions: Captions, rows: slice | Tensor, patches: Tensor) -> Tensor:
    """[q, b] of some captions with some images, on the CPU."""
    if isinstance(rows, Tensor):
        rows = rows.to(captions.words.device)
    words, mask = captions.words[rows], captions.mask[rows]
    longest = int(mask.any(dim=0).nonzero().max()) + 1
    similarity: Tensor = hard_similarity(words[:, :longest], patches, x_mask=mask[:, :longest], pool="mean")
    return similarity.cpu()


def _cosines(queries: Tensor, gallery: Tensor) -> Tensor:
    """[Q, G]."""
    queries, gallery = F.normalize(queries, dim=1), F.normalize(gallery, dim=1)
    return queries @ gallery.T
