"""One photograph of a person: the scene, then what camera and light make of it."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .canvas import CANVAS_HEIGHT, CANVAS_WIDTH, HEIGHT, SUPERSAMPLING, WIDTH, Canvas, Point
from .figure import Figure
from .identities import Identity
from .person import draw_person
from .pose import Pose
from .street import occlude, street

__all__ = ["HEIGHT", "STUDIO", "SURVEILLANCE", "WIDTH", "Camera", "Photo", "render"]


@dataclass(frozen=True)
class Photo:
    """One photograph of a person, and what of them can be seen in it."""

    image: Image.Image
    view: str  # "front", "side" or "back"
    walking: bool
    feet_hidden: bool


@dataclass(frozen=True)
class Camera:
    """From where photographs are taken, and how good they are."""

    views: tuple[float, float, float]  # how often front, back, side
    occluded: float  # how often something stands in front of the person
    blurred: float
    gain: tuple[float, float]  # of the exposure
    haze: float  # at most, in grey levels
    noise: tuple[float, float]  # standard deviation, in grey levels


SURVEILLANCE = Camera((0.45, 0.25, 0.3), occluded=0.25, blurred=0.4, gain=(0.68, 1.22), haze=26, noise=(1.5, 8))
STUDIO = Camera((0.7, 0.1, 0.2), occluded=0.03, blurred=0.1, gain=(0.9, 1.15), haze=8, noise=(0.5, 3))


def render(who: Identity, *, seed: tuple[int, ...], camera: Camera = SURVEILLANCE) -> Photo:
    """One photograph of `who`, 288 x 96 RGB; `seed` decides everything but the person."""
    rng = np.random.default_rng(list(seed))
    view = ("front", "back", "side")[int(rng.choice(3, p=camera.views))]
    turn = {"front": 0.0, "back": np.pi, "side": np.pi / 2 * rng.choice((-1, 1))}[view] + rng.normal(0, 0.24)
    walking = bool(rng.random() < 0.7)
    scale = rng.uniform(0.80, 0.95) * CANVAS_HEIGHT
    foot = (CANVAS_WIDTH / 2 + rng.normal(0, 0.045) * CANVAS_WIDTH, rng.uniform(0.935, 0.985) * CANVAS_HEIGHT)
    pose = Pose(rng, walking, float(turn), who.build, scale, foot)

    image = street(rng)
    _cast_shadow(image, foot, reach=int(scale * 0.2))
    light = float(rng.choice((-1, 1)) * rng.uniform(0.3, 1.0))
    draw_person(Figure(Canvas(image, scale, light), who, pose))
    feet_hidden = rng.random() < camera.occluded and occlude(ImageDraw.Draw(image), rng)
    image = image.reduce(SUPERSAMPLING)
    if rng.random() < camera.blurred:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.3))))
    return Photo(_expose(image, rng, camera), view, walking, bool(feet_hidden))


def _cast_shadow(image: Image.Image, foot: Point, reach: int) -> None:
    shadow = Image.new("L", (reach // 2, reach // 4))
    ImageDraw.Draw(shadow).ellipse((reach * 0.08, reach * 0.06, reach * 0.42, reach * 0.19), fill=150)
    shadow = shadow.filter(ImageFilter.GaussianBlur(3)).resize((2 * reach, reach))
    image.paste((12, 12, 16), (int(foot[0]) - reach, int(foot[1]) - reach // 2), shadow)


def _expose(image: Image.Image, rng: np.random.Generator, camera: Camera) -> Image.Image:
    """The colour of the light, light from one side, haze and noise."""
    pixels = np.asarray(image, np.float32)
    warmth = rng.normal(0, 0.06)
    gain = rng.uniform(*camera.gain) * np.array((1 + warmth, 1, 1 - warmth))
    side_light = 1 + rng.normal(0, 0.12) * np.linspace(-1, 1, WIDTH)[None, :, None]
    haze = rng.uniform(0, camera.haze)  # lifts the dark tones
    pixels = pixels * (gain * side_light * (1 - haze / 255)).astype(np.float32) + haze
    pixels += rng.standard_normal((HEIGHT, WIDTH, 1), np.float32) * rng.uniform(*camera.noise)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
