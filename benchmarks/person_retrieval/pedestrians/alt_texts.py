"""What stands beside a picture on a page: short, in phrases, naming two or three things.

The generic counterpart of `captions.py`: the same words for clothes and colours, in other sentences. It never walks,
carries or waits, and says nothing about the camera.
"""

from .captions import Wording, article, garment, upper_garment
from .identities import Identity
from .photo import Photo

__all__ = ["alt_text"]


def alt_text(who: Identity, photo: Photo, *, seed: tuple[int, ...]) -> str:
    """One line for `photo`, lower-case words without punctuation but hyphen and full stop."""
    words = Wording(seed)
    pick, chance = words.pick, words.chance
    subject = words.word("woman" if who.female else "man") if chance(0.9) else pick("person", "model")
    things = _things(words, who, photo)
    listed = (
        " and ".join([" ".join(things[:-1]), things[-1]]) if len(things) > 2 and chance(0.3) else " . ".join(things)
    )
    if not things:
        return f"{pick('photo', 'picture', 'portrait')} of {article(subject)}"
    if chance(0.4):
        picture = pick("photo", "picture", "image", "street style photo")
        return f"{picture} of {article(subject)} {pick('in', 'with', 'wearing')} {listed}"
    if chance(0.5):
        return f"{subject} {pick('in', 'wearing', 'with')} {listed}"
    return f"{pick('look', 'outfit', 'street style', 'fashion')} . {listed} . {subject}" if chance(0.5) else listed


def _things(words: Wording, who: Identity, photo: Photo) -> list[str]:
    chance, pick = words.chance, words.pick
    things = []
    if chance(0.75):
        things.append(upper_garment(words, who, front=photo.view == "front"))
    if who.upper != "dress" and chance(0.55):
        things.append(garment(words, who.lower_color, who.lower))
    if not photo.feet_hidden and chance(0.3):
        things.append(f"{words.word(who.shoes_color)} {pick('shoes', 'sneakers')}")
    if who.hat != "none" and chance(0.5):
        things.append(garment(words, who.hat_color, who.hat))
    if who.bag != "none" and chance(0.5):
        things.append(garment(words, who.bag_color, who.bag))
    if chance(0.3) and not (who.hair == "bald" and who.hat != "none"):
        things.append("bald head" if who.hair == "bald" else _hair(words, who))
    if who.glasses and photo.view == "front" and chance(0.4):
        things.append("glasses")
    words.shuffle(things)
    return things[: int(words.rng.integers(2, 5))]


def _hair(words: Wording, who: Identity) -> str:
    color = words.word(who.hair_color)
    return f"{color} ponytail" if who.hair == "ponytail" else f"{who.hair} {color} hair"
