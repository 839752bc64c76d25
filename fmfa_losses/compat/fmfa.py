"""FMFA as released in 2025-08: `model/objectives.py`, and the aggregation that `model/build_finetune.py` holds inline.

Source: yinhao1102/FMFA, arXiv 2509.13754v2.
"""

from torch import Tensor

from .irra import compute_cmpm, compute_id, compute_itc, compute_mlm, rank
from .irra import compute_sdm as _compute_sdm
from .released import released_aggregate, released_alignment, released_asdm

__all__ = [
    "compute_agg_v",
    "compute_cmpm",
    "compute_id",
    "compute_itc",
    "compute_minmax_info_loss",
    "compute_mlm",
    "compute_sdm",
    "rank",
]


def compute_sdm(
    image_fetures: Tensor,
    text_fetures: Tensor,
    pid: Tensor,
    logit_scale: float | Tensor,
    image_id: Tensor | None = None,
    factor: float = 0.3,
    epsilon: float = 1e-8,
    use_weight: bool = False,
) -> Tensor:
    """SDM, and with `use_weight` A-SDM as released.

    Quirks with `use_weight`: the gap is a difference of cosines and not of probabilities, it is measured to the first
    sample of the identity in the batch and not to the pair's own, and alpha is 0.1. Without them: `ASDMLoss()`, Eq. 2.
    Quirk with `image_id`: see `fmfa_losses.compat.irra.compute_sdm`; the gap then goes to the largest target.

    Args:
        image_fetures, text_fetures: [B, D].
        pid: [B] or [B, 1] integers.
        logit_scale: 1 / tau, a number or a one-element tensor on any device.
        image_id: [B] integers, for labels factor [same pid] + (1 - factor) [same image].
        use_weight: weigh a row by 1 + 0.1 gap.
    Returns:
        Scalar, both directions summed.
    Example:
        >>> import torch
        >>> image, text = torch.eye(3), torch.eye(3).roll(1, 0)
        >>> weighted, plain = (compute_sdm(image, text, torch.arange(3), 50.0, use_weight=w) for w in (True, False))
        >>> weighted / plain                                           # every gap is 1
        tensor(1.1000)
    """
    if not use_weight:
        return _compute_sdm(image_fetures, text_fetures, pid, logit_scale, image_id, factor, epsilon)
    return released_asdm(image_fetures, text_fetures, pid, logit_scale, 0.1, 0.1, image_id, factor, epsilon)


def compute_agg_v(text_feats: Tensor, patch_feats: Tensor) -> Tensor:
    """The block from `t2isim = ...` to `agg_v = ...` in one call: `sparse_aggregate`.

    Quirk: a patch counts above the threshold 1/N, in the paper from it on: `sparse_aggregate(patches, text)`. Where all
    patches are equally similar to a token the code gives NaN; here the token gathers them uniformly.

    Args:
        text_feats: [B, L, D].
        patch_feats: [B, N, D], image_feats[:, 1:, :].
    Returns:
        [B, L, D].
    Example:
        >>> import torch
        >>> patches = torch.tensor([[[4.0, 0.0], [2.0, 1.0], [0.0, 8.0]]])
        >>> compute_agg_v(torch.tensor([[[1.0, 0.0]]]), patches)
        tensor([[[3.3333, 0.3333]]])
    """
    return released_aggregate(patch_feats, text_feats, names=("patch_feats", "text_feats"))


def compute_minmax_info_loss(A: Tensor, B: Tensor, C: Tensor, margin: float = 0.1) -> Tensor:
    """EFA given the joint embeddings: `released_efa` without the aggregation.

    Quirks: `margin` is ignored, the margins are 0.1 for text and 0.9 for images; each row of S is L2-normalised; the
    diagonal stays in the sum as exp(0); both directions are reduced over dim 0. Without them: `EFALoss()`, Eq. 11.

    Args:
        A: [B, L, D] text tokens.
        B: [B, N, D] image patches.
        C: [B, L, D] joint embeddings, of `compute_agg_v`.
    Returns:
        Scalar.
    Example:
        >>> import torch
        >>> text, patches = torch.randn(4, 7, 8), torch.randn(4, 12, 8)
        >>> compute_minmax_info_loss(text, patches, compute_agg_v(text, patches)).shape
        torch.Size([])
    """
    text_loss = released_alignment(A, C, 0.1, 1.0, ("A", "C", "margin"))
    return text_loss + released_alignment(B, C, 0.9, 1.0, ("B", "C", "margin"))
