"""The k best items of the gallery for every query, exactly and blockwise."""

import torch
from torch import Tensor

from ..ops.checks import check_integer
from .scores import Array, block_sizes, feature_scores, slices

__all__ = ["search"]


@torch.no_grad()
def search(
    query_features: Array,
    gallery_features: Array,
    k: int,
    *,
    block_size: int | None = None,
    normalize: bool = True,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best items of the gallery for every query, exactly, blockwise.

    Equal scores rank by gallery index, lower first; NaN scores come first. Memory as `ranking_metrics`; the
    gallery is read once for every `block_size` queries.

    Args:
        query_features: [Q, D], any float dtype, tensor or NumPy array (memory-mapped too).
        gallery_features: [G, D], likewise.
        k: 1 to G.
        block_size: queries compared at a time.
        normalize: cosine similarity; False takes the inner product.
        device: where the blocks are computed; default: where the features are.
    Returns:
        scores [Q, k], float32 (float64 when either is float64), descending; gallery indices [Q, k], int64.
    Raises:
        ValueError: shapes that do not fit, or a k that the gallery cannot give.
    Example:
        >>> scores, indices = search(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]]), k=2)
        >>> scores, indices
        (tensor([[1., 0.]]), tensor([[1, 0]]))
    """
    scores, _ = feature_scores(
        ("query_features", query_features), ("gallery_features", gallery_features), normalize, device
    )
    sizes = len(query_features), len(gallery_features)
    k = check_integer("k", k, 1, high=sizes[1])  # no more than the gallery has
    query_block, gallery_block = block_sizes(*sizes, block_size)
    found = []
    for rows in slices(sizes[0], query_block):
        best: tuple[Tensor, Tensor] | None = None
        for columns in slices(sizes[1], gallery_block):
            values, indices = _top(scores(rows, columns), k)
            indices = indices + columns.start
            if best is not None:
                # Lower indices come first, and a stable sort keeps that order.
                values, order = torch.cat([best[0], values], 1).sort(dim=1, descending=True, stable=True)
                values, order = values[:, :k], order[:, :k]
                indices = torch.cat([best[1], indices], 1).gather(1, order)
            best = values, indices
        assert best is not None
        found.append(best)
    return torch.cat([values for values, _ in found]), torch.cat([indices for _, indices in found])


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The min(k, c) highest of scores [q, c]; equal ones by ascending index, which topk does not promise."""
    k = min(k, scores.shape[1])
    values, indices = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    last, following = values[:, k - 1], values[:, -1]
    # Where the k-th and the next score are equal, or both NaN, topk chose freely among the tied: those rows are sorted.
    tied = (last == following) | (last.isnan() & following.isnan())
    rows = tied.nonzero()[:, 0] if values.shape[1] > k else ()
    indices = indices[:, :k].sort(1).values
    values, order = scores.gather(1, indices).sort(dim=1, descending=True, stable=True)
    indices = indices.gather(1, order)
    if len(rows):
        sorted_rows = scores[rows].sort(dim=1, descending=True, stable=True)
        values[rows], indices[rows] = sorted_rows.values[:, :k], sorted_rows.indices[:, :k]
    return values, indices
