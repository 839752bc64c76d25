"""The street behind a person, and what may stand in front."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .canvas import CANVAS_HEIGHT, CANVAS_WIDTH, HEIGHT, WIDTH
from .colors import Color, shift

__all__ = ["occlude", "street"]


def street(rng: np.random.Generator) -> Image.Image:
    """A wall or a park above, the ground below, out of focus."""
    image = Image.new("RGB", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(image)

    def tone(low: int = 70, high: int = 205, colorful: float = 20) -> Color:
        base = rng.uniform(low, high)
        r, g, b = (int(v) for v in (base + rng.normal(0, colorful, 3)).clip(10, 245))
        return r, g, b

    horizon = int(rng.uniform(0.18, 0.62) * HEIGHT)
    wall, ground = tone(), tone(95, 190, 9)
    draw.rectangle((0, 0, WIDTH, horizon), fill=wall)
    kind = rng.integers(3)
    if kind == 0:  # a building: windows or doors
        step, top = int(rng.integers(22, 46)), int(rng.integers(0, 30))
        glass = tone(40, 220, 14)
        for x in range(int(rng.integers(-20, 0)), WIDTH, step):
            for y in range(top, horizon - 16, step + 12):
                draw.rectangle((x, y, x + step * 0.55, y + step * 0.8), fill=glass)
    elif kind == 1:  # trees and hedges
        for _ in range(16):
            x, y, r = rng.uniform(0, WIDTH), rng.uniform(0, horizon), rng.uniform(8, 26)
            green = (int(rng.integers(40, 90)), int(rng.integers(80, 140)), int(rng.integers(40, 80)))
            draw.ellipse((x - r, y - r, x + r, y + r), fill=green)
    else:  # shop fronts, posters, parked cars
        for _ in range(int(rng.integers(3, 7))):
            x, y = rng.uniform(-20, WIDTH), rng.uniform(-20, horizon)
            draw.rectangle((x, y, x + rng.uniform(10, 60), y + rng.uniform(14, 80)), fill=tone(40, 220, 34))
    draw.rectangle((0, horizon, WIDTH, HEIGHT), fill=ground)
    if rng.random() < 0.5:  # a kerb, then paving
        draw.rectangle(
            (0, horizon, WIDTH, horizon + rng.uniform(4, 14)), fill=shift(ground, float(rng.uniform(-40, 40)))
        )
    vanish = rng.uniform(-60, WIDTH + 60)
    if rng.random() < 0.7:
        line = shift(ground, float(rng.choice((-16, 18))))
        for x in np.arange(-240, WIDTH + 240, rng.uniform(26, 60)):
            draw.line((vanish, horizon - 20, x, HEIGHT), fill=line, width=1)
        y = float(horizon)
        while y < HEIGHT:
            draw.line((0, y, WIDTH, y), fill=line)
            y += 6 + (y - horizon) * 0.22
        draw.rectangle((0, horizon - 22, WIDTH, horizon - 1), fill=shift(wall, -12))
    image = image.filter(ImageFilter.BoxBlur(float(rng.uniform(0.8, 2.4))))
    return image.resize((CANVAS_WIDTH, CANVAS_HEIGHT), Image.Resampling.BILINEAR)


def occlude(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> bool:
    """Something stands between camera and person; True where it hides the feet."""
    color = tuple(int(v) for v in rng.integers(40, 190, 3))
    kind = rng.integers(3)
    if kind == 0:  # a post
        x, w = rng.uniform(0.05, 0.95) * CANVAS_WIDTH, rng.uniform(0.04, 0.1) * CANVAS_WIDTH
        draw.rectangle((x, 0, x + w, CANVAS_HEIGHT), fill=color)
        draw.rectangle((x, 0, x + w * 0.35, CANVAS_HEIGHT), fill=tuple(min(255, c + 24) for c in color))
        return False
    if kind == 1:  # a car's bonnet, a planter, a bench
        top = rng.uniform(0.74, 0.86) * CANVAS_HEIGHT
        left = rng.choice((-0.2, 0.25)) * CANVAS_WIDTH
        draw.rounded_rectangle((left, top, left + CANVAS_WIDTH, CANVAS_HEIGHT + 40), radius=26, fill=color)
        draw.rounded_rectangle(
            (left, top, left + CANVAS_WIDTH, top + 16), radius=8, fill=tuple(min(255, c + 36) for c in color)
        )
        return True
    side = rng.choice((-1, 1))  # the shoulder of a passer-by
    x = (0.5 + side * 0.5) * CANVAS_WIDTH
    r = rng.uniform(0.12, 0.24) * CANVAS_WIDTH
    top = rng.uniform(0.15, 0.4) * CANVAS_HEIGHT
    draw.rounded_rectangle((x - r, top, x + r, CANVAS_HEIGHT + 40), radius=int(r * 0.8), fill=color)
    return False
