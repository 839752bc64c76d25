"""Legs and arms, in trousers and sleeves or bare."""

from .colors import shift
from .figure import Figure

__all__ = ["arm", "leg"]


def leg(figure: Figure, side: str, sign: int) -> None:
    canvas, pose, s, b = figure.canvas, figure.pose, figure.scale, figure.build
    hip, knee, ankle, toe = (pose.joint(f"{name}_{side}") for name in ("hip", "knee", "ankle", "toe"))
    bare = figure.dress or figure.who.lower in ("shorts", "skirt")
    thick, slim = (0.055 * b, 0.038 * b) if not bare else (0.046 * b, 0.031 * b)
    cover = figure.skin if bare else figure.lower
    far = 10 if pose.depth(sign * 0.06, 0) < -0.02 else 0  # the far leg lies in the near one's shadow
    cover = shift(cover, -far)
    canvas.limb(ankle, toe, 0.026 * s, 0.019 * s, shift(figure.shoes, -far), 20)
    sole = ((toe[0], toe[1] + 0.012 * s), (ankle[0], ankle[1] + 0.034 * s))
    canvas.limb(*sole, 0.006 * s, 0.008 * s, shift(figure.shoes, -60), 0)
    canvas.limb(knee, ankle, slim * s, (0.021 if bare else 0.03) * s, cover)
    canvas.limb(hip, knee, thick * s, (slim + 0.003) * s, cover)
    if figure.who.lower == "jeans" and not bare:
        canvas.line([hip, knee, ankle], shift(figure.lower, -14), 0.006 * s)
    if figure.who.lower == "shorts" and not figure.dress:
        hem = tuple(h + 0.86 * (k - h) for h, k in zip(hip, knee, strict=True))
        canvas.limb(hip, (hem[0], hem[1]), 0.056 * b * s, 0.05 * b * s, shift(figure.lower, -far))


def arm(figure: Figure, side: str) -> None:
    canvas, pose, s, b = figure.canvas, figure.pose, figure.scale, figure.build
    shoulder, elbow, hand = (pose.joint(f"{name}_{side}") for name in ("shoulder", "elbow", "hand"))
    shoulder = (shoulder[0] * 0.94 + pose.at(0, 0, 0)[0] * 0.06, shoulder[1] + 0.016 * s)
    wide = 0.037 * b * s * (1.12 if figure.who.upper in ("hoodie", "jacket", "coat") else 1.0)
    canvas.ellipse(hand, 0.02 * s, 0.026 * s, figure.skin, 12)
    if figure.who.upper in ("t-shirt", "dress", "tank top"):
        canvas.limb(elbow, hand, 0.025 * s, 0.017 * s, figure.skin)
        canvas.limb(shoulder, elbow, 0.03 * s, 0.025 * s, figure.skin)
        if figure.who.upper != "tank top":
            sleeve = tuple(a + 0.62 * (e - a) for a, e in zip(shoulder, elbow, strict=True))
            canvas.limb(shoulder, (sleeve[0], sleeve[1]), wide, wide * 0.93, figure.fabric)
    else:
        canvas.limb(elbow, hand, wide * 0.84, wide * 0.62, figure.fabric)
        canvas.limb(shoulder, elbow, wide, wide * 0.84, figure.fabric)
