"""Ranking metrics: CMC (Rank-k), mAP and mINP, computed by blocks and without sorting the gallery.

A query has m matches in a gallery of G items, m << G, and all three metrics follow from the ranks of the
matches alone. With the ranks r_1 < ... < r_m, counted from 1:

    CMC@k = [r_1 <= k]        AP = (1/m) sum_i i / r_i        INP = m / r_m

(`average_precision.py` has the other rule for AP), and the rank of a match is a count, not a sort:

    r = 1 + #{items with a higher score} + #{items with the same score and a lower gallery index}

so equal scores have a defined order, which an argsort does not give. Scores are computed for a block of queries at a
time; no sorted gallery, no index matrix and no match matrix ever exist.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.checks import check_integer, describe
from .average_precision import AveragePrecision, average_precisions, check_average_precision
from .ranks import match_ranks
from .scores import Array, Scores, array_ids, block_sizes, check_array, feature_scores, load, slices

__all__ = [
    "Items",
    "RankingMetrics",
    "Report",
    "RetrievalMetrics",
    "block_metrics",
    "check_ranks",
    "checked_ids",
    "feature_metrics",
    "metrics_table",
    "ranking_metrics",
    "retrieval_metrics",
    "similarity_metrics",
]


@dataclass(frozen=True)
class RankingMetrics:
    """One direction, in percent, averaged over the queries that have a match.

    Attributes:
        cmc: rank k -> percentage of queries with a match among their first k, for each k of `ranks`.
        mAP: mean average precision.
        mINP: mean inverse negative penalty: how early the last match comes.
        unmatched_queries: int64 [U] on the CPU, indices of the queries without a match, which the means leave out.
    """

    cmc: dict[int, float]
    mAP: float  # noqa: N815 - the field's name
    mINP: float  # noqa: N815
    unmatched_queries: Tensor


@dataclass(frozen=True)
class RetrievalMetrics:
    """Both directions; `str()` is a table."""

    t2i: RankingMetrics
    i2t: RankingMetrics

    def __str__(self) -> str:
        return metrics_table({"t2i": self.t2i, "i2t": self.i2t})


def metrics_table(rows: dict[str, RankingMetrics]) -> str:
    """A line for each direction, and one for each that leaves queries out."""
    lines = ["".join(f"{name:>8}" for name in ("", *(f"R{k}" for k in next(iter(rows.values())).cmc), "mAP", "mINP"))]
    for name, one in rows.items():
        lines.append(f"{name:>8}" + "".join(f"{v:8.2f}" for v in (*one.cmc.values(), one.mAP, one.mINP)))
    for name, one in rows.items():
        if len(one.unmatched_queries):
            what = "texts" if name == "t2i" else "images"
            lines.append(f"{name:>8}  {len(one.unmatched_queries)} {what} without a match left out")
    return "\n".join(lines)


class Report(NamedTuple):
    """What to report of the ranks, and how many queries at a time."""

    ranks: tuple[int, ...]
    average_precision: AveragePrecision
    block_size: int | None

    @classmethod
    def of(
        cls, ranks: Sequence[int], average_precision: AveragePrecision = "step", block_size: int | None = None
    ) -> "Report":
        return cls(check_ranks(ranks), check_average_precision(average_precision), block_size)


@torch.no_grad()
def retrieval_metrics(
    text_features: Array,
    image_features: Array,
    text_pids: Array,
    image_pids: Array,
    *,
    ranks: Sequence[int] = (1, 5, 10),
    average_precision: AveragePrecision = "step",
    block_size: int | None = None,
    normalize: bool = True,
    device: torch.device | str | None = None,
) -> RetrievalMetrics:
    """CMC, mAP and mINP of texts searching images (t2i) and of images searching texts (i2t).

    `ranking_metrics` of each direction; see there for ties, NaN and memory. Equal to the numbers of the
    published argsort evaluators where no two scores of a query are equal.

    Args:
        text_features: [T, D], any float dtype, tensor or NumPy array (memory-mapped too).
        image_features: [I, D], likewise.
        text_pids: [T], integer person ids, on any device.
        image_pids: [I], likewise.
        ranks: the k of CMC@k.
        average_precision: "step", or "trapezoidal" as SSAN, LGUR and PLIP report it.
        block_size: queries compared at a time.
        normalize: cosine similarity; False takes the inner product.
        device: where the blocks are computed; default: where the features are.
    Returns:
        RetrievalMetrics(t2i, i2t), in percent.
    Raises:
        ValueError: shapes that do not fit, or no text shares a person with any image.
    Example:
        >>> text = torch.tensor([[1.0, 0.1], [0.0, 1.0], [1.0, 0.9]])
        >>> image = torch.tensor([[1.0, 0.0], [0.3, 1.0]])
        >>> metrics = retrieval_metrics(text, image, torch.tensor([7, 8, 8]), torch.tensor([7, 8]))
        >>> print(metrics)
                      R1      R5     R10     mAP    mINP
             t2i  100.00  100.00  100.00  100.00  100.00
             i2t  100.00  100.00  100.00  100.00  100.00
    """
    report = Report.of(ranks, average_precision, block_size)
    texts = Items("text", text_features, text_pids)
    images = Items("image", image_features, image_pids)
    return RetrievalMetrics(
        t2i=feature_metrics(texts, images, report, normalize, device),
        i2t=feature_metrics(images, texts, report, normalize, device),
    )


@torch.no_grad()
def ranking_metrics(
    query_features: Array,
    gallery_features: Array,
    query_pids: Array,
    gallery_pids: Array,
    *,
    ranks: Sequence[int] = (1, 5, 10),
    average_precision: AveragePrecision = "step",
    block_size: int | None = None,
    normalize: bool = True,
    device: torch.device | str | None = None,
) -> RankingMetrics:
    """CMC, mAP and mINP of one direction: queries that search a gallery.

    Equal scores rank by gallery index, lower first. A query whose scores hold a NaN makes the metrics NaN.
    Scores are float32 products (float64 when either is float64), in the precision that
    torch.set_float32_matmul_precision allows, whatever the features' dtype; a zero feature scores 0.

    Memory: a block of 2^24 numbers (64 MiB) beside the features, scores and ranks of matches; twice that where the
    allocator has not given the last one back. A gallery of more than 65536 rows is read by
    blocks, twice for every `block_size` queries: memory-mapped it may be larger than memory, and a larger
    `block_size` reads it less often.

    Args:
        query_features: [Q, D], any float dtype, tensor or NumPy array (memory-mapped too).
        gallery_features: [G, D], likewise.
        query_pids: [Q], integer person ids, on any device.
        gallery_pids: [G], likewise.
        ranks: the k of CMC@k.
        average_precision: "step", or "trapezoidal" as SSAN, LGUR and PLIP report it.
        block_size: queries compared at a time; default: as many as fill a block.
        normalize: cosine similarity; False takes the inner product.
        device: where the blocks are computed; default: where the features are.
    Returns:
        RankingMetrics, in percent, over the queries with a match; `unmatched_queries` names the others.
    Raises:
        ValueError: shapes that do not fit, or no query has a match.
    Example:
        >>> query, gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0], [3.0, 0.0]])
        >>> metrics = ranking_metrics(query, gallery, torch.tensor([5, 6]), torch.tensor([5, 5]))
        >>> metrics.cmc[1], metrics.mAP, metrics.unmatched_queries
        (100.0, 100.0, tensor([1]))
    """
    queries = Items("query", query_features, query_pids)
    gallery = Items("gallery", gallery_features, gallery_pids)
    return feature_metrics(queries, gallery, Report.of(ranks, average_precision, block_size), normalize, device)


@torch.no_grad()
def similarity_metrics(
    similarity: Array,
    query_pids: Array,
    gallery_pids: Array,
    *,
    ranks: Sequence[int] = (1, 5, 10),
    average_precision: AveragePrecision = "step",
    block_size: int | None = None,
) -> RankingMetrics:
    """CMC, mAP and mINP of scores that exist already: `ranking_metrics` without the product.

    Args:
        similarity: [Q, G], higher is better, any float dtype, tensor or NumPy array (memory-mapped too);
            -inf ranks last.
        query_pids: [Q], integer person ids, on any device.
        gallery_pids: [G], likewise.
        ranks: the k of CMC@k.
        average_precision: "step", or "trapezoidal" as SSAN, LGUR and PLIP report it.
        block_size: queries ranked at a time.
    Returns:
        RankingMetrics, in percent.
    Raises:
        ValueError: shapes that do not fit, or no query has a match.
    Example:
        >>> similarity = torch.tensor([[0.9, 0.5, 0.7, 0.1]])
        >>> metrics = similarity_metrics(similarity, torch.tensor([3]), torch.tensor([1, 3, 3, 2]))
        >>> metrics.cmc[1], metrics.cmc[5], round(metrics.mAP, 2), round(metrics.mINP, 2)
        (0.0, 100.0, 58.33, 66.67)
    """
    check_array("similarity", similarity, "Q G")
    device = similarity.device if isinstance(similarity, Tensor) else torch.device("cpu")

    def scores(rows: slice, columns: slice) -> Tensor:
        block = load(similarity, rows, columns)
        return block.to(torch.promote_types(block.dtype, torch.float32)).contiguous()

    sizes = similarity.shape[0], similarity.shape[1]
    ids = checked_ids("query", query_pids, "gallery", gallery_pids, sizes, device)
    return block_metrics(scores, *ids, Report.of(ranks, average_precision, block_size))


class Items(NamedTuple):
    """Queries or gallery; messages call them by their kind: "text", "image", "query", "gallery"."""

    kind: str
    features: Array
    pids: Array


@torch.no_grad()
def feature_metrics(
    queries: Items, gallery: Items, report: Report, normalize: bool = True, device: torch.device | str | None = None
) -> RankingMetrics:
    scores, target = feature_scores(
        (f"{queries.kind}_features", queries.features),
        (f"{gallery.kind}_features", gallery.features),
        normalize,
        device,
    )
    sizes = len(queries.features), len(gallery.features)
    ids = checked_ids(queries.kind, queries.pids, gallery.kind, gallery.pids, sizes, target)
    return block_metrics(scores, *ids, report)


def block_metrics(scores: Scores, query_ids: Tensor, gallery_ids: Tensor, report: Report) -> RankingMetrics:
    """Of scores that come a block at a time; ids [Q] and [G] as `checked_ids` returns them."""
    sizes, device = (len(query_ids), len(gallery_ids)), query_ids.device
    # Gallery indices grouped by person, ascending in a group: a query's matches are one run of `by_person`.
    sorted_ids, by_person = gallery_ids.sort(stable=True)
    first = torch.searchsorted(sorted_ids, query_ids)
    count = torch.searchsorted(sorted_ids, query_ids, right=True) - first
    matched = count > 0
    if not matched.any():
        raise ValueError(
            "at least one query must share its pid with the gallery, got none; number both with the same pids"
        )

    query_block, gallery_block = block_sizes(*sizes, report.block_size, most_matches=int(count.max()))
    best_rank, precision, penalty = torch.zeros(3, sizes[0], dtype=torch.float64, device=device)
    for rows in slices(sizes[0], query_block):
        matches = count[rows, None]  # [q, 1]
        slot = torch.arange(int(matches.max()), device=device)
        if len(slot) == 0:
            continue
        valid = slot < matches  # [q, m]
        match_columns = by_person[(first[rows, None] + slot).clamp(max=sizes[1] - 1)]
        rank, has_nan = match_ranks(scores, rows, sizes[1], gallery_block, match_columns, valid)
        rank = rank.masked_fill(~valid, torch.iinfo(torch.int64).max).sort(1).values.double()
        last = rank.gather(1, (matches - 1).clamp(min=0))
        rank, last = (r.masked_fill(has_nan[:, None], math.nan) for r in (rank, last))
        best_rank[rows] = rank[:, 0]
        precision[rows] = average_precisions(rank, valid, report.average_precision)
        penalty[rows] = (matches / last)[:, 0]

    best_rank, precision, penalty = best_rank[matched], precision[matched], penalty[matched]
    hits = {k: (best_rank <= k).double().masked_fill(best_rank.isnan(), math.nan) for k in report.ranks}
    return RankingMetrics(
        cmc={k: 100 * float(hit.mean()) for k, hit in hits.items()},
        mAP=100 * float(precision.mean()),
        mINP=100 * float(penalty.mean()),
        unmatched_queries=(~matched).nonzero()[:, 0].cpu(),
    )


def checked_ids(
    query_kind: str,
    query_pids: Array,
    gallery_kind: str,
    gallery_pids: Array,
    sizes: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Ids [Q] and [G] on the device of the scores."""
    names = f"{query_kind}_pids", f"{gallery_kind}_pids"
    ids = array_ids(names[0], query_pids), array_ids(names[1], gallery_pids)
    shapes = [tuple(x.shape) for x in ids]
    swapped = shapes == [(size,) for size in reversed(sizes)]
    for name, given, size in zip(names, ids, sizes, strict=True):
        if tuple(given.shape) != (size,):
            remedy = f"swap {names[0]} and {names[1]}" if swapped else "pass the person of each, in the same order"
            raise ValueError(
                f"{name} must have shape [{size}], one id per row of scores, got {describe(given)}; {remedy}"
            )
    return ids[0].to(device, torch.int64), ids[1].to(device, torch.int64)


def check_ranks(ranks: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(ranks, Iterable) or getattr(ranks, "ndim", 1) == 0:
        raise TypeError(f"ranks must be a sequence of k, such as (1, 5, 10), got {describe(ranks)}; pass ({ranks},)")
    checked = tuple(check_integer("ranks", k, 1) for k in ranks)
    if not checked:
        raise ValueError("ranks must hold at least one k, got none; pass (1, 5, 10)")
    return checked
