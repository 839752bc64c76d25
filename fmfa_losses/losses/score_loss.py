"""Losses over rows of scores: the own queries against all keys, in both directions.

A `ScoreLoss` has `rows`, its equation on a block of rows [m, C], and nothing else; everything around it is here. A
small matrix of scores is kept whole, a large one exists in blocks of rows alone: `ops.rows_in_blocks`. The keys are
those of the own pairs, with gather of all ranks, and behind them those of a queue. In a ring the keys travel, and of
them only their scores stay.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..distributed.peers import Peers
from ..ops.checks import check_divisor, check_option
from ..ops.operator import never_compiled
from ..ops.options import BACKENDS, Backend
from ..ops.precision import accumulation_dtype, product, unit_rows
from ..ops.rows_in_blocks import rows_in_blocks, scores_of, whole_rows
from .loss import Loss, hyperparameter
from .negatives_queue import Columns, NegativesQueue, queued, queued_columns
from .scores import check_features, check_scores, check_weight, resolve_scale

__all__ = ["Factors", "ScaledScoreLoss", "ScoreLoss", "score_factors", "without_kernel"]

# One direction's scores [b, C]: queries [b, D] and keys [C, D] whose products they are, or themselves.
Factors = tuple[Tensor, Tensor] | tuple[Tensor]


def without_kernel(name: str, backend: Any) -> Any:
    if backend == "triton":
        raise ValueError(f'{name} must be "auto" or "torch", got "triton": this loss has no kernel; pass "auto"')
    check_option(name, backend, BACKENDS)
    return backend


class ScoreLoss(Loss):
    """A loss over the rows of scores of texts and images; a subclass has its equation as `rows`.

        rows(scores [m, C], positive [m, C], offset) -> [m]

    Row i belongs to column offset + i: some of the own queries against all keys. `positive` says which columns count as
    positives of a row: the same identity, or the pair alone where the loss does not look at pids.

    Inputs:
        image_features, text_features: [B, D], any float dtype.
        pids: [B] integer identities.
        sample_weight: [B] weights >= 0 of the pairs; "mean" divides by their sum.
        queue: NegativesQueue whose samples are keys besides.
    """

    backend: Backend = hyperparameter(default="auto", check=without_kernel, kw_only=True)
    rows: ClassVar[Callable[..., Tensor]]
    unit_queries: ClassVar[bool] = True  # scores are cosines; otherwise products of features and unit vectors

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        pids: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        queue: NegativesQueue | None = None,
    ) -> Tensor:
        return self._of_features(image_features, text_features, pids, sample_weight, queue)

    def from_scores(self, scores: Tensor, pids: Tensor | None = None, *, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of scores that exist already, [B, B] text x image."""
        return self._of_scores(check_scores(scores), None, pids, sample_weight)

    def arguments(self, like: Tensor, **given: Any) -> dict[str, Any]:
        """Of what a call gives besides, what `rows` takes besides; tensors in `like`'s dtype."""
        return given

    def both(self, t2i: Tensor, i2t: Tensor | None, positive: Tensor, offset: int, **given: Any) -> Tensor:
        """Both directions of whole matrices, [b]; the images' rows are the transposed ones when None."""
        i2t = t2i.T if i2t is None else i2t
        return self.rows(t2i, positive, offset, **given) + self.rows(i2t, positive, offset, **given)

    def _of_features(
        self,
        image: Tensor,
        text: Tensor,
        pids: Tensor | None,
        sample_weight: Tensor | None,
        queue: NegativesQueue | None,
        **given: Any,
    ) -> Tensor:
        def checked() -> Any:  # torch.compile of 2.6 cannot make the types of a nested function
            check_features(image, text)
            if sample_weight is not None:
                check_weight("sample_weight", sample_weight, text[:, 0])
            like = text.new_empty((), dtype=accumulation_dtype(image, text))
            ids = self.check_pids(pids, text)
            columns = queued_columns(queue, text, self.gather, () if ids is None else ("pids",))
            return ids, columns, self.arguments(like, **given)

        tensors = {"image_features": image, "text_features": text, "pids": pids, "sample_weight": sample_weight}
        peers, (ids, columns, arguments) = self.handshake(tensors, checked, queued=queued(queue), **given)
        t2i, i2t = score_factors(image, text, peers, columns, unit_queries=self.unit_queries)
        per_sample = self._both(t2i, i2t, _ids(ids, text, peers, columns), peers.offset, arguments)
        return self.reduce(per_sample, sample_weight, peers)

    def _of_scores(
        self,
        scores: Tensor,
        transposed: Tensor | None,
        pids: Tensor | None,
        sample_weight: Tensor | None,
        **given: Any,
    ) -> Tensor:
        alone, ids, arguments = self.alone(), self.check_pids(pids, scores), self.arguments(scores, **given)
        i2t = None if transposed is None else (transposed,)
        per_sample = self._both((scores,), i2t, _ids(ids, scores, Peers((len(scores),)), None), 0, arguments)
        return self.reduce(per_sample, sample_weight, alone)

    def _both(
        self, t2i: Factors, i2t: Factors | None, ids: tuple[Tensor, Tensor], offset: int, arguments: dict[str, Any]
    ) -> Tensor:
        """Both directions, [b]."""
        row_ids, column_ids = ids
        if whole_rows(row_ids.shape[0], column_ids.shape[0], t2i[0]):
            transposed = None if i2t is None else scores_of(*i2t)
            return self.both(scores_of(*t2i), transposed, row_ids[:, None] == column_ids, offset, **arguments)
        if i2t is None:
            i2t = t2i[::-1] if len(t2i) == 2 else (t2i[0].T,)
        return self._in_blocks(t2i, ids, offset, arguments) + self._in_blocks(i2t, ids, offset, arguments)

    def _in_blocks(
        self, factors: Factors, ids: tuple[Tensor, Tensor], offset: int, arguments: dict[str, Any]
    ) -> Tensor:
        """One direction, [b]."""
        loss = self.as_called()

        def equation(first: int, scores: Tensor, row_ids: Tensor, column_ids: Tensor, **given: Any) -> Tensor:
            return loss.rows(scores, row_ids[:, None] == column_ids, offset + first, **given)

        return rows_in_blocks(equation, factors, {"row_ids": ids[0]}, {"column_ids": ids[1], **arguments})


