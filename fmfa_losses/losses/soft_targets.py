"""Soft targets: the distributions that rows are pulled to where labels alone do not say them.

    q_ij = r softmax_j(s c_ij) + (1 - r) y_ij / sum_k y_ik         r the ratio of the soft part, s the logit scale
    y_ij = the label of row i and column j, or 1 where both are among each other's k nearest by c
    c_ij = cosines of a teacher's features, or the own ones

or q_ij = what the caller gives, divided by the sum of its row. Targets are constants: no gradient passes through them.
Neighbours are kept as lists of indices and not as the k-th largest score, to which a score that is computed a second
time, in a block of another shape, may not be equal.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from typing_extensions import TypeIs

from ..distributed.peers import Peers
from ..ops.checks import check_float, check_same, describe, on_host
from ..ops.precision import accumulation_dtype
from ..ops.rows_in_blocks import all_rows, row_blocks, scores_of, whole_rows
from .negatives_queue import Columns
from .score_loss import Factors, score_factors
from .scores import check_features

__all__ = [
    "Direction",
    "MomentumFeatures",
    "SoftTargets",
    "TargetSettings",
    "are_tensors",
    "both_factors",
    "by_name",
    "check_momentum_features",
    "check_soft_targets",
    "nearest",
    "row_losses",
    "target_rows",
]

TargetFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
SoftTargets: TypeAlias = Tensor | tuple[Tensor, Tensor] | TargetFunction
MomentumFeatures: TypeAlias = tuple[Tensor, Tensor]


STEPS = {torch.float32: 2.0**18, torch.float64: 2.0**40}  # of cosines; where one rounds to the same, they are equal


class TargetSettings(NamedTuple):
    """How targets are made, in both directions."""

    ratio: float
    image_id_factor: float
    function: TargetFunction | None  # the caller's


class Direction(NamedTuple):
    """The scores of one direction, own rows against all columns, and what their targets are made of."""

    scores: Factors
    ids: tuple[Tensor, Tensor] | None  # of rows [b, 1 or 2] and columns [C, 1 or 2]: identity, image
    teacher: Factors | None = None  # of scores c; the own ones when None
    near: tuple[Tensor, Tensor] | None = None  # columns near each row [b, k], and rows near each column [C, k]
    given: Tensor | None = None  # [b, C]


def row_losses(
    loss: Callable[[Tensor, Tensor], Tensor],
    direction: Direction,
    offset: int,
    scale: float | Tensor,
    settings: TargetSettings,
) -> Tensor:
    """loss(logits [m, C], targets [m, C]) -> [m] of all rows, [b]; row i is paired with column offset + i."""
    factors, ids, teacher, near, given = direction
    cut: dict[str, Tensor | None] = {"given": given}
    whole: dict[str, Any] = {"scale": scale}
    cut["ids"], whole["column_ids"] = ids or (None, None)
    cut["near"], whole["near_columns"] = near or (None, None)
    if teacher is not None:
        cut["teacher"], whole["teacher_keys"] = teacher[0], teacher[1] if len(teacher) == 2 else None

    # torch.compile of 2.6 cannot make the union of a number and a tensor in a nested function.
    def equation(first: int, scores: Tensor, *, scale: Any, **block: Tensor) -> Tensor:
        with torch.no_grad():
            target = _target(block, scores.detach(), offset + first, scale, settings)
        return loss(scale * scores, target)

    rows = {name: x for name, x in cut.items() if x is not None}
    return all_rows(equation, factors, rows, {name: x for name, x in whole.items() if x is not None})


def _target(
    block: dict[str, Tensor], scores: Tensor, first: int, scale: float | Tensor, settings: TargetSettings
) -> Tensor:
    """q of a block of rows, [m, C] like its scores; `first` is the pair of its first row."""
    if "given" in block:
        return _normalised(_nan_where_negative(block["given"]), scores)
    teacher = scores
    if "teacher" in block:
        teacher = scores_of(block["teacher"], block.get("teacher_keys")).to(scores.dtype)
    rows, columns = block["ids"], block["column_ids"]
    same = rows[:, 0, None] == columns[:, 0]
    if settings.function is not None:
        return _normalised(_nan_where_negative(_checked(settings.function(teacher.clone(), same), scores)), scores)
    y = same.to(scores.dtype)
    if rows.shape[1] == 2:
        factor = settings.image_id_factor
        y = factor * y + (1 - factor) * (rows[:, 1, None] == columns[:, 1]).to(scores.dtype)
    if "near" in block:
        y = torch.where(_mutual(block["near"], block["near_columns"], first), 1.0, y)
    hard = _normalised(y, scores)
    if settings.ratio == 0:
        return hard
    scale = scale.detach() if isinstance(scale, Tensor) else scale
    soft = (scale * teacher).softmax(dim=1)
    # No lerp: torch.compile would compile it anew for every ratio of a ramp, up to its limit.
    return settings.ratio * soft + (1 - settings.ratio) * hard


def _normalised(y: Tensor, like: Tensor) -> Tensor:
    """Each row divided by its sum, in `like`'s dtype; the numbers themselves may be too large or small for it."""
    y = y.to(accumulation_dtype(y, like))
    return (y / y.sum(dim=1, keepdim=True)).to(like.dtype)


