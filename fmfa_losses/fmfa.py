"""The total of FMFA, Eq. 13: L = L_id + L_irr + L_efa + L_asdm."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from .distributed.handshake import handshake
from .distributed.peers import Peers
from .heads.identity import IDHead
from .heads.irr import IRRHead
from .losses.asdm import ASDMLoss
from .losses.efa import EFALoss
from .losses.negatives_queue import NegativesQueue, queued
from .ops.checks import (
    check_flag,
    check_float,
    check_nonnegative,
    check_option,
    check_same,
    describe,
    did_you_mean,
    nan_unless,
)
from .ops.keywords import check_keywords, keywords_checked
from .ops.lengths import captions, pad_alike
from .ops.module import Module
from .ops.options import GATHER, Backend, Dataset, Gather
from .ops.padding import refuse_trace

__all__ = ["FMFALoss", "FMFAOutput"]

TERMS = ("id", "irr", "efa", "asdm")
# Attributes of IRRHead that must be the same on all ranks.
IRR_SETTINGS = ("embed_dim", "vocab_size", "depth", "num_heads", "ignore_index")

# What the paper sets by dataset: margins of EFA (Table 1) and alpha of A-SDM.
DATASETS: dict[Dataset, tuple[dict[str, Any], dict[str, Any]]] = {
    "CUHK-PEDES": ({"alpha": 10.0}, {"margin_text": 0.1, "margin_image": 0.1}),
    "ICFG-PEDES": ({"alpha": 10.0}, {"margin_text": 0.2, "margin_image": 1.0}),
    "RSTPReid": ({"alpha": 1.0}, {"margin_text": 0.2, "margin_image": 0.8}),
}


T = TypeVar("T")
# The terms that are built from keyword arguments.
PARTS: dict[str, type] = {"asdm": ASDMLoss, "efa": EFALoss, "irr": IRRHead}


class FMFAOutput(NamedTuple):
    """loss: weighted sum, a scalar. terms: each term before its weight. metrics: accuracies in [0, 1], detached.

    With gather each of them is the rank's part: the mean over ranks is the value of the whole batch.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]


OwnTerms: TypeAlias = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]


