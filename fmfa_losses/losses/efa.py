"""EFA: explicit fine-grained alignment, Eq. 5-12 (parameter-free).

    e_i  = sparse aggregation of the image's patches for every text token               Eq. 5-8   ops/aggregation.py
    S_ij = (1/lambda) log sum_l exp(lambda max_k cos(x_il, e_jk)),  x = text, image     Eq. 9-10  ops/hard_similarity.py
    L_x2e = mean_i log sum_{j != i} exp((S_ij - S_ii + margin) / tau2)                  Eq. 11
    L    = L_t2e + L_e2t + L_i2e + L_e2i, the e2x terms on the transposed S             Eq. 12

What the released code does instead: fmfa_losses/compat/released.py.
"""

# torch.compile of 2.6 cannot make the types of a nested function.
from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..distributed.peers import Peers
from ..ops.aggregation import aggregate
from ..ops.alignment import alignment_similarities
from ..ops.backend import select_backend
from ..ops.checks import (
    check_divisor,
    check_finite,
    check_float,
    check_fraction,
    check_mask,
    check_same,
    check_scale,
    nan_unless,
)
from ..ops.hard_similarity import FLAT, UnitTokens, token_lists, unit_similarity
from ..ops.lengths import Captions, Lengths, captions
from ..ops.options import NEGATIVES, Negatives
from ..ops.padding import longest
from ..ops.precision import accumulation_dtype, unit_rows
from ..ops.ranking import rank, ranking_term
from ..ops.unit_tokens import unit_tokens
from .loss import Loss, ScaledOptions, functional, hyperparameter
from .scores import check_weight, resolve_scale

