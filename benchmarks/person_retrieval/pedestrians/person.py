"""The parts of a person, drawn from the farthest to the nearest."""

from collections.abc import Callable, Iterator
from functools import partial

from . import bags, hair, limbs
from .figure import Figure
from .head import head
from .torso import torso

__all__ = ["draw_person"]


def draw_person(figure: Figure) -> None:
    for _, draw in sorted(_parts(figure), key=lambda part: part[0]):
        draw(figure)


def _parts(figure: Figure) -> Iterator[tuple[float, Callable[[Figure], None]]]:
    """(how far towards the camera, function that draws it) of every part."""
    who, pose, facing = figure.who, figure.pose, figure.facing
    for side, sign in (("l", 1), ("r", -1)):
        knee, hand = pose.joints[f"knee_{side}"], pose.joints[f"hand_{side}"]
        yield pose.depth(knee[0], knee[2]) * 0.3 - 0.05, partial(limbs.leg, side=side, sign=sign)
        yield pose.depth(hand[0], hand[2] * 0.6) + 0.004, partial(limbs.arm, side=side)
    yield 0.0, torso
    yield 0.03, head
    # Hair behind the head: over the coat from behind; from ahead under it, but for two strands.
    yield (-0.02 if facing > 0.25 else 0.029 if facing > -0.25 else 0.045), hair.back_hair
    if who.hair == "long" and facing > 0.25:
        yield 0.031, hair.strands
    if who.bag == "backpack":
        yield pose.depth(0, -0.1), bags.backpack
        if facing > -0.3:
            yield 0.002, bags.straps
    elif who.bag == "handbag":
        hand = pose.joints["hand_l"]
        yield pose.depth(hand[0], hand[2] * 0.6) + 0.003, bags.handbag
    elif who.bag == "shoulder bag":
        yield 0.002 + max(0.0, pose.depth(-0.125, 0)), bags.shoulder_bag
