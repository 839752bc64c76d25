"""Best matches found in bfloat16: what torch.set_float32_matmul_precision("medium") allows on a CPU with units for it.

The products are twice as fast, and only decide who wins: the maximum of a winner is computed again in float32, D
multiplications a match instead of D for each of its candidates. A similarity is then that of a token whose cosine lies
within the rounding of bfloat16 of the largest one.
"""

import functools
import warnings

import torch
from torch import Tensor

from . import layout as rows_layout

__all__ = ["in_bfloat16", "products_of"]


def in_bfloat16(x: Tensor) -> bool:
    """Whether the user allows it for x, and the processor gains by it."""
    return (
        rows_layout.on_cpu(x)
        and x.dtype == torch.float32
        and torch.get_float32_matmul_precision() == "medium"
        and has_units()
    )


@functools.cache
def has_units() -> bool:
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    if not any(supported is not None and supported() for supported in known):
        return False
    with warnings.catch_warnings():  # that its sparse tensors are in beta, PyTorch says once
        warnings.simplefilter("ignore")
        one = torch.zeros(1, 1, dtype=torch.float32, device="cpu")
        products_of(one, one, one.to(torch.int32))
    return True


def products_of(x: Tensor, e: Tensor, tokens: Tensor) -> Tensor:
    """x_r . e_k for k = tokens[j, r], [J, R], of rows x [R, D] and e [K, D]; tokens grow with j, int32."""
    J, R = tokens.shape
    ends = torch.arange(0, R * J + 1, J, dtype=torch.int32, device=x.device)
    pattern = torch.sparse_csr_tensor(ends, tokens.T.flatten(), x.new_zeros(R * J), (R, len(e)), check_invariants=False)
    products: Tensor = torch.sparse.sampled_addmm(pattern, x, e.T, beta=0).values()
    return products.view(R, J).T
