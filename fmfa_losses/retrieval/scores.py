"""Scores of queries and gallery, one block at a time, from features in memory or in a memory map."""

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import torch
from torch import Tensor

from ..ops.checks import check_float, check_integer, describe, integer_ids
from ..ops.precision import product, unit_rows

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Array", "Scores", "array_ids", "block_sizes", "check_array", "feature_scores", "load", "slices"]

Array: TypeAlias = "Tensor | np.ndarray[Any, Any]"
# A block of scores: rows of the query, columns of the gallery.
Scores: TypeAlias = Callable[[slice, slice], Tensor]

SCORES_PER_BLOCK = 2**24  # 64 MiB in float32
GALLERY_IN_ONE_BLOCK = 2**16  # rows, 128 MiB at D 512
MATCH_IN_SCORES = 32  # memory of one match (ranks, indices, counts), in float32 numbers


def feature_scores(
    queries: tuple[str, Array], gallery: tuple[str, Array], normalize: bool, device: torch.device | str | None
) -> tuple[Scores, torch.device]:
    """Checks both features; returns what gives a block of their scores, and the device that it lies on."""
    (query_name, query_features), (gallery_name, gallery_features) = queries, gallery
    check_array(query_name, query_features, "Q D")
    check_array(gallery_name, gallery_features, "G D")
    if query_features.shape[1] != gallery_features.shape[1]:
        raise ValueError(
            f"{query_name} and {gallery_name} must agree in D (dimension 1), got "
            f"{_describe(query_features)} and {_describe(gallery_features)}; take both from one joint space"
        )
    if device is None:
        devices = {f.device for f in (query_features, gallery_features) if isinstance(f, Tensor)}
        if len(devices) > 1:
            raise ValueError(
                f"{query_name} and {gallery_name} must be on one device, got {_describe(query_features)} and "
                f"{_describe(gallery_features)}; move one, or pass device="
            )
        target = devices.pop() if devices else torch.device("cpu")
    else:
        target = torch.device(device)
    dtype = torch.promote_types(_dtype(query_features), _dtype(gallery_features))
    dtype = torch.promote_types(dtype, torch.float32)
    kept: dict[str, tuple[slice, Tensor]] = {}

    def features(name: str, array: Array, rows: slice) -> Tensor:
        # The last block of each stays: a gallery in one block is loaded and normalised once.
        if name not in kept or kept[name][0] != rows:
            kept.pop(name, None)
            block = load(array, rows, slice(None)).to(target, dtype)
            kept[name] = rows, unit_rows(block) if normalize else block
        return kept[name][1]

    def scores(rows: slice, columns: slice) -> Tensor:
        return product(features("query", query_features, rows), features("gallery", gallery_features, columns))

    return scores, target


def load(array: Array, rows: slice, columns: slice) -> Tensor:
    if isinstance(array, Tensor):
        return array[rows, columns]
    return torch.from_numpy(array[rows, columns].copy())  # a read-only memory map is no tensor


def _dtype(array: Array) -> torch.dtype:
    return array.dtype if isinstance(array, Tensor) else torch.from_numpy(array[:1].copy()).dtype


def slices(size: int, block: int) -> Iterator[slice]:
    for start in range(0, size, block):
        yield slice(start, min(start + block, size))


def block_sizes(queries: int, gallery: int, block_size: int | None, most_matches: int = 0) -> tuple[int, int]:
    """Queries and gallery rows in a block of about SCORES_PER_BLOCK numbers, what is kept of the matches included."""
    if block_size is None:
        row = gallery if gallery <= GALLERY_IN_ONE_BLOCK else SCORES_PER_BLOCK // 1024
        block_size = max(1, SCORES_PER_BLOCK // (row + MATCH_IN_SCORES * most_matches))
    block_size = min(check_integer("block_size", block_size, 1), queries)
    if gallery <= GALLERY_IN_ONE_BLOCK:
        return block_size, gallery
    return block_size, min(GALLERY_IN_ONE_BLOCK, max(1024, SCORES_PER_BLOCK // block_size))


def check_array(name: str, array: Array, pattern: str) -> None:
    """check_float, for tensors and NumPy arrays."""
    if not _is_numpy(array):
        check_float(name, array, pattern)
        return
    if array.dtype not in ("f2", "f4", "f8"):  # in native byte order
        raise TypeError(f"{name} must be a floating-point array, got {_describe(array)}; use {name}.astype('f4')")
    if array.ndim != len(pattern.split()):
        raise ValueError(f"{name} must have shape [{pattern}], got {_describe(array)}; reshape it")
    if 0 in array.shape:
        raise ValueError(f"{name} [{pattern}] must not be empty, got {_describe(array)}")


def array_ids(name: str, ids: Array) -> Tensor:
    """integer_ids, for tensors and NumPy arrays."""
    if _is_numpy(ids):
        if ids.dtype.kind not in "iu" or not ids.dtype.isnative:
            raise TypeError(f"{name} must be an integer array, got {_describe(ids)}; use {name}.astype('i8')")
        ids = torch.from_numpy(ids.copy())
    return integer_ids(name, ids, "B")


def _is_numpy(array: object) -> TypeGuard["np.ndarray[Any, Any]"]:
    numpy = sys.modules.get("numpy")  # an array can only come from a NumPy that is imported
    return numpy is not None and isinstance(array, numpy.ndarray)


def _describe(array: object) -> str:
    if _is_numpy(array):
        return f"{array.dtype} {list(array.shape)} in NumPy"
    return describe(array)
