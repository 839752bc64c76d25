"""RDE: `model/objectives.py`, per-sample losses on scores, and the two layers of `model/CrossEmbeddingLayer_tse.py`.

Source: QinYang79/RDE, arXiv 2308.09911. Scores are cosines, text x image, [B, B]. The released code calls the rows
i2t; both directions are summed, so no result depends on it.
"""

import torch
from torch import Tensor

from ..heads.token_selection import TokenSelection
from ..losses.itc import itc_loss_from_scores
from ..losses.scores import check_scores, check_weight, cosine_scores
from ..losses.sdm import sdm_loss_from_scores
from ..losses.tal import tal_loss_from_scores, trl_loss_from_scores
from ..ops.checks import check_divisor, check_option, check_positive
from .released import flat_ids

__all__ = [
    "TexualEmbeddingLayer",
    "VisualEmbeddingLayer",
    "compute_InfoNCE_per",
    "compute_TAL_per",
    "compute_TRL_per",
    "compute_per_loss",
    "compute_rbs",
    "compute_sdm_per",
]

LOSS_TYPES = ("TAL", "TRL", "InfoNCE", "SDM")


def compute_sdm_per(scores: Tensor, pid: Tensor, logit_scale: float | Tensor, epsilon: float = 1e-8) -> Tensor:
    """SDM of every pair: `sdm_loss_from_scores(..., reduction="none")`.

    Args:
        scores: [B, B] text x image, before the scale.
        pid: [B] or [B, 1] integers.
        logit_scale: 1 / tau, a number or a one-element tensor on any device.
    Returns:
        [B], both directions summed.
    Example:
        >>> compute_sdm_per(torch.eye(3), torch.arange(3), 50.0) < 1e-6
        tensor([True, True, True])
    """
    pid, epsilon = flat_ids("pid", pid, check_scores(scores)), check_positive("epsilon", epsilon)
    return sdm_loss_from_scores(scores, pid, logit_scale=logit_scale, eps=epsilon, reduction="none")


def compute_TRL_per(  # noqa: N802
    scores: Tensor, pid: Tensor, margin: float = 0.2, tau: float = 0.02
) -> Tensor:
    """Triplet ranking loss of every pair: `trl_loss_from_scores(..., negatives="released", reduction="none")`.

    Quirk: positives are among the negatives with similarity 0, so the hardest negative is never below 0, and a
    batch of one identity costs [margin - positive]_+. Without it: `TRLLoss()`.

    Args:
        scores: [B, B] text x image.
        pid: [B] or [B, 1] integers.
    Returns:
        [B], both directions summed.
    Example:
        >>> compute_TRL_per(torch.zeros(2, 2), torch.arange(2))
        tensor([0.4000, 0.4000])
    """
    pid, tau = flat_ids("pid", pid, check_scores(scores)), check_divisor("tau", tau)
    return trl_loss_from_scores(scores, pid, margin=margin, temperature=tau, negatives="released", reduction="none")


def compute_InfoNCE_per(scores: Tensor, logit_scale: float | Tensor) -> Tensor:  # noqa: N802
    """InfoNCE of every pair: `itc_loss_from_scores(..., reduction="none")`.

    Quirk: other images of the same person count as negatives. Without it: `ITCLoss(targets="identity")`.

    Args:
        scores: [B, B] text x image, before the scale.
        logit_scale: 1 / tau, a number or a one-element tensor on any device.
    Returns:
        [B], the mean of both directions.
    Example:
        >>> compute_InfoNCE_per(torch.zeros(2, 2), 50.0)
        tensor([0.6931, 0.6931])
    """
    return itc_loss_from_scores(scores, logit_scale=logit_scale, reduction="none")


def compute_TAL_per(scores: Tensor, pid: Tensor, tau: float, margin: float) -> Tensor:  # noqa: N802
    """Triplet alignment loss of every pair: `tal_loss_from_scores(..., reduction="none")`.

    The code there keeps the sum of exponentials below 1e36, which cuts the gradient of negatives with S > 83 tau, and
    from S > 88 tau on positives overflow to NaN all the same. Neither happens here.

    Args:
        scores: [B, B] text x image.
        pid: [B] or [B, 1] integers.
    Returns:
        [B], both directions summed.
    Example:
        >>> compute_TAL_per(torch.zeros(2, 2), torch.arange(2), 0.02, 0.1)
        tensor([0.2000, 0.2000])
    """
    pid, tau = flat_ids("pid", pid, check_scores(scores)), check_divisor("tau", tau)
    return tal_loss_from_scores(scores, pid, temperature=tau, margin=margin, reduction="none")


