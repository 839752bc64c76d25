"""What people are drawn on: filled outlines with rounded shading, and patterned cloth to fill them with."""

import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from .colors import Color

__all__ = ["CANVAS_HEIGHT", "CANVAS_WIDTH", "HEIGHT", "SUPERSAMPLING", "WIDTH", "Canvas", "Fill", "Point"]

HEIGHT, WIDTH = 288, 96  # of a finished photograph; training shrinks it
SUPERSAMPLING = 2
CANVAS_HEIGHT, CANVAS_WIDTH = HEIGHT * SUPERSAMPLING, WIDTH * SUPERSAMPLING

Point = tuple[float, float]
Fill = Color | Image.Image  # one colour, or cloth of the size of the canvas

_HALF_TURN = tuple(math.pi * (0.5 + k / 6) for k in range(7))
_CIRCLE = tuple((math.cos(2 * math.pi * k / 28), math.sin(2 * math.pi * k / 28)) for k in range(28))


class Canvas:
    """Cloth, skin and metal in polygons with rounded shading; `scale` turns body heights into pixels."""

    def __init__(self, image: Image.Image, scale: float, light: float) -> None:
        self.image, self.draw, self.scale, self.light = image, ImageDraw.Draw(image), scale, light

    def polygon(self, points: list[Point], fill: Fill, shade: float = 26.0) -> None:
        """A filled outline. Its rim is darker on the side that the light does not reach, as on a rounded body."""
        box = self._box(points)
        if box is None:
            return
        x0, y0, x1, y1 = box
        local = [(x - x0, y - y0) for x, y in points]
        mask = Image.new("L", (x1 - x0, y1 - y0))
        ImageDraw.Draw(mask).polygon(local, fill=255)
        self.image.paste(fill.crop(box) if isinstance(fill, Image.Image) else fill, box, mask)
        if shade <= 0:
            return
        # What the outline leaves uncovered when it shrinks and moves towards the light lies in shadow.
        width = x1 - x0
        center = sum(x for x, _ in local) / len(local) + 0.12 * self.light * width
        veil = Image.new("L", mask.size, int(shade * 2.4))
        ImageDraw.Draw(veil).polygon([((x - center) * 0.72 + center, y) for x, y in local], fill=0)
        veil = veil.filter(ImageFilter.BoxBlur(max(1.0, width * 0.09)))
        self.image.paste((0, 0, 0), box, ImageChops.multiply(veil, mask))

    def limb(self, a: Point, b: Point, ra: float, rb: float, fill: Fill, shade: float = 26.0) -> None:
        """A tapered tube with round ends from `a` to `b`."""
        angle = math.atan2(b[1] - a[1], b[0] - a[0])
        turns = [(math.cos(angle + t), math.sin(angle + t)) for t in _HALF_TURN]
        start = [(a[0] + ra * cos, a[1] + ra * sin) for cos, sin in turns]
        end = [(b[0] - rb * cos, b[1] - rb * sin) for cos, sin in turns]
        self.polygon(start + end, fill, shade)

    def ellipse(self, center: Point, rx: float, ry: float, fill: Fill, shade: float = 22.0) -> None:
        self.polygon([(center[0] + rx * cos, center[1] + ry * sin) for cos, sin in _CIRCLE], fill, shade)

    def line(self, points: list[Point], fill: Color, width: float) -> None:
        self.draw.line(points, fill=fill, width=max(1, round(width)), joint="curve")

    def fabric(self, color: Color, second: Color, pattern: str, origin: Point) -> Fill:
        """Plain cloth is a colour; patterned cloth is an image whose pattern starts at `origin`."""
        if pattern in ("plain", "logo"):
            return color
        width, height = self.image.size
        cloth = Image.new("RGB", (width, height), color)
        draw = ImageDraw.Draw(cloth)
        x0, y0 = origin
        step = {"striped": 0.056, "checked": 0.06, "dotted": 0.05}[pattern] * self.scale
        rows = np.arange(y0 % step - step, height + step, step)
        columns = np.arange(x0 % step - step, width + step, step)
        if pattern == "striped":
            for y in rows:
                draw.rectangle((0, y, width, y + step * 0.45), fill=second)
        elif pattern == "checked":
            between = tuple((a + b) // 2 for a, b in zip(color, second, strict=True))
            for y in rows:
                draw.rectangle((0, y, width, y + step * 0.4), fill=between)
            for x in columns:
                draw.rectangle((x, 0, x + step * 0.4, height), fill=between)
            for y in rows:
                for x in columns:
                    draw.rectangle((x, y, x + step * 0.4, y + step * 0.4), fill=second)
        else:
            radius = step * 0.26
            for index, y in enumerate(rows):
                for x in columns + (step / 2 if index % 2 else 0):
                    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=second)
        return cloth

    def _box(self, points: list[Point]) -> tuple[int, int, int, int] | None:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        width, height = self.image.size
        x0, y0 = max(0, int(min(xs)) - 1), max(0, int(min(ys)) - 1)
        x1, y1 = min(width, int(max(xs)) + 2), min(height, int(max(ys)) + 2)
        return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None