class ScaledScoreLoss(ScoreLoss):
    """A ScoreLoss with a temperature: rows(scores, positive, offset, scale), where scale is 1 / temperature.

    Inputs:
        logit_scale: 1 / temperature instead of `temperature`: a number, or a tensor with one element on any device,
            which receives its gradient.
    """

    temperature: float = hyperparameter(default=0.02, check=check_divisor)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        pids: Tensor | None = None,
        *,
        logit_scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
        queue: NegativesQueue | None = None,
    ) -> Tensor:
        return self._of_features(image_features, text_features, pids, sample_weight, queue, logit_scale=logit_scale)

    def from_scores(
        self,
        scores: Tensor,
        pids: Tensor | None = None,
        *,
        logit_scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return self._of_scores(check_scores(scores), None, pids, sample_weight, logit_scale=logit_scale)

    def arguments(self, like: Tensor, **given: Any) -> dict[str, Any]:
        logit_scale = given.pop("logit_scale")
        return {"scale": resolve_scale(logit_scale, self.temperature, like), **given}


def score_factors(
    image: Tensor, text: Tensor, peers: Peers, columns: Columns | None = None, *, unit_queries: bool = True
) -> tuple[Factors, Factors | None]:
    """Of own texts x all images, and of own images x all texts where these are not the transposed ones."""
    queued_features = () if columns is None else columns[:2]
    dtype = accumulation_dtype(image, text, *queued_features)
    queries = [unit_rows(x, dtype=dtype) if unit_queries else x.to(dtype) for x in (image, text)]
    queued_keys = [unit_rows(x, dtype=dtype) for x in queued_features]
    if peers.ring:
        t2i, i2t = _ring_scores(image, text, queries, peers)
        if queued_keys:
            t2i = torch.cat([t2i, product(queries[1], queued_keys[0])], dim=1)
            i2t = torch.cat([i2t, product(queries[0], queued_keys[1])], dim=1)
        return (t2i,), (i2t,)
    if peers.group is None and columns is None and unit_queries:
        return (queries[1], queries[0]), None
    keys = [unit_rows(peers.gather(x), dtype=dtype) for x in (image, text)]
    if queued_keys:
        keys = [torch.cat(parts) for parts in zip(keys, queued_keys, strict=True)]
    return (queries[1], keys[0]), (queries[0], keys[1])


def _ids(ids: Tensor | None, like: Tensor, peers: Peers, columns: Columns | None) -> tuple[Tensor, Tensor]:
    """Ids of rows [b] and columns [C]: where they are equal, the column is a positive of the row."""
    if ids is not None:
        queued_ids = () if columns is None or columns.pids is None else (columns.pids,)
        return ids, torch.cat([peers.gather(ids), *queued_ids])
    pairs = sum(peers.sizes)
    index = torch.arange(pairs if columns is None else pairs + len(columns.image_features), device=like.device)
    return index[peers.offset : peers.offset + like.shape[0]], index


@never_compiled
def _ring_scores(image: Tensor, text: Tensor, queries: list[Tensor], peers: Peers) -> Tensor:
    """Own texts x all images and own images x all texts, [2, b, B], while the raw features of all ranks travel."""
    own, dtype = torch.stack(queries, dim=1), queries[0].dtype  # [b, 2, D]

    def with_rank(q: int, own: Tensor, held: Tensor) -> Tensor:
        keys = unit_rows(held, dtype=dtype)
        return torch.stack([product(own[:, 1], keys[:, 0]), product(own[:, 0], keys[:, 1])])

    return torch.cat(peers.over_ranks(with_rank, (own,), torch.stack([image, text], dim=1)), dim=2)
