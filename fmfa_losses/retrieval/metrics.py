"""How well do captions find their person? CMC (Rank-k), mAP and mINP, blockwise, without sorting the gallery.

A query has m matches in a gallery of G items, m << G, and all three metrics follow from the ranks of the
matches alone. With r_1 < ... < r_m these ranks, the best item of the gallery having rank 1:

    CMC@k = [r_1 <= k]        AP = (1/m) sum_i i / r_i        INP = m / r_m

and the rank of a match is a count, not a sort:

    r = 1 + #{items with a higher score} + #{items with the same score and a lower gallery index}

so equal scores have a defined order, which an argsort does not give. Scores come a block of queries at a
time; no sorted gallery, no index matrix and no match matrix ever exist.
"""

import importlib
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from ..ops.checks import check_float, check_integer, describe, integer_ids
from ..ops.precision import product, unit_rows

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "Evaluator",
    "RankingMetrics",
    "RetrievalMetrics",
    "ranking_metrics",
    "retrieval_metrics",
    "search",
    "similarity_metrics",
]

Array: TypeAlias = "Tensor | np.ndarray[Any, Any]"
# A block of scores: rows of the query, columns of the gallery.
Scores: TypeAlias = Callable[[slice, slice], Tensor]

SCORES_PER_BLOCK = 2**24  # 64 MiB in float32
SCORES_IN_CACHE = 2**19  # 2 MiB in float32, near what a CPU core has as L2
COMPARED_MATCHES = 64  # up to here m comparisons of each score are faster than a binary search of m
MATCH_IN_SCORES = 32  # what is kept of one match, alive at once, in float32 numbers: ranks, indices, counts
GALLERY_IN_ONE_BLOCK = 2**16  # rows, 128 MiB at D 512


@dataclass(frozen=True)
class RankingMetrics:
    """One direction, in percent, averaged over the queries that have a match.

    Attributes:
        cmc: rank k -> share of queries with a match among their first k, for the k of `ranks=`: (1, 5, 10) unless
            others were passed.
        mAP: mean average precision.
        mINP: mean inverse negative penalty: how early the last match comes.
        unmatched_queries: int64 [U] on the CPU, the queries without a match in the gallery; no mean has them.
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
        header = ["", *(f"R{k}" for k in self.t2i.cmc), "mAP", "mINP"]
        lines = ["".join(f"{name:>8}" for name in header)]
        for name, one in (("t2i", self.t2i), ("i2t", self.i2t)):
            lines.append(f"{name:>8}" + "".join(f"{v:8.2f}" for v in (*one.cmc.values(), one.mAP, one.mINP)))
        for name, one, what in (("t2i", self.t2i, "texts"), ("i2t", self.i2t, "images")):
            if len(one.unmatched_queries):
                lines.append(f"{name:>8}  {len(one.unmatched_queries)} {what} without a match left out")
        return "\n".join(lines)


def retrieval_metrics(
    text_features: Array,
    image_features: Array,
    text_pids: Array,
    image_pids: Array,
    *,
    ranks: Sequence[int] = (1, 5, 10),
    block_size: int | None = None,
    normalize: bool = True,
    device: torch.device | str | None = None,
) -> RetrievalMetrics:
    """CMC, mAP and mINP of texts searching images (t2i) and of images searching texts (i2t).

    `ranking_metrics` called once a direction; see there for ties, NaN and memory. Equal to the numbers of the
    published argsort evaluators where no two scores of a query are equal.

    Args:
        text_features: [T, D], any float dtype, tensor or NumPy array (memory-mapped too).
        image_features: [I, D], likewise.
        text_pids: [T], integer person ids, on any device.
        image_pids: [I], likewise.
        ranks: the k of CMC@k.
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

    def direction(queries: Array, gallery: Array, query_pids: Array, gallery_pids: Array) -> RankingMetrics:
        return ranking_metrics(
            queries,
            gallery,
            query_pids,
            gallery_pids,
            ranks=ranks,
            block_size=block_size,
            normalize=normalize,
            device=device,
        )

    return RetrievalMetrics(
        t2i=direction(text_features, image_features, text_pids, image_pids),
        i2t=direction(image_features, text_features, image_pids, text_pids),
    )


