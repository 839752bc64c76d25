"""Rendered pedestrians: who they are (`Identity`), how one photograph of them looks (`render`), what a witness would
write about it (`caption`).

Identity is what a witness could describe: clothes, colours, pattern, shoes, hair, hat, bag, build, skin. Pose,
direction, light, background, distance, occlusion, blur and noise change from one photograph to the next. Everything
follows from integers: the same seed draws the same pixels.
"""

from .captions import caption
from .colors import COLORS
from .identities import Identity, make_identities
from .photo import HEIGHT, WIDTH, Photo, render

__all__ = ["COLORS", "HEIGHT", "WIDTH", "Identity", "Photo", "caption", "make_identities", "render"]
