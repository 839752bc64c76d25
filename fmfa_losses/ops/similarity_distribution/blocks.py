"""The row loss in blocks of logits: loops over blocks of rows, and over the ranks of a ring.

               k_0  k_1  k_2 ...  k_C
        q_0  [  z    z    z        z  ]   direction 0: a query is a row, whole in its block
        q_1  [  z    z    z        z  ]   direction 1: a key is a row, whose statistics are merged block by block
              ---- next block ----

A block backend does Eq. 1-4 on a block of cosines: the one in PyTorch below applies `statistics.py`, the one in Triton
is `fmfa_losses.kernels.asdm_blocks`. The forward makes one product of the size of [R, C], the backward three:
the cosines again, and one for each gradient. In a ring the keys are those of one rank after the other.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..precision import accumulation_dtype, divide_by_norms, row_norms
from .reference import RowLoss
from .statistics import Final, Labels, Running, dlogits, finalize, merge, nothing, of

__all__ = [
    "Batch", "BlockBackend", "Ring", "Rows", "backward", "forward", "plain_scale", "ring_backward", "ring_forward",
    "through_norms", "torch_blocks",
]  # fmt: skip


class Batch(NamedTuple):
    """What all blocks have in common."""

    pids: Tensor  # [C], contiguous
    image_ids: Tensor | None  # [C], contiguous
    label_sum: Tensor  # [R], sum_k y_ik
    scale: float | Tensor
    spec: RowLoss


class Rows(NamedTuple):
    """Results for the rows of S directions; after every block they are those of the columns so far."""

    loss: Tensor  # [S, R]
    final: Tensor  # [S, 3 or 4, R], the fields of `Final`
    indices: Tensor  # [S, 2, R] columns of top and positive, int32; [0] for an unweighted loss
    running: Tensor  # [5, R], the first fields of `Running`, of the direction whose rows come in several blocks

    @classmethod
    def empty(cls, R: int, like: Tensor, spec: RowLoss, carried: bool) -> "Rows":
        S, rows = spec.directions, R if carried else 0
        index = torch.zeros((S, 2, R) if spec.weighted else (0,), dtype=torch.int32, device=like.device)
        start = torch.stack(nothing(rows, like)[:5])
        return cls(like.new_empty(S, R), like.new_empty(S, 4 if spec.weighted else 3, R), index, start)


class BlockBackend(Protocol):
    """Eq. 1-4 on a block of cosines [m, n], which it may overwrite.

    Its rows are the queries `rows`, its columns the keys from `first` on.
    """

    block_elements: int  # numbers in a block
    row_multiple: int  # what the stride of its rows is a multiple of

    def norms(self, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """|f x| and f of the queries, then of the keys, [2, R + C], as `row_norms` has them."""

    def update(self, cos: Tensor, rows: slice, first: int, batch: Batch, out: Rows, carried: int | None) -> None:
        """Brings the results of all directions up to date. `carried` is the direction that continues from `running`."""

    def dlogits(self, cos: Tensor, rows: slice, first: int, g: Tensor, batch: Batch, out: Rows) -> Tensor:
        """Gradient in the logits [m, n] of sum_i g_i (loss of row i) over all directions; g [R]."""


def forward(
    queries: Tensor,
    keys: Tensor,
    pids: Tensor,
    image_ids: Tensor | None,
    scale: float | Tensor,
    spec: RowLoss,
    backend: BlockBackend,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, final statistics, indices, norms and label sums, as the operator declares them."""
    R, C, dtype = queries.shape[0], keys.shape[0], accumulation_dtype(queries, keys)
    norms = backend.norms(queries, keys, dtype)
    batch = _batch(pids, image_ids, None, R, scale, spec, dtype)
    out = Rows.empty(R, norms, spec, carried=spec.both)
    unit = divide_by_norms(torch.cat([queries, keys]), norms.unsqueeze(-1))
    q, k = unit[:R], unit[R:]
    for rows in _blocks(R, C, backend):
        backend.update(_cosines(q[rows], k, backend), rows, 0, batch, out, carried=1 if spec.both else None)
    per_sample = out.loss.sum(dim=0)
    if spec.reduction != "none":
        per_sample = getattr(per_sample, spec.reduction)()
    return per_sample, out.final, out.indices, norms, batch.label_sum


