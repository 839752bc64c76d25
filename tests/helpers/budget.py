"""The error budget of benchmarks/budget.py, asserted of results and of functions."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.budget import allowed_error, relative_error
from helpers.compare import value_and_grads


def assert_within_budget(
    got: Tensor,
    plain: Tensor,
    exact: Tensor,
    *,
    precision: str = "fp32",
    amplification: float = 1.0,
    size: float | None = None,
    reordered: float = 0.0,
    name: str = "",
) -> None:
    """Where `plain` overflows, only the roundings are left.

    Errors are relative to `size`, by default the norm of `exact`. `reordered` is what another order of additions costs.
    """
    assert torch.isfinite(got).all(), f"{name}: not every element is a finite number"
    plain_error = relative_error(plain, exact, size) if torch.isfinite(plain).all() else 0.0
    error = relative_error(got, exact, size)
    allowed = allowed_error(plain_error, precision, amplification) + reordered
    assert error <= allowed, f"{name}: error {error:.2e}, budget {allowed:.2e}, of plain PyTorch {plain_error:.2e}"


def assert_function_within_budget(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    amplification: float = 1.0,
) -> None:
    """Value and gradients of inputs rounded to `dtype`, on which `plain` in float64 gives the exact ones."""
    rounded = [tensor.to(dtype) for tensor in inputs]
    exact = value_and_grads(plain, [tensor.double() for tensor in rounded])
    results = zip(value_and_grads(ours, rounded), value_and_grads(plain, rounded), exact, strict=True)
    for index, (a, b, c) in enumerate(results):
        assert_within_budget(a, b, c, amplification=amplification, name=f"entry {index}")
