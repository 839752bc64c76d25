"""A queue of the last batches, whose features are further keys of a loss over rows of scores.

    keys of a row = the pairs of the batch (with gather, of all ranks), then those of the last K batches, newest first

Queued features are constants: the loss of the present batch against more columns, and its exact gradient. They were
computed by earlier weights, so a slowly changing encoder (MoCo's momentum encoder) or a small learning rate fits best.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from ..distributed.handshake import handshake
from ..ops.checks import check_flag, check_ids, check_integer, check_same, describe
from ..ops.module import Module
from .scores import check_features

__all__ = ["Columns", "NegativesQueue", "QueueOptions", "queued", "queued_columns"]


class Columns(NamedTuple):
    """Queued samples: features [Q, D] of both modalities, and their ids [Q] where they were given."""

    image_features: Tensor
    text_features: Tensor
    pids: Tensor | None
    image_ids: Tensor | None


class NegativesQueue(Module):
    """Keeps the features of the last batches, for losses that take `queue=`.

        loss = itc(image_features, text_features, queue=queue)
        loss.backward()
        queue.push(image_features, text_features)

    A queued sample of the same identity is no negative: where a loss compares pids, it is a positive or left out, as
    one of the batch would be. Without pids ("paired", "all") all queued samples are negatives.

    Args:
        batches: K >= 1, how many are kept.
        gather: keep the batches of all processes, on each of them, as losses with gather need. `push` then exchanges.
        process_group: the processes of gather; all when None.

    Returns:
        Nothing of its own: `push` adds a batch, `columns` are the samples that it holds, `clear` forgets them. Contents
        follow `to(device)` and belong to the state_dict; loaded ones are on the device of the state, so call
        `to(device)` after load_state_dict.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or arguments that do not fit, here or between processes.

    Example:
        >>> from fmfa_losses import ITCLoss
        >>> queue, loss = NegativesQueue(batches=2), ITCLoss()
        >>> image, text = torch.eye(3), torch.eye(3)
        >>> for _ in range(3):
        ...     value = loss(image, text, queue=queue)
        ...     queue.push(image, text)
        >>> len(queue), round(value.item(), 4)              # log 3: the queue holds each key twice more
        (6, 1.0986)

    Reference: He et al., arXiv 1911.05722 (MoCo); Wang et al., arXiv 1912.06798 (cross-batch memory).
    """

    batches: int
    gather: bool
    process_group: Any

    def __init__(self, batches: int, *, gather: bool = False, process_group: Any = None) -> None:
        super().__init__()
        self.batches = check_integer("batches", batches, 1)
        self.gather = check_flag("gather", gather)
        self.process_group = process_group
        self.clear()

    def clear(self) -> None:
        """Forgets all batches."""
        self._columns: Columns | None = None
        self._sizes: tuple[int, ...] = ()

    def __len__(self) -> int:
        return sum(self._sizes)

    @property
    def columns(self) -> Columns | None:
        """The queued samples, newest batch first; None before the first one."""
        return self._columns

    @torch.no_grad()
    def push(
        self,
        image_features: Tensor,
        text_features: Tensor,
        pids: Tensor | None = None,
        *,
        image_ids: Tensor | None = None,
    ) -> None:
        """Adds a batch, and drops the oldest one of more than `batches`. Graphs that use the old columns stay valid.

        Args:
            image_features, text_features: [B, D], any float dtype, in which they are kept; copied, without gradient.
            pids, image_ids: [B] integers, for losses that compare them. With every batch, or with none.
        """
        tensors = {"image_features": image_features, "text_features": text_features}
        tensors |= {"pids": pids, "image_ids": image_ids}  # type: ignore[dict-item]

        def checked() -> tuple[Tensor | None, ...]:
            check_features(image_features, text_features)
            ids = [
                None if x is None else check_ids(name, x, text_features.shape[0], text_features.device).long()
                for name, x in (("pids", pids), ("image_ids", image_ids))
            ]
            if self._columns is not None:
                self._check_alike(Columns(image_features, text_features, *ids))
            return tuple(ids)

        peers, ids = handshake(
            self.gather,
            self.process_group,
            tensors,
            loss="NegativesQueue",
            settings={"batches": self.batches, "queued": len(self)} if self.gather else None,
            check=checked,
        )
        batch = [None if x is None else peers.gather(x.detach()) for x in (image_features, text_features, *ids)]
        sizes = (sum(peers.sizes), *self._sizes)
        self._sizes = sizes[: self.batches]
        kept = len(self) - sizes[0]
        olds = (None,) * 4 if self._columns is None else self._columns
        self._columns = Columns(*(_joined(new, old, kept) for new, old in zip(batch, olds, strict=True)))  # type: ignore[arg-type]

    def _check_alike(self, new: Columns) -> None:
        held = (None,) * 4 if self._columns is None else self._columns
        for name, a, b in zip(Columns._fields, new, held, strict=True):
            if (a is None) != (b is None):
                raise ValueError(
                    f"{name} must be given with every batch of a queue or with none, got {describe(a)} after "
                    f"{describe(b)}; push them always, or call clear()"
                )
            if a is not None and b is not None and a.ndim == 2:
                check_same(f"{name} and the queued ones", a, b, dims=[("D", 1)])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NegativesQueue":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._columns is not None:
            self._columns = Columns(*(None if x is None else fn(x) for x in self._columns))  # type: ignore[arg-type]
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """Of a state_dict: sizes and contents, so that a run goes on as if it had not been interrupted."""
        return {"sizes": self._sizes, "columns": None if self._columns is None else tuple(self._columns)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if len(state["sizes"]) > self.batches:
            raise ValueError(
                f"the queue must hold at most batches = {self.batches} batches, got a state of {len(state['sizes'])}; "
                "build it as it was saved"
            )
        columns = None if state["columns"] is None else Columns(*state["columns"])
        held = 0 if columns is None else len(columns.image_features)
        if sum(state["sizes"]) != held:
            raise ValueError(
                f"the state of a queue must hold the samples of its batches, got {held} for batches of "
                f"{list(state['sizes'])}; take the state_dict that was saved"
            )
        self._sizes, self._columns = tuple(state["sizes"]), columns

    def extra_repr(self) -> str:
        held = f"samples={len(self)}"
        return ", ".join(filter(None, [super().extra_repr(), held]))


def _joined(new: Tensor | None, old: Tensor | None, kept: int) -> Tensor | None:
    if new is None:
        return None
    return new.clone() if old is None else torch.cat([new, old[:kept].to(new.dtype)])


class QueueOptions(TypedDict, total=False):
    """Of a function whose loss takes a queue, for type checkers."""

    queue: NegativesQueue | None


def queued(queue: object) -> int | None:
    """How many samples a call's queue holds; ranks compare it."""
    return len(queue) if isinstance(queue, NegativesQueue) else None


def queued_columns(
    queue: NegativesQueue | None, like: Tensor, gather: object, wanted: tuple[str, ...]
) -> Columns | None:
    """The columns for a batch like `like` [B, D], checked; `wanted` ids must be there."""
    if queue is None:
        return None
    if not isinstance(queue, NegativesQueue):
        raise TypeError(f"queue must be a NegativesQueue, got {describe(queue)}; build NegativesQueue(batches=...)")
    if gather and not queue.gather:
        raise ValueError(
            "queue must have gather=True for a loss with gather, so that all ranks have the same columns, got "
            f"gather=False; build NegativesQueue({queue.batches}, gather=True)"
        )
    columns = queue.columns
    if columns is None:
        return None
    check_same("features and queue", like, columns.text_features)
    if like.shape[1] != columns.text_features.shape[1]:
        raise ValueError(
            f"queue must hold features of the width of the batch, got {describe(columns.text_features)} for "
            f"{describe(like)}; push what the loss gets, or call clear()"
        )
    for name in wanted:
        if getattr(columns, name) is None:
            raise ValueError(f"queue must hold {name}, which this loss compares, got None; push(..., {name}={name})")
    return columns
