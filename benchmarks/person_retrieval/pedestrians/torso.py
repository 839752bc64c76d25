"""The upper body: the garment's outline, then what shows on it."""

from collections.abc import Callable

from .colors import shift
from .figure import Figure

__all__ = ["torso"]

Ring = tuple[float, float, float]  # y, half axis across, half axis along the walking direction

LOOSE = {"hoodie": 1.1, "jacket": 1.1, "coat": 1.13, "dress": 0.97, "tank top": 0.93}  # width of a garment


def torso(figure: Figure) -> None:
    canvas, pose, s, b = figure.canvas, figure.pose, figure.scale, figure.build
    stride = 0.03 * abs(pose.sin)  # a long garment follows it
    if not figure.dress:
        canvas.polygon(pose.outline(_seat(figure, stride)), figure.lower)
    canvas.polygon(pose.outline(_garment(figure, stride)), figure.fabric)
    if figure.who.upper == "tank top":  # bare shoulders
        for sign in (-1, 1):
            canvas.ellipse(pose.at(sign * 0.1 * b, 0.2, 0), 0.026 * s, 0.024 * s, figure.skin, 12)
    front = _FRONTS.get(figure.who.upper)
    if front:
        front(figure)
    if figure.who.pattern == "logo" and figure.facing > 0.25:
        x, y = pose.at(0, 0.295, 0.07)
        canvas.ellipse((x, y), 0.046 * s * figure.facing, 0.04 * s, figure.second, 0)
        canvas.ellipse((x, y), 0.024 * s * figure.facing, 0.02 * s, figure.upper, 0)
    if figure.dress:  # a belt
        rings = [(y, figure.waist * b, 0.066 * b) for y in (0.415, 0.435)]
        canvas.polygon(pose.outline(rings), shift(figure.upper, -45), 0)


def _seat(figure: Figure, stride: float) -> list[Ring]:
    """Of the trousers, or the skirt."""
    b, waist, hips = figure.build, figure.waist, figure.hips
    seat = [(0.46, waist * b, 0.06 * b), (0.52, hips * b * 1.04, 0.07 * b), (0.555, hips * b * 0.98, 0.066 * b)]
    if figure.who.lower == "skirt" and not figure.coat:
        seat = [*seat[:2], (0.6, 0.112 * b, 0.095 + stride), (0.69, 0.132 * b, 0.105 + stride)]
    return seat


def _garment(figure: Figure, stride: float) -> list[Ring]:
    b, hips = figure.build, figure.hips
    loose = LOOSE.get(figure.who.upper, 1.0)
    rings = [
        (0.168, 0.03, 0.035),
        (0.182, 0.088 * b, 0.05),
        (0.2, 0.113 * b, 0.06),
        (0.26, 0.107 * b, 0.074 * b),
        (0.32, 0.097 * b, 0.072 * b),
        (0.42, figure.waist * b, 0.064 * b),
        (0.5, hips * b, 0.07 * b),
    ]
    rings = [(y, across * (loose if y > 0.2 else 1), along * (loose if y > 0.2 else 1)) for y, across, along in rings]
    if figure.coat:
        return [*rings, (0.6, 0.1 * b, 0.082 + stride), (0.74, 0.113 * b, 0.085 + stride)]
    if figure.dress:
        return [*rings, (0.6, 0.112 * b, 0.09 + stride), (0.7, 0.134 * b, 0.1 + stride)]
    return [*rings, (0.53, (hips + 0.006) * b * loose, 0.073 * b * loose)]


def _shirt_front(figure: Figure) -> None:
    """A row of buttons and a collar."""
    canvas, pose = figure.canvas, figure.pose
    if figure.facing > 0.15:
        canvas.line([pose.at(0, 0.18, 0.07), pose.at(0, 0.52, 0.07)], shift(figure.upper, -38), 0.005 * figure.scale)
        canvas.polygon([pose.at(x, y, 0.07) for x, y in ((-0.03, 0.172), (0.03, 0.172), (0, 0.21))], figure.skin, 0)


def _open_front(figure: Figure) -> None:
    """A jacket or a coat, open over another shirt."""
    canvas, pose = figure.canvas, figure.pose
    if figure.facing <= 0.15:
        return
    opening = [(-0.026, 0.168), (0.026, 0.168), (0.02, 0.34)]
    opening += [(0.008, 0.46), (-0.008, 0.46)] if figure.coat else [(0.026, 0.53), (-0.026, 0.53)]
    opening.append((-0.02, 0.34))
    canvas.polygon([pose.at(x, y, 0.07) for x, y in opening], figure.second, 10)
    for sign in (-1, 1):
        lapel = [pose.at(sign * x, y, 0.07) for x, y in ((0.026, 0.168), (0.02, 0.34), (0.01, 0.46))]
        canvas.line(lapel, shift(figure.upper, -30), 0.008 * figure.scale)


def _neckline(figure: Figure) -> None:
    if figure.facing > 0.0:
        depth = 0.02 if figure.who.upper == "t-shirt" else 0.035
        center, width = figure.pose.at(0, 0.172, 0.03), figure.pose.half_width(0.032, 0.03)
        figure.canvas.ellipse(center, width, depth * figure.scale, figure.skin, 0)


def _hood(figure: Figure) -> None:
    canvas, pose, s = figure.canvas, figure.pose, figure.scale
    z, height = (0.03, 0.022) if figure.facing > 0 else (-0.045, 0.04)
    canvas.ellipse(pose.at(0, 0.182, z), pose.half_width(0.056, 0.045), height * s, shift(figure.upper, -20), 14)
    if figure.facing > 0.25:  # pocket and strings
        pocket = [pose.at(x, y, 0.07) for x, y in ((-0.045, 0.48), (-0.03, 0.42), (0.03, 0.42), (0.045, 0.48))]
        canvas.line(pocket, shift(figure.upper, -36), 0.006 * s)
        for sign in (-1, 1):
            string = [pose.at(sign * 0.014, 0.19, 0.06), pose.at(sign * 0.016, 0.25, 0.07)]
            canvas.line(string, shift(figure.upper, 60), 0.005 * s)


_FRONTS: dict[str, Callable[[Figure], None]] = {
    "shirt": _shirt_front,
    "jacket": _open_front,
    "coat": _open_front,
    "t-shirt": _neckline,
    "tank top": _neckline,
    "dress": _neckline,
    "hoodie": _hood,
}
