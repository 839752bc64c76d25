"""How far a result may lie from float64: as far as that of plain PyTorch, a quarter more, and a few roundings."""

import torch
from torch import Tensor

__all__ = ["ROUNDING", "allowed_error", "relative_error"]

# Half of the spacing of numbers near 1; tf32 keeps float32's range and 10 bits of its mantissa. By "tf32x3" the match
# alone is closer: what is aggregated, and gradients, are products of TF32.
ROUNDING = {"fp32": 2**-24, "tf32": 2**-11, "tf32x3": 2**-11, "bf16": 2**-8, "fp16": 2**-11}


def relative_error(got: Tensor, exact: Tensor, size: float | None = None) -> float:
    """|got - exact| / |exact| in the Euclidean norm, or over `size`."""
    exact = exact.double()
    size = torch.linalg.vector_norm(exact).item() if size is None else size
    return torch.linalg.vector_norm(got.double() - exact).item() / max(size, 1e-30)


def allowed_error(plain_error: float, precision: str = "fp32", amplification: float = 1.0) -> float:
    """The budget: 1.25 of the error of plain PyTorch, two roundings of `precision`, and `amplification` of float32.

    `precision` is that of the products, "fp32" also where float16 or bfloat16 is read but computed with in float32. A
    function amplifies roundings of its arguments: a logit scale of 50 makes 50 of one.
    """
    return 1.25 * plain_error + 2 * ROUNDING[precision] + amplification * ROUNDING["fp32"]
