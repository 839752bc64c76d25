"""What ITC, SDM and R-ITC share: targets that are hard, or soft in one of several ways.

Hard targets need a few statistics of a row alone: `DistributionLoss`. Soft ones need whole rows: a subclass has its
equation as `rows`, which is given them in blocks.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..distributed.peers import Peers
from ..ops.backend import select_backend
from ..ops.checks import check_fraction, check_ids, check_integer, check_same, check_scale, describe
from ..ops.precision import accumulation_dtype
from ._distribution import DistributionLoss, compared_ids
from .loss import hyperparameter
from .negatives_queue import Columns, NegativesQueue, queued
from .score_loss import Factors
from .scores import check_features, check_scores, check_weight, resolve_scale, scalar_like
from .soft_targets import (
    Direction,
    MomentumFeatures,
    SoftTargets,
    TargetSettings,
    are_tensors,
    both_factors,
    by_name,
    check_momentum_features,
    check_soft_targets,
    nearest,
    row_losses,
    target_rows,
)

__all__ = ["Given", "SoftDistributionLoss"]


def _check_count(name: str, value: object) -> int:
    return check_integer(name, value, 0)


class Given(NamedTuple):
    """What a call gives beside the features."""

    pids: Tensor | None
    image_ids: Tensor | None
    soft_targets: SoftTargets | None
    momentum: MomentumFeatures | None
    logit_scale: float | Tensor | None
    sample_weight: Tensor | None
    queue: NegativesQueue | None = None


class SoftDistributionLoss(DistributionLoss):
    """A DistributionLoss that also takes soft targets: see soft_targets.py.

    rows(logits [m, C], targets [m, C]) -> [m]        each row of targets sums to 1
    """

    softlabel_ratio: float = hyperparameter(default=0.0, check=check_fraction, kw_only=True)
    mutual_neighbors: int = hyperparameter(default=0, check=_check_count, kw_only=True)

    direction_weight: ClassVar[float] = 1.0  # of each of the two directions

    def rows(self, logits: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        pids: Tensor | None = None,
        *,
        image_ids: Tensor | None = None,
        soft_targets: SoftTargets | None = None,
        momentum_features: MomentumFeatures | None = None,
        logit_scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
        queue: NegativesQueue | None = None,
    ) -> Tensor:
        given = Given(pids, image_ids, soft_targets, momentum_features, logit_scale, sample_weight, queue)
        return self.of_pairs(image_features, text_features, given)

    def from_scores(
        self,
        scores: Tensor,
        pids: Tensor | None = None,
        *,
        image_ids: Tensor | None = None,
        soft_targets: SoftTargets | None = None,
        logit_scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        given = Given(pids, image_ids, soft_targets, None, logit_scale, sample_weight)
        return self.of_matrix(scores, given)

    def of_matrix(self, scores: Tensor, given: Given) -> Tensor:
        alone, scores = self.alone(), check_scores(scores)
        ids = self._checked_labels(given, scores)
        scale = resolve_scale(given.logit_scale, self.temperature, scores)
        value = self._in_rows(((scores,), (scores.T,)), given, ids, scale, None, Peers((scores.shape[0],)))
        return self.reduce(value, given.sample_weight, alone)

    def of_pairs(self, image: Tensor, text: Tensor, given: Given) -> Tensor:
        def checked() -> Any:  # torch.compile of 2.6 cannot make the types of a nested function
            check_features(image, text)
            if given.sample_weight is not None:
                check_weight("sample_weight", given.sample_weight, text[:, 0])
            if self.gather:  # the other ranks wait: what cannot run here must be known before
                select_backend(self.backend, image, text)
            ids = self._checked_labels(given, text)
            self._check_queued(given)
            if self.backend == "triton" and self._is_soft(given):
                raise ValueError(
                    'backend must be "auto" or "torch" with soft targets, got "triton": only labels have a kernel; '
                    'pass "auto"'
                )
            return ids, check_scale(given.logit_scale, self.temperature), self.check_queue(given.queue, text, *ids)

        tensors = {"image_features": image, "text_features": text, "pids": given.pids, "image_ids": given.image_ids}
        tensors["sample_weight"] = given.sample_weight
        tensors.update(by_name(given.soft_targets, given.momentum))
        kind = None if given.soft_targets is None else "tensors" if are_tensors(given.soft_targets) else "a function"
        settings: dict[str, Any] = {"logit_scale": given.logit_scale, "soft_targets": kind}
        settings["queued"] = queued(given.queue)
        peers, (ids, scale, columns) = self.handshake(tensors, checked, **settings)
        if not self._is_soft(given):
            value = self._of_labels(image, text, ids[0], ids[1], scale, given.sample_weight, columns, peers)
            return value if self.direction_weight == 1 else self.direction_weight * value
        if isinstance(scale, Tensor):
            scale = scalar_like("logit_scale", scale, text.new_empty((), dtype=accumulation_dtype(image, text)))
        value = self._in_rows(both_factors(image, text, peers, columns), given, ids, scale, columns, peers)
        return self.reduce(value, given.sample_weight, peers)

    def _is_soft(self, given: Given) -> bool:
        return given.soft_targets is not None or self.softlabel_ratio > 0 or self.mutual_neighbors > 0

    def _in_rows(
        self,
        factors: tuple[Factors, Factors],
        given: Given,
        ids: tuple[Tensor | None, Tensor | None],
        scale: float | Tensor,
        columns: Columns | None,
        peers: Peers,
    ) -> Tensor:
        """Both directions, [b], from the factors of their scores."""
        labels = target = function = None
        teachers = factors
        near: list[Tensor] = []
        with torch.no_grad():
            if given.momentum is not None:
                teachers = both_factors(given.momentum[0].detach(), given.momentum[1].detach(), peers, columns)
            if self.mutual_neighbors > 0:
                near = [nearest(x, self.mutual_neighbors) for x in teachers]
            if are_tensors(given.soft_targets):
                target = target_rows(given.soft_targets, peers)
            else:
                function, labels = given.soft_targets, compared_ids(*ids, columns, factors[0][0], peers)
        settings = TargetSettings(self.softlabel_ratio, getattr(self, "image_id_factor", 1.0), function)
        t2i, i2t = (
            row_losses(
                self.rows,
                Direction(
                    factors[way],
                    labels,
                    teachers[way] if given.momentum is not None else None,
                    (near[way], peers.gather(near[1 - way])) if near else None,
                    None if target is None else target[way],
                ),
                peers.offset,
                scale,
                settings,
            )
            for way in (0, 1)
        )
        return self.direction_weight * (t2i + i2t)

    def _checked_labels(self, given: Given, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Ids that can be compared, of identity and image. Target tensors need none."""
        check_soft_targets(given.soft_targets, like, shared=bool(self.gather))
        check_momentum_features(given.momentum, like)
        pids, image_ids = given.pids, given.image_ids
        if image_ids is not None:
            image_ids = check_ids("image_ids", image_ids, like.shape[0], like.device)
        if given.soft_targets is not None:
            self._check_alone(given)
        if not are_tensors(given.soft_targets):
            return self.check_pids(pids, like), image_ids
        if pids is not None:
            check_ids("pids", pids, like.shape[0], like.device)
        return None, None

    def _check_queued(self, given: Given) -> None:
        """The columns of a queue have labels and teachers, but no rows of their own."""
        if given.queue is None:
            return
        if are_tensors(given.soft_targets) or self.mutual_neighbors > 0:
            found = "soft_targets of the batch" if self.mutual_neighbors == 0 else "mutual_neighbors"
            raise ValueError(
                f"queue must come with targets that its columns have too: labels, softlabel_ratio or a function, got "
                f"{found} besides; leave one out"
            )
        columns = given.queue.columns if isinstance(given.queue, NegativesQueue) else None
        if given.momentum is not None and columns is not None:
            names = "momentum_features and queue"
            check_same(names, given.momentum[0], columns.image_features, dims=[("D", 1)])

    def _check_alone(self, given: Given) -> None:
        """Nothing else decides on the targets."""
        others = {name: getattr(self, name) for name in ("softlabel_ratio", "mutual_neighbors") if getattr(self, name)}
        if given.image_ids is not None:
            others["image_ids"] = describe(given.image_ids)
        if are_tensors(given.soft_targets) and given.momentum is not None:
            others["momentum_features"] = describe(given.momentum)
        if others:
            found = ", ".join(f"{name}={value}" for name, value in others.items())
            raise ValueError(
                f"soft_targets must be the only source of the targets, got {found} besides; leave it out, or mix it "
                "into soft_targets"
            )
