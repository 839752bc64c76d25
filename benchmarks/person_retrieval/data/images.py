"""Image files to RGB pixels of 8 bits, by one rule for each kind of file.

The rule is Pillow's `convert("RGB")`, which the published codebases use, so that figures stay comparable:

    greyscale                 three equal channels
    palette                   the colours of the palette
    transparency              dropped: the colours below it are shown
    CMYK, YCbCr, HSV          Pillow's formulas, without colour profiles
    EXIF orientation          ignored, as IRRA's reader does: the pixels as they are stored
    several frames            the first

where Pillow has none that is the same in all versions, ours:

    16 bits, greyscale        the upper 8 bits
    floating point            an error: its range is not defined

Sizes: any from 1 x 1 to MAX_PIXELS; more is an error before anything is decoded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .errors import DataError

__all__ = ["ImageFiles", "read_image"]

MAX_PIXELS = 128_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow's own limit, of the whole process, would warn from 89 million on
HUGE, TINY = 20_000_000, 16

KINDS = {
    "1": ["greyscale images"],
    "L": ["greyscale images"],
    "LA": ["greyscale images", "images whose transparency was dropped"],
    "P": ["palette images"],
    "PA": ["palette images", "images whose transparency was dropped"],
    "RGB": [],
    "RGBA": ["images whose transparency was dropped"],
}


@dataclass(frozen=True)
class ImageFiles:
    """`files[i]` read when it is asked for; a Photograph that worker processes can be sent."""

    files: Sequence[Path]

    def __call__(self, index: int) -> Image.Image:
        return read_image(self.files[index])


def read_image(file: Path, remark: Callable[[str], object] | None = None) -> Image.Image:
    """The image in RGB; `remark` is called with everything unusual about it, in words to be counted.

    Raises:
        DataError: the file is missing, is no image, is truncated or too large; the message has its path.
    """
    try:
        if not file.is_file():
            raise ValueError("it is no file" if file.exists() else "there is no such file")
        with Image.open(file) as photo:
            if photo.width * photo.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            photo.load()
            if remark is not None:
                for words in _remarks(photo):
                    remark(words)
            return _to_rgb(photo)
    except Exception as error:  # decoders raise of every kind on broken bytes
        raise DataError(f"image {file} cannot be read: {_reason(error, file)}") from error


def _to_rgb(photo: Image.Image) -> Image.Image:
    if photo.mode.startswith("I"):
        values = np.asarray(photo)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("its integers have more than 16 bits; save it with 8")
        photo = Image.fromarray((values >> 8).astype(np.uint8))
    elif photo.mode == "F":
        raise ValueError("it has floating-point pixels, whose range is not defined; save it with 8 bits")
    photo.info.pop("transparency", None)  # which convert would carry over, or warn about
    return photo.convert("RGB")


def _remarks(photo: Image.Image) -> list[str]:
    kind = photo.mode
    found = ["greyscale images", "16-bit images"] if kind.startswith("I") else list(KINDS.get(kind, [f"{kind} images"]))
    if "transparency" in photo.info:
        found.append("images whose transparency was dropped")
    if photo.width * photo.height > HUGE:
        found.append(f"images of more than {HUGE // 10**6} megapixels")
    if min(photo.size) < TINY:
        found.append(f"images smaller than {TINY} px")
    try:
        if photo.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            found.append("EXIF orientations ignored")
    except Exception:  # it says nothing about the pixels
        found.append("EXIF blocks that cannot be read")
    return found


def _reason(error: Exception, file: Path) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"an image must have at most {MAX_PIXELS:,} pixels; make it smaller"
    if isinstance(error, UnidentifiedImageError):
        return "it is no image in a format that Pillow knows" if file.stat().st_size else "it has 0 bytes"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