def backward(
    dloss: Tensor,
    final: Tensor,
    index: Tensor,
    norms: Tensor,
    label_sum: Tensor,
    queries: Tensor,
    keys: Tensor,
    pids: Tensor,
    image_ids: Tensor | None,
    scale: float | Tensor,
    scale_gradient: bool,
    spec: RowLoss,
    backend: BlockBackend,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and scale."""
    R, C = queries.shape[0], keys.shape[0]
    batch = _batch(pids, image_ids, label_sum, R, scale, spec, norms.dtype)
    out = Rows(norms[:0], final, index, norms[:0])
    unit = divide_by_norms(torch.cat([queries, keys]), norms.unsqueeze(-1))
    q, k = unit[:R], unit[R:]
    g = (dloss / R if spec.reduction == "mean" else dloss).expand(R)
    dq, dk = torch.empty_like(q), torch.zeros_like(k)
    for rows in _blocks(R, C, backend):
        dz = backend.dlogits(_cosines(q[rows], k, backend), rows, 0, g, batch, out)
        torch.mm(dz, k, out=dq[rows])
        dk.addmm_(dz.T, q[rows])
    inverse = (norms[1] / norms[0]).unsqueeze(-1)
    along = through_norms(dq, q, inverse[:R], scale)
    through_norms(dk, k, inverse[R:], scale)
    dscale = along.sum() if scale_gradient else norms.new_empty(0)  # every logit belongs to one query
    return dq.to(queries.dtype), dk.to(keys.dtype), dscale


class Ring(Protocol):
    """The ranks that share a batch, as `fmfa_losses.distributed.peers.Peers` has them."""

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def offset(self) -> int: ...

    def rounds(self, block: Tensor) -> Iterator[tuple[int, Tensor]]: ...

    def shift(self, x: Tensor, size: int) -> Callable[[], Tensor]: ...


# Queries and keys among the features [b, 2, D]: texts against images, and images against texts.
RING_DIRECTIONS = ((1, 0), (0, 1))


def ring_forward(
    features: Tensor,
    pids: Tensor,
    image_ids: Tensor | None,
    scale: float | Tensor,
    spec: RowLoss,
    ring: Ring,
    backend: BlockBackend,
    queued: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both directions of the own pairs against those of all ranks, from one rank's keys at a time.

    Args:
        features: [b, 2, D], own images and texts; they travel as they are.
        pids, image_ids: [B + Q] of all pairs, in rank order, and of what is queued.
        spec: of one direction; its offset is the ring's.
        queued: [Q, 2, D], constants that are keys after those of all ranks.
    Returns:
        Losses [b], final statistics [2, 3 or 4, b], indices [2, 2, b] or [2, 0], norms [2, b, 2, 1], label sums [b].
    """
    b, dtype = features.shape[0], accumulation_dtype(features)
    norms = _norms(features, dtype, backend)
    batch = _batch(pids, image_ids, None, b, scale, spec, dtype)
    unit, outs = divide_by_norms(features, norms), [Rows.empty(b, norms, spec, carried=True) for _ in RING_DIRECTIONS]
    for _, first, keys in _ring_keys(features, dtype, ring, backend, queued):
        for out, (q, k) in zip(outs, RING_DIRECTIONS, strict=True):
            for rows in _blocks(b, keys.shape[0], backend):
                cos = _cosines(unit[rows, q], keys[:, k], backend)
                backend.update(cos, rows, first, batch, out, carried=0)
    loss, final, index, _ = (torch.stack(parts) for parts in zip(*outs, strict=True))
    return loss.sum(dim=(0, 1)), final, index, norms, batch.label_sum


def ring_backward(
    dloss: Tensor,
    final: Tensor,
    index: Tensor,
    norms: Tensor,
    label_sum: Tensor,
    features: Tensor,
    pids: Tensor,
    image_ids: Tensor | None,
    scale: float | Tensor,
    spec: RowLoss,
    ring: Ring,
    backend: BlockBackend,
    queued: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the own features and of the scale. Features travel again, each followed by its gradient."""
    b = features.shape[0]
    batch = _batch(pids, image_ids, label_sum, b, scale, spec, norms.dtype)
    outs = [Rows(norms[:0], *results, norms[:0]) for results in zip(final, index, strict=True)]
    unit = divide_by_norms(features, norms)
    dqueries, dkeys = torch.zeros_like(unit), torch.zeros_like(unit)
    for rank, first, keys in _ring_keys(features, norms.dtype, ring, backend, queued):
        for out, (q, k) in zip(outs, RING_DIRECTIONS, strict=True):
            for rows in _blocks(b, keys.shape[0], backend):
                cos = _cosines(unit[rows, q], keys[:, k], backend)
                dz = backend.dlogits(cos, rows, first, dloss, batch, out)
                dqueries[rows, q].addmm_(dz, keys[:, k])
                if rank is not None:
                    dkeys[:, k].addmm_(dz.T, unit[rows, q])
        if rank is not None:
            dkeys = ring.shift(dkeys, ring.sizes[rank - 1])()  # after the last round it is back at its rank
    dscale = (unit * dqueries).sum()
    dfeatures = dqueries.add_(dkeys)
    through_norms(dfeatures, unit, norms[1] / norms[0], scale)
    return dfeatures.to(features.dtype), dscale


def _ring_keys(
    features: Tensor, dtype: torch.dtype, ring: Ring, backend: BlockBackend, queued: Tensor | None
) -> Iterator[tuple[int | None, int, Tensor]]:
    """(rank, index of its first pair, its unit rows [b_q, 2, D]) of every rank, the own one first; None of a queue."""
    for rank, held in ring.rounds(features):
        yield rank, sum(ring.sizes[:rank]), divide_by_norms(held, _norms(held, dtype, backend))
    if queued is not None:
        yield None, sum(ring.sizes), divide_by_norms(queued, _norms(queued, dtype, backend))


def _norms(features: Tensor, dtype: torch.dtype, backend: BlockBackend) -> Tensor:
    return row_norms(features, dtype, backend="torch" if backend is torch_blocks else "auto")


def _batch(
    pids: Tensor, image_ids: Tensor | None, label_sum: Tensor | None, R: int, scale: float | Tensor, spec: RowLoss,
    dtype: torch.dtype,
) -> Batch:  # fmt: skip
    """Ids are made contiguous once per pass: every block reads them."""
    pids, image_ids = pids.contiguous(), None if image_ids is None else image_ids.contiguous()
    total = _label_sum(pids, image_ids, R, spec, dtype) if label_sum is None else label_sum
    return Batch(pids, image_ids, total, scale, spec)


def _blocks(R: int, C: int, backend: BlockBackend) -> list[slice]:
    step = max(1, backend.block_elements // C)
    return [slice(i, min(i + step, R)) for i in range(0, R, step)]


def _cosines(q: Tensor, k: Tensor, backend: BlockBackend) -> Tensor:
    """A block [m, C] whose rows are consecutive numbers."""
    columns = -(-k.shape[0] // backend.row_multiple) * backend.row_multiple
    if columns == k.shape[0]:
        return q @ k.T
    return torch.mm(q, k.T, out=q.new_empty(q.shape[0], columns)[:, : k.shape[0]])


def through_norms(dunit: Tensor, unit: Tensor, inverse: Tensor, scale: float | Tensor) -> Tensor:
    """Makes the gradient in unit vectors, but for the scale, one in features, in place; returns unit . dunit.

    That is sum_j cos_ij dz_ij: normalising takes it out, and the scale receives it. `inverse` [..., 1] is 1 / |x|.
    """
    along: Tensor = torch.linalg.vecdot(unit, dunit).unsqueeze(-1)
    dunit.addcmul_(unit, along, value=-1).mul_(scale * inverse)
    return along


def plain_scale(scale: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A scale that may multiply numbers of `dtype`, outside of autograd."""
    return scale.detach().to(dtype) if isinstance(scale, Tensor) else scale


def _label_sum(pids: Tensor, image_ids: Tensor | None, R: int, spec: RowLoss, dtype: torch.dtype) -> Tensor:
    """sum_k y_ik of the queries."""

    def count(ids: Tensor) -> Tensor:
        """How often the query's id occurs among all."""
        ordered, wanted = ids.sort().values, ids[spec.offset : spec.offset + R].contiguous()
        return (torch.searchsorted(ordered, wanted, right=True) - torch.searchsorted(ordered, wanted)).to(dtype)

    if image_ids is None:
        return count(pids)
    return spec.image_id_factor * count(pids) + (1 - spec.image_id_factor) * count(image_ids)


class _TorchBlocks:
    """`statistics.py` on a block: direction 0 along its rows, direction 1 along its columns.

    Where one block is all of a small batch, both directions are rows of [z, z^T] at once: half the operations, whose
    number and not size takes the time then. Their labels are the same, as keys and queries have the same ids.
    """

    block_elements = 2**22  # about six temporaries of this size exist at the same time
    row_multiple = 1

    def norms(self, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        return row_norms(torch.cat([queries, keys]), dtype, backend="torch").squeeze(-1)

    def update(self, cos: Tensor, rows: slice, first: int, batch: Batch, out: Rows, carried: int | None) -> None:
        spec, z = batch.spec, cos.mul_(batch.scale)
        labels = _labels(rows, first, z.shape[1], batch)
        if self._at_once(z, batch):
            now = of(torch.stack([z, z.T]), labels, batch.label_sum[:, None], spec, dim=-1)
            loss, final = finalize(now, spec)
            out.loss.copy_(loss)
            torch.stack([x for x in final if x is not None], dim=1, out=out.final)
            if spec.weighted:
                torch.stack(now[5:], dim=1, out=out.indices)
            return
        for direction in range(spec.directions):
            own, dim, start = (slice(None), 0, rows.start) if direction else (rows, 1, first)
            total = batch.label_sum if direction else batch.label_sum[rows, None]
            pair = 0 if direction else rows.start + spec.offset
            now = of(z, labels, total, spec, dim=dim, first=start, pair=pair)
            index = out.indices[direction, :, own] if spec.weighted else None
            if direction == carried:
                running = out.running[:, own]
                now = merge(Running(*running, *(now[5:] if index is None else index)), now, spec)
                running.copy_(torch.stack(now[:5]))
            if index is not None:
                index.copy_(torch.stack(now[5:]))
            loss, final = finalize(now, spec)
            out.loss[direction, own] = loss
            out.final[direction, :, own] = torch.stack([x for x in final if x is not None])

    def dlogits(self, cos: Tensor, rows: slice, first: int, g: Tensor, batch: Batch, out: Rows) -> Tensor:
        spec, z = batch.spec, cos.mul_(batch.scale)
        labels = _labels(rows, first, z.shape[1], batch)
        if self._at_once(z, batch):
            final = Final(*out.final.unbind(1), *(() if spec.weighted else (None,)))
            indices = out.indices.unbind(1) if spec.weighted else ()
            both, total = torch.stack([z, z.T]), batch.label_sum[:, None]
            dz = dlogits(both, labels, total, final, indices, g.expand(2, -1), spec, dim=-1)
            return dz[0].add_(dz[1].T)
        gradients = []
        for direction in range(spec.directions):
            own, dim, start = (slice(None), 0, rows.start) if direction else (rows, 1, first)
            total = batch.label_sum if direction else batch.label_sum[rows, None]
            final = Final(*out.final[direction, :, own], *(() if spec.weighted else (None,)))
            index = tuple(out.indices[direction, :, own]) if spec.weighted else ()
            gradients.append(dlogits(z, labels, total, final, index, g[own], spec, dim=dim, first=start))
        return gradients[0].add_(gradients[1]) if spec.both else gradients[0]

    def _at_once(self, z: Tensor, batch: Batch) -> bool:
        return batch.spec.both and z.shape[0] == z.shape[1] and 2 * z.numel() <= self.block_elements


torch_blocks = _TorchBlocks()


def _labels(rows: slice, first: int, width: int, batch: Batch) -> Labels:
    """Of the queries `rows` with the keys from `first` on."""
    pids, image_ids, _, _, spec = batch
    samples, columns = slice(rows.start + spec.offset, rows.stop + spec.offset), slice(first, first + width)

    def same(ids: Tensor) -> Tensor:
        return ids[samples, None] == ids[columns]

    return Labels(same(pids), None if image_ids is None else same(image_ids), spec.image_id_factor, spec.eps)
