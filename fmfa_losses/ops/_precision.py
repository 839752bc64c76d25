"""Precision of a loss: float32 or better whatever the input, and no autocast inside."""

import os

import torch
from torch import Tensor

from ._backend import why_not_triton
from ._operator import operator

__all__ = ["accumulation_dtype", "divide_by_norms", "full_precision", "row_norms", "unit_rows", "value_at_hand"]


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when any tensor is float64, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def full_precision(tensor: Tensor) -> torch.autocast:
    """Context in which matrix products on the tensor's device keep their inputs' dtype, autocast or not."""
    return torch.autocast(tensor.device.type, enabled=False)


def value_at_hand(tensor: Tensor) -> bool:
    """Whether the host may look at the tensor's value: it need not wait, and nothing records what it then does."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


@operator("row_norms(Tensor x, bool double) -> Tensor")
def row_norms_op(x, double):  # type: ignore[no-untyped-def]
    if kernels_run(x) and not double:
        from fmfa_losses.kernels.similarity_distribution import prepare

        norms: Tensor = prepare(x.reshape(-1, x.shape[-1]), None, None, None, None)[0]
        return norms.view(2, *x.shape[:-1], 1)
    dtype = torch.float64 if double else torch.float32
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    one = torch.ones_like(norm)
    if _squares_fit(x.dtype, dtype):
        return torch.stack([torch.where(norm == 0, one, norm), one])
    limit, power = (2.0**300, 2.0**700) if double else (2.0**40, 2.0**88)
    if value_at_hand(norm) and bool(((norm >= 1 / limit) & (norm <= limit)).all()):
        return torch.stack([norm, one])
    factor = torch.where(norm > limit, 1 / power, torch.where(norm < 1 / limit, power, one))
    norm = torch.linalg.vector_norm(x * factor, dim=-1, keepdim=True)
    zero = norm == 0
    return torch.stack([norm.masked_fill(zero, 1), factor.masked_fill(zero, 1)])


@torch.library.register_fake(row_norms_op)
def _(x, double):  # type: ignore[no-untyped-def]
    return x.new_empty((2, *x.shape[:-1], 1), dtype=torch.float64 if double else torch.float32)


def kernels_run(x: Tensor) -> bool:
    """Whether a kernel finds the norms of x: of a tensor on a GPU, unless the environment wants PyTorch alone."""
    return x.device.type == "cuda" and os.environ.get("FMFA_LOSSES_BACKEND") != "torch" and why_not_triton(x) is None


def _squares_fit(dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Whether squares of `dtype` are far from the limits of `wide`."""
    return dtype == torch.float16 or (wide == torch.float64 and dtype != wide)


def row_norms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """|f x| along the last dimension and f, [2, ..., 1]: f x / |f x| is the unit vector, and f / |f x| is 1 / |x|.

    f is a power of two, so that no square overflows or vanishes: 1 for rows of usual length. A zero vector has 1, 1.
    """
    norms: Tensor = row_norms_op(x, dtype == torch.float64)
    return norms


def divide_by_norms(x: Tensor, norms: Tensor) -> Tensor:
    """The unit vectors of x, in the norms' dtype."""
    norm, factor = norms.unbind()
    if _squares_fit(x.dtype, norms.dtype) or (value_at_hand(factor) and bool((factor == 1).all())):
        return torch.div(x, norm)
    return torch.mul(x, factor).div_(norm)


def unit_rows(x: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """u = x / |x| along the last dimension, in float32 or better; a zero vector stays, its gradient passes as it is.

    Args:
        x: [..., D].
        mask: [...] bool; rows where it is False become zero vectors with zero gradient, whatever they held.
        dtype: of the result and its arithmetic; float32 or float64 by the input when None.
    """
    unit: Tensor = _UnitRows.apply(x, mask, dtype or accumulation_dtype(x))[0]  # type: ignore[no-untyped-call]
    return unit


class _UnitRows(torch.autograd.Function):
    """u, |f x| and f (`row_norms`), which are all that its gradient needs: dx = (du - u (u . du)) / |x| + f u d|f x|.

    All are outputs, so that a second derivative finds its way through them to x; plain operations make it.
    """

    @staticmethod
    def forward(x, mask, dtype):  # type: ignore[no-untyped-def]
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
        norms = row_norms(x, dtype)
        return divide_by_norms(x, norms), norms

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, mask, _ = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(*output, mask)
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
            return None, None, None
        if mask is not None:
            dx.masked_fill_(~mask.unsqueeze(-1), 0)
        return dx.to(ctx.dtype), None, None
