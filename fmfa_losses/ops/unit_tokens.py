"""Unit rows of tokens by a kernel, u = x / |x|, in the dtype that they are multiplied in."""

from typing import Any

import torch
from torch import Tensor

from .operator import differentiable_once, operator

__all__ = ["unit_tokens"]


def unit_tokens(x: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype, backend: str = "triton") -> Tensor:
    """`unit_rows` by the kernel, rounded to `dtype` once; differentiable once.

    Args:
        x: [B, T, D].
        mask: [B, T] bool; rows where it is False become zero vectors with zero gradient, whatever they held.
        dtype: of the result, any that the kernels take.
        backend: "triton".
    """
    unit: Tensor = _unit(x, mask, dtype)[0]
    return unit


@operator("unit_tokens(Tensor x, Tensor? mask, ScalarType dtype) -> (Tensor, Tensor)")
def unit_tokens_op(x, mask, dtype):  # type: ignore[no-untyped-def]
    from fmfa_losses.kernels import unit_rows as kernels

    return kernels.forward(x, mask, dtype)


@operator("unit_tokens_gradient(Tensor dunit, Tensor x, Tensor inverse, Tensor? mask) -> Tensor")
def unit_tokens_backward_op(dunit, x, inverse, mask):  # type: ignore[no-untyped-def]
    from fmfa_losses.kernels import unit_rows as kernels

    return kernels.backward(dunit, x, inverse, mask, torch.empty(x.shape, dtype=x.dtype, device=x.device))


@torch.library.register_fake(unit_tokens_op)
def _fake(x, mask, dtype):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake(unit_tokens_backward_op)
def _backward_fake(dunit, x, inverse, mask):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, mask, _ = inputs
    ctx.save_for_backward(x, output[1], mask)  # not the unit rows, which are rounded
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dunit: Tensor | None, dinverse: Tensor | None) -> Any:
    if dunit is None:
        return None, None, None
    return _unit_backward(dunit, *ctx.saved_tensors), None, None


_unit, _unit_backward = differentiable_once(
    unit_tokens_op, unit_tokens_backward_op, _backward, _setup_context, "hard_similarity", "EFA"
)
