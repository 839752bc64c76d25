"""What a row of A-SDM pays, from blocks of columns that are seen one at a time, Eq. 1-4.

Let p^b be a row's distribution within block b, and w_b the block's share of the row, the sum of its p_j. Then

    KL = sum_j p_j (log p_j - log(t_j + eps)) = sum_b w_b (KL_b + log w_b)

with KL_b of p^b against the same target t; top and positive are a maximum and a pick over blocks. So a block leaves
four numbers a row, whatever its width, and the result is exact although the blocks are never in one place.
"""

import torch
from torch import Tensor

from ..options import Positive
from ..precision import product

__all__ = ["block_statistics", "label_sums", "merge_blocks"]


def block_statistics(
    queries: Tensor,
    keys: Tensor,
    row_ids: Tensor,
    column_ids: Tensor,
    label_sum: Tensor,
    *,
    scale: float | Tensor,
    factor: float,
    positive: Positive,
    paired: bool,
    eps: float,
) -> Tensor:
    """What one block of columns says of every row.

    Args:
        queries, keys: [R, D] and [C, D] unit rows.
        row_ids, column_ids: [1, R] and [1, C] identities, or [2, R] and [2, C] identities and images.
        label_sum: [R, 1], what the labels y = factor [same pid] + (1 - factor) [same image] are divided by.
        scale: of the logits, a number or a 0-dim tensor.
        positive: "paired" or "any".
        paired: row i was sampled with column i of this block.
        eps: added to the target inside the logarithm.

    Returns:
        [4, R]: top = max z, log sum e^(z - top), KL_b, and z at the positive (-inf where this block has none).
    """
    same, *same_image = row_ids[:, :, None] == column_ids[:, None, :]
    y = same.to(queries.dtype)
    if same_image:
        y = factor * y + (1 - factor) * same_image[0].to(queries.dtype)
    z = scale * product(queries, keys)
    top = z.max(dim=1).values
    log_p = z - top[:, None]
    log_sum = log_p.logsumexp(dim=1)
    log_p = log_p - log_sum[:, None]
    divergence = (log_p.exp() * (log_p - (y / label_sum + eps).log())).sum(dim=1)
    if positive == "paired":
        chosen = torch.arange(len(z), device=z.device)
        candidates = same if paired else torch.zeros_like(same)
    else:
        chosen = z.masked_fill(~same, -torch.inf).argmax(dim=1)
        candidates = same
    chosen = chosen.clamp(max=z.shape[1] - 1)[:, None]
    at_positive = z.masked_fill(~candidates, -torch.inf).gather(1, chosen).squeeze(1)
    return torch.stack([top, log_sum, divergence, at_positive])


def merge_blocks(blocks: Tensor, *, alpha: float, detach_weight: bool) -> Tensor:
    """w_i KL_i of every row, [R], from what all blocks in order say of it, [W, 4, R]."""
    top, log_sum, divergence, chosen = blocks.unbind(dim=1)
    highest = top.max(dim=0).values
    relative = top - highest + log_sum
    log_sum = relative.logsumexp(dim=0)
    log_share = relative - log_sum
    divergence = (log_share.exp() * (divergence + log_share)).sum(dim=0)
    gap = (-log_sum).exp() - (chosen.max(dim=0).values - highest - log_sum).exp()
    weight = 1 + alpha * gap
    return (weight.detach() if detach_weight else weight) * divergence


def label_sums(ids: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """sum_k y_ik of every sample, [B], from ids [1 or 2, B], without a [B, B] matrix."""
    ordered = ids.sort(dim=1).values
    counts = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    pid, *image = counts.to(dtype)
    total: Tensor = factor * pid + (1 - factor) * image[0] if image else pid
    return total
