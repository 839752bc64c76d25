"""Losses over products within and across two views of every sample: image and text, or two augmentations of an image.

They have two directions as other losses have, with scores of their own: a subclass says by `queries` and `keys` what
these are the products of, and by `rows` what a row of them costs. Blocks of rows, the global batch and the ring are as
in score_loss.py.
"""

from typing import Any

import torch
from torch import Tensor

from ..distributed.peers import Peers
from ..ops.operator import never_compiled
from ..ops.options import Backend
from ..ops.precision import accumulation_dtype, product, unit_rows
from ..ops.rows_in_blocks import all_rows
from .loss import Loss, hyperparameter
from .score_loss import Factors, without_kernel
from .scores import check_features, check_weight

__all__ = ["TwoViewLoss"]


class TwoViewLoss(Loss):
    """A loss of the unit vectors a, b [b, D] of two views.

    queries(a, b) -> two of [b, E], one for each direction
    keys(a, b)    -> two of [C, E]; the columns of a sample stand together, those of all samples in their order
    rows(way, scores [m, C], first, ...) -> [m]; row i is sample first + i, way is 0 or 1
    """

    backend: Backend = hyperparameter(default="auto", check=without_kernel, kw_only=True)

    def queries(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def keys(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def rows(self, way: int, scores: Tensor, first: int, **given: Any) -> Tensor:
        raise NotImplementedError

    def arguments(self, like: Tensor, **given: Any) -> dict[str, Any]:
        """Of what a call gives besides, what `rows` takes besides; tensors in `like`'s dtype."""
        return given

    def of_views(
        self, names: tuple[str, str], first: Tensor, second: Tensor, sample_weight: Tensor | None, **given: Any
    ) -> Tensor:
        def checked() -> Any:  # torch.compile of 2.6 cannot make the types of a nested function
            check_features(first, second, names)
            if sample_weight is not None:
                check_weight("sample_weight", sample_weight, first[:, 0])
            return self.arguments(first.new_empty((), dtype=accumulation_dtype(first, second)), **given)

        tensors = {names[0]: first, names[1]: second, "sample_weight": sample_weight}
        peers, arguments = self.handshake(tensors, checked, **given)
        factors = self._factors(first, second, peers)
        directions = [self._direction(way, factors[way], peers.offset, arguments) for way in (0, 1)]
        return self.reduce(directions[0] + directions[1], sample_weight, peers)

    def _direction(self, way: int, factors: Factors, offset: int, arguments: dict[str, Any]) -> Tensor:
        """Losses of all own rows, [b]."""
        loss = self.as_called()

        def equation(first: int, scores: Tensor, **given: Any) -> Tensor:
            return loss.rows(way, scores, offset + first, **given)

        return all_rows(equation, factors, {}, arguments)

    def _factors(self, first: Tensor, second: Tensor, peers: Peers) -> tuple[Factors, Factors]:
        """Own queries and the keys of all samples, of both directions; in a ring their scores."""
        dtype = accumulation_dtype(first, second)
        a, b = unit_rows(first, dtype=dtype), unit_rows(second, dtype=dtype)
        queries = self.queries(a, b)
        if peers.ring:
            scores = self._ring_scores(queries, torch.stack([first, second], dim=1), peers)
            return (scores[0],), (scores[1],)
        if peers.group is not None:
            a, b = (unit_rows(peers.gather(x), dtype=dtype) for x in (first, second))
        keys = self.keys(a, b)
        return (queries[0], keys[0]), (queries[1], keys[1])

    @never_compiled
    def _ring_scores(self, queries: tuple[Tensor, Tensor], features: Tensor, peers: Peers) -> Tensor:
        """Scores of both directions, [2, b, C], while the raw features [b, 2, D] of all ranks travel."""

        def with_rank(q: int, of_first: Tensor, of_second: Tensor, held: Tensor) -> Tensor:
            a, b = (unit_rows(x, dtype=of_first.dtype) for x in held.unbind(dim=1))
            keys = self.keys(a, b)
            return torch.stack([product(of_first, keys[0]), product(of_second, keys[1])])

        return torch.cat(peers.over_ranks(with_rank, queries, features), dim=2)
