"""Checks of what is drawn, and pictures of any kind as arrays."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import describe


def image_array(name: str, image: Any) -> Any:
    """float64 [H, W, 3] in [0, 1]."""
    import numpy as np

    if isinstance(image, Tensor):
        image = image.detach().cpu()
        array = (image.double() if image.is_floating_point() else image).numpy()  # NumPy has no bfloat16
    else:
        array = np.asarray(image)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be a picture as numbers, got {describe(image)}; open a file with PIL.Image.open")
    if array.ndim == 3 and array.shape[0] == 3 and (array.shape[2] != 3 or isinstance(image, Tensor)):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"{name} must be [3, H, W] or [H, W, 3], got {list(array.shape)}; drop the batch dimension")
    if array.size == 0:
        raise ValueError(f"{name} must not be empty, got {list(array.shape)}")
    array = array / 255 if array.dtype == np.uint8 else array.astype("float64")
    low, high = array.min(), array.max()
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(
            f"{name} must be uint8 or lie in [0, 1], got values from {low:.3g} to {high:.3g}; "
            "undo the normalisation first: image * std + mean"
        )
    return array.clip(0, 1)


def check_number(name: str, value: Any, low: float, high: float) -> None:
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= float(value) <= high:
        raise ValueError(f"{name} must be a finite number in [{low:g}, {high:g}], got {value!r}")


def check_texts(name: str, texts: object) -> None:
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a sequence of texts, got {describe(texts)}; wrap a single one in a list")


def check_all_finite(name: str, tensor: Tensor) -> None:
    """A NaN has no colour and no height: what it would be drawn as is another value's."""
    lost = tensor.numel() - int(tensor.detach().double().isfinite().sum())
    if lost:
        raise ValueError(
            f"{name} must be finite, got {lost} of {tensor.numel()} values that are NaN or infinite; find where they "
            "come from, or leave their rows out"
        )


def matrix(name: str, rows: object) -> Tensor:
    try:
        return torch.as_tensor(rows).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must have shape [Q, k], one row per caption, got rows that are no matrix") from error
