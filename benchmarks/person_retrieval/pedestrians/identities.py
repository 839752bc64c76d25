"""Who the pedestrians are."""

from dataclasses import dataclass, fields, replace

import numpy as np

from .colors import COLORS, HAIR_COLORS, JEANS, SKINS

__all__ = ["Identity", "make_identities"]

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


def _draw_identity(rng: np.random.Generator) -> Identity:
    def pick(options, weights=None):  # type: ignore[no-untyped-def]
        options = list(options)
        p = None if weights is None else np.asarray(weights, float) / np.sum(weights)
        return options[int(rng.choice(len(options), p=p))]

    female = bool(rng.random() < 0.5)
    upper = pick(UPPERS, (5, 3, 3, 4, 2, 3 if female else 0, 1.5))
    upper_color = pick(COLORS)
    pattern = pick(PATTERNS, (5, 2, 1.5, 1, 0 if upper in ("coat", "dress", "jacket") else 1.5))
    if upper in ("coat", "jacket"):
        pattern = "plain" if pattern == "dotted" else pattern
    lower = pick(LOWERS, (4, 3, 2.5, 3 if female else 0))
    lower_color = pick(JEANS) if lower == "jeans" else pick(COLORS)
    hat = pick(HATS, (6, 1.6, 1))
    return Identity(
        female=female,
        build=float(np.clip(rng.normal(0.94 if female else 1.03, 0.08), 0.82, 1.25)),
        skin=int(rng.integers(len(SKINS))),
        hair=pick(HAIR_LENGTHS, (1, 5, 3, 0) if female else (7, 1, 0.3, 1)),
        hair_color=pick(HAIR_COLORS, (3, 3, 2, 1)),
        upper=upper,
        upper_color=upper_color,
        pattern=pattern,
        second_color=pick([name for name in COLORS if _contrast(name, upper_color) > 110]),
        lower=lower,
        lower_color=lower_color,
        shoes_color=pick(("black", "white", "gray", "red", "brown", "blue", "orange", "green", "pink")),
        hat=hat,
        hat_color=pick(("black", "white", "red", "blue", "green", "yellow", "gray")),
        bag=pick(BAGS, (4, 3, 2 if female else 0.7, 2)),
        bag_color=pick(("black", "red", "blue", "green", "brown", "yellow", "pink", "gray", "white")),
        glasses=bool(rng.random() < 0.2),
        tint=tuple(int(v) for v in rng.integers(-12, 13, 12)),
    )


def make_identities(count: int, *, seed: int = 0, lookalikes: float = 0.3) -> list[Identity]:
    """`count` people, no two with the same description; a share of them differ from another in two attributes only.

    Look-alikes stand within 20 places of each other, so that cutting the list in two splits few of them.
    """
    rng = np.random.default_rng([seed, 7919])
    people: list[Identity] = []
    taken: set[tuple[object, ...]] = set()
    while len(people) < count:
        person = _draw_identity(rng)
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
