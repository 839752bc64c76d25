"""Similarities of all texts and of all images with all joint embeddings: the kernels of EFA in the order of a step.

    forward(image [B, N, D], text [B, L, D], image_mask, text_mask, sparsity, pool, pool_scale, save)
        -> text_sim [B, B], image_sim [B, B], saved
    backward(dtext_sim, dimage_sim, saved, image, text, image_mask, text_mask, sparsity, pool)
        -> dimage, dtext

    forward    text, image -> joint -> unit joint
               text  -> unit text  -> matches -> text_sim
               image -> unit image -> matches -> image_sim
    backward   text  -> unit text  -> de += text matches;   dtext  = gather of unit joint, through the normalisation
               image -> unit image -> de += image matches;  dimage = gather of unit joint, through the normalisation
               de -> through the normalisation -> djoint -> aggregation: added to dtext and dimage

Unit texts and images are not kept: the backward makes them again, in the memory that becomes the gradient. So there
are never more of them than one in the forward, and none beside the gradients in the backward; what is kept is the unit
joint in the inputs' dtype and one match for each token and sample, `Saved`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import aggregation, hard_similarity, token_lists, unit_rows


class Saved(NamedTuple):
    """What the backward needs besides the inputs."""

    joint: Tensor  # [B, L, D], unit rows in the inputs' dtype
    inverse: Tensor  # [B, L] float32: 1 / |joint|
    row_sum: Tensor  # [B, L] float32: of the aggregation
    text_matches: Tensor  # [B, B, L], or empty
    image_matches: Tensor  # [B, B, N], or empty
    text_lists: Tensor | None
    image_lists: Tensor | None


def forward(
    image: Tensor,
    text: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    sparsity: float | None,
    pool: str,
    pool_scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Saved]:
    """text_sim, image_sim, and what the backward needs; without `save` there are no matches."""
    image, text = image.contiguous(), text.contiguous()
    raw, row_sum = aggregation.forward(image, text, image_mask, text_mask, sparsity)
    joint, inverse = unit_rows.forward(raw, text_mask, text.dtype)
    del raw
    text_lists, image_lists = (None if mask is None else token_lists.make(mask) for mask in (text_mask, image_mask))

    def similarity(tokens: Tensor, mask: Tensor | None, lists: Tensor | None) -> tuple[Tensor, Tensor]:
        unit = unit_rows.forward(tokens, mask, tokens.dtype)[0]
        return hard_similarity.forward(
            unit, joint, mask, text_mask, pool, pool_scale, save, x_lists=lists, e_lists=text_lists
        )

    text_sim, text_matches = similarity(text, text_mask, text_lists)
    image_sim, image_matches = similarity(image, image_mask, image_lists)
    return text_sim, image_sim, Saved(joint, inverse, row_sum, text_matches, image_matches, text_lists, image_lists)


def backward(
    dtext_sim: Tensor,
    dimage_sim: Tensor,
    saved: Saved,
    image: Tensor,
    text: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    sparsity: float | None,
    pool: str,
) -> tuple[Tensor, Tensor]:
    """dimage, dtext, in the inputs' dtype."""
    image, text = image.contiguous(), text.contiguous()
    joint = saved.joint
    dimage, dtext = torch.empty_like(image), torch.empty_like(text)
    de = torch.empty(joint.shape, dtype=torch.float32, device=joint.device)
    similarities = (
        (dtext_sim, saved.text_matches, text, text_mask, saved.text_lists, dtext),
        (dimage_sim, saved.image_matches, image, image_mask, saved.image_lists, dimage),
    )
    for number, (dsim, matches, tokens, mask, lists, unit) in enumerate(similarities):
        inverse = unit_rows.forward(tokens, mask, tokens.dtype, out=unit)[1]
        hard_similarity.add_gradients(
            dsim, matches, unit, tokens, joint, mask, pool, lists, saved.text_lists, inverse, de, accumulate=number > 0
        )
    unit_rows.backward(de, joint, saved.inverse, text_mask, out=de, unit=True)
    aggregation.backward(de, image, text, image_mask, sparsity, saved.row_sum, dimage, dtext)
    return dimage, dtext
