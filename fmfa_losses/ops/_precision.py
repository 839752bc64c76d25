"""Precision of a loss: float32 or better whatever the input, and no autocast inside."""

import torch
from torch import Tensor

from ._operator import operator, register_gradient

__all__ = ["ZERO_NORM", "accumulation_dtype", "full_precision", "product", "unit_rows"]

# A vector no longer than this counts as zero.
ZERO_NORM = 1e-12


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when any tensor is float64, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def full_precision(tensor: Tensor) -> torch.autocast:
    """Context in which matrix products on the tensor's device keep their inputs' dtype, autocast or not."""
    return torch.autocast(tensor.device.type, enabled=False)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T, [..., m, k] and [..., n, k] -> [..., m, n], in the inputs' dtype whatever autocast says.

    `full_precision` alone would leave the backward to the autocast that it runs under: that of the caller of
    backward(), and in a compiled loss that of the forward. Differentiable as often as one likes, in either mode.
    """
    scores: Tensor = product_op(a, b)
    return scores


@operator("product(Tensor a, Tensor b) -> Tensor")
def product_op(a, b):  # type: ignore[no-untyped-def]
    with full_precision(a):
        return a @ b.mT


@torch.library.register_fake(product_op)
def _(a, b):  # type: ignore[no-untyped-def]
    return a.new_empty(*a.shape[:-1], b.shape[-2])


def _product_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)
    ctx.save_for_forward(*inputs)
    ctx.set_materialize_grads(False)


def _product_backward(ctx, dscores):  # type: ignore[no-untyped-def]
    if dscores is None:
        return None, None
    a, b = ctx.saved_tensors
    da = product(dscores, b.mT) if ctx.needs_input_grad[0] else None
    return da, product(dscores.mT, a.mT) if ctx.needs_input_grad[1] else None


def _product_jvp(ctx, da, db):  # type: ignore[no-untyped-def]
    a, b = ctx.saved_tensors
    return sum(product(x, y) for x, y in ((da, b), (a, db)) if x is not None and y is not None)


register_gradient(product_op, _product_backward, _product_context, _product_jvp)


def unit_rows(x: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """u = x / |x| along the last dimension, in float32 or better; a zero vector stays, its gradient passes as it is.

    Args:
        x: [..., D].
        mask: [...] bool; rows where it is False become zero vectors with zero gradient, whatever they held.
        dtype: of the result and its arithmetic; float32 or float64 by the input when None.
    """
    # torch.compile does not take a Function that has a jvp, and differentiates what it sees of it without one.
    function = _UnitRows if torch.compiler.is_compiling() else _UnitRowsInEitherMode
    unit: Tensor = function.apply(x, mask, dtype or accumulation_dtype(x))[0]  # type: ignore[no-untyped-call]
    return unit


class _UnitRows(torch.autograd.Function):
    """u and |x|, which are all that its gradient needs: dx = (du - u (u . du)) / |x| + u d|x|.

    Both are outputs, so that a second derivative finds its way through them to x; plain operations make it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, mask, dtype):  # type: ignore[no-untyped-def]
        x = x.to(dtype)
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        norm = norm.masked_fill(norm <= 1e-12, 1)  # ZERO_NORM; torch.compile cannot lift a global float out of here
        return x / norm, norm

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, mask, _ = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(*output, mask)
        ctx.save_for_forward(*output, mask)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dunit, dnorm):  # type: ignore[no-untyped-def]
        unit, norm, mask = ctx.saved_tensors
        dx = None
        if dunit is not None:
            with full_precision(unit):
                radial = torch.linalg.vecdot(unit, dunit).unsqueeze(-1)
            dx = torch.addcmul(dunit, unit, radial, value=-1).div_(norm)
        if dnorm is not None:  # of a second derivative alone
            dx = unit * dnorm if dx is None else dx + unit * dnorm
        if dx is None:
            return None, None, None
        if mask is not None:
            dx.masked_fill_(~mask.unsqueeze(-1), 0)
        return dx.to(ctx.dtype), None, None


class _UnitRowsInEitherMode(_UnitRows):
    @staticmethod
    def jvp(ctx, dx, *_):  # type: ignore[no-untyped-def]
        unit, norm, mask = ctx.saved_tensors
        dx = dx.to(unit.dtype)
        if mask is not None:
            dx = dx.masked_fill(~mask.unsqueeze(-1), 0)
        with full_precision(unit):
            dnorm = torch.linalg.vecdot(unit, dx).unsqueeze(-1)
        return (dx - unit * dnorm) / norm, dnorm
