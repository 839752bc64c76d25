"""How far two results may lie apart: relative to the largest entry, or not at all; another default dtype."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected entry (over 1 where all are 0)."""
    scale = expected.abs().max().item() or 1.0
    return (got.to(torch.float64) - expected.to(torch.float64)).abs().max().item() / scale


def value_and_grads(
    fn: Callable[..., Tensor], inputs: Sequence[Tensor], cotangent: Tensor | None = None
) -> list[Tensor]:
    """[fn(*inputs), gradient of each input] from fresh leaves; the cotangent is fixed by the seed of its shape."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    value = fn(*leaves)
    if cotangent is None:
        cotangent = torch.linspace(-1, 2, value.numel(), dtype=torch.float64, device=value.device).reshape(value.shape)
    grads = torch.autograd.grad(value, leaves, cotangent.to(value.dtype))
    return [value.detach(), *grads]


def assert_close(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape
        error = relative_error(a, b)
        assert error <= tolerance, f"entry {index}: relative error {error:.2e} > {tolerance:.0e}"


def assert_finite(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        assert torch.isfinite(tensor).all()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What torch makes without being told a dtype, inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