class FMFALoss(Module):
    """All four training objectives of FMFA on one batch, and their weighted sum.

        L = w_id L_id + w_irr L_irr + w_efa L_efa + w_asdm L_asdm        every weight 1 in the paper

    Args:
        embed_dim: D, width of the joint space.
        num_identities: classes of the ID term, pids lie in [0, num_identities).
        vocab_size: V of the IRR term.
        weights: by term name ("id", "irr", "efa", "asdm"), finite and >= 0; what is not named weighs 1. A term of
            weight 0 is not computed, and the head of ID or IRR is not built: `identity` or `irr` is None and has no
            parameters, and what a checkpoint holds of it is ignored. The paper reports that an EFA weight of 5 or more
            collapses training.
        asdm, efa, irr: keyword arguments of ASDMLoss, EFALoss and IRRHead, or (asdm, efa) the modules themselves.
        gather, process_group, equal_batches: of both parameter-free terms, as ASDMLoss takes them. With True or "ring"
            the mean over ranks of the loss, and of every term and metric, is that of one process on the concatenated
            batch. The ID and IRR terms compare a sample with nothing but its own labels: their features stay, and the
            rank's own means are weighted by its part of all pairs (ID) and of all masked words (IRR), so that a count
            is what travels. gather and process_group decide over ID and IRR also where asdm or efa have their own. One
            handshake serves all terms that gather alike, and compares their hyperparameters and all weights. With False
            every term is the rank's own mean.
        backend: of both parameter-free terms, whose own arguments, in asdm and efa, come first here and above.

    Inputs:
        image_features, text_features: [B, D] global features.
        image_tokens: [B, N, D] patches without [CLS]. The IRR term puts image_features before them, as [CLS].
        text_tokens: [B, L, D]; or packed, [T, D], with text_cu_seqlens.
        pids: [B] integer identities.
        masked_text_tokens, masked_labels: [B, L, D] tokens of the masked captions and [B, L] original ids (0
            elsewhere), best left on the CPU (see IRRHead). Without them the IRR term is left out of `terms`, and its
            parameters get zero gradients, so that DistributedDataParallel finds all of them on every rank. With
            text_cu_seqlens the tokens are packed, [T, D], the labels packed, [T], or [B, text_max_seqlen].
        image_mask, text_mask: [B, N] and [B, L] bool, True = keep.
        text_lengths, text_cu_seqlens, text_max_seqlen: in place of text_mask, as EFALoss takes them; wrong ones on an
            accelerator make the EFA and IRR terms NaN.
        image_ids, logit_scale, queue: as ASDMLoss takes them.

    Returns:
        FMFAOutput(loss, terms, metrics). terms has the keys that were computed; metrics has "image_accuracy" and
        "text_accuracy" (ID) and "mlm_accuracy" (IRR).

    Raises:
        TypeError, ValueError: as the terms do; an unknown keyword or weight, or only one of the two masked arguments.
        RuntimeError: gather without torch.distributed, or a process that died or did not arrive in time.

    Example:
        >>> objective = FMFALoss.for_dataset("RSTPReid", 64, 10, vocab_size=100, irr={"depth": 1})
        >>> image, text = torch.randn(4, 12, 64), torch.randn(4, 7, 64)
        >>> out = objective(image.mean(1), text.mean(1), image, text, torch.arange(4))
        >>> sorted(out.terms)
        ['asdm', 'efa', 'id']

    Reference: Yin et al., arXiv 2509.13754v2, Eq. 13 and Table 1.
    """

    weights: dict[str, float]
    asdm: ASDMLoss
    efa: EFALoss
    identity: IDHead | None
    irr: IRRHead | None
    gather: Gather
    process_group: Any
    equal_batches: bool

    @keywords_checked(PARTS)
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
        gather: Gather = False,
        process_group: Any = None,
        equal_batches: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.weights = dict.fromkeys(TERMS, 1.0)
        for name, weight in _mapping("weights", weights, 'a mapping such as {"efa": 0.5}').items():
            check_option("weights", name, TERMS)
            self.weights[name] = check_nonnegative(f"weights[{name!r}]", weight)
        check_option("gather", gather, GATHER)
        self.gather, self.process_group = gather, process_group
        self.equal_batches = check_flag("equal_batches", equal_batches)
        both: dict[str, Any] = {
            "gather": gather,
            "process_group": process_group,
            "equal_batches": equal_batches,
            "backend": backend,
        }
        self.asdm = asdm if isinstance(asdm, ASDMLoss) else _build("asdm", ASDMLoss, asdm, **both)
        self.efa = efa if isinstance(efa, EFALoss) else _build("efa", EFALoss, efa, **both)
        # A module that is None has no parameters, and load_state_dict ignores what it is given of it.
        self.register_module("identity", IDHead(embed_dim, num_identities) if self.weights["id"] else None)
        words = _build("irr", IRRHead, irr, embed_dim, vocab_size) if self.weights["irr"] else None
        self.register_module("irr", words)
        if self.identity is not None:
            self.identity._caller = "FMFALoss"
        if self.irr is not None:
            self.irr._caller, self.irr._labels = "FMFALoss", "masked_labels"

    @classmethod
    def for_dataset(cls, name: Dataset, embed_dim: int, num_identities: int, **kwargs: Any) -> "FMFALoss":
        """The paper's hyperparameters for "CUHK-PEDES", "ICFG-PEDES" or "RSTPReid"; keywords override them."""
        if name not in tuple(DATASETS):
            near = did_you_mean(name, DATASETS, cutoff=0.5)  # "cuhk" is one half of "CUHK-PEDES"
            other = near or "; for another data set build FMFALoss(embed_dim, num_identities) with your asdm and efa"
            raise ValueError(f"name must be one of {', '.join(map(repr, DATASETS))}, got {name!r}{other}")
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
        text_lengths: Tensor | None = None,
        text_cu_seqlens: Tensor | None = None,
        text_max_seqlen: int | None = None,
        image_ids: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
        queue: NegativesQueue | None = None,
    ) -> FMFAOutput:
        refuse_trace("FMFALoss")
        batch: dict[str, Any] = {
            "image_features": image_features,
            "text_features": text_features,
            "image_tokens": image_tokens,
            "text_tokens": text_tokens,
            "pids": pids,
            "masked_text_tokens": masked_text_tokens,
            "masked_labels": masked_labels,
            "image_mask": image_mask,
            "text_mask": text_mask,
            "lengths": (text_lengths, text_cu_seqlens, text_max_seqlen),
            "image_ids": image_ids,
            "logit_scale": logit_scale,
            "queue": queue,
        }
        gathering = [part for part in (self, self.efa, self.asdm) if part.gather]
        leader = gathering[0] if gathering else None
        if leader is None:
            self._pad(batch)
            peers, (terms, metrics, nothing) = None, self._own_terms(batch)
        else:
            peers, (terms, metrics, nothing) = self._handshake(leader, batch)
        if self.gather and peers is not None:
            weighted = self._weighted({**terms, **metrics}, peers, batch["masked_labels"], batch["text_mask"])
            terms, metrics = ({name: weighted[name] for name in values} for values in (terms, metrics))
        if self.weights["efa"]:
            joined: dict[str, Any] = {"peers": peers} if _joins(self.efa, leader) else {}
            masks: dict[str, Any] = {"image_mask": image_mask, "text_mask": batch["text_mask"]}
            efa = self.efa(image_tokens, batch["text_tokens"], pids=self._efa_pids(pids), **masks, **joined)
            terms["efa"] = nan_unless(batch["right"], efa)
        if self.weights["asdm"]:
            joined = {"peers": peers} if _joins(self.asdm, leader) else {}
            soft: dict[str, Any] = {"image_ids": image_ids, "logit_scale": logit_scale, "queue": queue}
            terms["asdm"] = self.asdm(image_features, text_features, pids, **soft, **joined)
        loss = sum((self.weights[name] * term for name, term in terms.items()), nothing)
        return FMFAOutput(loss, terms, metrics)

    def _pad(self, batch: dict[str, Any]) -> None:
        """Tokens, labels and a mask of real lengths in place of what was given; `right` as in ops/lengths.py."""
        lengths, batch["right"] = batch.pop("lengths"), None
        if all(one is None for one in lengths):
            return
        tokens, mask, image = (batch[name] for name in ("text_tokens", "text_mask", "image_tokens"))
        check_float("image_tokens", image, "B N D")
        text = captions(tokens, mask, lengths, image, shared=bool(self.efa.gather))
        batch.update(text_tokens=text.tokens, text_mask=text.mask, right=text.right)
        if text.packing is not None:
            ignored = 0 if self.irr is None else self.irr.ignore_index
            for name, fill in (("masked_text_tokens", None), ("masked_labels", ignored)):
                batch[name] = pad_alike(name, batch[name], text.packing, fill)

    def _own_terms(self, batch: dict[str, Any]) -> OwnTerms:
        """Terms and metrics of a sample and its own labels, for which no other rank is needed; and a zero."""
        image_features, image_tokens = batch["image_features"], batch["image_tokens"]
        masked_text_tokens, masked_labels = batch["masked_text_tokens"], batch["masked_labels"]
        if (masked_text_tokens is None) != (masked_labels is None):
            raise ValueError("masked_text_tokens and masked_labels come together: pass both or neither")
        check_float("image_features", image_features, "B D")
        check_float("image_tokens", image_tokens, "B N D")
        check_same("image_features and image_tokens", image_features, image_tokens, dims=[("B", 0)])
        for name, head in (("id", self.identity), ("irr", self.irr)):
            if self.weights[name] and head is None:
                raise ValueError(
                    f"weights[{name!r}] must stay 0, with which FMFALoss was built and has no head, got "
                    f"{self.weights[name]}; build FMFALoss with that weight"
                )
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        nothing = image_features.new_zeros(())
        if self.identity is not None:
            identity = self.identity(image_features, batch["text_features"], batch["pids"])
            terms["id"] = identity.loss
            metrics.update(image_accuracy=identity.image_accuracy, text_accuracy=identity.text_accuracy)
        if self.irr is not None and masked_text_tokens is not None and masked_labels is not None:
            tokens = _with_class_token(image_features, image_tokens)
            irr = self.irr(tokens, masked_text_tokens, masked_labels, text_mask=batch["text_mask"])
            terms["irr"] = nan_unless(batch["right"], irr.loss)
            metrics["mlm_accuracy"] = nan_unless(batch["right"], irr.accuracy)
        elif self.irr is not None:  # one caption of one word that is not masked costs 0, with a zero gradient for all
            token = image_tokens.new_zeros(1, 1, self.irr.embed_dim)
            label = torch.full((1, 1), self.irr.ignore_index, device=token.device)
            nothing = nothing + self.irr(token, token, label).loss
        return terms, metrics, nothing

    def _efa_pids(self, pids: Tensor) -> Tensor | None:
        return pids if self.efa.negatives == "different_identity" else None

    def _handshake(self, leader: "FMFALoss | EFALoss | ASDMLoss", batch: Any) -> tuple[Peers, OwnTerms]:
        """One handshake for the weights and for all terms that gather as `leader` does, and the own terms."""
        names = ["image_features"]
        settings: dict[str, object] = {f"weights[{name!r}]": weight for name, weight in self.weights.items()}
        if self.identity is not None:
            settings["num_identities"] = getattr(self.identity.classifier, "out_features", None)
            settings["identity.label_smoothing"] = self.identity.label_smoothing
        if self.irr is not None:
            settings.update({f"irr.{name}": getattr(self.irr, name) for name in IRR_SETTINGS})
        with_efa, with_asdm = (
            self.weights[name] != 0 and _joins(part, leader) for name, part in (("efa", self.efa), ("asdm", self.asdm))
        )
        if with_efa:
            names += ["text_tokens", "text_mask", "pids"]
            settings.update({f"efa.{name}": value for name, value in self.efa.settings().items()})
            settings["dtype of image_tokens"] = getattr(batch["image_tokens"], "dtype", None)
        if with_asdm:
            names += ["text_features", "pids", "image_ids"]
            settings.update({f"asdm.{name}": value for name, value in self.asdm.settings().items()})
            settings |= {"logit_scale": batch["logit_scale"], "queued": queued(batch["queue"])}

        tensors = {name: batch[name] for name in names}

        def check() -> OwnTerms:
            # Also of terms that do not gather, or gather otherwise: the ranks wait for one that fails in such a term.
            self._pad(batch)
            tensors.update({name: batch[name] for name in names})
            if self.weights["efa"]:
                given = {**batch, "pids": self._efa_pids(batch["pids"])}
                tokens = ("image_tokens", "text_tokens", "image_mask", "text_mask", "pids")
                self.efa.check_inputs(*(given[name] for name in tokens), shared=True)
            if self.weights["asdm"]:
                features = ("image_features", "text_features", "pids", "image_ids", "logit_scale")
                self.asdm.check_inputs(*(batch[name] for name in features), shared=True)
                self.asdm.check_queue(*(batch[name] for name in ("queue", "text_features", "pids", "image_ids")))
            return self._own_terms(batch)

        return handshake(
            leader.gather,
            leader.process_group,
            tensors,
            loss="FMFALoss",
            settings=settings,
            equal_batches=leader.equal_batches,
            check=check,
        )

    def _weighted(
        self, values: dict[str, Tensor], peers: Peers, labels: Tensor | None, text_mask: Tensor | None
    ) -> dict[str, Tensor]:
        """Means of this rank times its part of all pairs, or of all masked words."""
        weight: dict[str, float | Tensor] = dict.fromkeys(values, peers.loss_weight)
        if self.irr is not None:  # on every rank, whether it has a masked word or not
            device = next(iter(values.values())).device if values else torch.device("cpu")
            words = torch.zeros((), dtype=torch.int64, device=device)
            if labels is not None:
                words = self.irr._count_masked(labels, text_mask, device)
            (of_words,) = peers.loss_weights(words.reshape(1))
            weight |= {name: of_words.to(values[name].dtype) for name in ("irr", "mlm_accuracy") if name in values}
        return {name: value * weight[name] for name, value in values.items()}

    def _shown(self, name: str) -> object:
        if name == "weights":
            return {term: weight for term, weight in self.weights.items() if weight != 1} or None
        return super()._shown(name)


