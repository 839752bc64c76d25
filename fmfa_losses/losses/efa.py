"""EFA: explicit fine-grained alignment, Eq. 5-12 (parameter-free).

    e_i  = sparse aggregation of the image's patches for every text token               Eq. 5-8   ops/aggregation.py
    S_ij = (1/lambda) log sum_l exp(lambda max_k cos(x_il, e_jk)),  x = text, image     Eq. 9-10  ops/hard_similarity.py
    L_x2e = mean_i log sum_{j != i} exp((S_ij - S_ii + margin) / tau2)                  Eq. 11
    L    = L_t2e + L_e2t + L_i2e + L_e2i, the e2x terms on the transposed S             Eq. 12

What the released code does instead: fmfa_losses/compat/released.py.
"""

# torch.compile of 2.6 cannot make the types of a nested function.
from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..distributed.peers import Gathering, Peers, meet
from ..ops.aggregation import aggregate, thresholds
from ..ops.backend import select_backend
from ..ops.checks import (
    check_divisor,
    check_finite,
    check_flag,
    check_float,
    check_fraction,
    check_ids,
    check_mask,
    check_option,
    check_same,
    check_unused_ids,
)
from ..ops.hard_similarity import FLAT, UnitTokens, token_lists, unit_similarity
from ..ops.options import BACKENDS, GATHER, NEGATIVES, REDUCTIONS, Backend, Gather, Negatives, Reduction
from ..ops.padding import longest
from ..ops.precision import unit_rows

__all__ = ["EFALoss", "efa_loss"]

# Attributes of EFALoss that must be the same on all ranks.
SETTINGS = ("margin_text", "margin_image", "temperature", "pool_scale", "sparsity", "negatives", "reduction")


