"""Metrics of two branches and of their mean, RDE's BGE, TSE and BGE+TSE, without a matrix in memory.

    score(q, g) = ( cos(q_bge, g_bge) + cos(q_tse, g_tse) ) / 2

A block of scores is the mean of two blocks, so all metrics are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .average_precision import AveragePrecision
from .metrics import RankingMetrics, Report, RetrievalMetrics, block_metrics, checked_ids
from .scores import Array, Scores, feature_scores

__all__ = ["BRANCHES", "FusedItems", "FusedMetrics", "fused_direction", "fused_metrics"]

BRANCHES = ("BGE", "TSE", "BGE+TSE")


@dataclass(frozen=True)
class FusedMetrics:
    """Metrics of each branch and of their mean; `str()` is a table.

    Attributes:
        bge: of the global features.
        tse: of the features of selected tokens.
        fused: of the mean of both cosines, BGE+TSE.
    """

    bge: RetrievalMetrics
    tse: RetrievalMetrics
    fused: RetrievalMetrics

    def __str__(self) -> str:
        parts = zip(BRANCHES, (self.bge, self.tse, self.fused), strict=True)
        return "\n".join(f"{name}\n{metrics}" for name, metrics in parts)


class FusedItems(NamedTuple):
    """Queries or gallery of two branches."""

    kind: str  # "text" or "image", as messages call them
    features: Array
    tse_features: Array
    pids: Array


@torch.no_grad()
def fused_metrics(
    text_features: Array,
    image_features: Array,
    text_tse_features: Array,
    image_tse_features: Array,
    text_pids: Array,
    image_pids: Array,
    *,
    ranks: Sequence[int] = (1, 5, 10),
    average_precision: AveragePrecision = "step",
    block_size: int | None = None,
    device: torch.device | str | None = None,
) -> FusedMetrics:
    """CMC, mAP and mINP by the cosines of two branches, and by their mean; both directions.

        score = ( cos(text, image) + cos(text_tse, image_tse) ) / 2

    `retrieval_metrics` of each; see `ranking_metrics` for ties, NaN and memory. The mean takes one more block.

    Args:
        text_features: [T, D], global features (BGE), any float dtype, tensor or NumPy array.
        image_features: [I, D], likewise.
        text_tse_features: [T, E], features of selected tokens (TSE); E need not be D.
        image_tse_features: [I, E], likewise.
        text_pids: [T], integer person ids, on any device.
        image_pids: [I], likewise.
        ranks: the k of CMC@k.
        average_precision: "step" or "trapezoidal".
        block_size: queries compared at a time.
        device: where the blocks are computed; default: where the features are.
    Returns:
        FusedMetrics(bge, tse, fused), each a RetrievalMetrics, in percent.
    Raises:
        TypeError, ValueError: shapes that do not fit, or no text shares a person with any image.
    Example:
        >>> x, pids = torch.eye(3), torch.arange(3)
        >>> metrics = fused_metrics(x, x, x, x.roll(1, 0), pids, pids)
        >>> metrics.bge.t2i.cmc[1], metrics.tse.t2i.cmc[1], metrics.fused.t2i.cmc[1]
        (100.0, 0.0, 66.66666666666666)

    Reference: RDE, arXiv 2308.09911, section 3.4; 2024-CVPR-RDE/utils/metrics.py.
    """
    texts = FusedItems("text", text_features, text_tse_features, text_pids)
    images = FusedItems("image", image_features, image_tse_features, image_pids)
    report = Report.of(ranks, average_precision, block_size)
    t2i = fused_direction(texts, images, report, device)
    i2t = fused_direction(images, texts, report, device)
    return FusedMetrics(*(RetrievalMetrics(*both) for both in zip(t2i, i2t, strict=True)))


@torch.no_grad()
def fused_direction(
    queries: FusedItems, gallery: FusedItems, report: Report, device: torch.device | str | None = None
) -> list[RankingMetrics]:
    """Of BGE, TSE and both."""
    bge, target = feature_scores(
        (f"{queries.kind}_features", queries.features), (f"{gallery.kind}_features", gallery.features), True, device
    )
    tse, other = feature_scores(
        (f"{queries.kind}_tse_features", queries.tse_features),
        (f"{gallery.kind}_tse_features", gallery.tse_features),
        True,
        device,
    )
    for items in (queries, gallery):
        if len(items.features) != len(items.tse_features):
            raise ValueError(
                f"{items.kind}_features and {items.kind}_tse_features must be of the same {items.kind}s, got "
                f"{len(items.features)} and {len(items.tse_features)} rows; pass both features of each"
            )
    if target != other:
        raise ValueError(
            f"the features of both branches must be on one device, got {target} and {other}; move one, or pass device="
        )

    def mean(rows: slice, columns: slice) -> Tensor:
        total, addend = bge(rows, columns), tse(rows, columns)
        return (total.add_(addend) if total.dtype == addend.dtype else total + addend).div_(2)

    sizes = len(queries.features), len(gallery.features)
    ids = checked_ids(queries.kind, queries.pids, gallery.kind, gallery.pids, sizes, target)
    every: tuple[Scores, ...] = (bge, tse, mean)
    return [block_metrics(scores, *ids, report) for scores in every]
