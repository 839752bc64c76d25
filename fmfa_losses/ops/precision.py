"""Precision of a loss: float32 or better whatever the input, and no autocast inside."""

import torch
from torch import Tensor

from .backend import select_backend
from .checks import on_host
from .operator import operator, register_gradient

__all__ = [
    "accumulation_dtype",
    "divide_by_norms",
    "full_precision",
    "product",
    "row_norms",
    "unit_rows",
]


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when any tensor is float64, float32 otherwise."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def full_precision(tensor: Tensor) -> torch.autocast:
    """Context in which matrix products on the tensor's device keep their inputs' dtype, autocast or not."""
    return torch.autocast(tensor.device.type, enabled=False)


# Norms from one over this to this: their squares are far from the limits of the dtype.
USUAL = {torch.float32: 2.0**40, torch.float64: 2.0**300}


@operator("row_norms(Tensor x, bool double, bool kernel) -> Tensor")
def row_norms_op(x, double, kernel):  # type: ignore[no-untyped-def]
    if kernel:
        from fmfa_losses.kernels.asdm_tiles import prepare

        norms: Tensor = prepare(x.reshape(-1, x.shape[-1]), None, None, None, None)[0]
        return norms.view(2, *x.shape[:-1], 1)
    dtype = torch.float64 if double else torch.float32
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    one = torch.ones_like(norm)
    if _squares_fit(x.dtype, dtype):
        return torch.stack([torch.where(norm == 0, one, norm), one])
    limit, power = USUAL[dtype], 2.0**700 if double else 2.0**88
    if on_host(norm) and bool(((norm >= 1 / limit) & (norm <= limit)).all()):
        return torch.stack([norm, one])
    factor = torch.where(norm > limit, 1 / power, torch.where(norm < 1 / limit, power, one))
    norm = torch.linalg.vector_norm(x * factor, dim=-1, keepdim=True)
    zero = norm == 0
    return torch.stack([norm.masked_fill(zero, 1), factor.masked_fill(zero, 1)])


@torch.library.register_fake(row_norms_op)
def _row_norms_fake(x, double, kernel):  # type: ignore[no-untyped-def]
    return x.new_empty((2, *x.shape[:-1], 1), dtype=torch.float64 if double else torch.float32)


def _norms_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[0], output)
    ctx.save_for_forward(inputs[0], output)


def _norms_backward(ctx, dnorms):  # type: ignore[no-untyped-def]
    x, norms = ctx.saved_tensors
    factor = norms[1].detach()
    return (dnorms[0] * factor * divide_by_norms(x, norms)).to(x.dtype), None, None


def _norms_jvp(ctx, dx, *_):  # type: ignore[no-untyped-def]
    x, norms = ctx.saved_tensors
    factor = norms[1].detach()
    with full_precision(x):
        along = torch.linalg.vecdot(divide_by_norms(x, norms), dx * factor).unsqueeze(-1)
    return torch.stack([along, torch.zeros_like(along)])


register_gradient(row_norms_op, _norms_backward, _norms_context, _norms_jvp)


