"""The similarity distribution in blocks of rows: one product a block, and both sides read it.

               k_0  k_1  k_2 ...  k_C
        q_0  [  z    z    z        z  ]   side 0: a query is a row, seen whole in its block
        q_1  [  z    z    z        z  ]   side 1: a key is a column, and carries what it has seen to the next block
              ---- next block ----

A reader takes the cosines of a block and does the rest of Eq. 1-4; there is one in PyTorch below, and one in Triton
(`fmfa_losses.kernels.distribution_blocks`). The forward makes one product of the size of [R, C], the backward
three: the cosines again, and one for each gradient. Sums run in the order of the blocks.
"""

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ..precision import accumulation_dtype, divide_by_norms, row_norms

if TYPE_CHECKING:
    from .api import RowLoss

__all__ = ["LOWEST", "Batch", "Reader", "Statistics", "backward", "forward", "torch_reader"]

LOWEST = -3.0e38  # a finite start of a running maximum: -inf - -inf would be NaN
NOWHERE = 2**30  # above every place


class Batch(NamedTuple):
    """What all blocks share."""

    pids: Tensor  # [C], contiguous
    image_ids: Tensor | None  # [C], contiguous
    label_sum: Tensor  # [R], sum_k y_ik
    scale: float | Tensor
    spec: "RowLoss"


class Statistics(NamedTuple):
    """What is known of the rows of every side, as the operator returns it, and what columns carry between blocks."""

    loss: Tensor  # [S, R]
    statistics: Tensor  # [S, 3 or 4, R]
    places: Tensor  # [S, 2, R], or [0]
    # [5, C] of side 1: top, sum e, paid, mass, positive; e = exp(z - top). [5, 0] for one side.
    running: Tensor

    @classmethod
    def empty(cls, R: int, like: Tensor, spec: "RowLoss") -> "Statistics":
        S, numbers, columns = spec.sides, 4 if spec.weighted else 3, R if spec.both else 0
        places = torch.zeros((S, 2, R) if spec.weighted else (0,), dtype=torch.int32, device=like.device)
        return cls(like.new_empty(S, R), like.new_empty(S, numbers, R), places, _start(columns, like))