def efa_loss(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    margin_text: float = 0.1,
    margin_image: float = 0.1,
    temperature: float = 1.0,
    pool_scale: float = 1.0,
    sparsity: float | None = None,
    negatives: Negatives = "all",
    reduction: Reduction = "mean",
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    pids: Tensor | None = None,
    gather: Gather = False,
    process_group: Any = None,
    equal_batches: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Functional form of `EFALoss`, which documents every argument.

    Example:
        >>> tokens = torch.eye(4).unsqueeze(1)           # four pairs of one patch and one token, all orthogonal
        >>> efa_loss(tokens, tokens)                     # 4 (log 3 + 0 - 1 + 0.1)
        tensor(0.7944)
    """

    settings = {
        "margin_text": margin_text,
        "margin_image": margin_image,
        "temperature": temperature,
        "pool_scale": pool_scale,
        "sparsity": sparsity,
        "negatives": negatives,
        "reduction": reduction,
    }
    inputs = (image_tokens, text_tokens, image_mask, text_mask, pids)
    return _loss(settings, False, inputs, gather, process_group, equal_batches, backend)


Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]  # as check_efa_inputs has them


def _loss(
    settings: dict[str, Any],
    checked: bool,
    inputs: Inputs,
    gather: Gather,
    process_group: Any,
    equal_batches: bool,
    backend: Backend,
) -> Tensor:
    """The loss of a call, over the batch of all processes; `checked` says that the hyperparameters are."""
    image_tokens, text_tokens, image_mask, text_mask, pids = inputs
    peers, (numbers, pids) = meet(
        gather,
        process_group,
        {"text_tokens": text_tokens, "text_mask": text_mask, "pids": pids},
        loss="efa_loss",
        # The dtype of the joint embeddings follows from those of both tokens.
        settings={**settings, "dtype of image_tokens": getattr(image_tokens, "dtype", None)},
        equal_batches=equal_batches,
        check=partial(_check, settings, checked, inputs, gather, backend),
    )
    if text_mask is not None:
        if not gather:  # what travels has the same L everywhere
            L = longest(text_mask)
            text_tokens, text_mask = text_tokens[:, :L], text_mask[:, :L]
        text_tokens = text_tokens.masked_fill(~text_mask.unsqueeze(-1), 0)
    margin_text, margin_image, temperature, pool_scale, sparsity = numbers
    chosen = select_backend(backend, image_tokens, text_tokens)
    flat = pool_scale < FLAT
    text_sim, image_sim = _similarities(
        image_tokens, text_tokens, image_mask, text_mask, peers,
        sparsity=sparsity, pool="log_mean" if flat else "lse", pool_scale=pool_scale, backend=chosen,
    )  # fmt: skip
    b, B, offset = *text_sim.shape, peers.offset
    if pids is None:
        own = torch.arange(B, device=text_sim.device)
        excluded = own[offset : offset + b, None] == own
    else:
        excluded = pids[:, None] == peers.gather(pids)
    # A margin is added to every logit of a row, and so to its term: the four terms add up to the same with the mean
    # of the margins in each.
    sims = torch.stack([text_sim, image_sim, peers.transpose(text_sim), peers.transpose(image_sim)])
    margin = (margin_text + margin_image) / 2
    levels = None
    if flat:
        levels = _level_differences(image_tokens, text_tokens, image_mask, text_mask, peers, sims.dtype) / pool_scale
    per_sample = _ranking(sims, excluded, margin, temperature, offset, levels).sum(dim=0)
    if settings["reduction"] == "mean":
        return peers.mean(per_sample)
    return per_sample.sum() if settings["reduction"] == "sum" else per_sample


def _similarities(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    peers: Peers,
    *,
    sparsity: float | None,
    pool: str,
    pool_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """S of the own texts and of the own images (rows) with all joint embeddings, [b, B] each; masked-out text is 0.

    Everything is normalised once, before it travels. `joint` serves both similarities, so its gradients from both, and
    from all ranks, are added up before they pass through the normalisation.
    """
    threshold = thresholds(image_tokens, text_tokens, image_mask, sparsity)
    dtype = threshold.dtype
    joint = aggregate(image_tokens, text_tokens, image_mask, threshold, backend)
    # Masked-out text is zero already, and joint embeddings are finite there: no need to fill them again.
    joint, text = unit_rows(joint, dtype=dtype, backend=backend), unit_rows(text_tokens, dtype=dtype, backend=backend)
    image = unit_rows(image_tokens, image_mask, dtype=dtype, backend=backend)
    # The tensor cores multiply in the precision of the tokens.
    text_dtype, image_dtype = (text_tokens.dtype, image_tokens.dtype) if backend == "triton" else (dtype, dtype)
    if backend == "triton":
        text_lists, image_lists = token_lists(text_mask, backend), token_lists(image_mask, backend)
    else:
        text_lists = image_lists = None

    def both(
        text: Tensor, image: Tensor, joint: Tensor, mask: Tensor | None, lists: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        joints = UnitTokens(joint.to(text_dtype), mask, lists)
        texts = UnitTokens(text.to(text_dtype), text_mask, text_lists)
        text_sim = unit_similarity(texts, joints, pool=pool, pool_scale=pool_scale, backend=backend)
        if image_dtype != text_dtype:
            joints = UnitTokens(joint.to(image_dtype), mask, lists)
        images = UnitTokens(image.to(image_dtype), image_mask, image_lists)
        return text_sim, unit_similarity(images, joints, pool=pool, pool_scale=pool_scale, backend=backend)

    if peers.group is None:
        return both(text, image, joint, text_mask, text_lists)
    joint_mask = None if text_mask is None else peers.gather(text_mask)
    if not peers.ring:
        return both(text, image, peers.gather(joint), joint_mask, token_lists(joint_mask, backend))
    masks = [None] * len(peers.sizes) if joint_mask is None else peers.blocks(joint_mask)
    of_blocks = [token_lists(mask, backend) for mask in masks]

    def with_block(q: int, text: Tensor, image: Tensor, joint: Tensor) -> Tensor:
        return torch.stack(both(text, image, joint, masks[q], of_blocks[q]))

    text_sim, image_sim = torch.cat(peers.around(with_block, (text, image), joint), dim=2)
    return text_sim, image_sim


def _level_differences(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    peers: Peers,
    dtype: torch.dtype,
) -> Tensor:
    """What a log mean leaves out of S, times lambda: log n of S_ij less that of S_ii, [4, b, B], in the order of sims.

    S_ij = (1/lambda) log n_i + log mean where text j, and so e_j, has a token; 0 elsewhere. Of rows that are equally
    long and not empty the differences are 0, exactly.
    """
    counts = torch.stack(
        [
            text_tokens.new_full((tokens.shape[0],), tokens.shape[1], dtype=torch.int64)
            if mask is None
            else mask.sum(dim=1)
            for tokens, mask in ((text_tokens, text_mask), (image_tokens, image_mask))
        ],
        dim=1,
    )  # [b, 2]
    everyone = peers.gather(counts)
    own, level = (c.clamp(min=1).to(dtype).log().T for c in (counts, everyone))  # [2, b], [2, B]
    own_any, any_ = ((c[:, 0] > 0).to(dtype) for c in (counts, everyone))
    of_rows = own.unsqueeze(2) * (any_ - own_any.unsqueeze(1))
    of_columns = own_any.unsqueeze(1) * (level.unsqueeze(1) - own.unsqueeze(2))
    return torch.cat([of_rows, of_columns])


def _ranking(
    sim: Tensor, excluded: Tensor, margin: float, temperature: float, offset: int, levels: Tensor | None = None
) -> Tensor:
    """log sum_{j not excluded} exp((S_ij - S_ii + margin) / temperature), [..., b]; 0 for a row without negatives.

    Row i of sim [..., b, B] belongs to column offset + i; excluded [b, B]. `levels` [..., b, B] are added to the
    differences; the largest one of a row, which may leave the others no digits, after the sum.
    """
    logits = sim - sim.diagonal(offset, -2, -1).unsqueeze(-1) + margin
    lowest, top = torch.finfo(sim.dtype).min, None
    if levels is not None:
        top = levels.masked_fill(excluded, lowest).amax(dim=-1, keepdim=True)
        logits = logits + (levels - top)
    # Finite, so that a row without negatives has a finite gradient for its last fill to stop.
    terms = (logits / temperature).masked_fill(excluded, lowest).logsumexp(dim=-1)
    if top is not None:
        terms = terms + top.squeeze(-1) / temperature
    return terms.masked_fill(excluded.all(dim=1), 0)


class EFALoss(Gathering):
    """Pulls each image's patches and each text's tokens to their joint embeddings, away from the other pairs' ones.

        L = mean_i sum_x log sum_{j != i} exp((S_ij - S_ii + margin_x) / tau2)    x in {text, image}, S and transposed S

    Args:
        margin_text, margin_image: margins of the text and the image terms. The paper: CUHK-PEDES 0.1, 0.1; ICFG-PEDES
            0.2, 1.0; RSTPReid 0.2, 0.8.
        temperature: tau2 > 0 of the ranking.
        pool_scale: lambda > 0 of the pooling over tokens.
        sparsity: a patch counts for a token from this min-max-normalised similarity on, in [0, 1]; 1/N when None.
        negatives: "all" other pairs (the paper) or only those of a "different_identity", which needs pids.
        reduction: "mean", "sum", or "none" for the per-sample sum of the four terms, [B].
        gather: False ranks within this process's batch. True and "ring" rank its pairs within the batch of all
            processes: joint embeddings and similarities are exchanged, never patches. See docs/distributed.md.
        process_group, equal_batches: as in ASDMLoss.
        backend: "auto", "triton" or "torch".

    Inputs:
        image_tokens: [B, N, D] patches without [CLS], any float dtype; need not be normalised.
        text_tokens: [B, L, D].
        image_mask, text_mask: [B, N] and [B, L] bool, True = keep.
        pids: [B] integer identities, for negatives="different_identity"; "all" does not use them and warns once.
        peers: as in ASDMLoss.

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). A sample without negatives (B == 1, or
        all of one identity) counts 0; a fully masked sample has similarity 0 to everything. The [B, B, N, L]
        similarities never exist: memory beyond inputs and gradients is O(B B (N + L)).

    Raises:
        TypeError, ValueError: shapes, dtypes, devices, masks or hyperparameters that do not fit, here or between
            processes.
        RuntimeError: gather without torch.distributed, or a process that died or did not arrive in time.

    Example:
        >>> loss = EFALoss(margin_text=0.2, margin_image=0.8)         # RSTPReid
        >>> image, text = torch.randn(4, 192, 64), torch.randn(4, 77, 64)
        >>> loss(image, text).shape
        torch.Size([])

    Reference: Yin et al., arXiv 2509.13754v2, Eq. 5-12.
    """

    margin_text: float
    margin_image: float
    temperature: float
    pool_scale: float
    sparsity: float | None
    negatives: Negatives
    reduction: Reduction
    gather: Gather
    equal_batches: bool
    backend: Backend

    def __init__(
        self,
        margin_text: float = 0.1,
        margin_image: float = 0.1,
        *,
        temperature: float = 1.0,
        pool_scale: float = 1.0,
        sparsity: float | None = None,
        negatives: Negatives = "all",
        reduction: Reduction = "mean",
        gather: Gather = False,
        process_group: Any = None,
        equal_batches: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.margin_text, self.margin_image, self.temperature, self.pool_scale, self.sparsity = _check_settings(
            margin_text, margin_image, temperature, pool_scale, sparsity, negatives, reduction
        )
        check_option("gather", gather, GATHER)
        check_option("backend", backend, BACKENDS)
        self.negatives, self.reduction, self.backend = negatives, reduction, backend
        self.gather, self.process_group = gather, process_group
        self.equal_batches = check_flag("equal_batches", equal_batches)

    def forward(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        *,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        pids: Tensor | None = None,
        peers: Peers | None = None,
    ) -> Tensor:
        settings = {name: getattr(self, name) for name in SETTINGS}
        inputs = (image_tokens, text_tokens, image_mask, text_mask, pids)
        group = self.process_group if peers is None else peers
        return _loss(settings, True, inputs, self.gather, group, self.equal_batches, self.backend)


Numbers: TypeAlias = tuple[float, float, float, float, float | None]


def _check_settings(
    margin_text: float,
    margin_image: float,
    temperature: float,
    pool_scale: float,
    sparsity: float | None,
    negatives: Negatives,
    reduction: Reduction,
) -> Numbers:
    check_option("negatives", negatives, NEGATIVES)
    check_option("reduction", reduction, REDUCTIONS)
    return (
        check_finite("margin_text", margin_text),
        check_finite("margin_image", margin_image),
        check_divisor("temperature", temperature),
        check_divisor("pool_scale", pool_scale),
        None if sparsity is None else check_fraction("sparsity", sparsity),
    )


def _check(
    settings: dict[str, Any], checked: bool, inputs: Inputs, gather: Gather, backend: Backend
) -> tuple[Numbers, Tensor | None]:
    numbers: Any = tuple(settings.values())[:5] if checked else _check_settings(**settings)
    return numbers, check_efa_inputs(*inputs, negatives=settings["negatives"], gather=gather, backend=backend)


def check_efa_inputs(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    pids: Tensor | None,
    *,
    negatives: Negatives,
    gather: Gather,
    backend: Backend,
) -> Tensor | None:
    """The pids to go on with; None where nothing asks for them."""
    check_float("image_tokens", image_tokens, "B N D")
    check_float("text_tokens", text_tokens, "B L D")
    check_same("image_tokens and text_tokens", image_tokens, text_tokens, dims=[("B", 0), ("D", 2)])
    check_mask("image_mask", image_mask, image_tokens)
    check_mask("text_mask", text_mask, text_tokens)
    if gather:  # what cannot run here must be known before the others wait for it
        select_backend(backend, image_tokens, text_tokens)
    if negatives == "all":
        if pids is not None:
            remedy = 'negatives="different_identity" to spare them'
            check_unused_ids("EFA", pids, image_tokens, 'negatives="all"', remedy)
        return None
    if pids is None:
        raise ValueError('negatives="different_identity" needs the identities: pass pids [B]')
    return check_ids("pids", pids, image_tokens.shape[0], image_tokens.device)
