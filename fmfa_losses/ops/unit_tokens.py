"""Unit rows of tokens in the dtype that they are multiplied in, u = x / |x|: by a kernel, or by `unit_rows`."""

from typing import Any

import torch
from torch import Tensor

from .operator import differentiable_once, operator
from .precision import unit_rows

__all__ = ["unit_tokens"]


def unit_tokens(x: Tensor, mask: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    """u = x / |x| along the last dimension, computed in float32 or better and rounded once.

    Args:
        x: [B, T, D].
        mask: [B, T] bool; rows where it is False become zero vectors with zero gradient, whatever they held.
        dtype: of the result; float32 or float64 for the torch path.
        backend: "triton" or "torch". The kernel's result is differentiable once.
    """
    if backend == "torch":
        return unit_rows(x, mask, dtype=dtype, backend=backend)
    unit: Tensor = _unit(x, mask, dtype)[0]
    return unit


@operator("unit_tokens(Tensor x, Tensor? mask, ScalarType dtype) -> (Tensor, Tensor)")
def unit_tokens_op(x, mask, dtype):  # type: ignore[no-untyped-def]
    from fmfa_losses.kernels import unit_rows as kernels

    return kernels.forward(x, mask, dtype)


@operator("unit_tokens_backward(Tensor dunit, Tensor unit, Tensor inverse, Tensor? mask, ScalarType dtype) -> Tensor")
def unit_tokens_backward_op(dunit, unit, inverse, mask, dtype):  # type: ignore[no-untyped-def]
    from fmfa_losses.kernels import unit_rows as kernels

    return kernels.backward(dunit, unit, inverse, mask, torch.empty(unit.shape, dtype=dtype, device=unit.device))


@torch.library.register_fake(unit_tokens_op)
def _fake(x, mask, dtype):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake(unit_tokens_backward_op)
def _backward_fake(dunit, unit, inverse, mask, dtype):  # type: ignore[no-untyped-def]
    return unit.new_empty(unit.shape, dtype=dtype)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, mask, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(*output, mask)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dunit: Tensor | None, dinverse: Tensor | None) -> Any:
    if dunit is None:
        return None, None, None
    return _unit_backward(dunit, *ctx.saved_tensors, ctx.dtype), None, None


_unit, _unit_backward = differentiable_once(
    unit_tokens_op, unit_tokens_backward_op, _backward, _setup_context, "hard_similarity", "EFA"
)
