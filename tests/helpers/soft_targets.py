"""Soft targets written out: one number after the other, from the equations."""

import math

import torch
from torch import Tensor


def cosines(queries: Tensor, keys: Tensor) -> Tensor:
    norms = torch.einsum("md,md->m", queries, queries).sqrt(), torch.einsum("cd,cd->c", keys, keys).sqrt()
    return torch.einsum("md,cd->mc", queries, keys) / (norms[0][:, None] * norms[1])


def _near(scores: list[list[float]], k: int) -> list[set[int]]:
    return [set(sorted(range(len(row)), key=lambda j, row=row: (-row[j], j))[:k]) for row in scores]


def labels(pids: Tensor | None, image_ids: Tensor | None, n: int, factor: float = 0.3) -> list[list[float]]:
    """y; the pair alone without pids."""
    y = [[float(i == j if pids is None else pids[i] == pids[j]) for j in range(n)] for i in range(n)]
    if image_ids is None:
        return y
    return [[factor * y[i][j] + (1 - factor) * float(image_ids[i] == image_ids[j]) for j in range(n)] for i in range(n)]


def targets(y: list[list[float]], teacher: Tensor, scale: float, ratio: float = 0.0, k: int = 0) -> Tensor:
    """q of the rows of teacher's cosines."""
    c, n = teacher.tolist(), len(y)
    rows, columns = _near(c, k), _near(teacher.T.tolist(), k)
    q = []
    for i in range(n):
        hard = [1.0 if j in rows[i] and i in columns[j] else y[i][j] for j in range(n)]
        soft = [math.exp(scale * c[i][j]) for j in range(n)]
        q.append([ratio * soft[j] / sum(soft) + (1 - ratio) * hard[j] / sum(hard) for j in range(n)])
    return torch.tensor(q, dtype=torch.float64)


def divided(numbers: Tensor) -> Tensor:
    return numbers.detach().double() / numbers.detach().double().sum(dim=1, keepdim=True)


def row_loss(name: str, z: Tensor, q: Tensor, eps: float) -> Tensor:
    """[B] of a direction's logits: a cross-entropy, or KL(softmax(z) || q + eps)."""
    log_p = z - z.exp().sum(dim=1, keepdim=True).log()
    if name == "itc":
        return -torch.einsum("ij,ij->i", q, log_p)
    return torch.einsum("ij,ij->i", log_p.exp(), log_p - (q + eps).log())
