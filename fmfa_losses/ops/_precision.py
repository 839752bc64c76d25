"""Precision of a loss: float32 or better whatever the input, and no autocast inside."""

import torch
from torch import Tensor

__all__ = ["ZERO_NORM", "accumulation_dtype", "full_precision", "unit_rows"]

# A vector no longer than this counts as zero.
ZERO_NORM = 1e-12


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when any tensor is float64, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def full_precision(tensor: Tensor) -> torch.autocast:
    """Context in which matrix products on the tensor's device keep their inputs' dtype, autocast or not."""
    return torch.autocast(tensor.device.type, enabled=False)


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
    """u and |x|, which are all that its gradient needs: dx = (du - u (u . du)) / |x| + u d|x|.

    Both are outputs, so that a second derivative finds its way through them to x; plain operations make it.
    """

    @staticmethod
    def forward(x, mask, dtype):  # type: ignore[no-untyped-def]
        x = x.to(dtype)
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        norm.masked_fill_(norm <= 1e-12, 1)  # ZERO_NORM; torch.compile cannot lift a global float out of here
        return x / norm, norm

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, mask, _ = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(*output, mask)
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
