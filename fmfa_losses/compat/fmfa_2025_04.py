"""FMFA as first released, in 2025-04: `model/objectives.py`, and the aggregation that `model/build.py` holds inline.

Source: yinhao1102/FMFA, arXiv 2509.13754.
"""

from torch import Tensor

from .fmfa import compute_agg_v
from .irra import compute_cmpm, compute_id, compute_itc, compute_mlm, compute_sdm, rank
from .released import released_alignment, released_asdm

__all__ = [
    "compute_a_sdm",
    "compute_agg_v",
    "compute_cmpm",
    "compute_efa",
    "compute_id",
    "compute_itc",
    "compute_mlm",
    "compute_sdm",
    "rank",
]


def compute_a_sdm(
    image_fetures: Tensor,
    text_fetures: Tensor,
    pid: Tensor,
    logit_scale: float | Tensor,
    alpha_i2t: float,
    alpha_t2i: float,
    image_id: Tensor | None = None,
    factor: float = 0.3,
    epsilon: float = 1e-8,
) -> Tensor:
    """A-SDM as released, with an alpha a direction (both 10 in its options).

    Quirks: the gap is a difference of cosines and not of probabilities, and it is measured to the first sample of the
    identity in the batch and not to the pair's own. Without them: `ASDMLoss(alpha=10.0)`, Eq. 2.
    Quirk with `image_id`: see `fmfa_losses.compat.irra.compute_sdm`; the gap then goes to the largest target.

    Args:
        image_fetures, text_fetures: [B, D].
        pid: [B] or [B, 1] integers.
        logit_scale: 1 / tau, a number or a one-element tensor on any device.
        alpha_i2t, alpha_t2i: weight of the gap for images and for texts as queries.
        image_id: [B] integers, for labels factor [same pid] + (1 - factor) [same image].
    Returns:
        Scalar, both directions summed.
    Example:
        >>> import torch
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)
        >>> args = image, text, torch.arange(3), 50.0
        >>> round((compute_a_sdm(*args, 10.0, 10.0) / compute_sdm(*args)).item(), 3)      # every gap is 1
        11.0
    """
    return released_asdm(image_fetures, text_fetures, pid, logit_scale, alpha_i2t, alpha_t2i, image_id, factor, epsilon)


def compute_efa(
    text_feat: Tensor, image_feat: Tensor, multimodal_feat: Tensor, margin_t2e: float, margin_i2e: float
) -> Tensor:
    """EFA given the joint embeddings: `released_efa(pool_scale=10)` without the aggregation.

    Quirks: the matches are pooled as log sum exp(max / 0.1) without the factor 0.1 in front; each row of S is
    L2-normalised; the diagonal stays in the sum as exp(0); both directions are reduced over dim 0. Without them:
    `EFALoss()`, Eq. 9-11.

    Args:
        text_feat: [B, L, D] text tokens.
        image_feat: [B, N, D] image patches.
        multimodal_feat: [B, L, D] joint embeddings, of `compute_agg_v`.
        margin_t2e, margin_i2e: margins for text and for images, 0.1 each in its options.
    Returns:
        Scalar.
    Example:
        >>> import torch
        >>> text, patches = torch.randn(4, 7, 8), torch.randn(4, 12, 8)
        >>> compute_efa(text, patches, compute_agg_v(text, patches), 0.1, 0.1).shape
        torch.Size([])
    """
    text_loss = released_alignment(
        text_feat, multimodal_feat, margin_t2e, 0.1, ("text_feat", "multimodal_feat", "margin_t2e")
    )
    return text_loss + released_alignment(
        image_feat, multimodal_feat, margin_i2e, 0.1, ("image_feat", "multimodal_feat", "margin_i2e")
    )
