"""Sparse token-patch aggregation: each text token gathers the patches that matter to it, Eq. 5-8.

With u_k = s_k - min s over the patches that pass the threshold, the weights are a_k = u_k / sum u: the range cancels,
so the maximum decides who passes and otherwise carries no gradient. That leaves one short backward:

    da_k = de . v_k,   ds_k = (da_k - sum_j a_j da_j) / sum u   for patches that passed, minus their sum at the minimum

Who passes is decided alike everywhere: n, rounded to the nearest number, is compared with the threshold, rounded to the
nearest number. A patch whose n is 1/N exactly is then exactly at the threshold, in every precision.
"""

import torch
from einops import einsum, rearrange
from torch import Tensor

from .backend import select_backend
from .checks import check_float, check_fraction, check_mask, check_same
from .operator import differentiable_once, operator
from .options import Backend
from .precision import accumulation_dtype
from .rows.aggregation import CONSTANT_ROW_EPS, joint_gradients, joint_rows
from .rows.layout import layout
from .threads import on_threads

__all__ = ["aggregate", "sparse_aggregate", "sparse_aggregate_reference"]


def sparse_aggregate_reference(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    image_mask: Tensor | None = None,
    sparsity: float | None = None,
) -> Tensor:
    """The specification of `sparse_aggregate`: Eq. 5-8 one after the other."""
    acc = accumulation_dtype(image_tokens, text_tokens)
    image_tokens, text_tokens = image_tokens.to(acc), text_tokens.to(acc)
    keep = image_tokens.new_ones(image_tokens.shape[:2], dtype=torch.bool) if image_mask is None else image_mask
    image_tokens = image_tokens.masked_fill(~rearrange(keep, "b n -> b n 1"), 0)
    keep = rearrange(keep, "b n -> b 1 n")
    count = keep.sum(dim=-1, keepdim=True)
    threshold = 1 / count.clamp(min=1).to(acc) if sparsity is None else torch.full_like(count, sparsity, dtype=acc)

    s = einsum(text_tokens, image_tokens, "b l d, b n d -> b l n")
    low = s.masked_fill(~keep, torch.inf).min(dim=-1, keepdim=True).values
    high = s.masked_fill(~keep, -torch.inf).max(dim=-1, keepdim=True).values
    constant = high - low <= CONSTANT_ROW_EPS * torch.finfo(acc).eps * torch.maximum(high.abs(), low.abs())
    constant = (constant & (high - low < torch.inf)) | (count == 0)  # a range that overflows is not: it gives NaN
    # The inner fills keep what a constant row does not use, and its gradient, finite.
    n = (s - low.masked_fill(constant, 0)) / (high - low).masked_fill(constant, 1)
    m = torch.where(keep & ~(n < threshold), n, 0)
    a = m / m.sum(dim=-1, keepdim=True).masked_fill(constant, 1)
    a = torch.where(constant, keep / count.clamp(min=1).to(acc), a)
    return einsum(a, image_tokens, "b l n, b n d -> b l d")


