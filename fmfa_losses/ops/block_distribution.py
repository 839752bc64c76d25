"""What a row of A-SDM pays, from blocks of columns that are seen one at a time, Eq. 1-4.

Let p^b be a row's distribution within block b, and w_b the block's share of the row, the sum of its p_j. Then

    KL = sum_j p_j (log p_j - log(t_j + eps)) = sum_b w_b (KL_b + log w_b)

with KL_b of p^b against the same target t; top and positive are a maximum and a pick over blocks. So a block leaves
four numbers a row, whatever its width, and the result is exact although the blocks are never in one place.
"""

import torch
from torch import Tensor

from ._precision import product

__all__ = ["block_statistics", "label_sums", "merge_blocks"]


def block_statistics(
    queries: Tensor,
    keys: Tensor,
    row_ids: Tensor,
    column_ids: Tensor,
    label_sum: Tensor,
    *,
    factor: float,
    positive: str,
    paired: bool,
    eps: float,
) -> Tensor:
    """What one block of columns says of every row.

    Args:
        queries: [R, D] unit rows times the logit scale. keys: [C, D] unit rows.
        row_ids, column_ids: [1, R] and [1, C] identities, or [2, R] and [2, C] identities and images.
        label_sum: [R, 1] or [C], what the labels y = factor [same pid] + (1 - factor) [same image] are divided by.
        positive: "paired", "any" or "first".
        paired: row i was sampled with column i of this block.
        eps: added to the target inside the logarithm.

    Returns:
        [4, R]: top = max z, log sum e^(z - top), KL_b, and z at the positive (-inf where this block has none).
    """
    same, *same_image = row_ids[:, :, None] == column_ids[:, None, :]
    y = same.to(queries.dtype)
    if same_image:
        y = factor * y + (1 - factor) * same_image[0].to(queries.dtype)
    z = product(queries, keys)
    top = z.max(dim=1).values
    log_p = z - top[:, None]
    log_sum = log_p.logsumexp(dim=1)
    log_p = log_p - log_sum[:, None]
    divergence = (log_p.exp() * (log_p - (y / label_sum + eps).log())).sum(dim=1)
    if positive == "paired":
        chosen = z.diagonal() if paired else torch.full_like(top, -torch.inf)
    elif positive == "first":
        first = same.to(torch.uint8).argmax(dim=1, keepdim=True)
        chosen = z.masked_fill(~same, -torch.inf).gather(1, first).squeeze(1)
    else:
        chosen = z.masked_fill(~same, -torch.inf).max(dim=1).values
    return torch.stack([top, log_sum, divergence, chosen])


def merge_blocks(
    blocks: Tensor, *, scale: float | Tensor, alpha: float, gap: str, positive: str, detach_weight: bool
) -> Tensor:
    """w_i KL_i of every row, [R], from what all blocks in order say of it, [W, 4, R]."""
    top, log_sum, divergence, chosen = blocks.unbind(dim=1)
    highest = top.max(dim=0).values
    relative = top - highest + log_sum
    log_sum = relative.logsumexp(dim=0)
    log_share = relative - log_sum
    divergence = (log_share.exp() * (divergence + log_share)).sum(dim=0)
    if positive == "first":
        first = (chosen > -torch.inf).to(torch.uint8).argmax(dim=0, keepdim=True)
        behind = chosen.gather(0, first).squeeze(0) - highest
    else:
        behind = chosen.max(dim=0).values - highest
    distance = -behind / scale if gap == "cosine" else (-log_sum).exp() - (behind - log_sum).exp()
    weight = 1 + alpha * distance
    return (weight.detach() if detach_weight else weight) * divergence


def label_sums(ids: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """sum_k y_ik of every sample, [B], from ids [1 or 2, B], without a [B, B] matrix."""
    ordered = ids.sort(dim=1).values
    counts = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    pid, *image = counts.to(dtype)
    total: Tensor = factor * pid + (1 - factor) * image[0] if image else pid
    return total
