"""Checks of shape, dtype and device that raise; each message states the invariant, what came, and the mend.

Only what the host knows without waiting for an accelerator is checked: shapes, dtypes, devices, Python numbers.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = [
    "check_float",
    "check_ids",
    "check_mask",
    "check_option",
    "check_positive",
    "check_same",
    "check_shape",
    "describe",
]


def describe(tensor: object) -> str:
    """`float32 [4, 7] on cpu`, the way every message here shows a tensor."""
    if isinstance(tensor, Tensor):
        return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
    return f"{type(tensor).__name__} {tensor!r:.60}"


def check_float(name: str, tensor: object, pattern: str) -> None:
    """A floating-point tensor with as many dimensions as `pattern` ("B L D") has letters, none of them empty."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor [{pattern}], got {describe(tensor)}; wrap it in torch.as_tensor")
    if hasattr(tensor, "device_mesh"):
        raise TypeError(
            f"{name} must be a plain tensor with this process's samples, got a DTensor; pass {name}.to_local() where "
            f"it is sharded over the batch, {name}.full_tensor() where this process should hold all of it"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {describe(tensor)}; call {name}.float()")
    if tensor.ndim != len(pattern.split()):
        raise ValueError(f"{name} must have shape [{pattern}], got {describe(tensor)}; reshape it")
    if 0 in tensor.shape:
        raise ValueError(f"{name} [{pattern}] must not be empty, got {describe(tensor)}; skip empty batches")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {list(expected)} ({why}), got {describe(tensor)}")


def check_same(names: str, a: Tensor, b: Tensor, *, dims: Iterable[tuple[str, int]] = ()) -> None:
    """`a` and `b` live on one device and agree in the given (letter, dimension) pairs; `names` is "image and text"."""
    if a.device != b.device:
        raise ValueError(
            f"{names} must be on one device, got {a.device} and {b.device}; move one with .to({str(a.device)!r})"
        )
    for letter, dim in dims:
        if a.shape[dim] != b.shape[dim]:
            raise ValueError(f"{names} must agree in {letter} (dimension {dim}), got {describe(a)} and {describe(b)}")


def check_ids(name: str, ids: object, length: int, device: torch.device) -> None:
    """Integer ids [length] on `device`."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be an integer tensor [{length}], got {describe(ids)}; use torch.as_tensor")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {describe(ids)}; call {name}.long()")
    check_shape(name, ids, (length,), "one id a sample")
    if ids.device != device:
        raise ValueError(f"{name} must be on {device}, got {describe(ids)}; call {name}.to({str(device)!r})")


def check_mask(name: str, mask: object, like: Tensor) -> None:
    """A boolean mask over the tokens of `like` [B, T, D]; True = keep."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a boolean tensor (True = keep), got {describe(mask)}; call {name}.bool()")
    check_shape(name, mask, (like.shape[0], like.shape[1]), "one flag a token")
    if mask.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {describe(mask)}; call {name}.to(...)")


def check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")


def check_option(name: str, value: object, options: Iterable[object]) -> None:
    options = tuple(options)
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
