"""What two witnesses would write about a photograph: differently worded, each leaving something out.

A caption names only what can be seen in its photograph: no logo from behind, no shoes behind a car. Every attribute is
mentioned with its own probability, in an order and in words drawn from the seed.
"""

from collections.abc import Sequence

import numpy as np

from .identities import Identity
from .photo import Photo

__all__ = ["Wording", "article", "caption", "garment", "upper_garment"]

SYNONYMS: dict[str, Sequence[str]] = {
    "gray": ("gray", "grey"),
    "burgundy": ("burgundy", "dark red", "maroon"),
    "olive": ("olive", "dark green"),
    "teal": ("teal", "turquoise"),
    "light blue": ("light blue", "pale blue", "sky blue"),
    "navy": ("navy", "dark blue", "navy blue"),
    "purple": ("purple", "violet"),
    "beige": ("beige", "tan", "cream"),
    "t-shirt": ("t-shirt", "tee", "short-sleeved top"),
    "shirt": ("shirt", "long-sleeved shirt", "button-up shirt"),
    "hoodie": ("hoodie", "hooded sweatshirt", "sweatshirt with a hood"),
    "jacket": ("jacket", "open jacket"),
    "coat": ("coat", "long coat", "overcoat"),
    "dress": ("dress", "knee-length dress"),
    "tank top": ("tank top", "sleeveless top"),
    "trousers": ("trousers", "pants", "slacks"),
    "jeans": ("jeans", "denim jeans"),
    "shorts": ("shorts", "short pants"),
    "skirt": ("skirt", "knee-length skirt"),
    "cap": ("cap", "baseball cap"),
    "beanie": ("beanie", "knitted hat"),
    "backpack": ("backpack", "rucksack"),
    "handbag": ("handbag", "purse"),
    "shoulder bag": ("shoulder bag", "messenger bag", "bag over the shoulder"),
    "striped": ("striped", "stripy"),
    "checked": ("checked", "plaid", "checkered"),
    "dotted": ("dotted", "spotted", "polka dot"),
    "woman": ("woman", "lady", "female pedestrian", "young woman"),
    "man": ("man", "guy", "male pedestrian", "young man"),
    "blond": ("blond", "fair"),
}


class Wording:
    """Chooses among words that mean the same, by the seed."""

    def __init__(self, seed: tuple[int, ...]) -> None:
        self.rng = np.random.default_rng([*seed, 104729])

    def pick(self, *options: str) -> str:
        return options[int(self.rng.integers(len(options)))]

    def word(self, name: str) -> str:
        return self.pick(*SYNONYMS.get(name, (name,)))

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def shuffle(self, sentences: list[str]) -> None:
        self.rng.shuffle(sentences)


def caption(who: Identity, photo: Photo, *, seed: tuple[int, ...]) -> str:
    """One description of `photo`, lower-case words without punctuation but the hyphen."""
    witness = Wording(seed)
    pick, chance = witness.pick, witness.chance
    subject = pick("person", "pedestrian") if chance(0.12) else witness.word("woman" if who.female else "man")
    clothes = _clothes(witness, who, photo)
    extras = _extras(witness, who, photo)
    action = _action(witness, photo)
    wearing = pick("wearing", "dressed in", "in", "who wears")
    outfit = _join(witness, clothes)
    opening = f"{pick('the', 'a', 'this')} {subject}"
    if not clothes:
        sentence = f"{opening} {action}"
    elif chance(0.35):
        sentence = f"{opening} {wearing} {outfit} {action}"
    elif chance(0.5):
        sentence = f"{opening} {action} {wearing.replace('who wears', 'wearing')} {outfit}"
    else:
        sentence = f"{opening} {pick('wears', 'is wearing', 'has on')} {outfit}"
    before = 1 if extras and chance(0.15) else 0
    return " . ".join([*extras[:before], sentence, *extras[before:]]) + " ."


