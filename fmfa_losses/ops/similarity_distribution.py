"""The similarity distribution p_i = softmax_j(q_i . k_j) of every row against the target of the labels, Eq. 1-4.

Three numbers of a row are all that A-SDM, SDM and InfoNCE need, found while its logits z_ij = q_i . k_j are at hand:

    divergence    KL(p || target + eps) = sum_j p_j (log p_j - log(target_j + eps))
    log_top       log max_j p_j
    log_positive  log p at the positive

so the [R, C] matrix is only ever there in blocks of rows, and the backward recomputes those blocks:

    dz = p [ddivergence (log p - log(target + eps) - divergence) - dlog_top - dlog_positive]
         + dlog_top at the top, + dlog_positive at the positive

log p = (z - top) - log sum e^(z - top): logits of size 50 cancel against their maximum before anything else is done.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._operator import operator
from ._precision import full_precision

__all__ = ["POSITIVES", "Labels", "RowStatistics", "row_statistics", "row_statistics_reference"]

POSITIVES = ("paired", "any", "first")


class Labels(NamedTuple):
    """What makes row i and column j belong together.

    y_ij = [same pid], or factor [same pid] + (1 - factor) [same image] where image ids are given.
    target_ij = y_ij / sum_k y_ik; with `column_sum` y_ij / column_sum_j, as the released code divides.
    """

    row_pids: Tensor  # [R]
    column_pids: Tensor  # [C]
    paired: Tensor  # [R] column that row i was sampled with
    row_image_ids: Tensor | None = None  # [R]
    column_image_ids: Tensor | None = None  # [C]
    factor: float = 0.3
    column_sum: Tensor | None = None  # [C]

    def weights(self, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[same pid] as bool and y, both [rows, C]."""
        same = self.row_pids[rows, None] == self.column_pids
        if self.row_image_ids is None or self.column_image_ids is None:
            return same, same.to(dtype)
        same_image = self.row_image_ids[rows, None] == self.column_image_ids
        return same, self.factor * same.to(dtype) + (1 - self.factor) * same_image.to(dtype)

    def targets(self, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[same pid] as bool and the target distribution, both [rows, C]."""
        same, y = self.weights(rows, dtype)
        total = y.sum(dim=1, keepdim=True) if self.column_sum is None else self.column_sum.to(dtype)
        return same, y / torch.where(total > 0, total, torch.ones_like(total))


class RowStatistics(NamedTuple):
    """[R] each; see the head of this file."""

    divergence: Tensor
    log_top: Tensor
    log_positive: Tensor


def _positive_index(z: Tensor, same: Tensor, paired: Tensor, positive: str) -> Tensor:
    if positive == "paired":
        return paired
    if positive == "first":
        return same.to(torch.uint8).argmax(dim=1)
    return z.masked_fill(~same, -torch.inf).argmax(dim=1)


def row_statistics_reference(
    queries: Tensor, keys: Tensor, labels: Labels, *, positive: str = "paired", eps: float = 1e-8
) -> RowStatistics:
    """The specification of `row_statistics`: the whole [R, C] matrix, and autograd."""
    log_p = (queries @ keys.T).log_softmax(dim=1)
    same, target = labels.targets(slice(None), log_p.dtype)
    index = _positive_index(log_p, same, labels.paired, positive)
    return RowStatistics(
        divergence=(log_p.exp() * (log_p - (target + eps).log())).sum(dim=1),
        log_top=log_p.max(dim=1).values,
        log_positive=log_p.gather(1, index[:, None]).squeeze(1),
    )


def row_statistics(
    queries: Tensor, keys: Tensor, labels: Labels, *, positive: str = "paired", eps: float = 1e-8
) -> RowStatistics:
    """Statistics of every row of the distribution softmax_j(queries_i . keys_j), never the [R, C] matrix.

    Args:
        queries: [R, D], float32 or float64, already multiplied by the logit scale.
        keys: [C, D], same dtype.
        labels: who belongs to whom.
        positive: which positive of a row counts: the "paired" one, the best of "any", or the "first" in the batch.
        eps: added to the target inside the logarithm.

    Returns:
        RowStatistics, [R] each, differentiable once in queries and keys.
    """
    statistics = similarity_distribution_op(queries, keys, *labels, positive, eps)[0]
    return RowStatistics(*statistics.unbind())


# The operator returns the statistics [3, R], the normaliser (top, log sum e^(z - top)) [2, R] and the places of top and
# positive [2, R].


@operator(
    "similarity_distribution(Tensor queries, Tensor keys, Tensor row_pids, Tensor column_pids, Tensor paired,"
    " Tensor? row_image_ids, Tensor? column_image_ids, float factor, Tensor? column_sum, str positive, float eps)"
    " -> (Tensor, Tensor, Tensor)"
)
def similarity_distribution_op(queries, keys, *arguments):  # type: ignore[no-untyped-def]
    *labels, positive, eps = arguments
    with full_precision(queries):
        return _forward_torch(queries, keys, Labels(*labels), positive, eps)


@operator(
    "similarity_distribution_backward(Tensor dstatistics, Tensor statistics, Tensor normaliser, Tensor places,"
    " Tensor queries, Tensor keys, Tensor row_pids, Tensor column_pids, Tensor paired, Tensor? row_image_ids,"
    " Tensor? column_image_ids, float factor, Tensor? column_sum, float eps) -> (Tensor, Tensor)"
)
def similarity_distribution_backward_op(  # type: ignore[no-untyped-def]
    dstatistics, statistics, normaliser, places, queries, keys, *arguments
):
    *labels, eps = arguments
    with full_precision(queries):
        return _backward_torch(dstatistics, statistics, normaliser, places, queries, keys, Labels(*labels), eps)


@torch.library.register_fake(similarity_distribution_op)
def _(queries, keys, row_pids, *arguments):  # type: ignore[no-untyped-def]
    R = queries.shape[0]
    return queries.new_empty(3, R), queries.new_empty(2, R), row_pids.new_empty(2, R, dtype=torch.int64)


@torch.library.register_fake(similarity_distribution_backward_op)
def _(dstatistics, statistics, normaliser, places, queries, keys, *arguments):  # type: ignore[no-untyped-def]
    return torch.empty_like(queries), torch.empty_like(keys)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.factor, column_sum, _, ctx.eps = inputs
    ctx.save_for_backward(*output, *tensors, column_sum)


def _backward(ctx, dstatistics, dnormaliser, dplaces):  # type: ignore[no-untyped-def]
    *tensors, column_sum = ctx.saved_tensors
    dqueries, dkeys = similarity_distribution_backward_op(dstatistics, *tensors, ctx.factor, column_sum, ctx.eps)
    return dqueries, dkeys, *[None] * 9


torch.library.register_autograd(similarity_distribution_op, _backward, setup_context=_setup_context)

# A block of logits holds this many numbers; about six temporaries of its size are alive at once.
BLOCK_ELEMENTS = 2**22


def _row_blocks(R: int, C: int) -> list[slice]:
    step = max(1, BLOCK_ELEMENTS // C)
    return [slice(i, min(i + step, R)) for i in range(0, R, step)]


def _forward_torch(
    queries: Tensor, keys: Tensor, labels: Labels, positive: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    R, C = queries.shape[0], keys.shape[0]
    statistics, normaliser = queries.new_empty(3, R), queries.new_empty(2, R)
    places = torch.empty(2, R, dtype=torch.int64, device=queries.device)
    for rows in _row_blocks(R, C):
        z = queries[rows] @ keys.T
        same, target = labels.targets(rows, z.dtype)
        top, top_index = z.max(dim=1)
        index = _positive_index(z, same, labels.paired[rows], positive)
        z -= top[:, None]
        lse = z.logsumexp(dim=1)
        log_p = z.sub_(lse[:, None])
        log_positive = log_p.gather(1, index[:, None]).squeeze(1)
        divergence = log_p.exp().mul_(log_p - target.add_(eps).log_()).sum(dim=1)
        statistics[:, rows] = torch.stack([divergence, -lse, log_positive])
        normaliser[:, rows] = torch.stack([top, lse])
        places[:, rows] = torch.stack([top_index, index])
    return statistics, normaliser, places


def _backward_torch(
    dstatistics: Tensor,
    statistics: Tensor,
    normaliser: Tensor,
    places: Tensor,
    queries: Tensor,
    keys: Tensor,
    labels: Labels,
    eps: float,
) -> tuple[Tensor, Tensor]:
    dqueries, dkeys = torch.empty_like(queries), torch.zeros_like(keys)
    for rows in _row_blocks(queries.shape[0], keys.shape[0]):
        top, lse = normaliser[:, rows, None]
        ddivergence, dlog_top, dlog_positive = dstatistics[:, rows, None]
        log_p = (queries[rows] @ keys.T).sub_(top).sub_(lse)
        _, target = labels.targets(rows, log_p.dtype)
        dz = (log_p - target.add_(eps).log_()).sub_(statistics[0, rows, None]).mul_(ddivergence)
        dz = dz.sub_(dlog_top + dlog_positive).mul_(log_p.exp_())
        dz.scatter_add_(1, places[0, rows, None], dlog_top)
        dz.scatter_add_(1, places[1, rows, None], dlog_positive)
        dqueries[rows] = dz @ keys
        dkeys.addmm_(dz.T, queries[rows])
    return dqueries, dkeys
