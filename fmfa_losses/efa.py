"""EFA: explicit fine-grained alignment, Eq. 5-12 (parameter-free).

    e_i  = sparse aggregation of the image's patches for every text token               Eq. 5-8   ops/aggregation.py
    S_ij = (1/lambda) log sum_l exp(lambda max_k cos(x_il, e_jk)),  x = text, image     Eq. 9-10  ops/hard_similarity.py
    L_x2e = mean_i log sum_{j != i} exp((S_ij - S_ii + margin) / tau2)                  Eq. 11
    L    = L_t2e + L_e2t + L_i2e + L_e2i, the e2x terms on the transposed S             Eq. 12

What the released code does instead is `ranking="released"`: each row of S is L2-normalised, the diagonal stays in the
sum as exp(0), both directions are summed over the rows of S, and a patch must lie strictly above the threshold. It
leaves out the factor 1/lambda, which the normalisation of rows makes irrelevant. Its two versions:

    2025-08: margin_text=0.1, margin_image=0.9, pool_scale=1
    2025-04: margin_text=0.1, margin_image=0.1, pool_scale=10
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops._checks import check_float, check_ids, check_mask, check_option, check_positive, check_same
from .ops._precision import accumulation_dtype
from .ops.aggregation import sparse_aggregate
from .ops.hard_similarity import hard_similarity

__all__ = ["EFALoss", "efa_loss"]

RANKINGS = ("paper", "released")
NEGATIVES = ("all", "different_identity")
REDUCTIONS = ("mean", "sum", "none")


def efa_loss(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    margin_text: float = 0.1,
    margin_image: float = 0.1,
    temperature: float = 1.0,
    pool_scale: float = 1.0,
    sparsity: float | None = None,
    ranking: str = "paper",
    negatives: str = "all",
    reduction: str = "mean",
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    pids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Functional form of `EFALoss`, which documents every argument.

    Example:
        >>> tokens = torch.eye(4).unsqueeze(1)           # four pairs of one patch and one token, all orthogonal
        >>> efa_loss(tokens, tokens)                     # 4 (log 3 + 0 - 1 + 0.1)
        tensor(0.7944)
    """
    _check_hyperparameters(margin_text, margin_image, temperature, pool_scale, ranking, negatives, reduction)
    _check_inputs(image_tokens, text_tokens, image_mask, text_mask, pids, negatives)
    if text_mask is not None:
        text_tokens = text_tokens.masked_fill(~text_mask.unsqueeze(-1), 0)
    if ranking == "released" and sparsity is None and image_mask is None:
        # n > 1/N is n >= the next number after 1/N.
        N, acc = image_tokens.shape[1], accumulation_dtype(image_tokens, text_tokens)
        sparsity = min(1.0, 1 / N + torch.finfo(acc).eps / N)
    joint = sparse_aggregate(image_tokens, text_tokens, image_mask=image_mask, sparsity=sparsity, backend=backend)

    def alignment(tokens: Tensor, mask: Tensor | None, margin: float) -> Tensor:
        """Both directions between one modality and the joint embeddings, per sample [B]."""
        sim = hard_similarity(tokens, joint, x_mask=mask, e_mask=text_mask, pool_scale=pool_scale, backend=backend)
        if ranking == "released":
            return _released_ranking(sim, margin, temperature)
        positive = torch.eye(len(sim), dtype=torch.bool, device=sim.device)
        excluded = positive if pids is None or negatives == "all" else pids[:, None] == pids
        return _ranking(sim, excluded, margin, temperature) + _ranking(sim.T, excluded.T, margin, temperature)

    per_sample = alignment(text_tokens, text_mask, margin_text) + alignment(image_tokens, image_mask, margin_image)
    return per_sample if reduction == "none" else getattr(per_sample, reduction)()


def _ranking(sim: Tensor, excluded: Tensor, margin: float, temperature: float) -> Tensor:
    """log sum_{j not excluded} exp((S_ij - S_ii + margin) / temperature), [B]; 0 for a row without negatives."""
    logits = (sim - sim.diagonal()[:, None] + margin) / temperature
    alone = excluded.all(dim=1)
    # The inner fill keeps the gradient of a row without negatives finite.
    logits = logits.masked_fill(excluded, -torch.inf).masked_fill(alone[:, None], 0)
    return logits.logsumexp(dim=1).masked_fill(alone, 0)


def _released_ranking(sim: Tensor, margin: float, temperature: float) -> Tensor:
    """Both directions as released: rows of S normalised, the positive pair counted as exp(0), sums over dim 0."""
    sim = F.normalize(sim, dim=1)
    positive = sim.diagonal()
    diagonal = torch.eye(len(sim), dtype=torch.bool, device=sim.device)

    def column_sums(against: Tensor) -> Tensor:
        return ((sim - against + margin) / temperature).masked_fill(diagonal, 0).logsumexp(dim=0)

    return column_sums(positive[:, None]) + column_sums(positive[None, :])