def _joins(part: "FMFALoss | EFALoss | ASDMLoss", leader: "FMFALoss | EFALoss | ASDMLoss | None") -> bool:
    """Whether the handshake of `leader` is that of `part` as well."""
    return (
        leader is not None
        and part.gather == leader.gather
        and part.process_group is leader.process_group
        and part.equal_batches == leader.equal_batches
    )


def _mapping(name: str, value: object, wanted: str) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name} must be {wanted}, got {describe(value)}")
    return value or {}


def _build(name: str, cls: type[T], given: object, *args: Any, **defaults: Any) -> T:
    """`cls` of `args` and of the keyword arguments `given`."""
    wanted = f"a mapping of keyword arguments of {cls.__name__}"
    if name in ("asdm", "efa"):
        wanted += f", or an {cls.__name__}"
    if given is False:
        wanted += f' (to leave the term out, pass weights={{"{name}": 0}})'
    keywords = _mapping(name, given, wanted)
    check_keywords(f"{name} ({cls.__name__})", keywords, functools.partial(cls, *args), PARTS)
    return cls(*args, **{**defaults, **keywords})


def _with_class_token(image_features: Tensor, image_tokens: Tensor) -> Tensor:
    """[B, D] and [B, N, D] -> [B, 1 + N, D]: IRRA's image tokens begin with the global feature."""
    if image_features.shape[1] != image_tokens.shape[2]:
        raise ValueError(
            "image_features [B, D] and image_tokens [B, N, D] must agree in D, got "
            f"{describe(image_features)} and {describe(image_tokens)}; pass both after the projection"
        )
    return torch.cat([image_features.to(image_tokens.dtype).unsqueeze(1), image_tokens], dim=1)
