"""Hair behind and beside the head."""

from .figure import Figure

__all__ = ["back_hair", "strands"]


def back_hair(figure: Figure) -> None:
    canvas, pose, s = figure.canvas, figure.pose, figure.scale
    if figure.who.hair == "long":
        x, y = pose.at(0, 0.08, -0.018)
        w = pose.half_width(0.056, 0.05)
        canvas.polygon(
            [
                (x - w * 0.8, y - 0.04 * s),
                (x + w * 0.8, y - 0.04 * s),
                (x + w * 1.06, y + 0.05 * s),
                (x + w, y + 0.15 * s),
                (x, y + 0.165 * s),
                (x - w, y + 0.15 * s),
                (x - w * 1.06, y + 0.05 * s),
            ],
            figure.hair,
            22,
        )
    elif figure.who.hair == "ponytail":
        canvas.limb(pose.at(0, 0.06, -0.055), pose.at(0, 0.185, -0.075), 0.017 * s, 0.012 * s, figure.hair, 16)


def strands(figure: Figure) -> None:
    canvas, pose, s = figure.canvas, figure.pose, figure.scale
    for sign in (-1, 1):
        top, tip = pose.at(sign * 0.046, 0.075, 0.01), pose.at(sign * 0.056, 0.225, 0.03)
        canvas.limb(top, tip, 0.014 * s, 0.009 * s, figure.hair, 12)
