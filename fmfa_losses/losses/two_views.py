"""Losses over products within and across two views of every sample: image and text, or two augmentations of an image.

A `TwoViewLoss` has two equations. `statistics` are numbers of own rows over some columns, `finalize` makes the loss of
those of all columns. So the columns may come in one piece, or rank by rank in a ring, and the rows in blocks.
"""

from typing import Any

import torch
from torch import Tensor

from ..distributed.peers import Peers
from ..ops.operator import never_compiled
from ..ops.options import Backend
from ..ops.precision import accumulation_dtype, unit_rows
from ..ops.rows_in_blocks import all_rows
from .loss import Loss, hyperparameter
from .score_loss import without_kernel
from .scores import check_features, check_weight

__all__ = ["TwoViewLoss"]


class TwoViewLoss(Loss):
    """A loss of unit vectors of two views, rows a, b [m, D] against columns A, B [C, D].

    statistics(first, a, b, A, B, ...) -> [m, S]; row i is the sample of column first + i, if there is one
    finalize(statistics [W, b, S] of W groups of columns, pairs) -> [b]; pairs is the number of all columns
    """

    backend: Backend = hyperparameter(default="auto", check=without_kernel, kw_only=True)

    def statistics(self, first: int, a: Tensor, b: Tensor, A: Tensor, B: Tensor, **given: Any) -> Tensor:
        raise NotImplementedError

    def finalize(self, statistics: Tensor, pairs: int) -> Tensor:
        raise NotImplementedError

    def arguments(self, like: Tensor, **given: Any) -> dict[str, Any]:
        """Of what a call gives besides, what `statistics` takes besides; tensors in `like`'s dtype."""
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
        dtype = accumulation_dtype(first, second)
        own = unit_rows(first, dtype=dtype), unit_rows(second, dtype=dtype)
        if peers.ring:
            statistics = self._in_a_ring(own, torch.stack([first, second], dim=1), arguments, peers)
        else:
            every = (
                own if peers.group is None else tuple(unit_rows(peers.gather(x), dtype=dtype) for x in (first, second))
            )
            statistics = self._over(peers.offset, own, every, arguments).unsqueeze(0)
        return self.reduce(self.finalize(statistics, sum(peers.sizes)), sample_weight, peers)

    def _over(
        self, offset: int, own: tuple[Tensor, ...], columns: tuple[Tensor, ...], arguments: dict[str, Any]
    ) -> Tensor:
        """Statistics of all own rows over some columns, [b, S]; row i is the sample of column offset + i."""
        names = [name for name, value in arguments.items() if isinstance(value, Tensor)]

        def equation(first: int, a: Tensor, b: Tensor, A: Tensor, B: Tensor, *tensors: Tensor) -> Tensor:
            given = arguments | dict(zip(names, tensors, strict=True))
            return self.statistics(offset + first, a, b, A, B, **given)

        products = 2 * columns[0].shape[0]  # of a row with the columns of both views
        return all_rows(equation, products, own, (*columns, *(arguments[name] for name in names)))

    @never_compiled
    def _in_a_ring(
        self, own: tuple[Tensor, Tensor], features: Tensor, arguments: dict[str, Any], peers: Peers
    ) -> Tensor:
        """Statistics over the columns of each rank, [W, b, S], while the raw features [b, 2, D] travel."""
        names = [name for name, value in arguments.items() if isinstance(value, Tensor)]

        def with_rank(q: int, a: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
            (*tensors, held), offset = rest, peers.offset - sum(peers.sizes[:q])
            columns = unit_rows(held[:, 0], dtype=a.dtype), unit_rows(held[:, 1], dtype=a.dtype)
            return self._over(offset, (a, b), columns, arguments | dict(zip(names, tensors, strict=True)))

        rows = (*own, *(arguments[name] for name in names))
        return torch.stack(peers.over_ranks(with_rank, rows, features))
