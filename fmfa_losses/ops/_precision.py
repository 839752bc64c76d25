"""Precision of a loss: float32 or better whatever the input, and no autocast inside."""

import torch
from torch import Tensor

from ._checks import on_host
from ._operator import operator, register_gradient

__all__ = ["accumulation_dtype", "full_precision", "product", "row_norms", "unit_rows"]


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when any tensor is float64, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def full_precision(tensor: Tensor) -> torch.autocast:
    """Context in which matrix products on the tensor's device keep their inputs' dtype, autocast or not."""
    return torch.autocast(tensor.device.type, enabled=False)


def row_norms(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """|f x| along the last dimension and f, [..., 1] each: f x / |f x| is the unit vector, and f / |f x| is 1 / |x|.

    f is a power of two, so that no square overflows or vanishes; None where it is 1 for every row. Both are the same
    number for a zero vector: its unit vector is zero, and its 1 / |x| counts as 1.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    if x.dtype == torch.float16 or (dtype == torch.float64 and x.dtype != dtype):  # squares are far from the limits
        return norm.masked_fill_(norm == 0, 1), None
    limit, power = (2.0**300, 2.0**700) if dtype == torch.float64 else (2.0**40, 2.0**88)
    if on_host(norm) and bool(((norm >= 1 / limit) & (norm <= limit)).all()):
        return norm, None
    factor = torch.where(norm > limit, 1 / power, torch.where(norm < 1 / limit, power, torch.ones_like(norm)))
    norm = torch.linalg.vector_norm(x * factor, dim=-1, keepdim=True)
    return torch.where(norm == 0, factor, norm), factor


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
def _product_fake(a, b):  # type: ignore[no-untyped-def]
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
    """u, |f x| and f (`row_norms`), which are all that its gradient needs: dx = (du - u (u . du)) / |x| + f u d|f x|.

    All are outputs, so that a second derivative finds its way through them to x; plain operations make it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, mask, dtype):  # type: ignore[no-untyped-def]
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
        norm, factor = row_norms(x, dtype)
        return (x / norm, norm) if factor is None else ((x * factor).div_(norm), norm, factor)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, mask, _ = inputs
        ctx.dtype = x.dtype
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(mask, *output)
        ctx.save_for_forward(mask, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dunit, dnorm, *_):  # type: ignore[no-untyped-def]
        mask, unit, norm, *factor = ctx.saved_tensors
        dx = None
        if dunit is not None:
            with full_precision(unit):
                radial = torch.linalg.vecdot(unit, dunit).unsqueeze(-1)
            dx = torch.addcmul(dunit, unit, radial, value=-1)
            dx = dx.mul_(factor[0] / norm) if factor else dx.div_(norm)
        if dnorm is not None:  # of a second derivative alone
            along = unit * (dnorm * factor[0] if factor else dnorm)
            dx = along if dx is None else dx + along
        if dx is None:
            return None, None, None
        if mask is not None:
            dx.masked_fill_(~mask.unsqueeze(-1), 0)
        return dx.to(ctx.dtype), None, None


class _UnitRowsInEitherMode(_UnitRows):
    @staticmethod
    def jvp(ctx, dx, *_):  # type: ignore[no-untyped-def]
        mask, unit, norm, *factor = ctx.saved_tensors
        dx = dx.to(unit.dtype)
        if mask is not None:
            dx = dx.masked_fill(~mask.unsqueeze(-1), 0)
        if factor:
            dx = dx * factor[0]
        with full_precision(unit):
            dnorm = torch.linalg.vecdot(unit, dx).unsqueeze(-1)
        return (dx - unit * dnorm) / norm, dnorm, *[None] * len(factor)
