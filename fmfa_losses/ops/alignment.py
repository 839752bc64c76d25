"""Both similarities of EFA in one operator: Eq. 5-10 from raw tokens.

    e_i = sparse aggregation of image i's patches for the tokens of text i              aggregation.py
    S_ij = pool_l max_k cos(x_il, e_jk) for x = text and for x = image                  hard_similarity.py

What the two operators compute one after the other. Together they keep less: unit tokens are never saved, and what
several gradients add to one input is added where it is written (kernels/alignment.py), and what the masks leave out is
taken out once (rows/alignment.py, the torch path).
"""

from typing import Any

import torch
from torch import Tensor

from .hard_similarity import SCALES, matches_like, saved_like
from .operator import differentiable_once, operator
from .precision import accumulation_dtype
from .rows import alignment as rows

__all__ = ["alignment_similarities"]


def alignment_similarities(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    text_mask: Tensor | None,
    *,
    sparsity: float | None,
    pool: str,
    pool_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """S of the texts and of the images (rows) with all joint embeddings, [B, B] each, differentiable once.

    Arguments are checked already. backend="triton": both kinds of tokens have one dtype that the kernels take. What the
    masks leave out may hold anything.
    """
    scale = min(max(float(pool_scale), SCALES[0]), SCALES[1])
    align = _align if backend == "triton" else _align_rows
    outputs = align(image_tokens, text_tokens, image_mask, text_mask, sparsity, pool, scale, False)
    return outputs[0], outputs[1]


# The operator. Outputs besides the similarities are what the backward needs, `Saved` of kernels/alignment.py; an empty
# tensor stands for None.

_TOKENS = "Tensor image_tokens, Tensor text_tokens, Tensor? image_mask, Tensor? text_mask"
_SAVED = (
    "Tensor joint, Tensor inverse, Tensor row_sum, Tensor text_matches, Tensor image_matches, Tensor text_lists,"
    " Tensor image_lists"
)


@operator(
    f"alignment_tiles({_TOKENS}, float? sparsity, str pool, float pool_scale, bool save)"
    f" -> ({', '.join(['Tensor'] * 9)})"
)
def alignment_op(image_tokens, text_tokens, image_mask, text_mask, sparsity, pool, pool_scale, save):  # type: ignore[no-untyped-def]
    from fmfa_losses.kernels import alignment as kernels

    arguments = (image_tokens, text_tokens, image_mask, text_mask, sparsity, pool, pool_scale, save)
    text_sim, image_sim, saved = kernels.forward(*arguments)
    return text_sim, image_sim, *(image_tokens.new_empty(0, dtype=torch.int32) if x is None else x for x in saved)


@operator(
    f"alignment_tiles_backward(Tensor dtext_sim, Tensor dimage_sim, {_SAVED}, {_TOKENS}, float? sparsity, str pool)"
    " -> (Tensor, Tensor)"
)
def alignment_backward_op(dtext_sim, dimage_sim, *arguments):  # type: ignore[no-untyped-def]
    from fmfa_losses.kernels import alignment as kernels

    *saved, text_lists, image_lists = arguments[:7]
    lists = (None if x.numel() == 0 else x for x in (text_lists, image_lists))
    return kernels.backward(dtext_sim, dimage_sim, kernels.Saved(*saved, *lists), *arguments[7:])


@torch.library.register_fake(alignment_op)
def _fake(image_tokens, text_tokens, image_mask, text_mask, sparsity, pool, pool_scale, save):  # type: ignore[no-untyped-def]
    from fmfa_losses.kernels import token_lists

    (B, N, _), L = image_tokens.shape, text_tokens.shape[1]
    new = image_tokens.new_empty
    return (
        new((B, B), dtype=torch.float32),
        new((B, B), dtype=torch.float32),
        new(text_tokens.shape),
        new((B, L), dtype=torch.float32),
        new((B, L), dtype=torch.float32),
        matches_like(image_tokens, (B, B, L), L, save),
        matches_like(image_tokens, (B, B, N), L, save),
        new(0 if text_mask is None else token_lists.size(B, L), dtype=torch.int32),
        new(0 if image_mask is None else token_lists.size(B, N), dtype=torch.int32),
    )


@torch.library.register_fake(alignment_backward_op)
def _backward_fake(dtext_sim, dimage_sim, *arguments):  # type: ignore[no-untyped-def]
    image, text = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in arguments[7:9])
    return image, text


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.sparsity, ctx.pool, _, _ = inputs
    ctx.save_for_backward(*output[2:], *tensors)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward_by(gradient: Any, ctx: Any, dtext_sim: Tensor | None, dimage_sim: Tensor | None) -> Any:
    if dtext_sim is None and dimage_sim is None:
        return (None,) * 8
    saved = ctx.saved_tensors  # once: every read unpacks all of them
    like: Any = dimage_sim if dtext_sim is None else dtext_sim
    dtext_sim, dimage_sim = (torch.zeros_like(like) if x is None else x for x in (dtext_sim, dimage_sim))
    return *gradient(dtext_sim, dimage_sim, *saved, ctx.sparsity, ctx.pool), *(None,) * 6


