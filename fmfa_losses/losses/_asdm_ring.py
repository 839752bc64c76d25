"""A-SDM of one process's pairs, while everybody's features travel round a ring and are never in one place."""

import torch
from torch import Tensor

from ..distributed.peers import Peers
from ..ops.precision import accumulation_dtype, unit_rows
from ..ops.similarity_distribution.api import RowLoss
from ..ops.similarity_distribution.block_distribution import block_statistics, label_sums, merge_blocks
from .scores import resolve_scale

__all__ = ["asdm_rows_round_the_ring"]


def asdm_rows_round_the_ring(
    image_features: Tensor,
    text_features: Tensor,
    every_id: Tensor,
    logit_scale: float | Tensor,
    peers: Peers,
    spec: RowLoss,
) -> Tensor:
    """w_i KL_i of the own texts and images, [b], from one rank's block of columns at a time; every_id [1 or 2, B]."""
    acc = accumulation_dtype(image_features, text_features)
    ids = peers.blocks(every_id, 1)
    sums = peers.blocks(label_sums(every_id, spec.image_id_factor, acc))
    image, text = unit_rows(image_features, dtype=acc), unit_rows(text_features, dtype=acc)
    scale = torch.as_tensor(resolve_scale(logit_scale, 1.0, image), dtype=acc)

    def with_block(q: int, text: Tensor, image: Tensor, scale: Tensor, block: Tensor) -> Tensor:
        """[2, 4, b]: own texts against rank q's images and own images against its texts, block [b_q, 2, D]."""
        every_image, every_text = unit_rows(block, dtype=acc).unbind(dim=1)

        def say(queries: Tensor, keys: Tensor) -> Tensor:
            return block_statistics(
                queries,
                keys,
                ids[peers.rank],
                ids[q],
                sums[peers.rank][:, None],
                scale=scale,
                factor=spec.image_id_factor,
                positive=spec.positive,
                paired=q == peers.rank,
                eps=spec.eps,
            )

        return torch.stack([say(text, every_image), say(image, every_text)])

    raw = torch.stack([image_features, text_features], dim=1)
    statistics = torch.stack(peers.around(with_block, (text, image, scale), raw))
    t2i, i2t = (
        merge_blocks(side, alpha=spec.alpha, detach_weight=spec.detach_weight) for side in statistics.unbind(dim=1)
    )
    return t2i + i2t
