"""What A-SDM, SDM and ITC share: the operator of similarity distributions, in one process or over ranks."""

# torch.compile of 2.6 cannot make the types of a nested function.
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distributed.peers import Peers
from ..ops.backend import select_backend
from ..ops.checks import check_divisor, check_ids, check_scale
from ..ops.similarity_distribution.api import RowLoss, row_loss, similarity_distribution_ring
from .loss import Loss, hyperparameter
from .negatives_queue import Columns, NegativesQueue, queued, queued_columns
from .scores import check_features, check_weight

__all__ = ["DistributionLoss", "compared_ids"]


class DistributionLoss(Loss):
    """A loss whose rows are `similarity_distribution_loss`: `row_options` names what that takes besides."""

    temperature: float = hyperparameter(default=0.02, check=check_divisor)

    def row_options(self) -> dict[str, Any]:
        """Of the hyperparameters, those of a row."""
        settings = self.settings()
        return {name: settings[name] for name in RowLoss._fields if name in settings and name != "reduction"}

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        pids: Tensor,
        *,
        image_ids: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
        queue: NegativesQueue | None = None,
        peers: Peers | None = None,
    ) -> Tensor:
        given = (pids, image_ids, logit_scale, sample_weight)
        return self._of_features(image_features, text_features, *given, queue, peers)

    def check_inputs(
        self,
        image: Tensor,
        text: Tensor,
        pids: Tensor | None,
        image_ids: Tensor | None,
        logit_scale: float | Tensor | None,
        sample_weight: Tensor | None = None,
        *,
        shared: bool,
    ) -> tuple[float | Tensor, Tensor | None, Tensor | None]:
        """Scale and ids to go on with. `shared`: other ranks wait, so what cannot run here must be known before."""
        check_features(image, text)
        pids = self.check_pids(pids, text)
        if image_ids is not None:
            image_ids = check_ids("image_ids", image_ids, image.shape[0], image.device)
        if sample_weight is not None:
            check_weight("sample_weight", sample_weight, text[:, 0])
        if shared:
            select_backend(self.backend, image, text)
        return check_scale(logit_scale, self.temperature), pids, image_ids

    def _of_features(
        self,
        image: Tensor,
        text: Tensor,
        pids: Tensor | None,
        image_ids: Tensor | None,
        logit_scale: float | Tensor | None,
        sample_weight: Tensor | None,
        queue: NegativesQueue | None,
        peers: Peers | None,
    ) -> Tensor:
        def checked() -> Any:  # torch.compile of 2.6 cannot make the types of a nested function
            given = (pids, image_ids, logit_scale, sample_weight)
            scale, ids, images = self.check_inputs(image, text, *given, shared=bool(self.gather))
            return scale, ids, images, self.check_queue(queue, text, ids, images)

        tensors = {"image_features": image, "text_features": text, "pids": pids, "image_ids": image_ids}
        tensors["sample_weight"] = sample_weight
        settings = {"logit_scale": logit_scale, "queued": queued(queue)}
        peers, (scale, ids, image_ids, columns) = self.handshake(tensors, checked, peers, **settings)
        return self._of_labels(image, text, ids, image_ids, scale, sample_weight, columns, peers)

    def check_queue(
        self, queue: NegativesQueue | None, text: Tensor, ids: Tensor | None, image_ids: Tensor | None
    ) -> Columns | None:
        compared = {"pids": ids, "image_ids": image_ids}
        return queued_columns(queue, text, self.gather, tuple(name for name, x in compared.items() if x is not None))

    def _of_labels(
        self,
        image: Tensor,
        text: Tensor,
        ids: Tensor | None,
        image_ids: Tensor | None,
        scale: float | Tensor,
        sample_weight: Tensor | None,
        columns: Columns | None,
        peers: Peers,
    ) -> Tensor:
        """The loss of checked arguments."""
        if self.gather or columns is not None:
            rows = self._own_rows(image, text, ids, image_ids, scale, columns, peers)
            return self.reduce(rows, sample_weight, peers)
        if ids is None:
            ids = _of_pairs(text, peers)
        spec = RowLoss(**self.row_options(), reduction=self.reduction if sample_weight is None else "none")
        loss = row_loss(image, text, ids, image_ids, scale, spec, self.backend)
        return loss if sample_weight is None else self.reduce(loss, sample_weight, peers)

    def _own_rows(
        self,
        image: Tensor,
        text: Tensor,
        ids: Tensor | None,
        image_ids: Tensor | None,
        scale: float | Tensor,
        columns: Columns | None,
        peers: Peers,
    ) -> Tensor:
        """What the own texts and images add to the loss of the batch of all ranks, [b]."""
        _, every_id = compared_ids(ids, image_ids, columns, text, peers)
        pids, *images = every_id.T.contiguous()
        spec = RowLoss(**self.row_options(), offset=peers.offset, both=False, reduction="none")
        if peers.ring:
            return similarity_distribution_ring(
                torch.stack([image, text], dim=1),
                pids,
                images[0] if images else None,
                logit_scale=scale,
                ring=peers,
                backend=select_backend(self.backend, image, text),
                spec=spec,
                queued=None if columns is None else torch.stack(columns[:2], dim=1),
            )

        def direction(queries: Tensor, keys: Tensor, queued_keys: Tensor | None) -> Tensor:
            """The own queries against everybody's keys, [b]. Raw features travel, in their own dtype."""
            keys = peers.gather(keys)
            if queued_keys is not None:
                keys = torch.cat([keys, queued_keys])
            return row_loss(queries, keys, pids, images[0] if images else None, scale, spec, self.backend)

        queued_image, queued_text = (None, None) if columns is None else columns[:2]
        return direction(text, image, queued_image) + direction(image, text, queued_text)


def compared_ids(
    pids: Tensor | None, image_ids: Tensor | None, columns: Columns | None, like: Tensor, peers: Peers
) -> tuple[Tensor, Tensor]:
    """Identity, and image where it is known, of own rows [b, 1 or 2] and of all columns [C, 1 or 2]."""
    own = _together(_of_pairs(like, peers) if pids is None else pids, image_ids)
    every = peers.gather(own)
    if columns is None:
        return own, every
    queued = columns.pids
    if pids is None or queued is None:  # identities that are none of the pairs'
        queued = -1 - torch.arange(columns.text_features.shape[0], device=like.device)
    return own, torch.cat([every, _together(queued, None if image_ids is None else columns.image_ids)])


def _of_pairs(like: Tensor, peers: Peers) -> Tensor:
    """Where pairs alone count: identities that are all different."""
    return torch.arange(peers.offset, peers.offset + like.shape[0], device=like.device)


def _together(*ids: Tensor | None) -> Tensor:
    return torch.stack([x.long() for x in ids if x is not None], dim=1)
