"""A-SDM in plain PyTorch, for tests on any machine: it needs no package besides torch."""

import torch
import torch.nn.functional as F


def plain(image, text, pids, *, temperature=0.02, alpha=10.0, positive="paired",
          detach_weight=False, eps=1e-8, image_ids=None, factor=0.3):  # fmt: skip
    """Eq. 1-4 with everything in memory."""
    sim = F.normalize(text, dim=1) @ F.normalize(image, dim=1).T
    same = pids[:, None] == pids
    y = same.to(sim.dtype)
    if image_ids is not None:
        y = factor * y + (1 - factor) * (image_ids[:, None] == image_ids).to(sim.dtype)
    q = y / y.sum(1, keepdim=True)
    total = 0
    for s in (sim, sim.T):
        log_p = (s / temperature).log_softmax(1)
        kl = (log_p.exp() * (log_p - (q + eps).log())).sum(1)
        p = log_p.exp()
        at = p.diagonal() if positive == "paired" else p.masked_fill(~same, -torch.inf).max(1).values
        weight = 1 + alpha * (p.max(1).values - at)
        total = total + (weight.detach() if detach_weight else weight) * kl
    return total
