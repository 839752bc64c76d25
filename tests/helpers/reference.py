"""The two operations as their equations stand, and the error that a kernel may have."""

import torch
from torch import Tensor


def aggregate_reference(image: Tensor, text: Tensor, mask: Tensor | None, threshold: Tensor) -> Tensor:
    """joint [B, L, D] of image [B, N, D] and text [B, L, D], in their dtype; constant rows are uniform."""
    keep = torch.ones(image.shape[:2], dtype=torch.bool) if mask is None else mask
    count = keep.sum(1).view(-1, 1, 1)
    s = text @ image.mT
    low = s.masked_fill(~keep[:, None], torch.inf).amin(-1, keepdim=True)
    high = s.masked_fill(~keep[:, None], -torch.inf).amax(-1, keepdim=True)
    # The kernels' float32 decides what is noise, whatever the precision here.
    noise = 8 * torch.finfo(torch.float32).eps * torch.maximum(low.abs(), high.abs())
    constant = (high - low <= noise) & (high - low < torch.inf) | (count == 0)
    n = (s - low.masked_fill(constant, 0)) / (high - low).masked_fill(constant, 1)
    m = torch.where(keep[:, None] & ~(n < threshold.to(s.dtype).view(-1, 1, 1)), n, 0)
    a = m / m.sum(-1, keepdim=True).masked_fill(constant, 1)
    a = torch.where(constant, (keep[:, None] / count.clamp(min=1)).to(s.dtype), a)
    return a @ image


def hard_similarity_reference(
    x: Tensor, e: Tensor, x_mask: Tensor | None, e_mask: Tensor | None, pool: str, scale: float
) -> tuple[Tensor, Tensor]:
    """sim [Bx, Be] and winners [Bx, Be, P] of unit rows x [Bx, P, D] and e [Be, Q, D], in their dtype."""
    x_keep = torch.ones(x.shape[:2], dtype=torch.bool) if x_mask is None else x_mask
    e_keep = torch.ones(e.shape[:2], dtype=torch.bool) if e_mask is None else e_mask
    keep = x_keep[:, None, :] & e_keep.any(1)[None, :, None]
    cos = torch.einsum("ild,jkd->ijlk", x, e).masked_fill(~e_keep[None, :, None], -torch.inf)
    best = cos.amax(-1)  # amax would share the gradient of a tie: the winner takes it
    winner = (cos == best.unsqueeze(-1)).to(torch.uint8).argmax(-1)  # lowest k
    best = cos.gather(-1, winner.unsqueeze(-1)).squeeze(-1)
    if pool == "lse":
        z = (scale * best).masked_fill(~keep, -torch.inf)
        z = z.masked_fill(~keep.any(-1, keepdim=True), 0)
        sim = z.logsumexp(-1).masked_fill(~keep.any(-1), 0) / scale
    else:
        sim = best.masked_fill(~keep, 0).sum(-1)
        if pool == "mean":
            sim = sim / keep.sum(-1).clamp(min=1)
    return sim, winner.masked_fill(~keep, -1)


def error(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact|; anything not finite fails."""
    assert torch.isfinite(value).all(), "not every element was written with a finite number"
    return float(torch.linalg.vector_norm(value.double() - exact) / torch.linalg.vector_norm(exact).clamp(min=1e-30))


def within_budget(value: Tensor, exact: Tensor, plain: Tensor, scale: float = 1.0) -> None:
    """No worse against float64 than plain PyTorch in the same dtype, plus a few roundings of float32.

    `scale` is what an exponential multiplies a rounding of its argument by.
    """
    allowed = 1.5 * error(plain, exact) + (8 + scale) * torch.finfo(torch.float32).eps
    assert error(value, exact) <= allowed, f"error {error(value, exact):.2e}, allowed {allowed:.2e}"