@torch.no_grad()
def ranking_metrics(
    query_features: Array,
    gallery_features: Array,
    query_pids: Array,
    gallery_pids: Array,
    *,
    ranks: Sequence[int] = (1, 5, 10),
    block_size: int | None = None,
    normalize: bool = True,
    device: torch.device | str | None = None,
) -> RankingMetrics:
    """CMC, mAP and mINP of one direction: queries that search a gallery.

    Equal scores rank by gallery index, lower first. A query whose scores hold a NaN makes the metrics NaN.
    Scores are float32 products (float64 when a side is float64), in the precision that
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
    scores, device = _feature_scores(
        ("query_features", query_features), ("gallery_features", gallery_features), normalize, device
    )
    sizes = len(query_features), len(gallery_features)
    return _metrics(scores, sizes, query_pids, gallery_pids, ranks, block_size, device)


@torch.no_grad()
def similarity_metrics(
    similarity: Array,
    query_pids: Array,
    gallery_pids: Array,
    *,
    ranks: Sequence[int] = (1, 5, 10),
    block_size: int | None = None,
) -> RankingMetrics:
    """CMC, mAP and mINP of scores that exist already: `ranking_metrics` without the product.

    Args:
        similarity: [Q, G], higher is better, any float dtype, tensor or NumPy array (memory-mapped too);
            -inf ranks last.
        query_pids: [Q], integer person ids, on any device.
        gallery_pids: [G], likewise.
        ranks: the k of CMC@k.
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
    _check_array("similarity", similarity, "Q G")
    device = similarity.device if isinstance(similarity, Tensor) else torch.device("cpu")
    return _metrics(
        lambda rows, columns: _upcast(_load(similarity, rows, columns)).contiguous(),
        (similarity.shape[0], similarity.shape[1]),
        query_pids,
        gallery_pids,
        ranks,
        block_size,
        device,
    )


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
        scores [Q, k], float32 (float64 when a side is float64), descending; gallery indices [Q, k], int64.
    Raises:
        ValueError: shapes that do not fit, or a k that the gallery cannot give.
    Example:
        >>> scores, indices = search(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]]), k=2)
        >>> scores, indices
        (tensor([[1., 0.]]), tensor([[1, 0]]))
    """
    scores, _ = _feature_scores(
        ("query_features", query_features), ("gallery_features", gallery_features), normalize, device
    )
    sizes = len(query_features), len(gallery_features)
    k = check_integer("k", k, 1, high=sizes[1])  # no more than the gallery has
    query_block, gallery_block = _block_sizes(*sizes, block_size)
    found = []
    for rows in _slices(sizes[0], query_block):
        best: tuple[Tensor, Tensor] | None = None
        for columns in _slices(sizes[1], gallery_block):
            values, indices = _top(scores(rows, columns), k)
            indices = indices + columns.start
            if best is not None:
                # Lower indices stand first, and a stable sort leaves them there.
                values, order = torch.cat([best[0], values], 1).sort(dim=1, descending=True, stable=True)
                values, order = values[:, :k], order[:, :k]
                indices = torch.cat([best[1], indices], 1).gather(1, order)
            best = values, indices
        assert best is not None
        found.append(best)
    return torch.cat([values for values, _ in found]), torch.cat([indices for _, indices in found])


class Evaluator:
    """Runs a model over an image and a text loader and ranks: the shape that TIPR training loops expect.

    Args:
        image_loader: batches of (pids [b], images).
        text_loader: batches of (pids [b], captions).
        encode_image: (model, images) -> features [b, D]; default: `model.encode_image(images)`.
        encode_text: (model, captions) -> features [b, D]; default: `model.encode_text(captions)`.
        ranks: the k of CMC@k.
        block_size: queries compared at a time.
        progress: a tqdm bar for each loader, where tqdm is installed.
    Example:
        >>> class Model(nn.Module):
        ...     encode_image = encode_text = staticmethod(nn.functional.normalize)
        >>> batches = [(torch.tensor([1, 2]), torch.eye(2)), (torch.tensor([3]), torch.tensor([[1.0, 1.0]]))]
        >>> Evaluator(batches, batches, progress=False).eval(Model())
        100.0
    """

    def __init__(
        self,
        image_loader: Iterable[Any],
        text_loader: Iterable[Any],
        *,
        encode_image: Callable[[Any, Any], Tensor] | None = None,
        encode_text: Callable[[Any, Any], Tensor] | None = None,
        ranks: Sequence[int] = (1, 5, 10),
        block_size: int | None = None,
        progress: bool = True,
    ) -> None:
        self.image_loader = image_loader
        self.text_loader = text_loader
        self.encode_image = encode_image
        self.encode_text = encode_text
        self.ranks: tuple[int, ...] = _check_ranks(ranks)
        self.block_size = block_size
        self.progress = progress
        self.logger: logging.Logger = logging.getLogger(__name__)

    def eval(self, model: Any) -> float:
        """Rank-1 of text-to-image retrieval in percent, which picks the best epoch; logs the table."""
        metrics = self.metrics(model, ranks=sorted({1, *self.ranks}))
        self.logger.info("\n%s", metrics)
        return metrics.t2i.cmc[1]

    def metrics(self, model: Any, *, ranks: Sequence[int] | None = None) -> RetrievalMetrics:
        """Everything, both directions. The model's train and eval modes are as before afterwards."""
        texts, text_pids = self._features(model, "encode_text", self.encode_text, self.text_loader)
        images, image_pids = self._features(model, "encode_image", self.encode_image, self.image_loader)
        return retrieval_metrics(
            texts, images, text_pids, image_pids, ranks=ranks or self.ranks, block_size=self.block_size
        )

    @torch.no_grad()
    def _features(
        self, model: Any, name: str, encode: Callable[[Any, Any], Tensor] | None, loader: Iterable[Any]
    ) -> tuple[Tensor, Tensor]:
        if encode is None and not hasattr(model, name):
            raise TypeError(
                f"model must have {name}(batch), got {type(model).__name__}; "
                f"pass Evaluator(..., {name}=lambda model, batch: ...)"
            )
        modes: dict[nn.Module, bool] = {}
        parameter = None
        if isinstance(model, nn.Module):
            modes = {module: module.training for module in model.modules()}
            parameter = next(model.parameters(), None)
            model.eval()
        features, pids = [], []
        try:
            for batch_pids, batch in _progress(loader, name, self.progress):
                if parameter is not None and hasattr(batch, "to"):
                    batch = batch.to(parameter.device)
                features.append(getattr(model, name)(batch) if encode is None else encode(model, batch))
                pids.append(torch.as_tensor(batch_pids).reshape(-1))
        finally:
            for module, mode in modes.items():
                module.training = mode
        if not features:
            raise ValueError(f"the loader for {name} must give at least one batch, got none")
        return torch.cat(features), torch.cat(pids)


