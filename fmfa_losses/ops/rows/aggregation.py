"""The torch path of the aggregation, Eq. 5-8, and its gradient, on rows of kept tokens.

    s_ij = t_i . v_j,  u_ij = s_ij - min_k s_ik where n_ij passes, else 0
    e_i = sum_j a_ij v_j,  a_ij = u_ij / sum_k u_ik

with the tokens t_i and patches v_j of one sample. The gradient is that of aggregation.py. A task takes some samples:
one product after the other, and what comes between them for all rows together.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..threads import Work
from .layout import Layout, blocks, by_device, pieces

__all__ = ["CONSTANT_ROW_EPS", "joint_gradients", "joint_rows"]

# A row whose range is within this many roundings of its largest entry is constant: its order is noise.
CONSTANT_ROW_EPS = 8

SAMPLES = 8, 2**20  # in one task, on a CPU and on an accelerator


class Task(NamedTuple):
    """Some texts with their images. What is multiplied: one sample after the other, or all, if they are alike, at once.

    The rows of each product: [l, D] of one sample, [S, l, D] of S.
    """

    tokens: slice  # rows of all its texts
    lengths: list[int] | int  # of the texts of each product, or the number of samples in the only one
    images: list[int]  # which images, by the layout
    patches: list[int]  # of each product
    keep: Tensor | None  # [R, N] which patches the R tokens have; None: all

    def of_text(self, rows: Tensor) -> Sequence[Tensor]:
        rows = rows[self.tokens]
        if isinstance(self.lengths, int):
            return [rows.view(self.lengths, -1, rows.shape[1])]
        return rows.split_with_sizes(self.lengths)

    def of_image(self, samples: Sequence[Tensor]) -> Sequence[Tensor]:
        return [samples[i] for i in self.images]

    def of_scores(self, scores: Tensor) -> Sequence[Tensor]:
        """Scores [R, N] of each product, without patches that there are not."""
        if isinstance(self.lengths, int):
            return [scores.view(self.lengths, -1, scores.shape[1])]
        parts = scores.split_with_sizes(self.lengths)
        return parts if self.keep is None else [s[:, :n] for s, n in zip(parts, self.patches, strict=True)]

    def times(self, text: Tensor, image: Sequence[Tensor]) -> Tensor:
        """text image^T, [R, N]; 0 where there is no patch."""
        s = text.new_zeros(self.tokens.stop - self.tokens.start, max(1, *self.patches))
        for t, v, out in zip(self.of_text(text), self.of_image(image), self.of_scores(s), strict=True):
            torch.matmul(t, v.mT, out=out)
        return s


def _samples(image: Tensor, images: Layout, texts: Layout) -> Sequence[Tensor]:
    """Rows of every image, [n, D], or of all images of a task, [S, N, D]."""
    if images.places is None and texts.places is None:
        B, N, D = images.shape
        return [image.view(B, N, D)[some] for some in pieces(B, by_device(*SAMPLES, image))]
    return image.split_with_sizes(images.sizes)


def joint_rows(
    image: Tensor, text: Tensor, images: Layout, texts: Layout, sparsity: float | None, strict: bool, joint: Tensor
) -> list[Work]:
    """Tasks that write the joint embeddings [K, D] of text rows [K, D] with image rows."""
    samples = _samples(image, images, texts)

    def aggregate(task: Task) -> None:
        a = _weights(task.times(text, samples), task.keep, sparsity, strict)[0]
        for weights, v, e in zip(task.of_scores(a), task.of_image(samples), task.of_text(joint), strict=True):
            torch.matmul(weights, v, out=e)

    return [partial(aggregate, task) for task in _tasks(images, texts)]


def joint_gradients(
    djoint: Tensor,
    image: Tensor,
    text: Tensor,
    images: Layout,
    texts: Layout,
    sparsity: float | None,
    strict: bool,
    dimage: Tensor,
    dtext: Tensor,
    finish: Callable[[slice], None] = lambda rows: None,
) -> list[Work]:
    """Tasks that add the gradients to rows dimage and dtext; each first calls finish(rows of djoint that it reads)."""

    samples, dsamples = _samples(image, images, texts), _samples(dimage, images, texts)

    def add(task: Task) -> None:
        finish(task.tokens)
        a, total, passed, argmin = _weights(task.times(text, samples), task.keep, sparsity, strict)
        da = task.times(djoint, samples)
        centred = (da - (a * da).sum(dim=-1, keepdim=True)) / total
        ds = torch.where(passed, centred, 0)
        ds.scatter_add_(-1, argmin, -ds.sum(dim=-1, keepdim=True))
        of_image = task.of_image(samples), task.of_image(dsamples)
        of_text = task.of_text(text), task.of_text(dtext), task.of_text(djoint)
        of_scores = task.of_scores(a), task.of_scores(ds)
        for v, dv, t, dt, de, a, ds in zip(*of_image, *of_text, *of_scores, strict=True):
            add_product = "addmm_" if v.dim() == 2 else "baddbmm_"
            getattr(dv, add_product)(a.mT, de)
            getattr(dv, add_product)(ds.mT, t)
            getattr(dt, add_product)(ds, v)

    return [partial(add, task) for task in _tasks(images, texts)]


def _tasks(images: Layout, texts: Layout) -> list[Task]:
    """Texts that are alike in length, in the order of their rows."""
    some = blocks(texts.sizes, samples=by_device(*SAMPLES, texts.counts))
    if images.places is None and texts.places is None:
        N, keep = images.shape[1], images.keep
        if keep is not None:
            keep = keep.view(-1, N).repeat_interleave(texts.shape[1], dim=0)
        return [
            Task(block.rows, len(block.sizes), [n], [N], keep if keep is None else keep[block.rows])
            for n, block in enumerate(some)
        ]
    position = torch.empty_like(images.samples)
    position[images.samples] = torch.arange(len(position), device=position.device)
    position = position[texts.samples]
    tasks = []
    for block in some:
        of_images = position[block.samples]
        patches = images.counts[of_images]
        keep = None
        if int(patches.min()) < int(patches.max()) or int(patches.max()) == 0:
            keep = torch.arange(max(1, int(patches.max())), device=patches.device) < patches.unsqueeze(1)
            keep = keep.repeat_interleave(texts.counts[block.samples], dim=0)
        tasks.append(Task(block.rows, block.sizes, of_images.tolist(), patches.tolist(), keep))
    return tasks


def _weights(
    s: Tensor, keep: Tensor | None, sparsity: float | None, strict: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a [R, N] of scores s, sum u [R, 1], which patches passed [R, N], and the index of the minimum [R, 1]."""
    if keep is not None:
        s = s.masked_fill(~keep, -torch.inf)
    high = s.amax(dim=-1, keepdim=True)
    low, argmin = (s if keep is None else s.masked_fill(~keep, torch.inf)).min(dim=-1, keepdim=True)
    span = high - low
    constant = span <= CONSTANT_ROW_EPS * torch.finfo(s.dtype).eps * torch.maximum(high.abs(), low.abs())
    constant &= span < torch.inf  # where the range overflows, u / span is inf / inf, and shows
    u = s - low
    uniform = 1 / s.new_full((1, 1), s.shape[1]) if keep is None else 1 / keep.sum(-1, True).clamp(min=1).to(s.dtype)
    threshold = uniform if sparsity is None else torch.full_like(uniform, sparsity)
    if strict:  # what lies above it
        threshold = torch.nextafter(threshold, torch.ones_like(threshold))
    # "not below" rather than "at or above": a NaN passes and shows.
    passed = ~(u / span < threshold) & ~constant
    if keep is not None:
        passed &= keep
        uniform = uniform * keep
    u = torch.where(passed, u, 0)
    total = u.sum(dim=-1, keepdim=True)
    total.masked_fill_(total == torch.inf, torch.nan)  # or its weights were 0
    a = torch.where(constant, uniform, u / torch.where(constant, 1, total))
    return a, total, passed, argmin