class EFALoss(nn.Module):
    """Pulls each image's patches and each text's tokens to their joint embeddings, away from the other pairs' ones.

        L = mean_i sum_x log sum_{j != i} exp((S_ij - S_ii + margin_x) / tau2)    x in {text, image}, S and transposed S

    Args:
        margin_text, margin_image: margins of the text and the image terms. The paper: CUHK-PEDES 0.1, 0.1; ICFG-PEDES
            0.2, 1.0; RSTPReid 0.2, 0.8.
        temperature: tau2 > 0 of the ranking.
        pool_scale: lambda > 0 of the pooling over tokens.
        sparsity: a patch counts for a token from this min-max-normalised similarity on, in [0, 1]; 1/N when None.
        ranking: "paper", or "released" for the released code (see the head of fmfa_losses/efa.py).
        negatives: "all" other pairs (the paper) or only those of a "different_identity", which needs pids.
        reduction: "mean", "sum", or "none" for the per-sample sum of the four terms, [B].
        backend: "auto", "triton" or "torch".

    Inputs:
        image_tokens: [B, N, D] patches without [CLS], any float dtype; need not be normalised.
        text_tokens: [B, L, D].
        image_mask, text_mask: [B, N] and [B, L] bool, True = keep.
        pids: [B] integer identities, for negatives="different_identity".

    Returns:
        Scalar, or [B] with reduction="none"; float32 (float64 when an input is). A sample without negatives (B == 1, or
        all of one identity) counts 0; a fully masked sample has similarity 0 to everything. The [B, B, N, L]
        similarities never exist: memory beyond inputs and gradients is O(B B (N + L)).

    Raises:
        TypeError, ValueError: shapes, dtypes, devices, masks or hyperparameters that do not fit.

    Example:
        >>> loss = EFALoss(margin_text=0.2, margin_image=0.8)         # RSTPReid
        >>> image, text = torch.randn(4, 192, 64), torch.randn(4, 77, 64)
        >>> loss(image, text).shape
        torch.Size([])

    Reference: Yin et al., arXiv 2509.13754v2, Eq. 5-12.
    """

    def __init__(
        self,
        margin_text: float = 0.1,
        margin_image: float = 0.1,
        *,
        temperature: float = 1.0,
        pool_scale: float = 1.0,
        sparsity: float | None = None,
        ranking: str = "paper",
        negatives: str = "all",
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check_hyperparameters(margin_text, margin_image, temperature, pool_scale, ranking, negatives, reduction)
        self.margin_text, self.margin_image = margin_text, margin_image
        self.temperature, self.pool_scale, self.sparsity = temperature, pool_scale, sparsity
        self.ranking, self.negatives, self.reduction, self.backend = ranking, negatives, reduction, backend

    def forward(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        *,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        pids: Tensor | None = None,
    ) -> Tensor:
        return efa_loss(
            image_tokens,
            text_tokens,
            margin_text=self.margin_text,
            margin_image=self.margin_image,
            temperature=self.temperature,
            pool_scale=self.pool_scale,
            sparsity=self.sparsity,
            ranking=self.ranking,
            negatives=self.negatives,
            reduction=self.reduction,
            image_mask=image_mask,
            text_mask=text_mask,
            pids=pids,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"margin_text={self.margin_text}, margin_image={self.margin_image}, temperature={self.temperature}, "
            f"pool_scale={self.pool_scale}, ranking={self.ranking!r}, negatives={self.negatives!r}"
        )


def _check_hyperparameters(
    margin_text: float,
    margin_image: float,
    temperature: float,
    pool_scale: float,
    ranking: str,
    negatives: str,
    reduction: str,
) -> None:
    for name, margin in (("margin_text", margin_text), ("margin_image", margin_image)):
        if not -float("inf") < margin < float("inf"):
            raise ValueError(f"{name} must be a finite number, got {margin!r}")
    check_positive("temperature", temperature)
    check_positive("pool_scale", pool_scale)
    check_option("ranking", ranking, RANKINGS)
    check_option("negatives", negatives, NEGATIVES)
    check_option("reduction", reduction, REDUCTIONS)
    if ranking == "released" and negatives != "all":
        raise ValueError('ranking="released" knows only negatives="all"; use ranking="paper"')


def _check_inputs(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    pids: Tensor | None,
    negatives: str,
) -> None:
    check_float("image_tokens", image_tokens, "B N D")
    check_float("text_tokens", text_tokens, "B L D")
    check_same("image_tokens and text_tokens", image_tokens, text_tokens, dims=[("B", 0), ("D", 2)])
    check_mask("image_mask", image_mask, image_tokens)
    check_mask("text_mask", text_mask, text_tokens)
    if pids is not None:
        check_ids("pids", pids, len(image_tokens), image_tokens.device)
    elif negatives == "different_identity":
        raise ValueError('negatives="different_identity" needs the identities: pass pids [B]')
