"""Rendered pedestrians: who they are (`Identity`), how one photograph of them looks (`render`), what a witness would
write about it (`caption`).

Identity is what a witness could describe: clothes, colours, pattern, shoes, hair, hat, bag, build, skin. Pose,
direction, light, background, distance, occlusion, blur and noise change from one photograph to the next. Everything
follows from integers: the same seed draws the same pixels.

Two worlds: the street (`STREET`, `SURVEILLANCE`, `caption`), where people are searched for, and pictures in general
(`CATALOGUE`, `STUDIO`, `alt_text`), on which encoders are pretrained.
"""

from .alt_texts import alt_text
from .captions import caption
from .colors import COLORS
from .identities import CATALOGUE, STREET, Identity, Wardrobe, make_identities
from .photo import HEIGHT, STUDIO, SURVEILLANCE, WIDTH, Camera, Photo, render
from .vocabulary import vocabulary

__all__ = [
    "CATALOGUE",
    "COLORS",
    "HEIGHT",
    "STREET",
    "STUDIO",
    "SURVEILLANCE",
    "WIDTH",
    "Camera",
    "Identity",
    "Photo",
    "Wardrobe",
    "alt_text",
    "caption",
    "make_identities",
    "render",
    "vocabulary",
]
