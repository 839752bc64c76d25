"""The tiny batch of docs/how_it_works.md, and every number that its figures show, one plain formula after the other.

    B 2 pairs, N 6 patches, L 4 words, D 4

The four numbers of a token have names here (face, red, blue, bag), so that a reader can check them by eye.
tests/docs/test_how_it_works.py compares what is computed here, and what the page prints, with the library.
"""

import math

import torch
from torch import Tensor

__all__ = ["COSINES", "FEATURES", "IMAGE", "MARGIN", "PATCHES", "RED", "TEXT", "WORDS", "Alignment", "Statistics"]

FEATURES = ("face", "red", "blue", "bag")
PATCHES = (
    ("face", "wall", "jacket", "strap", "jeans", "bag"),
    ("face", "wall", "coat", "strap", "skirt", "bag"),
)
WORDS = (("man", "red", "jeans", "bag"), ("woman", "blue", "coat", "bag"))
RED = 1  # the word of pair 0 that the figures follow
MARGIN = 0.1

IMAGE = torch.tensor(
    [
        [[2, 0, 0, 0], [0, 0, 1, 0], [0, 3, 0, 0], [0, 2, 0, 1], [0, 0, 3, 0], [0, 0, 2, 2]],
        [[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 3, 0], [0, 0, 2, 1], [1, 0, 1, 0], [0, 2, 0, 2]],
    ],
    dtype=torch.float64,
)
TEXT = torch.tensor(
    [
        [[2, 1, 1, 0], [0.3, 2, -0.1, 0.3], [0, -0.1, 2, 0.4], [0, 0.3, -0.1, 2]],
        [[2, 0, 1, 0], [0.3, -0.1, 2, 0], [0.4, -0.2, 2, 0.5], [0.1, 1, -0.2, 2]],
    ],
    dtype=torch.float64,
)
# Texts (rows) with images of a batch of four pairs, two on each of two processes.
COSINES = torch.tensor(
    [[0.30, 0.34, 0.28, 0.31], [0.27, 0.36, 0.25, 0.29], [0.24, 0.26, 0.33, 0.30], [0.28, 0.25, 0.31, 0.35]],
    dtype=torch.float64,
)


class Alignment:
    """EFA of the tiny batch, Eq. 5-12."""

    def __init__(self, image: Tensor = IMAGE, text: Tensor = TEXT) -> None:
        self.image, self.text = image, text
        self.s = text @ image.mT  # [B, L, N]
        low, high = self.s.amin(2, keepdim=True), self.s.amax(2, keepdim=True)
        self.n = (self.s - low) / (high - low)
        self.threshold = 1 / image.shape[1]
        self.m = torch.where(self.n >= self.threshold, self.n, 0)
        self.a = self.m / self.m.sum(2, keepdim=True)
        self.joint = self.a @ image  # [B, L, D]
        self.text_cos, self.image_cos = (self._cosines(x) for x in (text, image))  # [B, B, L or N, L]
        self.text_sim, self.image_sim = (c.amax(3).logsumexp(2) for c in (self.text_cos, self.image_cos))

    def _cosines(self, x: Tensor) -> Tensor:
        unit, joint = (t / t.norm(dim=2, keepdim=True) for t in (x, self.joint))
        return torch.einsum("i l d, j k d -> i j l k", unit, joint)

    def ds(self, djoint: Tensor, word: int = RED) -> tuple[Tensor, Tensor]:
        """da and ds of one word of pair 0, from the gradient of its joint embedding."""
        s, a = self.s[0, word], self.a[0, word]
        da = self.image[0] @ djoint
        kept = a > 0
        u = (s - s.min())[kept].sum()
        ds = torch.where(kept, (da - a @ da) / u, 0)
        ds[s.argmin()] -= ds.sum()
        return da, ds

    def terms(self) -> Tensor:
        """Eq. 11 of every pair, [4, B]: texts, their columns, images, their columns. Two pairs: one negative each."""
        sims = [self.text_sim, self.text_sim.T, self.image_sim, self.image_sim.T]
        return torch.stack([s.flip(1).diagonal() - s.diagonal() + MARGIN for s in sims])

    def lists(self, j: int) -> tuple[list[int], list[int], list[list[int]]]:
        """Of texts with sample j: winners of all rows (i, l), starts of the lists, and the rows of every token."""
        winners = self.text_cos[:, j].argmax(2).flatten().tolist()
        rows = [[r for r, winner in enumerate(winners) if winner == k] for k in range(self.text.shape[1])]
        starts = [sum(len(list_) for list_ in rows[:k]) for k in range(len(rows) + 1)]
        return winners, starts, rows

    def weights(self) -> Tensor:
        """w_ijl of the texts, [B, B, L]: dL / dS_ij times a softmax over the words.

        With two pairs every logarithm of Eq. 11 has one term, so dL / dS is -1 at a pair and 1 beside it.
        """
        own = torch.eye(len(self.text), dtype=self.text.dtype)
        return (1 - 2 * own).unsqueeze(2) * self.text_cos.amax(3).softmax(2)

    def parts(self, j: int, token: int, feature: int) -> list[Tensor]:
        """What each row of a list adds to one number of de, in float32."""
        unit = (self.text / self.text.norm(dim=2, keepdim=True)).flatten(0, 1)
        L = self.text.shape[1]
        return [(self.weights()[r // L, j, r % L] * unit[r, feature]).float() for r in self.lists(j)[2][token]]


class Statistics:
    """Row 0 of A-SDM over four images in two blocks, Eq. 1-4; alpha 10, scale 50."""

    alpha, scale, eps = 10.0, 50.0, 1e-8

    def __init__(self, cosines: Tensor = COSINES) -> None:
        self.z = self.scale * cosines[0]
        target = torch.tensor([1.0, 0, 0, 0], dtype=cosines.dtype)
        self.log_target = (target + self.eps).log()
        self.blocks = [self._of(columns) for columns in (slice(0, 2), slice(2, 4))]
        self.merged = self._merge(*self.blocks)
        top, sum_e, excess = self.merged
        self.p = (self.z - top).exp() / sum_e
        self.divergence = excess / sum_e - math.log(sum_e)
        self.gap = float(self.p.max() - self.p[0])
        self.weight = 1 + self.alpha * self.gap
        self.loss = self.weight * self.divergence

    def _of(self, columns: slice) -> tuple[float, float, float]:
        z = self.z[columns]
        below = z - z.max()
        return z.max().item(), below.exp().sum().item(), (below.exp() * (below - self.log_target[columns])).sum().item()

    @staticmethod
    def _merge(a: tuple[float, float, float], b: tuple[float, float, float]) -> tuple[float, float, float]:
        top = max(a[0], b[0])
        sum_e = excess = 0.0
        for own, e, x in (a, b):
            shrink = math.exp(own - top)
            sum_e += shrink * e
            excess += shrink * (x + (own - top) * e)
        return top, sum_e, excess