def compute_per_loss(
    image_features: Tensor,
    text_features: Tensor,
    pid: Tensor,
    tau: float = 0.02,
    margin: float = 0.2,
    loss_type: str = "TAL",
    logit_scale: float | Tensor = 50,
) -> tuple[Tensor, Tensor]:
    """The chosen per-sample loss, and the cosine of every pair.

    Args:
        image_features, text_features: [B, D].
        pid: [B] or [B, 1] integers.
        loss_type: contains "TAL", "TRL", "InfoNCE" or "SDM", looked for in this order.
    Returns:
        ([B], [B]).
    Raises:
        ValueError: another loss_type; there the program ends.
    Example:
        >>> loss, cosine = compute_per_loss(torch.eye(3), torch.eye(3), torch.arange(3))
        >>> loss, cosine
        (tensor([0., 0., 0.]), tensor([1., 1., 1.]))
    """
    scores = cosine_scores(image_features, text_features)
    name = next((name for name in LOSS_TYPES if name in loss_type), loss_type)
    check_option("loss_type", name, LOSS_TYPES)
    if name == "TAL":
        per_loss = compute_TAL_per(scores, pid, tau, margin=margin)
    elif name == "TRL":
        per_loss = compute_TRL_per(scores, pid, tau=tau, margin=margin)
    elif name == "InfoNCE":
        per_loss = compute_InfoNCE_per(scores, logit_scale)
    else:
        per_loss = compute_sdm_per(scores, pid, logit_scale)
    return per_loss, scores.diag()


def compute_rbs(
    i_feats: Tensor,
    t_feats: Tensor,
    i_tse_f: Tensor,
    t_tse_f: Tensor,
    pid: Tensor,
    label_hat: Tensor | None = None,
    tau: float = 0.02,
    margin: float = 0.1,
    loss_type: str = "TAL",
    logit_scale: float | Tensor = 50,
) -> tuple[Tensor, Tensor]:
    """The chosen loss on global (BGE) and on selected-token (TSE) features, over the pairs held to be clean.

    Quirk: "TAL" and "TRL" are summed over the batch, the others averaged over the weights; what a step costs then
    depends on the batch size. Without it: `TALLoss()(..., sample_weight=label_hat)`, which averages.

    Args:
        i_feats, t_feats: [B, D] global features.
        i_tse_f, t_tse_f: [B, D'] features of the selected tokens.
        pid: [B] or [B, 1] integers.
        label_hat: [B] weights of the pairs; there None fails, here it weighs all pairs 1.
    Returns:
        Two scalars: BGE, TSE.
    Example:
        >>> features = torch.eye(3)
        >>> compute_rbs(features, features, features, features, torch.arange(3), torch.ones(3))
        (tensor(0.), tensor(0.))
    """

    def weighted(image: Tensor, text: Tensor) -> Tensor:
        per_loss, _ = compute_per_loss(image, text, pid, tau, margin, loss_type, logit_scale)
        weight = torch.ones_like(per_loss) if label_hat is None else check_weight("label_hat", label_hat, per_loss)
        total = (weight * per_loss).sum()
        return total if loss_type in ("TAL", "TRL") else total / weight.sum()

    return weighted(i_feats, t_feats), weighted(i_tse_f, t_tse_f)


class TexualEmbeddingLayer(TokenSelection):
    """`TokenSelection("text")` with the published constructor and order of arguments.

    Args:
        input_dim: D.
        embed_dim: E.
        ratio: share of the tokens that is chosen.
    Inputs:
        features: [B, T, D].
        text: [B, T] token ids.
        atten: [B, T, T].
    Returns:
        [B, E], float32 or better.
    Example:
        >>> layer = TexualEmbeddingLayer(input_dim=8, embed_dim=16).eval()
        >>> layer(torch.ones(1, 7, 8), torch.tensor([[49406, 320, 786, 2342, 49407, 0, 0]]), torch.ones(1, 7, 7)).shape
        torch.Size([1, 16])
    """

    def __init__(self, input_dim: int = 512, embed_dim: int = 1024, ratio: float = 0.3) -> None:
        super().__init__("text", input_dim, embed_dim, ratio)

    def forward(self, features: Tensor, text: Tensor, atten: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(features, atten, text)


class VisualEmbeddingLayer(TokenSelection):
    """`TokenSelection("image")` with the published constructor and names of arguments.

    Args:
        input_dim: D.
        embed_dim: E.
        ratio: share of the tokens that is chosen.
    Inputs:
        base_features: [B, T, D], token 0 is [CLS].
        atten: [B, T, T].
    Returns:
        [B, E], float32 or better.
    Example:
        >>> VisualEmbeddingLayer(input_dim=8, embed_dim=16).eval()(torch.ones(1, 5, 8), torch.ones(1, 5, 5)).shape
        torch.Size([1, 16])
    """

    def __init__(self, input_dim: int = 512, embed_dim: int = 1024, ratio: float = 0.3) -> None:
        super().__init__("image", input_dim, embed_dim, ratio)

    def forward(self, base_features: Tensor, atten: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(base_features, atten)
