"""Flip, shift and erase: the augmentation of training images."""

import numpy as np

__all__ = ["augment_image"]

ERASED = (123, 117, 104)  # the colour of an erased rectangle: the mean of photographs


def augment_image(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Flip, shift within a padded frame, and erase a rectangle, each half of the time; [H, W, 3] stays as it is."""
    height, width, _ = pixels.shape
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < 0.5:
        pad_y, pad_x = max(1, height * 10 // 384), max(1, width * 10 // 128)
        padded = np.pad(pixels, ((pad_y, pad_y), (pad_x, pad_x), (0, 0)), mode="edge")
        y, x = rng.integers(2 * pad_y + 1), rng.integers(2 * pad_x + 1)
        pixels = padded[y : y + height, x : x + width]
    if rng.random() < 0.5:
        area, ratio = rng.uniform(0.02, 0.25) * height * width, np.exp(rng.uniform(np.log(0.3), np.log(3.3)))
        h, w = min(height, int(np.sqrt(area * ratio))), min(width, int(np.sqrt(area / ratio)))
        y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
        pixels = pixels.copy()
        pixels[y : y + h, x : x + w] = ERASED
    return pixels