def _metrics(
    scores: Scores,
    sizes: tuple[int, int],
    query_pids: Array,
    gallery_pids: Array,
    ranks: Sequence[int],
    block_size: int | None,
    device: torch.device,
) -> RankingMetrics:
    ranks = _check_ranks(ranks)
    query_ids = _ids("query_pids", query_pids, sizes[0], device)
    gallery_ids = _ids("gallery_pids", gallery_pids, sizes[1], device)

    # Gallery indices grouped by person, ascending in a group: a query's matches are one run of `by_person`.
    sorted_ids, by_person = gallery_ids.sort(stable=True)
    first = torch.searchsorted(sorted_ids, query_ids)
    count = torch.searchsorted(sorted_ids, query_ids, right=True) - first
    matched = count > 0
    if not matched.any():
        raise ValueError(
            "at least one query must share its pid with the gallery, got none; number the persons of both sides alike"
        )

    query_block, gallery_block = _block_sizes(*sizes, block_size, most_matches=int(count.max()))
    best_rank, precision, penalty = torch.zeros(3, sizes[0], dtype=torch.float64, device=device)
    for rows in _slices(sizes[0], query_block):
        matches = count[rows, None]  # [q, 1]
        slot = torch.arange(int(matches.max()), device=device)
        if len(slot) == 0:
            continue
        valid = slot < matches  # [q, m]
        match_columns = by_person[(first[rows, None] + slot).clamp(max=sizes[1] - 1)]
        rank, has_nan = _match_ranks(scores, rows, sizes[1], gallery_block, match_columns, valid)
        rank = rank.masked_fill(~valid, torch.iinfo(torch.int64).max).sort(1).values.double()
        last = rank.gather(1, (matches - 1).clamp(min=0))
        rank, last = (r.masked_fill(has_nan[:, None], math.nan) for r in (rank, last))
        best_rank[rows] = rank[:, 0]
        precision[rows] = ((slot + 1) / rank).masked_fill(~valid, 0).sum(1) / matches[:, 0]
        penalty[rows] = (matches / last)[:, 0]

    best_rank, precision, penalty = best_rank[matched], precision[matched], penalty[matched]
    hits = {k: (best_rank <= k).double().masked_fill(best_rank.isnan(), math.nan) for k in ranks}
    return RankingMetrics(
        cmc={k: 100 * float(hit.mean()) for k, hit in hits.items()},
        mAP=100 * float(precision.mean()),
        mINP=100 * float(penalty.mean()),
        unmatched_queries=(~matched).nonzero()[:, 0].cpu(),
    )