def sparse_aggregate(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    image_mask: Tensor | None = None,
    sparsity: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Joint embedding of every text token: the sparse weighted mean of its own image's patches.

        s_ij = t_i . v_j,   n_ij = (s_ij - min_k s_ik) / (max_k s_ik - min_k s_ik)
        m_ij = n_ij if n_ij >= sparsity else 0,   a_ij = m_ij / sum_k m_ik,   e_i = sum_j a_ij v_j

    Args:
        image_tokens: [B, N, D], any float dtype; patches without [CLS], not normalised.
        text_tokens: [B, L, D], any float dtype.
        image_mask: [B, N] bool, True = keep; minimum, maximum and N range over the kept patches.
        sparsity: threshold in [0, 1]; 1/N when None.
        backend: "auto", "triton" or "torch".

    Returns:
        [B, L, D], float32 (float64 when an input is). A token that is equally similar to all patches (and N == 1)
        gathers them uniformly and sends no gradient through s; a sample without patches gives zeros; a token whose
        similarities or their range overflow gives NaN. Differentiable once.

    Raises:
        TypeError, ValueError: rank, width, batch, dtype, device or mask do not fit; sparsity outside [0, 1].
        RuntimeError: backend="triton" cannot run; the message says why.

    Example:
        >>> patches = torch.tensor([[[4.0, 0.0], [2.0, 1.0], [0.0, 8.0]]])
        >>> sparse_aggregate(patches, torch.tensor([[[1.0, 0.0]]]))     # s = 4, 2, 0; a = 2/3, 1/3, 0
        tensor([[[3.3333, 0.3333]]])

    Reference: SPARC, arXiv 2401.09865; Yin et al., arXiv 2509.13754v2, Eq. 5-8.
    """
    check_float("image_tokens", image_tokens, "B N D")
    check_float("text_tokens", text_tokens, "B L D")
    check_same("image_tokens and text_tokens", image_tokens, text_tokens, dims=[("B", 0), ("D", 2)])
    check_mask("image_mask", image_mask, image_tokens)
    sparsity = None if sparsity is None else check_fraction("sparsity", sparsity)
    return aggregate(
        image_tokens, text_tokens, image_mask, sparsity, select_backend(backend, image_tokens, text_tokens)
    )


def aggregate(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_mask: Tensor | None,
    sparsity: float | None,
    backend: str,
    *,
    text_mask: Tensor | None = None,
    strict: bool = False,
) -> Tensor:
    """`sparse_aggregate` of inputs that are checked; `backend` is "triton" or "torch".

    A token that text_mask leaves out has a joint embedding of 0, and gets and sends no gradient. `strict`: a patch
    passes with n > sparsity, not with n >= sparsity.
    """
    if image_tokens.dtype != text_tokens.dtype or (backend == "torch" and image_tokens.dtype.itemsize == 2):
        acc = accumulation_dtype(image_tokens, text_tokens)
        image_tokens, text_tokens = image_tokens.to(acc), text_tokens.to(acc)
    inputs = image_tokens, text_tokens, image_mask, text_mask
    joint: Tensor = _aggregation(*inputs, sparsity, strict, backend)[0]
    return joint


@operator(
    "sparse_aggregation(Tensor image_tokens, Tensor text_tokens, Tensor? image_mask, Tensor? text_mask,"
    " float? sparsity, bool strict, str backend) -> (Tensor, Tensor)",
)
def sparse_aggregation_op(image_tokens, text_tokens, image_mask, text_mask, sparsity, strict, backend):  # type: ignore[no-untyped-def]
    """joint [B, L, D] and sum u of every row [B, L], which only the kernels read again."""
    if backend == "triton":
        from fmfa_losses.kernels import aggregation as kernels

        return kernels.forward(image_tokens, text_tokens, image_mask, text_mask, sparsity, strict=strict)
    images, texts = layout(image_tokens, image_mask), layout(text_tokens, text_mask)
    rows = images.pack(image_tokens, image_tokens.dtype), texts.pack(text_tokens, text_tokens.dtype)
    joint = torch.empty_like(rows[1])
    on_threads(joint_rows(*rows, images, texts, sparsity, strict, joint), joint.device)
    joint = texts.unpack(joint, joint.dtype)
    return joint, joint.new_zeros(joint.shape[:2])


@operator(
    "sparse_aggregation_backward(Tensor djoint, Tensor image_tokens, Tensor text_tokens, Tensor? image_mask,"
    " Tensor? text_mask, Tensor row_sum, float? sparsity, bool strict, str backend) -> (Tensor, Tensor)",
)
def sparse_aggregation_backward_op(  # type: ignore[no-untyped-def]
    djoint, image_tokens, text_tokens, image_mask, text_mask, row_sum, sparsity, strict, backend
):
    if backend == "triton":
        from fmfa_losses.kernels import aggregation as kernels

        return kernels.backward(djoint, image_tokens, text_tokens, image_mask, sparsity, row_sum, strict=strict)
    images, texts = layout(image_tokens, image_mask), layout(text_tokens, text_mask)
    rows = images.pack(image_tokens, image_tokens.dtype), texts.pack(text_tokens, text_tokens.dtype)
    dimage, dtext = (torch.zeros_like(x) for x in rows)
    djoint = texts.pack(djoint, djoint.dtype)
    on_threads(joint_gradients(djoint, *rows, images, texts, sparsity, strict, dimage, dtext), djoint.device)
    return images.unpack(dimage, image_tokens.dtype), texts.unpack(dtext, text_tokens.dtype)


@torch.library.register_fake(sparse_aggregation_op)
def _fake(image_tokens, text_tokens, image_mask, text_mask, sparsity, strict, backend):  # type: ignore[no-untyped-def]
    acc = accumulation_dtype(image_tokens)
    return text_tokens.new_empty(text_tokens.shape, dtype=acc), text_tokens.new_empty(text_tokens.shape[:2], dtype=acc)


@torch.library.register_fake(sparse_aggregation_backward_op)
def _backward_fake(djoint, image_tokens, text_tokens, image_mask, text_mask, row_sum, sparsity, strict, backend):  # type: ignore[no-untyped-def]
    # Contiguous, as both backends return them, whatever the strides of the tokens.
    image, text = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (image_tokens, text_tokens))
    return image, text


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, sparsity, strict, backend = inputs
    ctx.options = sparsity, strict, backend
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, djoint, drow_sum):  # type: ignore[no-untyped-def]
    if djoint is None:
        return (None,) * 7
    return *_aggregation_backward(djoint, *ctx.saved_tensors, *ctx.options), *(None,) * 5


_aggregation, _aggregation_backward = differentiable_once(
    sparse_aggregation_op, sparse_aggregation_backward_op, _backward, _setup_context, "sparse_aggregate", "EFA"
)
