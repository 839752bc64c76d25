"""The rank of a match is a count of the scores above it: no sort of the gallery.

r = 1 + #{items with a higher score} + #{items with the same score and a lower gallery index}
"""

import torch
from torch import Tensor

from .scores import Scores, slices

__all__ = ["match_ranks"]

SCORES_IN_CACHE = 2**19  # 2 MiB in float32, near what a CPU core has as L2
COMPARED_MATCHES = 64  # up to here m comparisons of each score are faster than a binary search of m


def match_ranks(
    scores: Scores, rows: slice, gallery_size: int, gallery_block: int, match_columns: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Ranks from 1 [q, m] of the gallery items `match_columns` [q, m], and [q] whether a row holds a NaN."""
    blocks = list(slices(gallery_size, gallery_block))
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
        greater, at_least = count_above(block, match_scores)
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


def count_above(scores: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
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
