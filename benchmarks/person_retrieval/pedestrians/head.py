"""The head with face, glasses and hat."""

import numpy as np

from .colors import shift
from .figure import Figure

__all__ = ["head"]

EYES, FRAMES = (34, 26, 24), (16, 16, 18)


def head(figure: Figure) -> None:
    canvas, pose, s = figure.canvas, figure.pose, figure.scale
    x, y = pose.at(0, 0.078 + pose.nod, 0.012)
    canvas.limb(pose.at(0, 0.13, 0.0), pose.at(0, 0.178, 0.0), 0.026 * s, 0.03 * s, shift(figure.skin, -18), 14)
    rx, ry = pose.half_width(0.046, 0.054), 0.066 * s
    if figure.who.hair == "bald":
        canvas.ellipse((x, y), rx, ry, figure.skin)
    else:
        canvas.ellipse((x, y), rx * 1.08, ry * 1.04, figure.hair)
    if figure.facing > -0.4:
        _face(figure, x, y, rx, ry)
    if figure.who.hat == "cap":
        _cap(figure, x, y, rx)
    elif figure.who.hat == "beanie":
        _beanie(figure, x, y, rx)


def _face(figure: Figure, x: float, y: float, rx: float, ry: float) -> None:
    """Ahead of the hair and below it."""
    canvas, pose, s = figure.canvas, figure.pose, figure.scale
    bald = figure.who.hair == "bald"
    ahead, low = 0.026 * pose.sin * s, 0.0 if bald else 0.014 * s
    width = rx * (0.92 - 0.28 * abs(pose.sin))
    canvas.ellipse((x + ahead, y + low), width, ry * (1.0 if bald else 0.86), figure.skin, 14)
    if not bald:  # the hairline
        canvas.ellipse((x + ahead * 0.4, y - 0.05 * s), rx * 0.98, 0.021 * s, figure.hair, 8)
    for sign in (-1, 1):
        if pose.depth(sign * 0.019, 0.045) > 0.004:
            eye_x = sign * 0.019 * pose.cos + 0.045 * pose.sin
            _eye(figure, x + eye_x * s, y + 0.004 * s)
    if figure.who.glasses and figure.facing > -0.1:  # their bridge
        nose = x + 0.045 * pose.sin * s
        canvas.line([(nose - 0.008 * s, y + 0.003 * s), (nose + 0.008 * s, y + 0.003 * s)], FRAMES, 0.004 * s)
    mouth, half = x + 0.047 * pose.sin * s, 0.011 * s * max(0.3, figure.facing)
    canvas.line([(mouth - half, y + 0.037 * s), (mouth + half, y + 0.037 * s)], shift(figure.skin, -70), 0.006 * s)
    nose_line = [(x + 0.05 * pose.sin * s, y + 0.012 * s), (x + 0.054 * pose.sin * s, y + 0.022 * s)]
    canvas.line(nose_line, shift(figure.skin, -34), 0.006 * s)


def _eye(figure: Figure, x: float, y: float) -> None:
    """With its eyebrow and a lens of the glasses."""
    canvas, s = figure.canvas, figure.scale
    canvas.ellipse((x, y), 0.0062 * s, 0.0055 * s, EYES, 0)
    brow = [(x - 0.009 * s, y - 0.013 * s), (x + 0.009 * s, y - 0.014 * s)]
    canvas.line(brow, shift(figure.hair, -10), 0.004 * s)
    if figure.who.glasses:
        r = 0.0135 * s
        canvas.draw.ellipse((x - r, y - r, x + r, y + r), outline=FRAMES, width=max(1, round(0.005 * s)))


def _cap(figure: Figure, x: float, y: float, rx: float) -> None:
    pose, s = figure.pose, figure.scale
    _dome(figure, x, y - 0.02 * s, rx, 0.056)
    if figure.facing > -0.35:
        brim = (x + 0.05 * pose.sin * s, y - 0.021 * s)
        figure.canvas.ellipse(brim, pose.half_width(0.04, 0.04), 0.009 * s, shift(figure.hat, -30), 0)


def _beanie(figure: Figure, x: float, y: float, rx: float) -> None:
    s = figure.scale
    _dome(figure, x, y - 0.026 * s, rx, 0.062)
    left, right = (x - rx * 1.02, y - 0.028 * s), (x + rx * 1.02, y - 0.028 * s)
    figure.canvas.limb(left, right, 0.013 * s, 0.013 * s, shift(figure.hat, -24), 0)


def _dome(figure: Figure, x: float, y: float, rx: float, height: float) -> None:
    angles = [(float(np.cos(t)), float(np.sin(t))) for t in np.linspace(np.pi, 2 * np.pi, 14)]
    points = [(x + rx * 1.14 * cos, y + height * figure.scale * sin) for cos, sin in angles]
    figure.canvas.polygon(points, figure.hat)
