"""A person before the camera, as every part of them is drawn: canvas, pose, measures, colours."""

from .canvas import Canvas
from .colors import COLORS, HAIR_COLORS, JEANS, SKINS, Color
from .identities import Identity
from .pose import Pose

__all__ = ["Figure"]


class Figure:
    """A person in one pose, with the colours of skin, hair and clothes."""

    def __init__(self, canvas: Canvas, who: Identity, pose: Pose) -> None:
        self.canvas, self.who, self.pose = canvas, who, pose
        self.scale, self.build = canvas.scale, who.build
        self.facing = pose.cos  # 1: towards the camera, -1: away
        self.skin, self.hair = SKINS[who.skin], HAIR_COLORS[who.hair_color]
        self.upper, self.second = self._tinted(who.upper_color, 0), COLORS[who.second_color]
        self.lower = self._tinted(who.lower_color, 1, JEANS if who.lower == "jeans" else COLORS)
        self.shoes, self.bag = self._tinted(who.shoes_color, 2), self._tinted(who.bag_color, 3)
        self.hat = COLORS[who.hat_color]
        self.fabric = canvas.fabric(self.upper, self.second, who.pattern, pose.at(0, 0.2, 0))
        self.dress, self.coat = who.upper == "dress", who.upper == "coat"
        self.waist, self.hips = (0.066, 0.088) if who.female else (0.079, 0.083)

    def _tinted(self, name: str, garment: int, table: dict[str, Color] = COLORS) -> Color:
        tint = self.who.tint[3 * garment : 3 * garment + 3]
        r, g, b = (min(255, max(0, channel + t)) for channel, t in zip(table[name], tint, strict=True))
        return r, g, b
