"""The match and its pooling on unit rows, as the kernels take them: the operation's own reference normalises first."""

import torch
from torch import Tensor


def unit_similarity_reference(
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