def _clothes(witness: Wording, who: Identity, photo: Photo) -> list[str]:
    clothes: list[str] = []
    if witness.chance(0.93):
        clothes.append(article(upper_garment(witness, who, front=photo.view == "front")))
    if who.upper != "dress" and witness.chance(0.88):
        lower = garment(witness, who.lower_color, who.lower)
        clothes.append(article(lower) if who.lower == "skirt" else lower)
    if not photo.feet_hidden and witness.chance(0.6):
        clothes.append(f"{witness.word(who.shoes_color)} {witness.pick('shoes', 'sneakers', 'footwear')}")
    witness.shuffle(clothes)
    return clothes


def _extras(witness: Wording, who: Identity, photo: Photo) -> list[str]:
    """Hat, bag, hair and glasses, a sentence each."""
    pick, chance = witness.pick, witness.chance
    pronoun = "she" if who.female else "he"
    extras: list[str] = []
    if who.hat != "none" and chance(0.85):
        extras.append(f"{pronoun} {pick('wears', 'has on')} {article(garment(witness, who.hat_color, who.hat))}")
    if who.bag != "none" and chance(0.85):
        verb = pick("carries", "is carrying", "has", "holds" if who.bag == "handbag" else "carries")
        extras.append(f"{pronoun} {verb} {article(garment(witness, who.bag_color, who.bag))}")
    if chance(0.6) and not (who.hair == "bald" and who.hat != "none"):
        extras.append(_hair(witness, who, pronoun))
    if who.glasses and photo.view == "front" and chance(0.7):
        extras.append(f"{pronoun} {pick('wears', 'has')} glasses")
    witness.shuffle(extras)
    return extras


def _hair(witness: Wording, who: Identity, pronoun: str) -> str:
    pick, word, chance = witness.pick, witness.word, witness.chance
    their = "her" if who.female else "his"
    if who.hair == "bald":
        return f"{pronoun} is bald" if chance(0.5) else f"{their} head is shaved"
    style = {"short": "short", "long": "long", "ponytail": "tied"}[who.hair]
    hair = f"{style} {word(who.hair_color)} hair"
    if who.hair == "ponytail":
        hair = pick(f"{word(who.hair_color)} hair in a ponytail", f"a {word(who.hair_color)} ponytail")
    if chance(0.6) or "ponytail" in hair:
        return f"{pronoun} has {hair}"
    return f"{their} {word(who.hair_color)} hair is {style}"


def _action(witness: Wording, photo: Photo) -> str:
    pick = witness.pick
    action = pick("is walking", "walks") if photo.walking else pick("is standing", "stands", "waits")
    if witness.chance(0.3):
        action += {
            "front": pick(" towards the camera", ""),
            "back": " away from the camera",
            "side": pick(" to the side", ""),
        }[photo.view]
    return action


def upper_garment(witness: Wording, who: Identity, *, front: bool) -> str:
    """With its colours and pattern, and what can be seen under it from the front."""
    pick, word, chance = witness.pick, witness.word, witness.chance
    color, name, second = word(who.upper_color), word(who.upper), word(who.second_color)
    if who.pattern in ("striped", "checked", "dotted") and chance(0.8):
        pattern = word(who.pattern)
        noun = pick(f"{pattern} {color} {name}", f"{color} and {second} {pattern} {name}", f"{color} {pattern} {name}")
    elif who.pattern == "logo" and front and chance(0.8):
        noun = f"{color} {name} with a {second} {pick('logo', 'print', 'emblem')}"
    else:
        noun = f"{color} {name}"
    if who.upper in ("jacket", "coat") and front and chance(0.6):
        noun += f" over a {second} {pick('shirt', 'top')}"
    return noun


def garment(witness: Wording, color: str, name: str) -> str:
    return f"{witness.word(color)} {witness.word(name)}"


def article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _join(witness: Wording, items: list[str]) -> str:
    if len(items) < 2:
        return "".join(items)
    return f"{witness.pick(' with ', ' and ').join(items[:-1])} {witness.pick('and', 'with')} {items[-1]}"
