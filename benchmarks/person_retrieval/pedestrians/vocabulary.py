"""Every word that a caption or an alt text can hold."""

from PIL import Image

from .alt_texts import alt_text
from .captions import caption
from .identities import CATALOGUE, STREET, make_identities
from .photo import Photo

__all__ = ["vocabulary"]

PEOPLE = 700  # of each world: with them the last word was found long ago
SEED = 10**6  # other people than those of any split


def vocabulary() -> list[str]:
    """The language of both worlds, as a tokenizer of CLIP knows every word."""
    words: set[str] = set()
    nothing = Image.new("RGB", (1, 1))
    for wardrobe, write in ((STREET, caption), (CATALOGUE, alt_text)):
        for number, who in enumerate(make_identities(PEOPLE, seed=SEED, wardrobe=wardrobe)):
            view = ("front", "side", "back")[number % 3]
            photo = Photo(nothing, view, walking=number % 2 == 0, feet_hidden=number % 5 == 0)
            for wording in range(4):
                words.update(write(who, photo, seed=(SEED, number, wording)).split())
    return sorted(words)
