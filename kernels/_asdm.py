"""What the A-SDM kernels share: sizes and block table, the cosines of a tile, and how launchers prepare arguments.

Up to SMALL pairs the gradient is one launch that makes every logit again for each chunk of D (asdm_gradient.py); up to
KEPT pairs cosines and dlogits are kept in memory as [R, C] (asdm_kept.py). Above, half precision works in tiles without
them, and float32 goes through `asdm_blocks`.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import BLACKWELL, LDS, chip_class, precision
from ._tile import dot_nearest

# Pairs up to which the gradient is one launch, and up to which [R, C] is kept.
SMALL = {"half": 256, "tf32": 256, "ieee": 64}
KEPT = {"half": 1024, "tf32": 1024, "ieee": 1024}

# Blocks by kernel, size of the batch and precision: (BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_OUT, num_warps, num_stages).
# Small batches want many programs, large ones large tiles. BLOCK_D is the same in all kernels of a size: the
# gradient of a peaked row is a small difference that needs the very logits of the forward.
BLOCKS: dict[tuple[str, str, str], tuple[Any, ...]] = {
    ("row_loss", "small", "half"): (16, 64, 64, None, 4, 3),
    ("row_loss", "small", "tf32"): (16, 64, 64, None, 4, 3),
    ("row_loss", "small", "ieee"): (16, 32, 32, None, 4, 3),
    ("row_loss", "kept", "half"): (8, 128, None, None, 4, 3),
    ("row_loss", "kept", "tf32"): (8, 128, None, None, 4, 3),
    ("row_loss", "kept", "ieee"): (8, 128, None, None, 4, 3),
    ("row_loss", "large", "half"): (64, 64, 64, None, 8, 3),
    ("logits", "kept", "half"): (32, 64, 64, None, 4, 3),
    ("logits", "kept", "tf32"): (32, 64, 64, None, 4, 2),
    ("logits", "kept", "ieee"): (32, 64, 16, None, 4, 4),
    ("gradient", "small", "half"): (16, 32, 64, 128, 4, 2),
    ("gradient", "small", "tf32"): (16, 32, 64, 64, 4, 2),
    ("gradient", "small", "ieee"): (16, 32, 32, 64, 4, 2),
    ("gradient", "kept", "half"): (32, 32, None, 128, 4, 3),
    ("gradient", "kept", "tf32"): (32, 32, None, 64, 4, 3),
    ("gradient", "kept", "ieee"): (32, 16, None, 64, 4, 4),
    ("gradient", "large", "half"): (64, 32, 64, 256, 8, 2),
}
# Triton 3.6 cannot compile, for chips with tensor memory, products of 64 rows in a loop that may be made again.
ON_BLACKWELL: dict[tuple[str, str, str], tuple[Any, ...]] = {
    ("row_loss", "large", "half"): (32, 128, 64, None, 8, 3),
    ("gradient", "large", "half"): (32, 32, 64, 256, 8, 1),
}


def kind_of(queries: Tensor, keys: Tensor) -> str:
    """How the products of both are made: "half", "tf32" or "ieee"."""
    return precision(torch.promote_types(queries.dtype, keys.dtype))


def size(queries: Tensor, keys: Tensor) -> str:
    """Which of the three sizes above the batch has: "small", "kept" or "large"."""
    pairs, kind = max(queries.shape[0], keys.shape[0]), kind_of(queries, keys)
    return "small" if pairs <= SMALL[kind] else "kept" if pairs <= KEPT[kind] else "large"


def blocks(kernel: str, queries: Tensor, keys: Tensor) -> dict[str, int]:
    """Compile-time sizes and launch options of a kernel."""
    key = kernel, size(queries, keys), kind_of(queries, keys)
    on_chip = ON_BLACKWELL if chip_class(keys.device) == BLACKWELL else {}
    *numbers, warps, stages = on_chip.get(key, BLOCKS[key])
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_OUT")
    sizes = {name: number for name, number in zip(names, numbers, strict=True) if number is not None}
    return sizes | launch_options(keys, warps, stages)


def launch_options(like: Tensor, warps: int, stages: int) -> dict[str, int]:
    if chip_class(like.device) == LDS:  # an AMD chip: a wave holds 64 threads
        return {"num_warps": min(warps, 4), "num_stages": stages}
    # Allowed 255 registers, the compiler takes what it needs; left to itself it spills a few to fit one more program.
    return {"num_warps": warps, "num_stages": stages, "maxnreg": 255}


# Arguments that Triton does not specialise on: vectors of the user, at any address. Each kernel's list adds the numbers
# that change with the batch, so that a smaller last batch compiles nothing.
ANY_ADDRESS = ("pids_ptr", "image_ids_ptr", "scale_ptr", "dloss_ptr", "g_ptr")


@triton.jit
def by_direction(direction, first, second):
    """The two numbers in the order of the direction. (A stride of 1 is a constant to the compiler, so no `if`.)"""
    return tl.where(direction == 0, first, second), tl.where(direction == 0, second, first)


@triton.jit
def any_factor_of(factors_ptr, n):
    """Whether one of n rows has a factor."""
    found = tl.zeros((1024,), tl.int32)
    for start in range(0, n, 1024):
        at = start + tl.arange(0, 1024)
        found |= (tl.load(factors_ptr + at, mask=at < n, other=1.0) != 1.0).to(tl.int32)
    return tl.max(found, 0) > 0


@triton.jit
def cosines(
    x_ptr,  # [X, D]
    y_ptr,  # [Y, D]
    factors_ptr,  # [R + C]
    rows,  # [BLOCK_M]
    cols,  # [BLOCK_N]
    x_inverse,  # [BLOCK_M]
    y_inverse,  # [BLOCK_N]
    x_norm,  # index of x_0 among the factors
    y_norm,
    X,
    Y,
    D,
    x_stride,
    y_stride,
    any_factor,  # whether any row has one
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] of cos(x_i, y_j): raw features are multiplied, so that nothing is rounded before."""
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    y_rows = y_ptr + cols.to(tl.int64)[None, :] * y_stride
    dots = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_rows + d[None, :], mask=(rows < X)[:, None] & (d < D)[None, :], other=0.0)
        y = tl.load(y_rows + d[:, None], mask=(cols < Y)[None, :] & (d < D)[:, None], other=0.0)
        dots = dot_nearest(x, y, dots, PRECISION)
    if x_ptr.dtype.element_ty != tl.float16:  # noqa: SIM102, settled when compiled; products of float16 are in range
        if any_factor:
            x_factor = tl.load(factors_ptr + x_norm + rows, mask=rows < X, other=1.0)[:, None]
            y_factor = tl.load(factors_ptr + y_norm + cols, mask=cols < Y, other=1.0)[None, :]
            dots = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            # No stages and narrow steps: this rare case takes no registers from the usual one.
            STEP: tl.constexpr = 16 if x_ptr.dtype.element_ty == tl.float32 else BLOCK_D
            for start in tl.range(0, D, STEP, num_stages=1):
                d = start + tl.arange(0, STEP)
                x = tl.load(x_rows + d[None, :], mask=(rows < X)[:, None] & (d < D)[None, :], other=0.0)
                y = tl.load(y_rows + d[:, None], mask=(cols < Y)[None, :] & (d < D)[:, None], other=0.0)
                dots = dot_nearest((x * x_factor).to(x.dtype), (y * y_factor).to(y.dtype), dots, PRECISION)
    # One product of the inverses: both directions, rows and columns exchanged, get the same number to the last bit.
    return dots * (x_inverse[:, None] * y_inverse[None, :])