def _nan_where_negative(y: Tensor) -> Tensor:
    """The host does not look at a function's result, nor at tensors of an accelerator."""
    return torch.where(y >= 0, y, float("nan"))


def _checked(target: object, like: Tensor) -> Tensor:
    """What a caller's function returned."""
    if not isinstance(target, Tensor) or target.shape != like.shape or target.is_complex():
        raise ValueError(
            f"soft_targets(scores, positive) must return a real tensor of the shape of scores, {list(like.shape)}, got "
            f"{describe(target)}; it is called for some rows at a time"
        )
    target = target.detach()
    if on_host(target) and on_host(like) and not like.isnan().any():  # NaN features give a NaN loss
        _check_values("soft_targets(scores, positive)", target, columns=False)
    return target


def _mutual(near: Tensor, near_columns: Tensor, first: int) -> Tensor:
    """Which columns are among the nearest of a row, and the row among theirs, [m, C] bool."""
    m, C = near.shape[0], near_columns.shape[0]
    of_rows = near.new_zeros(m, C, dtype=torch.bool).scatter(1, near, True)
    at = near_columns.T - first  # [k, C]
    at = torch.where((at >= 0) & (at < m), at, m)
    of_columns = near.new_zeros(m + 1, C, dtype=torch.bool).scatter(0, at, True)[:m]
    return of_rows & of_columns


@torch.no_grad()
def nearest(factors: Factors, k: int) -> Tensor:
    """The k columns of the largest scores of every row, [b, min(k, C)]; of equal scores the lowest column first."""
    queries, *keys = (x.detach() for x in factors)
    b, columns = queries.shape[0], keys[0].shape[0] if keys else queries.shape[1]
    if whole_rows(b, columns, queries):
        return _nearest(scores_of(queries, *keys), k)
    # Allocated first: pieces between the temporaries of the blocks would keep the allocator from using these again.
    found = queries.new_empty(b, min(k, columns), dtype=torch.long)
    for rows in row_blocks(b, columns, queries):
        found[rows] = _nearest(scores_of(queries[rows], *keys), k)
    return found


def _nearest(scores: Tensor, k: int) -> Tensor:
    """Scores of the same image, twice in a batch, differ in their last bits between products of different shapes."""
    found, scores = [], (scores * STEPS[scores.dtype]).round()
    for _ in range(min(k, scores.shape[1])):
        found.append(scores.argmax(dim=1, keepdim=True))
        scores = scores.scatter(1, found[-1], -torch.inf)
    return torch.cat(found, dim=1)


def both_factors(image: Tensor, text: Tensor, peers: Peers, columns: Columns | None) -> tuple[Factors, Factors]:
    """Factors of own texts x all images, and of own images x all texts; a small matrix is multiplied once."""
    t2i, i2t = score_factors(image, text, peers, columns)
    if i2t is not None:
        return t2i, i2t
    if not whole_rows(text.shape[0], image.shape[0], text):
        return t2i, (t2i[-1], t2i[0])
    scores = scores_of(*t2i)
    return (scores,), (scores.T,)


def are_tensors(soft_targets: SoftTargets | None) -> TypeIs[Tensor | tuple[Tensor, Tensor]]:
    """Whether the targets exist already, so that no labels are needed."""
    return isinstance(soft_targets, (Tensor, tuple, list))


def target_rows(soft_targets: Tensor | tuple[Tensor, Tensor], peers: Peers) -> tuple[Tensor, Tensor]:
    """Of own texts x all images, and of own images x all texts, [b, C] each."""
    parts = soft_targets if not isinstance(soft_targets, Tensor) else (soft_targets,)
    pairs = sum(peers.sizes)
    if parts[0].shape[1] != pairs or parts[-1].shape[1] != pairs:  # the same on all ranks, after the handshake
        raise ValueError(
            f"soft_targets must have a column for each pair of all processes, {pairs}, got "
            f"{' and '.join(map(describe, parts))}; give every process its own rows of all columns"
        )
    t2i, i2t = (x.detach() for x in (parts if len(parts) == 2 else (parts[0], peers.transpose(parts[0].detach()))))
    if len(parts) == 1 and peers.group is not None and on_host(i2t):
        _check_columns(i2t, peers)
    return t2i, i2t


