"""What two witnesses would write about a photograph: differently worded, each leaving something out.

A caption names only what can be seen in its photograph: no logo from behind, no shoes behind a car. Every attribute is
mentioned with its own probability, in an order and in words drawn from the seed.
"""

from collections.abc import Sequence

import numpy as np

from .pedestrians import Identity, Photo

__all__ = ["caption"]

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


def caption(who: Identity, photo: Photo, *, seed: tuple[int, ...]) -> str:
    """One description of `photo`, lower-case words without punctuation but the hyphen."""
    rng = np.random.default_rng([*seed, 104729])

    def pick(*options: str) -> str:
        return options[int(rng.integers(len(options)))]

    def word(name: str) -> str:
        return pick(*SYNONYMS.get(name, (name,)))

    def chance(p: float) -> bool:
        return bool(rng.random() < p)

    subject = pick("person", "pedestrian") if chance(0.12) else word("woman" if who.female else "man")
    pronoun = "she" if who.female else "he"
    their = "her" if who.female else "his"
    front = photo.view == "front"

    clothes: list[str] = []
    if chance(0.93):
        clothes.append(_upper(who, front, word, pick, chance))
    if who.upper != "dress" and chance(0.88):
        clothes.append(f"{_article(_garment(who.lower_color, who.lower, word), who.lower == 'skirt')}")
    if not photo.feet_hidden and chance(0.6):
        clothes.append(f"{word(who.shoes_color)} {pick('shoes', 'sneakers', 'footwear')}")
    rng.shuffle(clothes)

    extras: list[str] = []
    if who.hat != "none" and chance(0.85):
        extras.append(f"{pronoun} {pick('wears', 'has on')} {_article(_garment(who.hat_color, who.hat, word))}")
    if who.bag != "none" and chance(0.85):
        verb = pick("carries", "is carrying", "has", "holds" if who.bag == "handbag" else "carries")
        extras.append(f"{pronoun} {verb} {_article(_garment(who.bag_color, who.bag, word))}")
    if chance(0.6) and not (who.hair == "bald" and who.hat != "none"):
        if who.hair == "bald":
            extras.append(f"{pronoun} is bald" if chance(0.5) else f"{their} head is shaved")
        else:
            style = {"short": "short", "long": "long", "ponytail": "tied"}[who.hair]
            hair = f"{style} {word(who.hair_color)} hair"
            if who.hair == "ponytail":
                hair = pick(f"{word(who.hair_color)} hair in a ponytail", f"a {word(who.hair_color)} ponytail")
            extras.append(
                f"{pronoun} has {hair}"
                if chance(0.6) or "ponytail" in hair
                else f"{their} {word(who.hair_color)} hair is {style}"
            )
    if who.glasses and front and chance(0.7):
        extras.append(f"{pronoun} {pick('wears', 'has')} glasses")
    rng.shuffle(extras)

    action = pick("is walking", "walks") if photo.walking else pick("is standing", "stands", "waits")
    if chance(0.3):
        action += {
            "front": pick(" towards the camera", ""),
            "back": " away from the camera",
            "side": pick(" to the side", ""),
        }[photo.view]
    wearing = pick("wearing", "dressed in", "in", "who wears")
    outfit = _join(clothes, pick)
    opening = f"{pick('the', 'a', 'this')} {subject}"
    if not clothes:
        sentences = [f"{opening} {action}"]
    elif chance(0.35):
        sentences = [f"{opening} {wearing} {outfit} {action}"]
    elif chance(0.5):
        sentences = [f"{opening} {action} {wearing.replace('who wears', 'wearing')} {outfit}"]
    else:
        sentences = [f"{opening} {pick('wears', 'is wearing', 'has on')} {outfit}"]
    if extras and chance(0.15):
        sentences = extras[:1] + sentences + extras[1:]
    else:
        sentences += extras
    return " . ".join(sentences) + " ."


def _upper(who: Identity, front: bool, word, pick, chance) -> str:  # type: ignore[no-untyped-def]
    color, name = word(who.upper_color), word(who.upper)
    second = word(who.second_color)
    if who.pattern in ("striped", "checked", "dotted") and chance(0.8):
        pattern = word(who.pattern)
        noun = pick(f"{pattern} {color} {name}", f"{color} and {second} {pattern} {name}", f"{color} {pattern} {name}")
    elif who.pattern == "logo" and front and chance(0.8):
        noun = f"{color} {name} with a {second} {pick('logo', 'print', 'emblem')}"
    else:
        noun = f"{color} {name}"
    if who.upper in ("jacket", "coat") and front and chance(0.6):
        noun += f" over a {second} {pick('shirt', 'top')}"
    return _article(noun)


def _garment(color: str, name: str, word) -> str:  # type: ignore[no-untyped-def]
    return f"{word(color)} {word(name)}"


def _article(noun: str, wanted: bool = True) -> str:
    if not wanted:
        return noun
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _join(items: list[str], pick) -> str:  # type: ignore[no-untyped-def]
    if len(items) < 2:
        return "".join(items)
    return f"{pick(' with ', ' and ').join(items[:-1])} {pick('and', 'with')} {items[-1]}"
