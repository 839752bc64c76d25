"""Who the pedestrians are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np

from .colors import COLORS, HAIR_COLORS, JEANS, SKINS

__all__ = ["CATALOGUE", "STREET", "Identity", "Wardrobe", "make_identities"]

UPPERS = ("t-shirt", "shirt", "hoodie", "jacket", "coat", "dress", "tank top")
LOWERS = ("trousers", "jeans", "shorts", "skirt")
PATTERNS = ("plain", "striped", "checked", "dotted", "logo")
HAIR_LENGTHS = ("short", "long", "ponytail", "bald")
HATS = ("none", "cap", "beanie")
BAGS = ("none", "backpack", "handbag", "shoulder bag")

_GARMENTS = (
    ("upper_color", "second_color"),
    ("lower", "lower_color"),
    ("shoes_color",),
    ("bag", "bag_color"),
    ("hair", "hair_color"),
    ("hat", "hat_color"),
    ("pattern",),
)  # what a look-alike may have changed


@dataclass(frozen=True)
class Identity:
    """What stays the same in every photograph of a person."""

    female: bool
    build: float  # width of the body, 1 = average
    skin: int
    hair: str
    hair_color: str
    upper: str
    upper_color: str
    pattern: str
    second_color: str  # of the pattern, or of the shirt under an open jacket
    lower: str
    lower_color: str
    shoes_color: str
    hat: str
    hat_color: str
    bag: str
    bag_color: str
    glasses: bool
    tint: tuple[int, ...]  # small differences between two garments of one colour name

    def described(self) -> tuple[object, ...]:
        """The attributes that a caption can name: no two identities share all of them."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.name not in ("build", "skin", "tint"))


@dataclass(frozen=True)
class Wardrobe:
    """How often people wear what: weights by name. What is not named is as frequent as any other."""

    uppers: Sequence[float]  # of UPPERS for women; men wear no dresses
    patterns: Sequence[float]
    lowers: Sequence[float]
    hats: Sequence[float]
    bags: Sequence[float]
    colors: dict[str, float] | None = None  # of clothes; None: all alike

    def color(self, rng: np.random.Generator, names: Iterable[str]) -> str:
        return _pick(rng, list(names), None if self.colors is None else [self.colors[name] for name in names])


# Where people are searched for: every colour is as frequent as any other, and many carry bags and wear hats.
STREET = Wardrobe(
    uppers=(5, 3, 3, 4, 2, 3, 1.5),
    patterns=(5, 2, 1.5, 1, 1.5),
    lowers=(4, 3, 2.5, 3),
    hats=(6, 1.6, 1),
    bags=(4, 3, 2, 2),
)
# Of pictures in general: dark and plain clothes are frequent; orange, teal or a beanie are rare.
CATALOGUE = Wardrobe(
    uppers=(2, 4, 1, 4, 4, 4, 0.7),
    patterns=(8, 1.2, 0.6, 0.5, 0.5),
    lowers=(4, 5, 1, 3),
    hats=(9, 1, 0.5),
    bags=(6, 1, 3, 1),
    colors={
        "black": 6, "white": 5, "gray": 4, "navy": 4, "blue": 4, "beige": 2.5, "brown": 2, "red": 2, "light blue": 2,
        "pink": 1.2, "green": 1, "olive": 0.7, "burgundy": 0.7, "yellow": 0.6, "orange": 0.5, "purple": 0.5,
        "teal": 0.4,
    },
)  # fmt: skip


def _pick(rng: np.random.Generator, options: Sequence[str], weights: Sequence[float] | None = None) -> str:
    p = None if weights is None else np.asarray(weights, float) / np.sum(weights)
    return options[int(rng.choice(len(options), p=p))]


def _draw_identity(rng: np.random.Generator, wardrobe: Wardrobe) -> Identity:
    pick, color = partial(_pick, rng), partial(wardrobe.color, rng)
    female = bool(rng.random() < 0.5)

    def worn(weights: Sequence[float], womens: int) -> list[float]:
        return [w if female or i != womens else 0.0 for i, w in enumerate(weights)]

    upper = pick(UPPERS, worn(wardrobe.uppers, UPPERS.index("dress")))
    upper_color = color(COLORS)
    patterns = list(wardrobe.patterns)
    if upper in ("coat", "dress", "jacket"):
        patterns[PATTERNS.index("logo")] = 0.0
    pattern = pick(PATTERNS, patterns)
    if upper in ("coat", "jacket"):
        pattern = "plain" if pattern == "dotted" else pattern
    lower = pick(LOWERS, worn(wardrobe.lowers, LOWERS.index("skirt")))
    lower_color = color(JEANS) if lower == "jeans" else color(COLORS)
    hat = pick(HATS, wardrobe.hats)
    bags = [w if female or i != BAGS.index("handbag") else 0.35 * w for i, w in enumerate(wardrobe.bags)]
    return Identity(
        female=female,
        build=float(np.clip(rng.normal(0.94 if female else 1.03, 0.08), 0.82, 1.25)),
        skin=int(rng.integers(len(SKINS))),
        hair=pick(HAIR_LENGTHS, (1, 5, 3, 0) if female else (7, 1, 0.3, 1)),
        hair_color=pick(list(HAIR_COLORS), (3, 3, 2, 1)),
        upper=upper,
        upper_color=upper_color,
        pattern=pattern,
        second_color=color([name for name in COLORS if _contrast(name, upper_color) > 110]),
        lower=lower,
        lower_color=lower_color,
        shoes_color=color(("black", "white", "gray", "red", "brown", "blue", "orange", "green", "pink")),
        hat=hat,
        hat_color=color(("black", "white", "red", "blue", "green", "yellow", "gray")),
        bag=pick(BAGS, bags),
        bag_color=color(("black", "red", "blue", "green", "brown", "yellow", "pink", "gray", "white")),
        glasses=bool(rng.random() < 0.2),
        tint=tuple(int(v) for v in rng.integers(-12, 13, 12)),
    )


def make_identities(
    count: int, *, seed: int = 0, lookalikes: float = 0.3, wardrobe: Wardrobe = STREET
) -> list[Identity]:
    """`count` people, no two with the same description; a share of them differ from another in two attributes only.

    Look-alikes stand within 20 places of each other, so that cutting the list in two splits few of them.
    """
    rng = np.random.default_rng([seed, 7919])
    people: list[Identity] = []
    taken: set[tuple[object, ...]] = set()
    while len(people) < count:
        person = _draw_identity(rng, wardrobe)
        if people and rng.random() < lookalikes:
            model = people[-1 - int(rng.integers(min(20, len(people))))]
            if model.female != person.female:
                continue
            changed = rng.choice(len(_GARMENTS), 2, replace=False)
            changes = {name: getattr(person, name) for index in changed for name in _GARMENTS[index]}
            person = replace(model, skin=person.skin, build=person.build, tint=person.tint, **changes)
            if person.pattern == "logo" and person.upper in ("coat", "dress", "jacket"):
                continue
            if _contrast(person.second_color, person.upper_color) <= 110:
                continue
        if person.described() not in taken:
            taken.add(person.described())
            people.append(person)
    return people


def _contrast(a: str, b: str) -> float:
    return float(np.abs(np.subtract(COLORS[a], COLORS[b])).sum())