__all__ = ["EFALoss", "efa_loss"]


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
    """S of the own texts and of the own images (rows) with all joint embeddings, [b, B] each.

    Everything is normalised once, before it travels. `joint` serves both similarities, so its gradients from both, and
    from all ranks, are added up before they pass through the normalisation.
    """
    if peers.group is None and (backend == "torch" or image_tokens.dtype == text_tokens.dtype):
        inputs = image_tokens, text_tokens, image_mask, text_mask
        return alignment_similarities(*inputs, sparsity=sparsity, pool=pool, pool_scale=pool_scale, backend=backend)
    dtype = accumulation_dtype(image_tokens, text_tokens)
    # The tensor cores multiply in the precision of the tokens.
    text_dtype, image_dtype = (text_tokens.dtype, image_tokens.dtype) if backend == "triton" else (dtype, dtype)
    joint = aggregate(image_tokens, text_tokens, image_mask, sparsity, backend, text_mask=text_mask)
    units = unit_tokens if backend == "triton" else unit_rows
    joint = units(joint, dtype=dtype, backend=backend)  # zero where masked out
    text = units(text_tokens, text_mask, dtype=text_dtype, backend=backend)
    image = units(image_tokens, image_mask, dtype=image_dtype, backend=backend)
    text_lists = image_lists = None
    if backend == "triton":
        text_lists, image_lists = token_lists(text_mask, backend), token_lists(image_mask, backend)

    def both(
        text: Tensor, image: Tensor, joint: Tensor, mask: Tensor | None, lists: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        joints = UnitTokens(joint.to(text_dtype), mask, lists)
        texts = UnitTokens(text, text_mask, text_lists)
        text_sim = unit_similarity(texts, joints, pool=pool, pool_scale=pool_scale, backend=backend)
        if image_dtype != text_dtype:
            joints = UnitTokens(joint.to(image_dtype), mask, lists)
        images = UnitTokens(image, image_mask, image_lists)
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

    text_sim, image_sim = torch.cat(peers.over_ranks(with_block, (text, image), joint), dim=2)
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


def _check_sparsity(name: str, value: float | None) -> float | None:
    return None if value is None else check_fraction(name, value)


class EFALoss(Loss):
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
        text_tokens: [B, L, D]; or packed, [T, D], the captions one after the other, with text_cu_seqlens.
        image_mask, text_mask: [B, N] and [B, L] bool, True = keep; what they leave out may hold anything, NaN too, and
            gets gradient 0.
        text_lengths: [B] integers in [0, L], in place of text_mask: the kept tokens at the start of every caption.
        text_cu_seqlens: [B + 1] integers, where each packed caption starts, and T: 0 and the cumulative lengths.
        text_max_seqlen: of packed captions an upper bound of the lengths, the same on all ranks. It may be left out
            where the host reads the starts: on the CPU, without gather, torch.compile and torch.func. On an accelerator
            nobody reads starts and lengths: wrong ones, and a bound that is too low, make the loss NaN.
        pids: [B] integer identities, for negatives="different_identity"; "all" does not use them and warns once.
        logit_scale: 1 / tau2 instead of `temperature`: a number, or a tensor with one element on any device.
        sample_weight, peers: as in ASDMLoss.

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

    margin_text: float = hyperparameter(default=0.1, check=check_finite)
    margin_image: float = hyperparameter(default=0.1, check=check_finite)
    _: KW_ONLY
    temperature: float = hyperparameter(default=1.0, check=check_divisor)
    pool_scale: float = hyperparameter(default=1.0, check=check_divisor)
    sparsity: float | None = hyperparameter(default=None, check=_check_sparsity)
    negatives: Negatives = hyperparameter(default="all", check=NEGATIVES)

    pids_option = ("negatives", "different_identity", "all", "to spare them")
    moved = ("ranking",)

    def forward(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        *,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        text_lengths: Tensor | None = None,
        text_cu_seqlens: Tensor | None = None,
        text_max_seqlen: int | None = None,
        pids: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
        peers: Peers | None = None,
    ) -> Tensor:
        tensors = {"text_tokens": text_tokens, "text_mask": text_mask, "pids": pids, "sample_weight": sample_weight}

        def checked() -> Any:  # torch.compile of 2.6 cannot make the types of a nested function
            given = (image_tokens, text_tokens, image_mask, text_mask, pids, logit_scale, sample_weight)
            lengths = (text_lengths, text_cu_seqlens, text_max_seqlen)
            text, ids = self.check_inputs(*given, lengths, shared=bool(self.gather))
            tensors.update(text_tokens=text.tokens, text_mask=text.mask)  # what is exchanged
            return text, ids

        dtype = getattr(image_tokens, "dtype", None)  # that of the joint embeddings follows
        settings = {"logit_scale": logit_scale, "dtype of image_tokens": dtype}
        peers, (text, ids) = self.handshake(tensors, checked, peers, **settings)
        per_sample = self.per_sample(image_tokens, text.tokens, image_mask, text.mask, ids, logit_scale, peers)
        if text.right is not None:
            per_sample = nan_unless(text.right, per_sample)
        return self.reduce(per_sample, sample_weight, peers)

    def check_inputs(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        image_mask: Tensor | None,
        text_mask: Tensor | None,
        pids: Tensor | None,
        logit_scale: float | Tensor | None = None,
        sample_weight: Tensor | None = None,
        lengths: Lengths = (None, None, None),
        *,
        shared: bool,
    ) -> tuple[Captions, Tensor | None]:
        """Captions and pids to go on with. `shared`: other ranks wait, so what cannot run here must be known before."""
        check_float("image_tokens", image_tokens, "B N D")
        text = captions(text_tokens, text_mask, lengths, image_tokens, shared=shared)
        check_same("image_tokens and text_tokens", image_tokens, text.tokens, dims=[("B", 0), ("D", 2)])
        if image_mask is not None:
            check_mask("image_mask", image_mask, image_tokens)
        if logit_scale is not None:
            check_scale(logit_scale)
        if sample_weight is not None:
            check_weight("sample_weight", sample_weight, text.tokens[:, 0, 0])
        if shared:
            select_backend(self.backend, image_tokens, text.tokens)
        return text, self.check_pids(pids, image_tokens)

    def per_sample(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        image_mask: Tensor | None,
        text_mask: Tensor | None,
        pids: Tensor | None,
        logit_scale: float | Tensor | None,
        peers: Peers,
    ) -> Tensor:
        """The four terms of the own pairs, added, [b]."""
        if text_mask is not None and not self.gather:  # what travels has the same L everywhere
            L = longest(text_mask)
            text_tokens, text_mask = text_tokens[:, :L], text_mask[:, :L]
        chosen = select_backend(self.backend, image_tokens, text_tokens)
        flat = self.pool_scale < FLAT
        text_sim, image_sim = _similarities(
            image_tokens, text_tokens, image_mask, text_mask, peers,
            sparsity=self.sparsity, pool="log_mean" if flat else "lse", pool_scale=self.pool_scale, backend=chosen,
        )  # fmt: skip
        # A margin is added to every logit of a row, and so to its term: the four terms add up to the same with the mean
        # of the margins in each.
        margin = (self.margin_text + self.margin_image) / 2
        scale = 1 / self.temperature if logit_scale is None else resolve_scale(logit_scale, 1.0, text_sim)
        if peers.group is None and not flat:
            return rank(text_sim, image_sim, pids, margin, scale, chosen)
        b, B, offset = *text_sim.shape, peers.offset
        if pids is None:
            everyone = torch.arange(B, device=text_sim.device)
            excluded = everyone[offset : offset + b, None] == everyone
        else:
            excluded = pids[:, None] == peers.gather(pids)
        sims = torch.stack([text_sim, image_sim, peers.transpose(text_sim), peers.transpose(image_sim)])
        levels = None
        if flat:
            levels = _level_differences(image_tokens, text_tokens, image_mask, text_mask, peers, sims.dtype)
            levels = levels / self.pool_scale
        return ranking_term(sims, excluded, margin, scale, offset, levels).sum(dim=0)


class EFAOptions(ScaledOptions, total=False):
    margin_text: float
    margin_image: float
    pool_scale: float
    sparsity: float | None
    negatives: Negatives
    image_mask: Tensor | None
    text_mask: Tensor | None
    text_lengths: Tensor | None
    text_cu_seqlens: Tensor | None
    text_max_seqlen: int | None
    pids: Tensor | None


@functional(EFALoss)
def efa_loss(image_tokens: Tensor, text_tokens: Tensor, **options: Unpack[EFAOptions]) -> Tensor:
    """Functional form of `EFALoss`, which documents every argument.

    Example:
        >>> tokens = torch.eye(4).unsqueeze(1)           # four pairs of one patch and one token, all orthogonal
        >>> efa_loss(tokens, tokens)                     # 4 (log 3 + 0 - 1 + 0.1)
        tensor(0.7944)
    """

    return EFALoss.of(image_tokens, text_tokens, **options)
