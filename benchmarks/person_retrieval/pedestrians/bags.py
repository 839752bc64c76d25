"""What people carry."""

from .colors import shift
from .figure import Figure

__all__ = ["backpack", "handbag", "shoulder_bag", "straps"]


def backpack(figure: Figure) -> None:
    canvas, pose, s, b = figure.canvas, figure.pose, figure.scale, figure.build
    x, _ = pose.at(0, 0, -0.115)
    w = pose.half_width(0.082 * b, 0.05)
    top, bottom = pose.at(0, 0.205, 0)[1], pose.at(0, 0.455, 0)[1]
    r = 0.028 * s
    points = [
        (x - w + r, top),
        (x + w - r, top),
        (x + w, top + r),
        (x + w, bottom - r * 0.6),
        (x + w - r * 0.5, bottom),
        (x - w + r * 0.5, bottom),
        (x - w, bottom - r * 0.6),
        (x - w, top + r),
    ]
    canvas.polygon(points, figure.bag)
    if figure.facing < 0.2:
        pocket = [
            (x - w * 0.7, bottom - 0.1 * s),
            (x + w * 0.7, bottom - 0.1 * s),
            (x + w * 0.7, bottom - 0.02 * s),
            (x - w * 0.7, bottom - 0.02 * s),
        ]
        canvas.polygon(pocket, shift(figure.bag, -24), 8)
        canvas.line(
            [(x - w * 0.75, top + 0.055 * s), (x + w * 0.75, top + 0.055 * s)], shift(figure.bag, -44), 0.006 * s
        )


def straps(figure: Figure) -> None:
    canvas, pose, s, b = figure.canvas, figure.pose, figure.scale, figure.build
    for sign in (-1, 1):
        canvas.line(
            [
                pose.at(sign * 0.058 * b, 0.176, 0.0),
                pose.at(sign * 0.066 * b, 0.25, 0.07),
                pose.at(sign * 0.08 * b, 0.37, 0.045),
            ],
            figure.bag,
            0.021 * s,
        )


def handbag(figure: Figure) -> None:
    canvas, pose, s = figure.canvas, figure.pose, figure.scale
    x, y = pose.joint("hand_l")
    top, w, h = y + 0.075 * s, pose.half_width(0.03, 0.066), 0.085 * s
    canvas.line([(x - w * 0.6, top), (x, y + 0.01 * s), (x + w * 0.6, top)], shift(figure.bag, -40), 0.008 * s)
    canvas.polygon([(x - w * 0.85, top), (x + w * 0.85, top), (x + w, top + h), (x - w, top + h)], figure.bag)


def shoulder_bag(figure: Figure) -> None:
    canvas, pose, s, b = figure.canvas, figure.pose, figure.scale, figure.build
    front = 0.07 if figure.facing > 0 else -0.07
    x, y = pose.at(-0.125 * b, 0.5, 0.02)
    canvas.line([pose.at(0.06 * b, 0.176, 0), pose.at(0.0, 0.31, front), (x, y)], shift(figure.bag, -26), 0.014 * s)
    if pose.depth(-0.125 * b, 0) > -0.11:
        w, h = pose.half_width(0.03, 0.068), 0.052 * s
        canvas.polygon(
            [(x - w, y - h * 0.4), (x + w, y - h * 0.4), (x + w * 1.04, y + h * 1.2), (x - w * 1.04, y + h * 1.2)],
            figure.bag,
        )
        canvas.line([(x - w, y + h * 0.2), (x + w, y + h * 0.2)], shift(figure.bag, -40), 0.006 * s)
