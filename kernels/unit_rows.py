"""Unit rows u = x / |x|, and the derivative of the normalisation: one pass over memory each.

    forward(x [..., D], mask [...] | None, dtype, out=None) -> unit [..., D] in `dtype`, inverse [...] float32
    backward(dunit [..., D], x, inverse, mask, out, unit=False) -> out [..., D]

    u = x / |x|,  inverse = 1 / |x|          dx = (du - u (u . du)) / |x|

A zero vector stays one, and its gradient passes as it is: its inverse counts as 1. A row that the mask leaves out is a
zero vector with zero gradient, whatever it held. A row whose squares leave float32's range is multiplied with a power
of two before anything is squared; an inverse beyond float32's range is its largest number.

The backward makes u again, in float32, from x and `inverse`. Unit rows that were rounded to 16 bits would do, but where
u and du are nearly parallel, as of a token and its match, the gradient is the small difference of two products, and a
rounding of u is as large in it as one of du. With `unit` x are unit rows already, as they were rounded.

In the backward `out` may be `dunit` or `x`: what a program writes no other one reads, and it has read it before.
Deterministic: see CONTRIBUTING.md, "A kernel file".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import all_registers, contiguous, launch, on_device
from ._tile import row_norms

LARGEST = tl.constexpr(3.4028235e38)
WIDEST = 1024  # numbers of a row in one tile
ROWS, WARPS = 4, 4  # a row for each warp


@triton.jit
def _rows_and_kept(mask_ptr, rows, ROWS: tl.constexpr):
    """The program's rows, int64, which exist, and which of those the mask keeps."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    kept = exists
    if mask_ptr is not None:
        kept = tl.load(mask_ptr + row, mask=exists, other=0).to(tl.int1)
    return row, exists, kept


@triton.jit
def _load(ptr, row, kept, d, D):
    return tl.load(ptr + row[:, None] * D + d[None, :], mask=kept[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["mask_ptr", "rows"])
def _unit_kernel(
    x_ptr,  # [rows, D]
    mask_ptr,  # [rows] bool, or None
    unit_ptr,  # [rows, D]
    inverse_ptr,  # [rows] float32
    rows,
    D,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (row blocks)."""
    row, exists, kept = _rows_and_kept(mask_ptr, rows, ROWS)
    norm, factor = row_norms(x_ptr + row * D, kept, D, BLOCK_D)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        unit = _load(x_ptr, row, kept, d, D) * factor[:, None] / norm[:, None]
        tl.store(
            unit_ptr + row[:, None] * D + d[None, :],
            unit.to(unit_ptr.dtype.element_ty),
            mask=exists[:, None] & (d < D)[None, :],
        )
    inverse = factor / norm
    tl.store(inverse_ptr + row, tl.where(inverse > LARGEST, LARGEST, inverse), mask=exists)


@triton.jit(do_not_specialize=["mask_ptr", "inverse_ptr", "rows"])
def _unit_gradient_kernel(
    dunit_ptr,  # [rows, D]
    x_ptr,  # [rows, D]
    inverse_ptr,  # [rows] float32
    mask_ptr,  # [rows] bool, or None
    out_ptr,  # [rows, D]
    rows,
    D,
    UNIT: tl.constexpr,  # x are unit rows
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (row blocks): dx = (du - u (u . du)) / |x|."""
    row, exists, kept = _rows_and_kept(mask_ptr, rows, ROWS)
    inverse = tl.load(inverse_ptr + row, mask=kept, other=0.0)
    to_unit = inverse
    if UNIT:
        to_unit = tl.full((ROWS,), 1.0, tl.float32)
    products = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        products += _load(dunit_ptr, row, kept, d, D) * (_load(x_ptr, row, kept, d, D) * to_unit[:, None])
    along = tl.sum(products, 1)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        dunit, unit = _load(dunit_ptr, row, kept, d, D), _load(x_ptr, row, kept, d, D) * to_unit[:, None]
        dx = (dunit - unit * along[:, None]) * inverse[:, None]
        tl.store(
            out_ptr + row[:, None] * D + d[None, :],
            dx.to(out_ptr.dtype.element_ty),
            mask=exists[:, None] & (d < D)[None, :],
        )


def forward(x: Tensor, mask: Tensor | None, dtype: torch.dtype, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Unit rows in `dtype`, in `out` where it is given, and 1 / |x|."""
    x = x.contiguous()
    unit = torch.empty(x.shape, dtype=dtype, device=x.device) if out is None else out
    inverse = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _launch_rows(_unit_kernel, x, x, contiguous(mask), unit, inverse)
    return unit, inverse


def backward(dunit: Tensor, x: Tensor, inverse: Tensor, mask: Tensor | None, out: Tensor, unit: bool = False) -> Tensor:
    """The gradient of x, or of what the unit rows `x` were made of, in `out`."""
    x = x.contiguous()
    _launch_rows(_unit_gradient_kernel, x, dunit.contiguous(), x, inverse, contiguous(mask), out, UNIT=unit)
    return out


def _launch_rows(kernel: object, like: Tensor, *tensors: Tensor | None, **options: bool) -> None:
    rows, D = like.shape[:-1].numel(), like.shape[-1]
    with on_device(like):
        launch(
            kernel, (triton.cdiv(rows, ROWS),), *tensors, rows, D,
            BLOCK_D=min(WIDEST, triton.next_power_of_2(D)), ROWS=ROWS, num_warps=WARPS, **options,
            **all_registers(like.device),
        )  # fmt: skip