def _backward(ctx: Any, dtext_sim: Tensor | None, dimage_sim: Tensor | None, *_: Any) -> Any:
    return _backward_by(_align_backward, ctx, dtext_sim, dimage_sim)


_align, _align_backward = differentiable_once(
    alignment_op, alignment_backward_op, _backward, _setup_context, "efa_loss", "EFA"
)


# The same by PyTorch. Outputs besides the similarities: Saved of rows/alignment.py.

_SAVED_ROWS = "Tensor joint, Tensor text_weights, Tensor text_winners, Tensor image_weights, Tensor image_winners"


@operator(
    f"alignment_rows({_TOKENS}, float? sparsity, str pool, float pool_scale, bool save)"
    f" -> ({', '.join(['Tensor'] * 7)})"
)
def alignment_rows_op(image_tokens, text_tokens, image_mask, text_mask, sparsity, pool, pool_scale, save):  # type: ignore[no-untyped-def]
    arguments = (image_tokens, text_tokens, image_mask, text_mask, sparsity, pool, pool_scale, save)
    text_sim, image_sim, saved = rows.forward(*arguments)
    return text_sim, image_sim, *saved


@operator(
    f"alignment_rows_backward(Tensor dtext_sim, Tensor dimage_sim, {_SAVED_ROWS}, {_TOKENS}, float? sparsity,"
    " str pool) -> (Tensor, Tensor)"
)
def alignment_rows_backward_op(dtext_sim, dimage_sim, *arguments):  # type: ignore[no-untyped-def]
    return rows.backward(dtext_sim, dimage_sim, rows.Saved(*arguments[:5]), *arguments[5:])


@torch.library.register_fake(alignment_rows_op)
def _rows_fake(image_tokens, text_tokens, image_mask, text_mask, sparsity, pool, pool_scale, save):  # type: ignore[no-untyped-def]
    (B, N, _), L, dtype = image_tokens.shape, text_tokens.shape[1], accumulation_dtype(image_tokens, text_tokens)
    weights, winners = saved_like(image_tokens, (B, B, L), L, pool, save, dtype)
    image_weights, image_winners = saved_like(image_tokens, (B, B, N), L, pool, save, dtype)
    new = image_tokens.new_empty
    sims = new((B, B), dtype=dtype), new((B, B), dtype=dtype)
    return *sims, new(text_tokens.shape, dtype=dtype), weights, winners, image_weights, image_winners


@torch.library.register_fake(alignment_rows_backward_op)
def _rows_backward_fake(dtext_sim, dimage_sim, *arguments):  # type: ignore[no-untyped-def]
    image, text = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in arguments[5:7])
    return image, text


def _rows_backward(ctx: Any, dtext_sim: Tensor | None, dimage_sim: Tensor | None, *_: Any) -> Any:
    return _backward_by(_align_rows_backward, ctx, dtext_sim, dimage_sim)


_align_rows, _align_rows_backward = differentiable_once(
    alignment_rows_op, alignment_rows_backward_op, _rows_backward, _setup_context, "efa_loss", "EFA"
)
