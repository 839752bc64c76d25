"""The total of FMFA, Eq. 13: L = L_id + L_irr + L_efa + L_asdm."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .asdm import ASDMLoss
from .distributed import GATHER, shares
from .efa import EFALoss
from .identity import IDHead
from .irr import IRRHead
from .ops._checks import check_float, check_option, check_same

__all__ = ["FMFALoss", "FMFAOutput"]

TERMS = ("id", "irr", "efa", "asdm")

# What the paper sets by dataset: margins of EFA (Table 1) and alpha of A-SDM.
DATASETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "CUHK-PEDES": ({"alpha": 10.0}, {"margin_text": 0.1, "margin_image": 0.1}),
    "ICFG-PEDES": ({"alpha": 10.0}, {"margin_text": 0.2, "margin_image": 1.0}),
    "RSTPReid": ({"alpha": 1.0}, {"margin_text": 0.2, "margin_image": 0.8}),
}


class FMFAOutput(NamedTuple):
    """loss: weighted sum, a scalar. terms: each term before its weight. metrics: accuracies in [0, 1], detached.

    With gather each of them is the rank's share: the mean over ranks is the value of the whole batch.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]


class FMFALoss(nn.Module):
    """All four training objectives of FMFA on one batch, and their weighted sum.

        L = w_id L_id + w_irr L_irr + w_efa L_efa + w_asdm L_asdm        every weight 1 in the paper

    Args:
        embed_dim: D, width of the joint space.
        num_identities: classes of the ID term, pids lie in [0, num_identities).
        vocab_size: V of the IRR term.
        weights: by term name ("id", "irr", "efa", "asdm"); what is not named weighs 1, and a term of weight 0 is not
            computed. The paper reports that an EFA weight of 5 or more collapses training.
        asdm, efa, irr: keyword arguments of ASDMLoss, EFALoss and IRRHead, or (asdm, efa) the modules themselves.
        gather, process_group, equal_batches: of both parameter-free terms, as ASDMLoss takes them. With True or "ring"
            the mean over ranks of the loss, and of every term and metric, is that of one process on the concatenated
            batch. The ID and IRR terms compare a sample with nothing but its own labels: their features stay, and the
            rank's own means are weighted by its share of all pairs (ID) and of all masked words (IRR), so that two
            counts are what travels. gather and process_group decide over ID and IRR also where asdm or efa have their
            own. With False every term is the rank's own mean.
        backend: of both parameter-free terms, whose own arguments, in asdm and efa, come first here and above.

    Inputs:
        image_features, text_features: [B, D] global features.
        image_tokens: [B, N, D] patches without [CLS]. The IRR term sees image_features in [CLS]'s place before them.
        text_tokens: [B, L, D].
        pids: [B] integer identities.
        masked_text_tokens, masked_labels: [B, L, D] tokens of the masked captions and [B, L] original ids (0
            elsewhere), best left on the CPU (see IRRHead); without them the IRR term is left out.
        image_mask, text_mask: [B, N] and [B, L] bool, True = keep.
        image_ids, logit_scale: as ASDMLoss takes them.

    Returns:
        FMFAOutput(loss, terms, metrics). terms has the keys that were computed; metrics has "image_accuracy" and
        "text_accuracy" (ID) and "mlm_accuracy" (IRR).

    Raises:
        TypeError, ValueError: as the terms do; an unknown weight, or only one of the two masked arguments.
        RuntimeError: gather without torch.distributed, or a process that died or did not arrive in time.

    Example:
        >>> objective = FMFALoss.for_dataset("RSTPReid", 64, 10, vocab_size=100, irr={"depth": 1})
        >>> image, text = torch.randn(4, 12, 64), torch.randn(4, 7, 64)
        >>> out = objective(image.mean(1), text.mean(1), image, text, torch.arange(4))
        >>> sorted(out.terms)
        ['asdm', 'efa', 'id']

    Reference: Yin et al., arXiv 2509.13754v2, Eq. 13 and Table 1.
    """

    def __init__(
        self,
        embed_dim: int,
        num_identities: int,
        *,
        vocab_size: int = 49408,
        weights: Mapping[str, float] | None = None,
        asdm: ASDMLoss | Mapping[str, Any] | None = None,
        efa: EFALoss | Mapping[str, Any] | None = None,
        irr: Mapping[str, Any] | None = None,
        gather: bool | str = False,
        process_group: Any = None,
        equal_batches: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name in weights or {}:
            check_option("weights", name, TERMS)
        check_option("gather", gather, GATHER)
        self.gather, self.process_group = gather, process_group
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in TERMS}
        both: dict[str, Any] = {
            "gather": gather,
            "process_group": process_group,
            "equal_batches": equal_batches,
            "backend": backend,
        }
        self.asdm = asdm if isinstance(asdm, ASDMLoss) else ASDMLoss(**{**both, **(asdm or {})})
        self.efa = efa if isinstance(efa, EFALoss) else EFALoss(**{**both, **(efa or {})})
        self.identity = IDHead(embed_dim, num_identities)
        self.irr = IRRHead(embed_dim, vocab_size, **(irr or {}))

    @classmethod
    def for_dataset(cls, name: str, embed_dim: int, num_identities: int, **kwargs: Any) -> "FMFALoss":
        """The paper's hyperparameters for "CUHK-PEDES", "ICFG-PEDES" or "RSTPReid"; keywords override them."""
        check_option("name", name, DATASETS)
        for term, preset in zip(("asdm", "efa"), DATASETS[name], strict=True):
            given = kwargs.get(term)
            if given is None or isinstance(given, Mapping):
                kwargs[term] = {**preset, **(given or {})}
        return cls(embed_dim, num_identities, **kwargs)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        image_tokens: Tensor,
        text_tokens: Tensor,
        pids: Tensor,
        *,
        masked_text_tokens: Tensor | None = None,
        masked_labels: Tensor | None = None,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> FMFAOutput:
        if (masked_text_tokens is None) != (masked_labels is None):
            raise ValueError("masked_text_tokens and masked_labels come together: pass both or neither")
        check_float("image_features", image_features, "B D")
        check_float("image_tokens", image_tokens, "B N D")
        check_same("image_features and image_tokens", image_features, image_tokens, dims=[("B", 0)])
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if self.weights["id"]:
            identity = self.identity(image_features, text_features, pids)
            terms["id"] = identity.loss
            metrics.update(image_accuracy=identity.image_accuracy, text_accuracy=identity.text_accuracy)
        if self.weights["irr"] and masked_text_tokens is not None:
            tokens = torch.cat([image_features.to(image_tokens.dtype).unsqueeze(1), image_tokens], dim=1)
            irr = self.irr(tokens, masked_text_tokens, masked_labels, text_mask=text_mask)
            terms["irr"] = irr.loss
            metrics["mlm_accuracy"] = irr.accuracy
        if self.gather and (self.weights["id"] or self.weights["irr"]):
            pairs, words = self._shares(image_features, masked_labels, text_mask)
            share = {"irr": words, "mlm_accuracy": words}
            terms, metrics = (
                {name: value * share.get(name, pairs).to(value.dtype) for name, value in values.items()}
                for values in (terms, metrics)
            )
        if self.weights["efa"]:
            efa_pids = pids if self.efa.negatives == "different_identity" else None
            terms["efa"] = self.efa(
                image_tokens, text_tokens, image_mask=image_mask, text_mask=text_mask, pids=efa_pids
            )
        if self.weights["asdm"]:
            terms["asdm"] = self.asdm(image_features, text_features, pids, image_ids=image_ids, logit_scale=logit_scale)
        loss = sum((self.weights[name] * term for name, term in terms.items()), image_features.new_zeros(()))
        return FMFAOutput(loss, terms, metrics)

    def _shares(self, features: Tensor, labels: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """By what the means of this rank are multiplied: [2], of its pairs and of its masked words."""
        pairs = torch.full((), features.shape[0], device=features.device)
        words = torch.zeros_like(pairs) if labels is None else self.irr._count_masked(labels, text_mask, pairs.device)
        return shares(torch.stack([pairs, words]), self.gather, self.process_group)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {weight:g}" for name, weight in self.weights.items())