def _squares_fit(dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Whether squares of `dtype` are far from the limits of `wide`."""
    return dtype == torch.float16 or (wide == torch.float64 and dtype != wide)


def row_norms(x: Tensor, dtype: torch.dtype, *, backend: str) -> Tensor:
    """|f x| along the last dimension and f, [2, ..., 1]: f x / |f x| is the unit vector, and f / |f x| is 1 / |x|.

    f is a power of two, so that no square overflows or vanishes: 1 for rows of usual length. A zero vector has 1, 1.
    On a GPU a kernel finds both in one pass, unless backend or environment say "torch".
    """
    double = dtype == torch.float64
    norms: Tensor = row_norms_op(x, double, backend != "torch" and not double and kernels_run(x))
    return norms


def kernels_run(x: Tensor) -> bool:
    return x.device.type == "cuda" and select_backend("auto", x) == "triton"


def divide_by_norms(x: Tensor, norms: Tensor) -> Tensor:
    """The unit vectors of x, in the norms' dtype."""
    norm, factor = norms.unbind()
    if _squares_fit(x.dtype, norms.dtype) or (on_host(factor) and bool((factor == 1).all())):
        return torch.div(x, norm)
    return torch.mul(x, factor).div_(norm)


def across(d: Tensor, x: Tensor, inverse: Tensor, *, out: Tensor) -> None:
    """d without its part along x, [K, D]; inverse [K] is 1 / |x|. Of x's unit rows and d / |x| that is dx."""
    radial = torch.linalg.vecdot(x, d) * inverse**2
    torch.addcmul(d, x, radial.unsqueeze(1), value=-1, out=out)


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


def unit_rows(
    x: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype | None = None, backend: str = "auto"
) -> Tensor:
    """u = x / |x| along the last dimension, in float32 or better; a zero vector stays, its gradient passes as it is.

    Args:
        x: [..., D].
        mask: [...] bool; rows where it is False become zero vectors with zero gradient, whatever they held.
        dtype: of the result and its arithmetic; float32 or float64 by the input when None.
        backend: of `row_norms`.
    """
    # torch.compile does not take a Function that has a jvp, and differentiates what it sees of it without one.
    function = _UnitRows if torch.compiler.is_compiling() else _UnitRowsInEitherMode
    unit: Tensor = function.apply(x, mask, dtype or accumulation_dtype(x), backend)[0]  # type: ignore[no-untyped-call]
    return unit


class _UnitRows(torch.autograd.Function):
    """u and (|f x|, f) of `row_norms`, all that its gradient needs: dx = (du - u (u . du)) / |x| + f u d|f x|.

    Both are outputs, so that a second derivative finds its way through them to x; plain operations make it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, mask, dtype, backend):  # type: ignore[no-untyped-def]
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
        if on_host(x):  # rows of usual length need no operator
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
            if mask is not None:
                norm.masked_fill_(~mask.unsqueeze(-1), 1)
            if bool(((norm >= 1 / USUAL[dtype]) & (norm <= USUAL[dtype])).all()):
                return torch.div(x, norm), torch.stack([norm, torch.ones_like(norm)])
        norms = row_norms(x, dtype, backend=backend)
        return divide_by_norms(x, norms), norms

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, mask = inputs[:2]
        ctx.dtype = x.dtype
        ctx.save_for_backward(*output, mask)
        ctx.save_for_forward(*output, mask)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dunit, dnorms):  # type: ignore[no-untyped-def]
        unit, norms, mask = ctx.saved_tensors
        norm, factor = norms[0], norms[1].detach()
        dx = None
        if dunit is not None:
            with full_precision(unit):
                radial = torch.linalg.vecdot(unit, dunit).unsqueeze(-1)
            dx = torch.addcmul(dunit, unit, radial, value=-1).mul_(factor / norm)
        if dnorms is not None:  # of a second derivative alone
            along = unit * (dnorms[0] * factor)
            dx = along if dx is None else dx + along
        if dx is None:
            return None, None, None, None
        if mask is not None:
            dx.masked_fill_(~mask.unsqueeze(-1), 0)
        return dx.to(ctx.dtype), None, None, None


class _UnitRowsInEitherMode(_UnitRows):
    @staticmethod
    def jvp(ctx, dx, *_):  # type: ignore[no-untyped-def]
        unit, norms, mask = ctx.saved_tensors
        norm, factor = norms[0], norms[1].detach()
        dx = dx.to(unit.dtype) * factor
        if mask is not None:
            dx = dx.masked_fill(~mask.unsqueeze(-1), 0)
        with full_precision(unit):
            dnorm = torch.linalg.vecdot(unit, dx).unsqueeze(-1)
        return (dx - unit * dnorm) / norm, torch.stack([dnorm, torch.zeros_like(dnorm)])
