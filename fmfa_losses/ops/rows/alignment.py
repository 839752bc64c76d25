"""The torch path of both similarities of EFA, Eq. 5-10: rows of kept tokens from the first product to the last.

    e_i = sparse aggregation of image i's patches for the tokens of text i              aggregation.py
    S_ij = pool_l max_k cos(x_il, e_jk) for x = text and for x = image                  match.py

Tokens that a mask leaves out are taken out once. Of texts and images no unit rows are made: the length of x_il divides
its best match and not its 512 numbers.
"""

from typing import NamedTuple

from torch import Tensor

from ..checks import on_host
from ..precision import accumulation_dtype, across, row_norms
from ..threads import on_threads
from .aggregation import joint_gradients, joint_rows
from .layout import Layout, layout
from .match import Gradients, in_order, match, match_gradients

__all__ = ["Saved", "backward", "forward"]


class Saved(NamedTuple):
    """What the backward needs besides the inputs."""

    joint: Tensor  # [B, L, D], rows of kept tokens first
    text_weights: Tensor  # match.py
    text_winners: Tensor
    image_weights: Tensor
    image_winners: Tensor


def forward(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    sparsity: float | None,
    pool: str,
    pool_scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Saved]:
    """S of the texts and of the images (rows) with all joint embeddings, [B, B] each."""
    dtype = accumulation_dtype(image_tokens, text_tokens)
    images, texts = layout(image_tokens, image_mask), layout(text_tokens, text_mask)
    image, text = images.pack(image_tokens, dtype), texts.pack(text_tokens, dtype)
    joint = text.new_empty(text_tokens.shape[0] * text_tokens.shape[1], text.shape[1])
    rows = joint[: len(text)]
    joint[len(text) :] = 0
    on_threads(joint_rows(image, text, images, texts, sparsity, False, rows), text.device)
    unit = _unit(*_in_range(rows)[:2])
    options = pool, pool_scale, save
    found = []
    for x, xs in ((text, texts), (image, images)):
        x, inverse, _ = _in_range(x)
        found.append(match(x, unit, xs, texts, *options, inverse))
    of_text, of_image = found
    on_threads([*of_image.tasks, *of_text.tasks], text.device)
    sims = in_order(of_text.sim, texts, texts), in_order(of_image.sim, images, texts)
    kept = of_text.weights, of_text.winners, of_image.weights, of_image.winners
    return *sims, Saved(joint.view(text_tokens.shape), *kept)


def backward(
    dtext_sim: Tensor,
    dimage_sim: Tensor,
    saved: Saved,
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    sparsity: float | None,
    pool: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the image and the text tokens."""
    dtype = accumulation_dtype(image_tokens, text_tokens)
    images, texts = layout(image_tokens, image_mask), layout(text_tokens, text_mask)
    image, text = images.pack(image_tokens, dtype), texts.pack(text_tokens, dtype)
    joint, inverse, factor = _in_range(saved.joint.flatten(0, 1)[: len(text)])
    unit = _unit(joint, inverse)

    def of_similarity(dsim: Tensor, weights: Tensor, winners: Tensor, x: Tensor, xs: Layout) -> Gradients:
        x, inverse, factor = _in_range(x)
        return match_gradients(dsim, weights, winners, x, unit, xs, texts, pool, inverse, factor)

    of_text = of_similarity(dtext_sim, saved.text_weights, saved.text_winners, text, texts)
    of_image = of_similarity(dimage_sim, saved.image_weights, saved.image_winners, image, images)
    on_threads([*of_image.tasks, *of_text.tasks], text.device)
    dimage, dtext, djoint = of_image.dx, of_text.dx, of_text.de

    def finish(rows: slice) -> None:
        d = (djoint[rows] + of_image.de[rows]) * inverse[rows].unsqueeze(1)
        across(d, joint[rows], inverse[rows], out=djoint[rows])
        if factor is not None:
            djoint[rows] *= factor[rows].unsqueeze(1)

    arguments = image, text, images, texts, sparsity, False, dimage, dtext, finish
    on_threads(joint_gradients(djoint, *arguments), text.device)
    return images.unpack(dimage, image_tokens.dtype), texts.unpack(dtext, text_tokens.dtype)


def _in_range(x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """f x [K, D], 1 / |f x| [K], and f [K], powers of two that keep squares in range; None: all 1."""
    norm, factor = row_norms(x, x.dtype, backend="torch").squeeze(2)
    if on_host(factor) and bool((factor == 1).all()):
        return x, norm.reciprocal_(), None
    return x * factor.unsqueeze(1), norm.reciprocal_(), factor


def _unit(x: Tensor, inverse: Tensor) -> Tensor:
    return x * inverse.unsqueeze(1)