class Reader(Protocol):
    """What Eq. 1-4 make of a block of cosines [m, C], those of the queries `rows` with all keys; may overwrite it."""

    block_elements: int  # numbers in a block
    row_multiple: int  # what the stride of its rows is a multiple of

    def norms(self, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """|f x| and f of the queries, then of the keys, [2, R + C], as `row_norms` has them."""

    def absorb(self, cos: Tensor, rows: slice, batch: Batch, out: Statistics) -> None:
        """Writes what the rows pay and their statistics; those of the columns as far as the blocks have come."""

    def dlogits(self, cos: Tensor, rows: slice, g: Tensor, batch: Batch, out: Statistics) -> Tensor:
        """Gradient in the logits [m, C] of sum_i g_i (what row i pays), both sides together; g [R]."""


def forward(
    queries: Tensor,
    keys: Tensor,
    pids: Tensor,
    image_ids: Tensor | None,
    scale: float | Tensor,
    spec: "RowLoss",
    reader: Reader,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, statistics, places, norms and label sums, as the operator declares them."""
    R, C, dtype = queries.shape[0], keys.shape[0], accumulation_dtype(queries, keys)
    norms = reader.norms(queries, keys, dtype)
    pids, image_ids = _contiguous(pids, image_ids)
    batch = Batch(pids, image_ids, _label_sum(pids, image_ids, R, spec, dtype), scale, spec)
    out = Statistics.empty(R, norms, spec)
    q, k = divide_by_norms(queries, norms[:, :R, None]), divide_by_norms(keys, norms[:, R:, None])
    for rows in _blocks(R, C, reader):
        reader.absorb(_cosines(q[rows], k, reader), rows, batch, out)
    per_sample = out.loss.sum(dim=0)
    if spec.reduction != "none":
        per_sample = getattr(per_sample, spec.reduction)()
    return per_sample, out.statistics, out.places, norms, batch.label_sum


def backward(
    dloss: Tensor,
    statistics: Tensor,
    places: Tensor,
    norms: Tensor,
    label_sum: Tensor,
    queries: Tensor,
    keys: Tensor,
    pids: Tensor,
    image_ids: Tensor | None,
    scale: float | Tensor,
    scale_gradient: bool,
    spec: "RowLoss",
    reader: Reader,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and scale."""
    R, C = queries.shape[0], keys.shape[0]
    batch = Batch(*_contiguous(pids, image_ids), label_sum, scale, spec)
    known = Statistics(norms[:0], statistics, places, norms[:0])
    q, k = divide_by_norms(queries, norms[:, :R, None]), divide_by_norms(keys, norms[:, R:, None])
    g = (dloss / R if spec.reduction == "mean" else dloss).expand(R)
    dq, dk = torch.empty_like(q), torch.zeros_like(k)
    for rows in _blocks(R, C, reader):
        dz = reader.dlogits(_cosines(q[rows], k, reader), rows, g, batch, known)
        torch.mm(dz, k, out=dq[rows])
        dk.addmm_(dz.T, q[rows])

    # Along a unit vector its gradient is sum_j cos_ij dz_ij: normalising takes it out, and the scale receives it.
    dq_along, dk_along = (q * dq).sum(dim=1, keepdim=True), (k * dk).sum(dim=1, keepdim=True)
    dscale = dq_along.sum() if scale_gradient else norms.new_empty(0)
    for unit, along, dx, samples in ((q, dq_along, dq, slice(R)), (k, dk_along, dk, slice(R, None))):
        norm, factor = norms[:, samples].unsqueeze(-1)
        dx.sub_(unit.mul_(along)).mul_(scale * (factor / norm))
    return dq.to(queries.dtype), dk.to(keys.dtype), dscale


def _contiguous(pids: Tensor, image_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Once a pass: every block reads the ids."""
    return pids.contiguous(), None if image_ids is None else image_ids.contiguous()


def _start(n: int, like: Tensor) -> Tensor:
    """Running numbers [5, n] of payers that have seen nothing."""
    running = like.new_zeros(5, n)
    running[0], running[4] = LOWEST, LOWEST
    return running


def _blocks(R: int, C: int, reader: Reader) -> list[slice]:
    step = max(1, reader.block_elements // C)
    return [slice(i, min(i + step, R)) for i in range(0, R, step)]


def _cosines(q: Tensor, k: Tensor, reader: Reader) -> Tensor:
    """A block [m, C] whose rows are consecutive numbers."""
    columns = -(-k.shape[0] // reader.row_multiple) * reader.row_multiple
    if columns == k.shape[0]:
        return q @ k.T
    return torch.mm(q, k.T, out=q.new_empty(q.shape[0], columns)[:, : k.shape[0]])


def _label_sum(pids: Tensor, image_ids: Tensor | None, R: int, spec: "RowLoss", dtype: torch.dtype) -> Tensor:
    """sum_k y_ik of the queries."""
    samples = slice(spec.offset, spec.offset + R)

    def count(ids: Tensor) -> Tensor:
        """How often the sample's id occurs among all."""
        ordered, wanted = ids.sort().values, ids[samples].contiguous()
        return (torch.searchsorted(ordered, wanted, right=True) - torch.searchsorted(ordered, wanted)).to(dtype)

    if image_ids is None:
        return count(pids)
    return spec.image_id_factor * count(pids) + (1 - spec.image_id_factor) * count(image_ids)


class _TorchReader:
    """Eq. 1-4 on a block in plain PyTorch. One side reads along dim 1, the other along dim 0."""

    block_elements = 2**22  # about six temporaries of this size are alive at once
    row_multiple = 1

    def norms(self, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.cat([row_norms(x, dtype, backend="torch") for x in (queries, keys)], dim=1).squeeze(-1)

    def absorb(self, cos: Tensor, rows: slice, batch: Batch, out: Statistics) -> None:
        spec, z = batch.spec, cos.mul_(batch.scale)
        labels = _Labels.of(rows, batch)
        for side in range(spec.sides):
            payers = slice(None) if side else rows
            running = out.running if side else _start(z.shape[0], z)
            places = out.places[side, :, payers] if spec.weighted else out.places
            _walk(z, labels, labels.totals[side], running, places, 1 - side, rows.start, batch)
            _conclude(running, out.loss[side, payers], out.statistics[side, :, payers], batch)

    def dlogits(self, cos: Tensor, rows: slice, g: Tensor, batch: Batch, out: Statistics) -> Tensor:
        z, labels, spec = cos.mul_(batch.scale), _Labels.of(rows, batch), batch.spec
        gradients = []
        for side in range(spec.sides):
            payers, dim = (slice(None), 0) if side else (rows, 1)
            statistics = out.statistics[side, :, payers].unsqueeze(1 + dim)
            places = out.places[side, :, payers].unsqueeze(1 + dim) if spec.weighted else out.places
            first = rows.start if side else 0  # the block's first place along dim
            side_g, total = g[payers].unsqueeze(dim), labels.totals[side]
            gradients.append(_dlogits(z, labels, total, statistics, places, side_g, batch, dim, first))
        return gradients[0].add_(gradients[1]) if spec.both else gradients[0]


torch_reader = _TorchReader()


class _Labels(NamedTuple):
    """Labels of one block, [m, C] each; `totals`, what y is divided by on each side, are [m, 1] and [C]."""

    same: Tensor
    same_image: Tensor | None
    totals: tuple[Tensor, Tensor]
    factor: float
    eps: float

    @classmethod
    def of(cls, rows: slice, batch: Batch) -> "_Labels":
        pids, image_ids, label_sum, _, spec = batch
        samples = slice(rows.start + spec.offset, rows.stop + spec.offset)
        same_image = None if image_ids is None else image_ids[samples, None] == image_ids
        totals = (label_sum[rows, None], label_sum)
        return cls(pids[samples, None] == pids, same_image, totals, spec.image_id_factor, spec.eps)

    def pick(self, both: Tensor, pid: Tensor, image: Tensor, neither: Tensor) -> Tensor:
        """One of four values an entry, by what its row and column share."""
        if self.same_image is None:
            return torch.where(self.same, both, neither)
        return torch.where(
            self.same, torch.where(self.same_image, both, pid), torch.where(self.same_image, image, neither)
        )

    def target(self, total: Tensor) -> Tensor:
        return self.pick(1 / total, self.factor / total, (1 - self.factor) / total, total.new_zeros(()))

    def log_target(self, total: Tensor) -> Tensor:
        """log(target + eps): logarithms of vectors, never of the matrix."""
        values = (1 / total, self.factor / total, (1 - self.factor) / total, total.new_zeros(()))
        return self.pick(*((value + self.eps).log() for value in values))


def _walk(
    z: Tensor,
    labels: _Labels,
    total: Tensor,
    running: Tensor,
    places: Tensor,
    dim: int,
    start: int,
    batch: Batch,
) -> None:
    """Takes a block into the running numbers [5, n] of the payers, which stand along the other dimension than `dim`.

    paid is sum e (z - top - log(t + eps)), or for the cross-entropy sum t (z - top); mass is sum t.
    """
    spec = batch.spec
    top, sum_e, paid, mass, positive = running.unbind()
    first = start if dim == 0 else 0  # a place is one in the whole [R, C]; only columns meet blocks that begin later
    new_top = torch.maximum(top, z.amax(dim))
    below = z - new_top.unsqueeze(dim)
    if spec.weighted:
        places[0] = torch.where(new_top > top, _lowest_zero(below, dim) + first, places[0])
        if spec.positive == "paired":
            pairs = slice(start, start + z.shape[0]) if dim == 0 else slice(None)
            positive[pairs] = z.diagonal(start + spec.offset)
            places[1, pairs] = torch.arange(start, start + z.shape[0], dtype=torch.int32, device=z.device) + spec.offset
        else:
            among = z.masked_fill(~labels.same, LOWEST)
            highest = among.amax(dim)
            place = _lowest_zero(among.sub_(highest.unsqueeze(dim)), dim)
            places[1] = torch.where(highest > positive, place + first, places[1])
            positive.copy_(torch.maximum(highest, positive))
    e = below.exp()
    shrink = (top - new_top).exp_()
    if spec.objective == "cross_entropy":
        target = labels.target(total)
        paid.add_((top - new_top).mul_(mass)).add_(below.mul_(target).sum(dim))
        mass.add_(target.sum(dim))
    else:
        paid.add_((top - new_top).mul_(sum_e)).mul_(shrink)
        paid.add_(below.sub_(labels.log_target(total)).mul_(e).sum(dim))
    sum_e.mul_(shrink).add_(e.sum(dim))
    top.copy_(new_top)


def _lowest_zero(x: Tensor, dim: int) -> Tensor:
    """The first place along `dim` where x <= 0 is 0, int32; beyond every place where it is negative throughout.

    place - infinity x is smallest there: two passes, where argmax along dim 0 takes as long as a matrix product.
    """
    place = torch.arange(x.shape[dim], dtype=x.dtype, device=x.device).unsqueeze(1 - dim)
    return torch.sub(place, x, alpha=torch.finfo(x.dtype).max).amin(dim).clamp(max=NOWHERE).int()


def _conclude(running: Tensor, loss: Tensor, statistics: Tensor, batch: Batch) -> None:
    """What the payers pay after the blocks so far, [n], and their statistics [3 or 4, n]."""
    top, sum_e, paid, mass, positive = running.unbind()
    spec = batch.spec
    # lse in two parts: z - top is exact where p is large, top + log_sum would round that away.
    log_sum = sum_e.log()
    statistics[0], statistics[1] = top, log_sum
    if spec.objective == "cross_entropy":
        statistics[2] = mass
        loss.copy_(mass * log_sum - paid)
        return
    divergence = paid / sum_e - log_sum
    statistics[2] = divergence
    if spec.weighted:
        gap = (-log_sum).exp() - (positive - top - log_sum).exp()
        statistics[3] = gap
        divergence = divergence * (1 + spec.alpha * gap)
    loss.copy_(divergence)


def _dlogits(
    z: Tensor,
    labels: _Labels,
    total: Tensor,
    statistics: Tensor,
    places: Tensor,
    g: Tensor,
    batch: Batch,
    dim: int,
    first: int,
) -> Tensor:
    """Gradient in a block of logits of what the payers pay; the others stand along `dim`, from place `first` on.

    g p [w (log p - log(t + eps) - KL) + alpha KL ([top] - [positive] - gap)]     divergence
    g (mass p - t)                                                                cross-entropy
    """
    spec = batch.spec
    top, log_sum, third, *gap = statistics.unbind()
    excess = (z - top).sub_(log_sum)
    p = excess.exp()
    if spec.objective == "cross_entropy":
        return p.mul_(third).sub_(labels.target(total)).mul_(g)
    excess.sub_(labels.log_target(total)).sub_(third)
    if not spec.weighted:
        return excess.mul_(p).mul_(g)
    excess.mul_(g * (1 + spec.alpha * gap[0]))
    of_gap = spec.alpha * g * third * (not spec.detach_weight)
    _add_ends(excess.sub_(of_gap * gap[0]), places, of_gap, dim, first)
    return excess.mul_(p)


def _add_ends(x: Tensor, places: Tensor, value: Tensor, dim: int, first: int) -> None:
    """Adds value ([top] - [positive]) to a block x, whose first place along `dim` is `first`."""
    for place, sign in zip(places.unbind(), (1, -1), strict=True):
        index = place.long() - first
        here = (index >= 0) & (index < x.shape[dim])
        x.scatter_add_(dim, index.clamp(0, x.shape[dim] - 1), torch.where(here, sign * value, 0))
