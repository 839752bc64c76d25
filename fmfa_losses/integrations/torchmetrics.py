"""Retrieval metrics in the form of torchmetrics: add batches on every process, compute once for all of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import check_flag, check_float, check_shape, describe, integer_ids
from ..retrieval import RetrievalMetrics, retrieval_metrics
from ..retrieval.metrics import check_ranks

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat
except ImportError as error:
    raise ImportError(
        "fmfa_losses.integrations.torchmetrics needs torchmetrics; pip install torchmetrics, or call "
        "fmfa_losses.retrieval.retrieval_metrics, which needs no other package"
    ) from error

__all__ = ["TextToImageRetrieval"]


class TextToImageRetrieval(Metric):  # type: ignore[misc]
    """CMC, mAP and mINP, both directions, of all batches on all processes: the numbers of `retrieval_metrics`.

    A batch has images, texts or pairs. Processes may have different numbers of them, or none. Every row that is added
    counts: add an image with several captions once, and do not let a sampler repeat samples to fill the last batch.

    Args:
        ranks: the k of CMC@k.
        block_size: queries compared at a time.
        normalize: cosine similarity; False takes the inner product.
        kwargs: those of torchmetrics.Metric.
    Inputs:
        image_features, text_features: [B, D], any float dtype, or one of them None. They are kept in the dtype of the
            metric: float32, or what `set_dtype` sets.
        pids: [B] integer identities of the rows of both.
    Returns:
        From `compute`, a dict of float scalars in percent: "t2i_R1", "t2i_R5", "t2i_R10", "t2i_mAP", "t2i_mINP", and
        the same of "i2t". `table` has what `retrieval_metrics` returned, and prints as a table.
    Raises:
        ImportError: on import, where torchmetrics is missing.
        TypeError, ValueError: no features, features and pids that do not fit, a width unlike that of the batch before;
            from `compute`, no images or no texts, and what `retrieval_metrics` raises.
    Example:
        >>> metric = TextToImageRetrieval(ranks=[1])
        >>> metric.update(text_features=torch.tensor([[1.0, 0.1], [0.2, 1.0]]), pids=torch.tensor([7, 8]))
        >>> metric.update(image_features=torch.eye(2), pids=torch.tensor([7, 8]))
        >>> metric.compute()["t2i_R1"]
        tensor(100.)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(
        self,
        *,
        ranks: Sequence[int] = (1, 5, 10),
        block_size: int | None = None,
        normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.ranks: tuple[int, ...] = check_ranks(ranks)
        self.block_size, self.normalize = block_size, check_flag("normalize", normalize)
        self.width: int | None = None
        self.table: RetrievalMetrics | None = None
        # Features are kept as [B * D]: for a process that has none torchmetrics sends [0], and the number of
        # dimensions must be the same on all.
        for kind in ("image", "text"):
            self.add_state(f"{kind}_features", [], dist_reduce_fx="cat")
            self.add_state(f"{kind}_pids", [], dist_reduce_fx="cat")

    def update(
        self, image_features: Tensor | None = None, text_features: Tensor | None = None, pids: Tensor | None = None
    ) -> None:
        given = {"image": image_features, "text": text_features}
        present = {kind: features for kind, features in given.items() if features is not None}
        if not present:
            raise TypeError("image_features, text_features or both must be given, got None; pass [B, D] of one of them")
        ids = integer_ids("pids", pids, "B").to(torch.int64)
        for kind, features in present.items():
            name = f"{kind}_features"
            check_float(name, features, "B D")
            check_shape("pids", ids, (len(features),), f"one id per row of {name}")
            if self.width not in (None, features.shape[1]):
                raise ValueError(
                    f"{name} must be as wide as those before, D = {self.width}, got {describe(features)}; take all "
                    "from one joint space"
                )
        for kind, features in present.items():
            self.width = features.shape[1]
            getattr(self, f"{kind}_features").append(features.detach().to(self.device, self.dtype).flatten())
            getattr(self, f"{kind}_pids").append(ids.to(self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As torchmetrics does; a process without images or texts sends no pids in the dtype of pids."""
        for kind in ("image", "text"):
            pids = getattr(self, f"{kind}_pids")
            if not len(pids):
                pids.append(torch.empty(0, dtype=torch.int64, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        features, pids = {}, {}
        for kind in ("image", "text"):
            ids = getattr(self, f"{kind}_pids")
            if not sum(map(len, ids) if isinstance(ids, list) else [len(ids)]):
                raise ValueError(
                    f"{kind}_features must have been added before compute(), got none; call "
                    f"update({kind}_features=..., pids=...)"
                )
            pids[kind] = dim_zero_cat(ids)
            features[kind] = dim_zero_cat(getattr(self, f"{kind}_features")).reshape(len(pids[kind]), -1)
        self.table = retrieval_metrics(
            features["text"],
            features["image"],
            pids["text"],
            pids["image"],
            ranks=self.ranks,
            block_size=self.block_size,
            normalize=self.normalize,
        )
        values: dict[str, Tensor] = {}
        for direction, found in (("t2i", self.table.t2i), ("i2t", self.table.i2t)):
            named = {**{f"R{k}": value for k, value in found.cmc.items()}, "mAP": found.mAP, "mINP": found.mINP}
            values |= {f"{direction}_{name}": torch.tensor(value, device=self.device) for name, value in named.items()}
        return values

    def reset(self) -> None:
        super().reset()
        self.width = self.table = None