@triton.jit
def scaled_rows(y_ptr, factors_ptr, cols, col_mask, d, D, y_stride, any_factor):
    """[BLOCK_N, C]: columns `d` of rows f y; `factors_ptr` is that of y_0."""
    y_rows = y_ptr + cols.to(tl.int64)[:, None] * y_stride
    y = tl.load(y_rows + d[None, :], mask=col_mask[:, None] & (d < D)[None, :], other=0.0)
    if y_ptr.dtype.element_ty != tl.float16:  # noqa: SIM102, settled when compiled
        if any_factor:
            y = (y * tl.load(factors_ptr + cols, mask=col_mask, other=1.0)[:, None]).to(y.dtype)
    return y


@triton.jit
def store_through_norms(
    out_ptr,  # [X, D]
    dx,  # [BLOCK_M, C]: sum_j dz_ij y_j / |y_j|
    along,  # [BLOCK_M]: sum_j dz_ij cos_ij
    x_ptr,  # [X, D]
    factors_ptr,  # [X]: that of x_0
    x_inverse,  # [BLOCK_M]
    rows,
    row_mask,
    d,
    D,
    x_stride,
    scale,
):
    """dx_i = s / |x_i| (sum_j dz_ij y_j / |y_j|  -  a_i x_i / |x_i|)."""
    edge = row_mask[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * x_stride + d[None, :], mask=edge, other=0.0).to(tl.float32)
    x_factor = tl.load(factors_ptr + rows, mask=row_mask, other=1.0)[:, None]
    dx = scale * dx - (scale * along * x_inverse)[:, None] * (x * x_factor)
    dx = dx * x_inverse[:, None] * x_factor
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * D + d[None, :], dx.to(out_ptr.dtype.element_ty), mask=edge)


class Gradient(NamedTuple):
    """What a gradient is made of, as both ways to make it take it."""

    dloss: Tensor  # [R], any stride
    statistics: Tensor
    indices: Tensor
    norms: Tensor
    label_sum: Tensor
    queries: Tensor  # [R, D]; these two are alike
    keys: Tensor  # [C, D]
    ids: tuple[Tensor, Tensor]
    image_ids: Tensor | None
    scale_ptr: Tensor | None
    scale: float
    scale_gradient: bool
    spec: Any
    dqueries: Tensor  # written, as dkeys
    dkeys: Tensor


def alike(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, with rows of consecutive numbers."""
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    queries, keys = queries.to(dtype), keys.to(dtype)
    return tuple(x if x.stride(1) == 1 else x.contiguous() for x in (queries, keys))  # type: ignore[return-value]


def contiguous_ids(pids: Tensor, image_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Ids as the kernels read them, contiguous. Without image ids the second is a pointer that is not read."""
    pids = pids.contiguous()
    return pids, pids if image_ids is None else image_ids.contiguous()


def flags(image_ids: Tensor | None, scale_ptr: Tensor | None, spec: Any) -> dict[str, object]:
    return {
        "STATISTICS": 4 if spec.weighted else 3,
        "HAS_IMAGES": image_ids is not None,
        "HAS_SCALE": scale_ptr is not None,
        "CROSS_ENTROPY": spec.objective == "cross_entropy",
        "WEIGHTED": spec.weighted,
    }
