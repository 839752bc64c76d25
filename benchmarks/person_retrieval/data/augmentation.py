"""Flip, shift and erase: the augmentation of training images, as IRRA has it."""

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["Augmentation"]

# IRRA erases after it has normalised, with CLIP's mean as the value. As a pixel that is (mean std + mean) 255: grey.
ERASED = (156, 147, 133)
TRIES = 10


@dataclass(frozen=True)
class Augmentation:
    """Flips, shifts within a black frame, and erases a rectangle, in this order.

    Args:
        flip: probability that left and right change places.
        pad: width of the frame in pixels of an image 384 high, of which a crop of the image's size is cut, always; on
            another height it is in proportion, rounded (96: 3).
        erase: probability that a rectangle is erased.
        erase_area: its smallest and largest share of the area.
        erase_aspect: its smallest and largest height / width; the logarithm is uniform between them. A rectangle as
            high or as wide as the image is drawn anew, up to ten times; then nothing is erased.

    Example:
        >>> plain = Augmentation(flip=1.0, pad=0, erase=0.0)
        >>> plain(np.arange(6, dtype=np.uint8).reshape(1, 2, 3), np.random.default_rng(0)).tolist()
        [[[3, 4, 5], [0, 1, 2]]]
    """

    flip: float = 0.5
    pad: int = 10
    erase: float = 0.5
    erase_area: tuple[float, float] = (0.02, 0.4)
    erase_aspect: tuple[float, float] = (0.3, 3.3)

    def __post_init__(self) -> None:
        for name in ("flip", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability from 0 to 1, got {getattr(self, name)}")
        if self.pad < 0:
            raise ValueError(f"pad must be at least 0 pixels, got {self.pad}")
        if not 0 < self.erase_area[0] <= self.erase_area[1] <= 1:
            raise ValueError(f"erase_area must be two rising shares in (0, 1], got {self.erase_area}")
        if not 0 < self.erase_aspect[0] <= self.erase_aspect[1] < math.inf:
            raise ValueError(f"erase_aspect must be two rising ratios above 0, got {self.erase_aspect}")

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`pixels` [H, W, 3] uint8 stay as they are; the same state of `rng` gives the same result."""
        if rng.random() < self.flip:
            pixels = pixels[:, ::-1]
        pixels = self._shifted(pixels, rng)
        if rng.random() < self.erase:
            self._erase(pixels, rng)
        return pixels

    def _shifted(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A copy."""
        height, width, _ = pixels.shape
        pad = (2 * self.pad * height + 384) // (2 * 384)  # rounded, a half up
        padded = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)))
        y, x = rng.integers(2 * pad + 1, size=2)
        return padded[y : y + height, x : x + width]

    def _erase(self, pixels: np.ndarray, rng: np.random.Generator) -> None:
        """In place."""
        height, width, _ = pixels.shape
        for _ in range(TRIES):
            area = rng.uniform(*self.erase_area) * height * width
            aspect = math.exp(rng.uniform(math.log(self.erase_aspect[0]), math.log(self.erase_aspect[1])))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
                pixels[y : y + h, x : x + w] = ERASED
                break