def _match_ranks(
    scores: Scores, rows: slice, gallery_size: int, gallery_block: int, match_columns: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Ranks from 1 [q, m] of the gallery items `match_columns` [q, m], and [q] whether a row holds a NaN."""
    blocks = list(_slices(gallery_size, gallery_block))
    kept = scores(rows, blocks[0]) if len(blocks) == 1 else None  # the second pass takes it from here
    match_scores = has_nan = None
    for columns in blocks:
        block = scores(rows, columns) if kept is None else kept  # [q, c]
        inside = (match_columns >= columns.start) & (match_columns < columns.stop)
        taken = block.gather(1, (match_columns - columns.start).clamp(0, block.shape[1] - 1))
        nan = block.amax(1).isnan()
        match_scores = taken if match_scores is None else torch.where(inside, taken, match_scores)
        has_nan = nan if has_nan is None else has_nan | nan
    assert match_scores is not None and has_nan is not None

    rank = torch.ones_like(match_columns)
    for columns in blocks:
        block = scores(rows, columns) if kept is None else kept
        greater, at_least = _count_above(block, match_scores)
        # Items before the match win a tie, items after it lose one.
        rank += torch.where(match_columns >= columns.stop, at_least, greater)
        inside = (match_columns >= columns.start) & (match_columns < columns.stop)
        tied = inside & valid & (at_least - greater > 1)
        for m in tied.any(0).nonzero()[:, 0].tolist():
            row = tied[:, m].nonzero()[:, 0]
            equal = block[row] == match_scores[row, m, None]
            index = torch.arange(columns.start, columns.stop, device=row.device)
            rank[row, m] += (equal & (index < match_columns[row, m, None])).sum(1)
    return rank, has_nan


def _count_above(scores: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """For each threshold [q, m]: how many scores [q, c] of its row lie above, how many at or above; int64."""
    count = _count_by_comparing if thresholds.shape[1] <= COMPARED_MATCHES else _count_by_bins
    rows = len(scores)
    if scores.device.type == "cpu":  # what is read m times should stay in the cache
        rows = max(1, SCORES_IN_CACHE // scores.shape[1])
    tiles = zip(torch.split(scores, rows), torch.split(thresholds, rows), strict=True)
    parts = [count(*tile) for tile in tiles]
    return torch.cat([greater for greater, _ in parts]), torch.cat([at_least for _, at_least in parts])


def _count_by_comparing(scores: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """O(c m), and vectorised."""
    flags = torch.empty_like(scores)  # 0.0 and 1.0 add up faster than booleans, exactly so up to 2^24 of them
    greater, at_least = torch.empty(2, *thresholds.shape, dtype=torch.int64, device=scores.device)
    for m in range(thresholds.shape[1]):
        threshold = thresholds[:, m, None]
        greater[:, m] = torch.gt(scores, threshold, out=flags).sum(1)
        at_least[:, m] = torch.ge(scores, threshold, out=flags).sum(1)
    return greater, at_least


def _count_by_bins(scores: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """O(c log m): a histogram of the scores between the sorted thresholds, summed from the top."""
    scores, thresholds = _ordered_integers(scores), _ordered_integers(thresholds)
    edges, order = torch.cat([thresholds, thresholds - 1], 1).sort(1)  # [q, 2m]: s >= t is s > t - 1
    bins = torch.searchsorted(edges, scores)  # [q, c]: edges strictly below each score
    histogram = bins.new_zeros(len(edges), edges.shape[1] + 1)
    histogram.scatter_add_(1, bins, bins.new_ones(1).expand_as(bins))
    above_edge = histogram.flip(1).cumsum(1).flip(1)[:, 1:]
    greater, at_least = torch.empty_like(order).scatter_(1, order, above_edge).chunk(2, dim=1)
    return greater, at_least


def _ordered_integers(x: Tensor) -> Tensor:
    """Integers in the order of x, which has no NaN: whether denormals count as zero or not, the next one is x + 1."""
    signed = torch.int32 if x.dtype == torch.float32 else torch.int64
    bits = (x + 0.0).view(signed)  # -0 becomes 0
    return torch.where(bits < 0, bits ^ torch.iinfo(signed).max, bits)


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


def _feature_scores(
    queries: tuple[str, Array], gallery: tuple[str, Array], normalize: bool, device: torch.device | str | None
) -> tuple[Scores, torch.device]:
    """Checks both features; returns what gives a block of their scores, and the device that it lies on."""
    (query_name, query_features), (gallery_name, gallery_features) = queries, gallery
    _check_array(query_name, query_features, "Q D")
    _check_array(gallery_name, gallery_features, "G D")
    if query_features.shape[1] != gallery_features.shape[1]:
        raise ValueError(
            f"{query_name} and {gallery_name} must agree in D (dimension 1), got "
            f"{_describe(query_features)} and {_describe(gallery_features)}; take both from one joint space"
        )
    if device is None:
        devices = {f.device for f in (query_features, gallery_features) if isinstance(f, Tensor)}
        if len(devices) > 1:
            raise ValueError(
                f"{query_name} and {gallery_name} must be on one device, got {_describe(query_features)} and "
                f"{_describe(gallery_features)}; move one, or pass device="
            )
        target = devices.pop() if devices else torch.device("cpu")
    else:
        target = torch.device(device)
    dtype = torch.promote_types(_dtype(query_features), _dtype(gallery_features))
    dtype = torch.promote_types(dtype, torch.float32)
    kept: dict[str, tuple[slice, Tensor]] = {}

    def features(name: str, array: Array, rows: slice) -> Tensor:
        # The last block of a side stays: a gallery in one block is loaded and normalised once.
        if name not in kept or kept[name][0] != rows:
            kept.pop(name, None)
            block = _load(array, rows, slice(None)).to(target, dtype)
            kept[name] = rows, unit_rows(block) if normalize else block
        return kept[name][1]

    def scores(rows: slice, columns: slice) -> Tensor:
        return product(features("query", query_features, rows), features("gallery", gallery_features, columns))

    return scores, target


def _load(array: Array, rows: slice, columns: slice) -> Tensor:
    if isinstance(array, Tensor):
        return array[rows, columns]
    return torch.from_numpy(array[rows, columns].copy())  # a read-only memory map is no tensor


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _dtype(array: Array) -> torch.dtype:
    return array.dtype if isinstance(array, Tensor) else torch.from_numpy(array[:1].copy()).dtype


def _slices(size: int, block: int) -> Iterator[slice]:
    for start in range(0, size, block):
        yield slice(start, min(start + block, size))


def _block_sizes(queries: int, gallery: int, block_size: int | None, most_matches: int = 0) -> tuple[int, int]:
    """Queries and gallery rows in a block of about SCORES_PER_BLOCK numbers, what is kept of the matches included."""
    if block_size is None:
        row = gallery if gallery <= GALLERY_IN_ONE_BLOCK else SCORES_PER_BLOCK // 1024
        block_size = max(1, SCORES_PER_BLOCK // (row + MATCH_IN_SCORES * most_matches))
    block_size = min(check_integer("block_size", block_size, 1), queries)
    if gallery <= GALLERY_IN_ONE_BLOCK:
        return block_size, gallery
    return block_size, min(GALLERY_IN_ONE_BLOCK, max(1024, SCORES_PER_BLOCK // block_size))


def _check_ranks(ranks: Sequence[int]) -> tuple[int, ...]:
    checked = tuple(check_integer("ranks", k, 1) for k in ranks)
    if not checked:
        raise ValueError("ranks must hold at least one k, such as (1, 5, 10), got none")
    return checked


def _is_numpy(array: object) -> TypeGuard["np.ndarray[Any, Any]"]:
    numpy = sys.modules.get("numpy")  # an array can only come from a NumPy that is imported
    return numpy is not None and isinstance(array, numpy.ndarray)


def _describe(array: object) -> str:
    if _is_numpy(array):
        return f"{array.dtype} {list(array.shape)} in NumPy"
    return describe(array)


def _check_array(name: str, array: Array, pattern: str) -> None:
    """check_float, for tensors and NumPy arrays."""
    if not _is_numpy(array):
        check_float(name, array, pattern)
        return
    if array.dtype not in ("f2", "f4", "f8"):  # in native byte order
        raise TypeError(f"{name} must be a floating-point array, got {_describe(array)}; use {name}.astype('f4')")
    if array.ndim != len(pattern.split()):
        raise ValueError(f"{name} must have shape [{pattern}], got {_describe(array)}; reshape it")
    if 0 in array.shape:
        raise ValueError(f"{name} [{pattern}] must not be empty, got {_describe(array)}")


def _ids(name: str, ids: Array, length: int, device: torch.device) -> Tensor:
    if _is_numpy(ids):
        if ids.dtype.kind not in "iu" or not ids.dtype.isnative:
            raise TypeError(f"{name} must be an integer array, got {_describe(ids)}; use {name}.astype('i8')")
        ids = torch.from_numpy(ids.copy())
    ids = integer_ids(name, ids, str(length))
    if tuple(ids.shape) != (length,):
        raise ValueError(f"{name} must have shape [{length}] (one id a row of the features), got {describe(ids)}")
    return ids.to(device, torch.int64)


def _progress(loader: Iterable[Any], name: str, show: bool) -> Iterable[Any]:
    if not show:
        return loader
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        return loader
    bar: Iterable[Any] = tqdm(loader, desc=name.replace("_", " "), leave=False)
    return bar
