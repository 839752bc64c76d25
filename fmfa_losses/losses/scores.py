"""What the losses over all pairs of a batch share: scores, labels and sample weights.

Scores are [B, B], text x image: scores_ij belongs to text i and image j, and the diagonal holds the pairs of the batch.
Transposed scores have images as rows. Every loss here is a few [B, B] matrices of float32 or better.
"""

import torch
from torch import Tensor

from ..ops.checks import (
    as_tensor,
    check_float,
    check_ids,
    check_same,
    check_scalar,
    check_scale,
    describe,
    on_host,
)
from ..ops.precision import accumulation_dtype, product, unit_rows

__all__ = [
    "check_features",
    "check_scores",
    "check_weight",
    "cosine_scores",
    "divergence",
    "masked_logsumexp",
    "resolve_scale",
    "same_identity",
    "scalar_like",
]


def check_features(image: Tensor, text: Tensor, names: tuple[str, str] = ("image_features", "text_features")) -> None:
    check_float(names[0], image, "B D")
    check_float(names[1], text, "B D")
    check_same(" and ".join(names), image, text, dims=[("B", 0), ("D", 1)])


def cosine_scores(image_features: Tensor, text_features: Tensor) -> Tensor:
    """cos(t_i, v_j), [B, B], float32 or better; a zero vector has cosine 0 with everything."""
    check_features(image_features, text_features)
    dtype = accumulation_dtype(image_features, text_features)
    return product(unit_rows(text_features, dtype=dtype), unit_rows(image_features, dtype=dtype))


def check_scores(scores: Tensor, name: str = "scores") -> Tensor:
    """Checked square scores, in float32 or better."""
    check_float(name, scores, "B B")
    if scores.shape[0] != scores.shape[1]:
        raise ValueError(
            f"{name} must be square, one text and one image per sample [B, B], got {describe(scores)}; "
            "pass the pairs of one batch"
        )
    return scores.to(accumulation_dtype(scores))


def same_identity(pids: Tensor, scores: Tensor) -> Tensor:
    """[pid_i == pid_j], [B, B] bool; true on the diagonal."""
    pids = check_ids("pids", pids, scores.shape[0], scores.device)
    return pids[:, None] == pids


def divergence(logits: Tensor, target: Tensor, eps: float) -> Tensor:
    """KL(softmax_j(logits_ij) || target_ij + eps) of every row, [B]."""
    log_p = logits.log_softmax(dim=1)
    return (log_p.exp() * (log_p - (target + eps).log())).sum(dim=1)


def masked_logsumexp(logits: Tensor, keep: Tensor) -> Tensor:
    """log sum over the kept j of exp(logits_ij), [B]; -inf, with zero gradient, for a row with nothing kept."""
    empty = ~keep.any(dim=1)
    # The inner fill keeps the gradient of an empty row finite.
    kept = logits.masked_fill(~keep, -torch.inf).masked_fill(empty[:, None], 0)
    return kept.logsumexp(dim=1).masked_fill(empty, -torch.inf)


def resolve_scale(logit_scale: float | Tensor | None, temperature: float, like: Tensor) -> float | Tensor:
    """`check_scale`, a tensor in `like`'s dtype, so that it may multiply `like`."""
    scale = check_scale(logit_scale, temperature)
    return scalar_like("logit_scale", scale, like) if isinstance(scale, Tensor) else scale


def scalar_like(name: str, scalar: Tensor, like: Tensor) -> Tensor:
    """A one-element tensor as a 0-dim one in `like`'s dtype that may multiply `like`."""
    # PyTorch multiplies a CPU scalar with accelerator tensors as it is, without a copy.
    device = like.device if like.device.type == "cpu" or scalar.device.type != "cpu" else None
    return check_scalar(name, scalar).to(device=device, dtype=like.dtype)


def check_weight(name: str, weight: Tensor, per_sample: Tensor) -> Tensor:
    """Weights [B] in the dtype of the losses that they multiply; none is negative, where the host can look."""
    if not isinstance(weight, Tensor) or weight.is_complex():
        raise TypeError(f"{name} must be a tensor [B] of real numbers, got {describe(weight)}; {as_tensor(weight)}")
    if weight.shape != per_sample.shape:
        raise ValueError(
            f"{name} must have shape {list(per_sample.shape)} (one weight per pair), got {describe(weight)}; reshape it"
        )
    check_same(f"{name} and the features", weight, per_sample)
    given, weight = weight, weight.to(per_sample.dtype)
    if on_host(weight) and (weight < 0).any():
        lowest = weight[weight < 0].min().item()
        raise ValueError(
            f"{name} must not be negative, got {lowest:g} in {describe(given)}; a weight of 0 leaves a pair out"
        )
    return weight