def by_name(soft_targets: object, momentum: object) -> dict[str, Tensor | None]:
    """The tensors of both, not yet checked, which a handshake compares; None where there is none."""
    found: dict[str, Tensor | None] = {}
    for name, given in (("soft_targets", soft_targets), ("momentum_features", momentum)):
        parts = given if isinstance(given, (tuple, list)) else (given,)
        for n in (0, 1):
            found[f"{name}[{n}]"] = parts[n] if n < len(parts) and isinstance(parts[n], Tensor) else None
    return found


def check_momentum_features(momentum: object, like: Tensor) -> None:
    if momentum is None:
        return
    if not isinstance(momentum, (tuple, list)) or len(momentum) != 2:
        raise TypeError(
            f"momentum_features must be a pair (image, text), [B, D] each, got {describe(momentum)}; pass the "
            "teacher's features of both"
        )
    names = ("momentum_features[0]", "momentum_features[1]")
    image, text = momentum
    check_features(image, text, names)
    check_same(f"{names[0]} and the features", image, like, dims=[("B", 0)])


def check_soft_targets(soft_targets: object, like: Tensor, *, shared: bool) -> None:
    """`shared`: the columns are those of all ranks, whose number is not known yet."""
    if soft_targets is None or (callable(soft_targets) and not isinstance(soft_targets, Tensor)):
        return
    parts = soft_targets if isinstance(soft_targets, (tuple, list)) else (soft_targets,)
    if len(parts) not in (1, 2) or not all(isinstance(x, Tensor) for x in parts):
        raise TypeError(
            "soft_targets must be a tensor [B, B] text x image, a pair of such tensors (texts x images, images x "
            f"texts), or a function of scores and positives, got {describe(soft_targets)}; torch.as_tensor makes one "
            "of an array or a list of numbers"
        )
    for x in parts:
        check_float("soft_targets", x, "B B")
        check_same("soft_targets and the features", x, like)
        if x.shape[0] != like.shape[0] or (not shared and x.shape[1] != x.shape[0]):
            shape = "[b, B], own pairs x those of all ranks" if shared else "[B, B]"
            rows = "a row for each own pair, a column for each of all ranks" if shared else "a row and a column a pair"
            raise ValueError(f"soft_targets must be {shape}, for {like.shape[0]} pairs, got {describe(x)}; pass {rows}")
        if on_host(x):
            _check_values("soft_targets", x, columns=len(parts) == 1 and not shared)


def _check_values(name: str, x: Tensor, *, columns: bool) -> None:
    """In blocks of rows: a sum in another dtype would copy the whole of x."""
    lowest, of_rows, of_columns = [], [], torch.zeros((), dtype=accumulation_dtype(x))
    for rows in row_blocks(x.shape[0], x.shape[1], x):
        part = x[rows].detach().to(of_columns.dtype)
        lowest.append(part.min())
        of_rows.append(part.sum(dim=1))
        if columns:
            of_columns = of_columns + part.sum(dim=0)
    least = torch.stack(lowest).min()
    if not least >= 0:  # of NaN too
        remedy = "clamp them at 0" if least < 0 else "look for what made it"
        raise ValueError(f"{name} must hold no negative number, got {least.item():g} in {describe(x)}; {remedy}")
    for which, totals in (("row", torch.cat(of_rows)), *([("column", of_columns)] if columns else [])):
        at = _without_sum(totals)
        if at >= 0:
            raise ValueError(
                f"{name} must have a finite sum > 0 in every row and column, got {totals[at].item():g} in {which} {at} "
                f"of {describe(x)}; give every sample at least its own pair"
            )


def _without_sum(totals: Tensor) -> int:
    """Where targets cannot be divided by their sum, the first one; -1 where all can."""
    wrong = (totals == 0) | ~totals.isfinite()
    return int(wrong.nonzero()[0, 0]) if wrong.any() else -1


def _check_columns(i2t: Tensor, peers: Peers) -> None:
    """Of the columns of all ranks' rows no rank has a sum before it receives its own ones: all ranks raise."""
    at = _without_sum(i2t.sum(dim=1, dtype=accumulation_dtype(i2t)))
    found = torch.tensor([at if at < 0 else peers.offset + at])
    every = Peers((1,) * len(peers.sizes), peers.rank, peers.group).gather(found).tolist()
    first = next((column for column in every if column >= 0), -1)
    if first >= 0:
        raise ValueError(
            f"soft_targets must have a finite sum > 0 in every row and column, got none in column {first} of the rows "
            "of all ranks; give every sample at least its own pair"
        )
