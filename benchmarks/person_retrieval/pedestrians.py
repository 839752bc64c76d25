"""Rendered pedestrians: who they are (`Identity`) and how one photograph of them looks (`render`).

A skeleton in three dimensions is posed, turned and projected; clothes are drawn around its limbs from the farthest to
the nearest, in front of a street. Identity is what a witness could describe: clothes, colours, pattern, shoes, hair,
hat, bag, build, skin. Pose, direction, light, background, distance, occlusion, blur and noise change from one
photograph to the next. Everything follows from integers: the same seed draws the same pixels.
"""

import math
from dataclasses import dataclass, fields, replace

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

__all__ = ["COLORS", "HEIGHT", "WIDTH", "Identity", "Photo", "make_identities", "render"]

HEIGHT, WIDTH = 288, 96  # of a finished photograph; training shrinks it
SUPERSAMPLING = 2
H, W = HEIGHT * SUPERSAMPLING, WIDTH * SUPERSAMPLING  # of the canvas

COLORS = {
    "black": (28, 28, 32),
    "white": (236, 236, 232),
    "gray": (128, 130, 134),
    "red": (196, 32, 38),
    "burgundy": (108, 22, 42),
    "orange": (232, 124, 32),
    "yellow": (238, 206, 52),
    "green": (42, 132, 62),
    "olive": (104, 106, 52),
    "teal": (24, 132, 136),
    "blue": (38, 84, 190),
    "light blue": (136, 184, 228),
    "navy": (28, 36, 82),
    "purple": (112, 54, 148),
    "pink": (238, 142, 176),
    "brown": (104, 66, 40),
    "beige": (206, 182, 142),
}
UPPERS = ("t-shirt", "shirt", "hoodie", "jacket", "coat", "dress", "tank top")
LOWERS = ("trousers", "jeans", "shorts", "skirt")
PATTERNS = ("plain", "striped", "checked", "dotted", "logo")
HAIR_LENGTHS = ("short", "long", "ponytail", "bald")
HAIR_COLORS = {"black": (26, 22, 22), "brown": (84, 54, 34), "blond": (206, 168, 98), "gray": (168, 166, 164)}
SKINS = ((246, 212, 186), (228, 184, 150), (190, 138, 100), (134, 90, 62), (86, 56, 40))
JEANS = {"blue": (58, 84, 128), "light blue": (138, 168, 204), "black": (44, 46, 54), "gray": (110, 116, 126)}
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
class Photo:
    """One photograph of a person, and what of them can be seen in it."""

    image: Image.Image
    view: str  # "front", "side" or "back"
    walking: bool
    feet_hidden: bool


# ------------------------------------------------------------------------------------------------------- identities


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


# -------------------------------------------------------------------------------------------------------- the canvas

Color = tuple[int, int, int]
Point = tuple[float, float]


_HALF_TURN = tuple(math.pi * (0.5 + k / 6) for k in range(7))
_CIRCLE = tuple((math.cos(2 * math.pi * k / 28), math.sin(2 * math.pi * k / 28)) for k in range(28))


def _shift(color: Color, amount: float) -> Color:
    r, g, b = (int(min(255, max(0, channel + amount))) for channel in color)
    return r, g, b


class _Canvas:
    """Cloth, skin and metal in polygons with rounded shading; `scale` turns body heights into pixels."""

    def __init__(self, image: Image.Image, scale: float, light: float) -> None:
        self.image, self.draw, self.scale, self.light = image, ImageDraw.Draw(image), scale, light

    def polygon(self, points: list[Point], fill: Color | Image.Image, shade: float = 26.0) -> None:
        """A filled outline. Its rim is darker on the side that the light does not reach, as on a rounded body."""
        box = self._box(points)
        if box is None:
            return
        x0, y0, x1, y1 = box
        local = [(x - x0, y - y0) for x, y in points]
        mask = Image.new("L", (x1 - x0, y1 - y0))
        ImageDraw.Draw(mask).polygon(local, fill=255)
        self.image.paste(fill.crop(box) if isinstance(fill, Image.Image) else fill, box, mask)
        if shade <= 0:
            return
        # What the outline leaves uncovered when it shrinks and moves towards the light lies in shadow.
        width = x1 - x0
        center = sum(x for x, _ in local) / len(local) + 0.12 * self.light * width
        veil = Image.new("L", mask.size, int(shade * 2.4))
        ImageDraw.Draw(veil).polygon([((x - center) * 0.72 + center, y) for x, y in local], fill=0)
        veil = veil.filter(ImageFilter.BoxBlur(max(1.0, width * 0.09)))
        self.image.paste((0, 0, 0), box, ImageChops.multiply(veil, mask))

    def limb(self, a: Point, b: Point, ra: float, rb: float, fill: Color | Image.Image, shade: float = 26.0) -> None:
        """A tapered tube with round ends from `a` to `b`."""
        angle = math.atan2(b[1] - a[1], b[0] - a[0])
        turns = [(math.cos(angle + t), math.sin(angle + t)) for t in _HALF_TURN]
        start = [(a[0] + ra * cos, a[1] + ra * sin) for cos, sin in turns]
        end = [(b[0] - rb * cos, b[1] - rb * sin) for cos, sin in turns]
        self.polygon(start + end, fill, shade)

    def ellipse(self, center: Point, rx: float, ry: float, fill: Color | Image.Image, shade: float = 22.0) -> None:
        self.polygon([(center[0] + rx * cos, center[1] + ry * sin) for cos, sin in _CIRCLE], fill, shade)

    def line(self, points: list[Point], fill: Color, width: float) -> None:
        self.draw.line(points, fill=fill, width=max(1, round(width)), joint="curve")

    def _box(self, points: list[Point]) -> tuple[int, int, int, int] | None:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        width, height = self.image.size
        x0, y0 = max(0, int(min(xs)) - 1), max(0, int(min(ys)) - 1)
        x1, y1 = min(width, int(max(xs)) + 2), min(height, int(max(ys)) + 2)
        return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def _fabric(color: Color, second: Color, pattern: str, scale: float, origin: Point) -> Color | Image.Image:
    """Plain cloth is a colour; patterned cloth an image of the canvas' size, anchored at the body."""
    if pattern in ("plain", "logo"):
        return color
    cloth = Image.new("RGB", (W, H), color)
    draw = ImageDraw.Draw(cloth)
    x0, y0 = origin
    step = {"striped": 0.056, "checked": 0.06, "dotted": 0.05}[pattern] * scale
    rows = np.arange(y0 % step - step, H + step, step)
    columns = np.arange(x0 % step - step, W + step, step)
    if pattern == "striped":
        for y in rows:
            draw.rectangle((0, y, W, y + step * 0.45), fill=second)
    elif pattern == "checked":
        between = tuple((a + b) // 2 for a, b in zip(color, second, strict=True))
        for y in rows:
            draw.rectangle((0, y, W, y + step * 0.4), fill=between)
        for x in columns:
            draw.rectangle((x, 0, x + step * 0.4, H), fill=between)
        for y in rows:
            for x in columns:
                draw.rectangle((x, y, x + step * 0.4, y + step * 0.4), fill=second)
    else:
        radius = step * 0.26
        for index, y in enumerate(rows):
            for x in columns + (step / 2 if index % 2 else 0):
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=second)
    return cloth


# ---------------------------------------------------------------------------------------------------------- a person


class _Pose:
    """Joints of a walking or standing body, in body heights, turned by `yaw` and projected to the canvas.

    The body's axes: x to its left, y down, z ahead; yaw 0 faces the camera.
    """

    def __init__(self, rng: np.random.Generator, walking: bool, yaw: float, build: float, scale: float, foot: Point):
        self.cos, self.sin, self.scale, self.foot = float(np.cos(yaw)), float(np.sin(yaw)), scale, foot
        stride = rng.uniform(0.28, 0.5) if walking else rng.uniform(0.0, 0.08)
        swing = stride * float(rng.choice((-1, 1))) * (rng.uniform(0.35, 1.0) if walking else 1.0)
        spread = rng.uniform(0.0, 0.05)
        lift = rng.uniform(0.0, 0.16)
        shoulder, hip = 0.108 * build, 0.055 * build
        self.joints: dict[str, tuple[float, float, float]] = {}
        for side, sign in (("l", 1), ("r", -1)):
            thigh = sign * swing
            bend = 0.12 + (0.75 * abs(swing) if thigh < 0 else 0.05)  # the leg behind bends its knee
            knee = (sign * (hip + spread * 0.4), 0.525 + 0.215 * np.cos(thigh), 0.215 * np.sin(thigh))
            ankle = (
                sign * (hip + spread * 0.8),
                knee[1] + 0.215 * np.cos(thigh - bend),
                knee[2] + 0.215 * np.sin(thigh - bend),
            )
            toe = (ankle[0] + sign * 0.018, ankle[1] + 0.025, ankle[2] + 0.085)
            arm = -sign * swing * 0.8 + rng.normal(0, 0.06)
            elbow_bend = rng.uniform(0.1, 0.45) if rng.random() < 0.75 else rng.uniform(0.6, 1.7)
            out = rng.uniform(0.012, 0.045)
            elbow = (sign * (shoulder + out), 0.205 + 0.16 * np.cos(arm), 0.16 * np.sin(arm))
            hand = (
                sign * (shoulder + out * 0.7),
                elbow[1] + 0.155 * np.cos(arm + elbow_bend),
                elbow[2] + 0.155 * np.sin(arm + elbow_bend),
            )
            self.joints |= {
                f"hip_{side}": (sign * hip, 0.525, 0.0),
                f"knee_{side}": knee,
                f"ankle_{side}": ankle,
                f"toe_{side}": toe,
                f"shoulder_{side}": (sign * shoulder, 0.205, 0.0),
                f"elbow_{side}": elbow,
                f"hand_{side}": hand,
            }
        self.ground = max(self.joints["ankle_l"][1], self.joints["ankle_r"][1]) + 0.035
        self.nod = float(rng.normal(0, 0.006))
        self.lift = lift

    def at(self, x: float, y: float, z: float) -> Point:
        """Canvas position of a point of the body."""
        return (
            self.foot[0] + (x * self.cos + z * self.sin) * self.scale,
            self.foot[1] + (y - self.ground) * self.scale,
        )

    def joint(self, name: str) -> Point:
        return self.at(*self.joints[name])

    def depth(self, x: float, z: float) -> float:
        """Towards the camera."""
        return z * self.cos - x * self.sin

    def half_width(self, across: float, along: float) -> float:
        """Half the silhouette of an elliptic ring with half-axes `across` and `along` the walking direction."""
        return float(np.hypot(across * self.cos, along * self.sin)) * self.scale

    def outline(self, rings: list[tuple[float, float, float]]) -> list[Point]:
        """Silhouette of a body of elliptic rings (y, across, along), top to bottom."""
        left, right = [], []
        for y, across, along in rings:
            x, screen_y = self.at(0, y, 0)
            half = self.half_width(across, along)
            left.append((x - half, screen_y))
            right.append((x + half, screen_y))
        return left + right[::-1]


def _draw_person(canvas: _Canvas, who: Identity, pose: _Pose) -> None:
    s, b = canvas.scale, who.build
    tint = [who.tint[i : i + 3] for i in range(0, 12, 3)]

    def cloth(name: str, index: int, table: dict[str, Color] = COLORS) -> Color:
        r, g, bl = (min(255, max(0, c + t)) for c, t in zip(table[name], tint[index], strict=True))
        return r, g, bl

    skin, hair = SKINS[who.skin], HAIR_COLORS[who.hair_color]
    upper, second = cloth(who.upper_color, 0), COLORS[who.second_color]
    lower = cloth(who.lower_color, 1, JEANS if who.lower == "jeans" else COLORS)
    shoes, bag, hat = cloth(who.shoes_color, 2), cloth(who.bag_color, 3), COLORS[who.hat_color]
    fabric = _fabric(upper, second, who.pattern, s, pose.at(0, 0.2, 0))
    dress, coat = who.upper == "dress", who.upper == "coat"
    facing = pose.cos  # 1: towards the camera, -1: away
    parts: list[tuple[float, object]] = []

    def leg(side: str, sign: int) -> None:
        hip, knee, ankle, toe = (pose.joint(f"{name}_{side}") for name in ("hip", "knee", "ankle", "toe"))
        bare = dress or who.lower in ("shorts", "skirt")
        thick, slim = (0.055 * b, 0.038 * b) if not bare else (0.046 * b, 0.031 * b)
        cover = skin if bare else lower
        far = 10 if pose.depth(sign * 0.06, 0) < -0.02 else 0  # the far leg lies in the near one's shadow
        cover = _shift(cover, -far)
        canvas.limb(ankle, toe, 0.026 * s, 0.019 * s, _shift(shoes, -far), 20)
        canvas.limb(
            (toe[0], toe[1] + 0.012 * s), (ankle[0], ankle[1] + 0.034 * s), 0.006 * s, 0.008 * s, _shift(shoes, -60), 0
        )
        canvas.limb(knee, ankle, slim * s, (0.021 if bare else 0.03) * s, cover)
        canvas.limb(hip, knee, thick * s, (slim + 0.003) * s, cover)
        if who.lower == "jeans" and not bare:
            canvas.line([hip, knee, ankle], _shift(lower, -14), 0.006 * s)
        if who.lower == "shorts" and not dress:
            hem = tuple(h + 0.86 * (k - h) for h, k in zip(hip, knee, strict=True))
            canvas.limb(hip, (hem[0], hem[1]), 0.056 * b * s, 0.05 * b * s, _shift(lower, -far))

    def torso() -> None:
        waist = 0.066 if who.female else 0.079
        hips = 0.088 if who.female else 0.083
        loose = {"hoodie": 1.1, "jacket": 1.1, "coat": 1.13, "dress": 0.97, "tank top": 0.93}.get(who.upper, 1.0)
        rings = [
            (0.168, 0.03, 0.035),
            (0.182, 0.088 * b, 0.05),
            (0.2, 0.113 * b, 0.06),
            (0.26, 0.107 * b, 0.074 * b),
            (0.32, 0.097 * b, 0.072 * b),
            (0.42, waist * b, 0.064 * b),
            (0.5, hips * b, 0.07 * b),
        ]
        rings = [
            (y, across * (loose if y > 0.2 else 1), along * (loose if y > 0.2 else 1)) for y, across, along in rings
        ]
        legs = 0.03 * abs(pose.sin)  # a long garment follows the stride
        if not dress:  # the seat of the trousers, or the skirt
            seat = [(0.46, waist * b, 0.06 * b), (0.52, hips * b * 1.04, 0.07 * b), (0.555, hips * b * 0.98, 0.066 * b)]
            if who.lower == "skirt" and not coat:
                seat = [*seat[:2], (0.6, 0.112 * b, 0.095 + legs), (0.69, 0.132 * b, 0.105 + legs)]
            canvas.polygon(pose.outline(seat), lower)
        if coat:
            rings += [(0.6, 0.1 * b, 0.082 + legs), (0.74, 0.113 * b, 0.085 + legs)]
        elif dress:
            rings += [(0.6, 0.112 * b, 0.09 + legs), (0.7, 0.134 * b, 0.1 + legs)]
        else:
            rings += [(0.53, (hips + 0.006) * b * loose, 0.073 * b * loose)]
        canvas.polygon(pose.outline(rings), fabric)
        if who.upper == "tank top":  # bare shoulders
            for sign in (-1, 1):
                canvas.ellipse(pose.at(sign * 0.1 * b, 0.2, 0), 0.026 * s, 0.024 * s, skin, 12)
        hem = 0.74 if coat else 0.53
        if who.upper in ("jacket", "coat", "shirt") and facing > 0.15:
            middle = lambda y, x=0.0: pose.at(x, y, 0.07)  # noqa: E731
            if who.upper == "shirt":
                canvas.line([middle(0.18), middle(0.52)], _shift(upper, -38), 0.005 * s)
                canvas.polygon([middle(0.172, -0.03), middle(0.172, 0.03), middle(0.21)], skin, 0)
            else:  # open over another shirt
                opening = [
                    middle(0.168, -0.026),
                    middle(0.168, 0.026),
                    middle(0.34, 0.02),
                    middle(hem, 0.034 if coat else 0.026),
                    middle(hem, -0.034 if coat else -0.026),
                    middle(0.34, -0.02),
                ]
                if coat:
                    opening = [*opening[:3], middle(0.46, 0.008), middle(0.46, -0.008), opening[5]]
                canvas.polygon(opening, second, 10)
                for sign in (-1, 1):
                    canvas.line(
                        [middle(0.168, sign * 0.026), middle(0.34, sign * 0.02), middle(0.46, sign * 0.01)],
                        _shift(upper, -30),
                        0.008 * s,
                    )
        elif who.upper in ("t-shirt", "tank top", "dress") and facing > 0.0:
            depth = 0.02 if who.upper == "t-shirt" else 0.035
            canvas.ellipse(pose.at(0, 0.172, 0.03), pose.half_width(0.032, 0.03), depth * s, skin, 0)
        elif who.upper == "hoodie":
            z = 0.03 if facing > 0 else -0.045
            canvas.ellipse(
                pose.at(0, 0.182, z),
                pose.half_width(0.056, 0.045),
                (0.022 if facing > 0 else 0.04) * s,
                _shift(upper, -20),
                14,
            )
            if facing > 0.25:  # pocket and strings
                canvas.line(
                    [
                        pose.at(-0.045, 0.48, 0.07),
                        pose.at(-0.03, 0.42, 0.07),
                        pose.at(0.03, 0.42, 0.07),
                        pose.at(0.045, 0.48, 0.07),
                    ],
                    _shift(upper, -36),
                    0.006 * s,
                )
                for sign in (-1, 1):
                    canvas.line(
                        [pose.at(sign * 0.014, 0.19, 0.06), pose.at(sign * 0.016, 0.25, 0.07)],
                        _shift(upper, 60),
                        0.005 * s,
                    )
        if who.pattern == "logo" and facing > 0.25:
            x, y = pose.at(0, 0.295, 0.07)
            canvas.ellipse((x, y), 0.046 * s * facing, 0.04 * s, second, 0)
            canvas.ellipse((x, y), 0.024 * s * facing, 0.02 * s, upper, 0)
        if dress:
            canvas.polygon(
                pose.outline([(0.415, waist * b, 0.066 * b), (0.435, waist * b, 0.066 * b)]), _shift(upper, -45), 0
            )

    def arm(side: str) -> None:
        shoulder, elbow, hand = (pose.joint(f"{name}_{side}") for name in ("shoulder", "elbow", "hand"))
        shoulder = (shoulder[0] * 0.94 + pose.at(0, 0, 0)[0] * 0.06, shoulder[1] + 0.016 * s)
        wide = 0.037 * b * s * (1.12 if who.upper in ("hoodie", "jacket", "coat") else 1.0)
        canvas.ellipse(hand, 0.02 * s, 0.026 * s, skin, 12)
        if who.upper in ("t-shirt", "dress", "tank top"):
            canvas.limb(elbow, hand, 0.025 * s, 0.017 * s, skin)
            canvas.limb(shoulder, elbow, 0.03 * s, 0.025 * s, skin)
            if who.upper != "tank top":
                sleeve = tuple(a + 0.62 * (e - a) for a, e in zip(shoulder, elbow, strict=True))
                canvas.limb(shoulder, (sleeve[0], sleeve[1]), wide, wide * 0.93, fabric)
        else:
            canvas.limb(elbow, hand, wide * 0.84, wide * 0.62, fabric)
            canvas.limb(shoulder, elbow, wide, wide * 0.84, fabric)

    def head() -> None:
        x, y = pose.at(0, 0.078 + pose.nod, 0.012)
        canvas.limb(pose.at(0, 0.13, 0.0), pose.at(0, 0.178, 0.0), 0.026 * s, 0.03 * s, _shift(skin, -18), 14)
        rx, ry = pose.half_width(0.046, 0.054), 0.066 * s
        bald = who.hair == "bald"
        canvas.ellipse((x, y), rx * (1 if bald else 1.08), ry * (1 if bald else 1.04), skin if bald else hair)
        if facing > -0.4:  # the face, ahead of and below the hair
            ahead = 0.026 * pose.sin * s
            low = 0.0 if bald else 0.014 * s
            canvas.ellipse(
                (x + ahead, y + low), rx * (0.92 - 0.28 * abs(pose.sin)), ry * (1.0 if bald else 0.86), skin, 14
            )
            if not bald:  # the hairline
                canvas.ellipse((x + ahead * 0.4, y - 0.05 * s), rx * 0.98, 0.021 * s, hair, 8)
            for sign in (-1, 1):
                eye_x = sign * 0.019 * pose.cos + 0.045 * pose.sin
                if pose.depth(sign * 0.019, 0.045) > 0.004:
                    eye = (x + eye_x * s, y + 0.004 * s)
                    canvas.ellipse(eye, 0.0062 * s, 0.0055 * s, (34, 26, 24), 0)
                    canvas.line(
                        [(eye[0] - 0.009 * s, eye[1] - 0.013 * s), (eye[0] + 0.009 * s, eye[1] - 0.014 * s)],
                        _shift(hair, -10),
                        0.004 * s,
                    )
                    if who.glasses:
                        r = 0.0135 * s
                        canvas.draw.ellipse(
                            (eye[0] - r, eye[1] - r, eye[0] + r, eye[1] + r),
                            outline=(16, 16, 18),
                            width=max(1, round(0.005 * s)),
                        )
            if who.glasses and facing > -0.1:
                canvas.line(
                    [
                        (x + 0.045 * pose.sin * s - 0.008 * s, y + 0.003 * s),
                        (x + 0.045 * pose.sin * s + 0.008 * s, y + 0.003 * s),
                    ],
                    (16, 16, 18),
                    0.004 * s,
                )
            mouth = x + 0.047 * pose.sin * s
            canvas.line(
                [
                    (mouth - 0.011 * s * max(0.3, facing), y + 0.037 * s),
                    (mouth + 0.011 * s * max(0.3, facing), y + 0.037 * s),
                ],
                _shift(skin, -70),
                0.006 * s,
            )
            canvas.line(
                [(x + 0.05 * pose.sin * s, y + 0.012 * s), (x + 0.054 * pose.sin * s, y + 0.022 * s)],
                _shift(skin, -34),
                0.006 * s,
            )
        if who.hat == "cap":
            canvas.polygon(
                [
                    (x + rx * 1.14 * float(np.cos(t)), y - 0.02 * s + 0.056 * s * float(np.sin(t)))
                    for t in np.linspace(np.pi, 2 * np.pi, 14)
                ],
                hat,
            )
            if facing > -0.35:
                brim = x + 0.05 * pose.sin * s
                canvas.ellipse((brim, y - 0.021 * s), pose.half_width(0.04, 0.04), 0.009 * s, _shift(hat, -30), 0)
        elif who.hat == "beanie":
            canvas.polygon(
                [
                    (x + rx * 1.14 * float(np.cos(t)), y - 0.026 * s + 0.062 * s * float(np.sin(t)))
                    for t in np.linspace(np.pi, 2 * np.pi, 14)
                ],
                hat,
            )
            canvas.limb(
                (x - rx * 1.02, y - 0.028 * s),
                (x + rx * 1.02, y - 0.028 * s),
                0.013 * s,
                0.013 * s,
                _shift(hat, -24),
                0,
            )

    def back_hair() -> None:
        if who.hair == "long":
            x, y = pose.at(0, 0.08, -0.018)
            w = pose.half_width(0.056, 0.05)
            canvas.polygon(
                [
                    (x - w * 0.8, y - 0.04 * s),
                    (x + w * 0.8, y - 0.04 * s),
                    (x + w * 1.06, y + 0.05 * s),
                    (x + w, y + 0.15 * s),
                    (x, y + 0.165 * s),
                    (x - w, y + 0.15 * s),
                    (x - w * 1.06, y + 0.05 * s),
                ],
                hair,
                22,
            )
        elif who.hair == "ponytail":
            canvas.limb(pose.at(0, 0.06, -0.055), pose.at(0, 0.185, -0.075), 0.017 * s, 0.012 * s, hair, 16)

    def strands() -> None:
        for sign in (-1, 1):
            canvas.limb(
                pose.at(sign * 0.046, 0.075, 0.01), pose.at(sign * 0.056, 0.225, 0.03), 0.014 * s, 0.009 * s, hair, 12
            )

    def backpack() -> None:
        x, _ = pose.at(0, 0, -0.115)
        w = pose.half_width(0.082 * b, 0.05)
        top, bottom = pose.at(0, 0.205, 0)[1], pose.at(0, 0.455, 0)[1]
        r = 0.028 * s
        points = [
            (x - w + r, top),
            (x + w - r, top),
            (x + w, top + r),
            (x + w, bottom - r * 0.6),
            (x + w - r * 0.5, bottom),
            (x - w + r * 0.5, bottom),
            (x - w, bottom - r * 0.6),
            (x - w, top + r),
        ]
        canvas.polygon(points, bag)
        if facing < 0.2:
            pocket = [
                (x - w * 0.7, bottom - 0.1 * s),
                (x + w * 0.7, bottom - 0.1 * s),
                (x + w * 0.7, bottom - 0.02 * s),
                (x - w * 0.7, bottom - 0.02 * s),
            ]
            canvas.polygon(pocket, _shift(bag, -24), 8)
            canvas.line([(x - w * 0.75, top + 0.055 * s), (x + w * 0.75, top + 0.055 * s)], _shift(bag, -44), 0.006 * s)

    def straps() -> None:
        for sign in (-1, 1):
            canvas.line(
                [
                    pose.at(sign * 0.058 * b, 0.176, 0.0),
                    pose.at(sign * 0.066 * b, 0.25, 0.07),
                    pose.at(sign * 0.08 * b, 0.37, 0.045),
                ],
                bag,
                0.021 * s,
            )

    def handbag() -> None:
        x, y = pose.joint("hand_l")
        top, w, h = y + 0.075 * s, pose.half_width(0.03, 0.066), 0.085 * s
        canvas.line([(x - w * 0.6, top), (x, y + 0.01 * s), (x + w * 0.6, top)], _shift(bag, -40), 0.008 * s)
        canvas.polygon([(x - w * 0.85, top), (x + w * 0.85, top), (x + w, top + h), (x - w, top + h)], bag)

    def shoulder_bag() -> None:
        front = 0.07 if facing > 0 else -0.07
        x, y = pose.at(-0.125 * b, 0.5, 0.02)
        canvas.line([pose.at(0.06 * b, 0.176, 0), pose.at(0.0, 0.31, front), (x, y)], _shift(bag, -26), 0.014 * s)
        if pose.depth(-0.125 * b, 0) > -0.11:
            w, h = pose.half_width(0.03, 0.068), 0.052 * s
            canvas.polygon(
                [(x - w, y - h * 0.4), (x + w, y - h * 0.4), (x + w * 1.04, y + h * 1.2), (x - w * 1.04, y + h * 1.2)],
                bag,
            )
            canvas.line([(x - w, y + h * 0.2), (x + w, y + h * 0.2)], _shift(bag, -40), 0.006 * s)

    for side, sign in (("l", 1), ("r", -1)):
        ankle = pose.joints[f"knee_{side}"]
        hand = pose.joints[f"hand_{side}"]
        parts.append((pose.depth(ankle[0], ankle[2]) * 0.3 - 0.05, lambda side=side, sign=sign: leg(side, sign)))
        parts.append((pose.depth(hand[0], hand[2] * 0.6) + 0.004, lambda side=side: arm(side)))
    parts.append((0.0, torso))
    parts.append((0.03, head))
    # Hair behind the head: over the coat from behind; from ahead under it, but for two strands.
    parts.append((-0.02 if facing > 0.25 else 0.029 if facing > -0.25 else 0.045, back_hair))
    if who.hair == "long" and facing > 0.25:
        parts.append((0.031, strands))
    if who.bag == "backpack":
        parts.append((pose.depth(0, -0.1), backpack))
        if facing > -0.3:
            parts.append((0.002, straps))
    elif who.bag == "handbag":
        hand = pose.joints["hand_l"]
        parts.append((pose.depth(hand[0], hand[2] * 0.6) + 0.003, handbag))
    elif who.bag == "shoulder bag":
        parts.append((0.002 + max(0.0, pose.depth(-0.125, 0)), shoulder_bag))
    for _, paint in sorted(parts, key=lambda part: part[0]):
        paint()  # type: ignore[operator]


# --------------------------------------------------------------------------------------------------------- the street


def _street(rng: np.random.Generator) -> Image.Image:
    """A wall or a park above, the ground below, out of focus."""
    image = Image.new("RGB", (WIDTH, HEIGHT))
    draw = ImageDraw.Draw(image)

    def tone(low: int = 70, high: int = 205, colorful: float = 20) -> Color:
        base = rng.uniform(low, high)
        r, g, b = (int(v) for v in (base + rng.normal(0, colorful, 3)).clip(10, 245))
        return r, g, b

    horizon = int(rng.uniform(0.18, 0.62) * HEIGHT)
    wall, ground = tone(), tone(95, 190, 9)
    draw.rectangle((0, 0, WIDTH, horizon), fill=wall)
    kind = rng.integers(3)
    if kind == 0:  # a building: windows or doors
        step, top = int(rng.integers(22, 46)), int(rng.integers(0, 30))
        glass = tone(40, 220, 14)
        for x in range(int(rng.integers(-20, 0)), WIDTH, step):
            for y in range(top, horizon - 16, step + 12):
                draw.rectangle((x, y, x + step * 0.55, y + step * 0.8), fill=glass)
    elif kind == 1:  # trees and hedges
        for _ in range(16):
            x, y, r = rng.uniform(0, WIDTH), rng.uniform(0, horizon), rng.uniform(8, 26)
            green = (int(rng.integers(40, 90)), int(rng.integers(80, 140)), int(rng.integers(40, 80)))
            draw.ellipse((x - r, y - r, x + r, y + r), fill=green)
    else:  # shop fronts, posters, parked cars
        for _ in range(int(rng.integers(3, 7))):
            x, y = rng.uniform(-20, WIDTH), rng.uniform(-20, horizon)
            draw.rectangle((x, y, x + rng.uniform(10, 60), y + rng.uniform(14, 80)), fill=tone(40, 220, 34))
    draw.rectangle((0, horizon, WIDTH, HEIGHT), fill=ground)
    if rng.random() < 0.5:  # a kerb, then paving
        draw.rectangle(
            (0, horizon, WIDTH, horizon + rng.uniform(4, 14)), fill=_shift(ground, float(rng.uniform(-40, 40)))
        )
    vanish = rng.uniform(-60, WIDTH + 60)
    if rng.random() < 0.7:
        line = _shift(ground, float(rng.choice((-16, 18))))
        for x in np.arange(-240, WIDTH + 240, rng.uniform(26, 60)):
            draw.line((vanish, horizon - 20, x, HEIGHT), fill=line, width=1)
        y = float(horizon)
        while y < HEIGHT:
            draw.line((0, y, WIDTH, y), fill=line)
            y += 6 + (y - horizon) * 0.22
        draw.rectangle((0, horizon - 22, WIDTH, horizon - 1), fill=_shift(wall, -12))
    image = image.filter(ImageFilter.BoxBlur(float(rng.uniform(0.8, 2.4))))
    return image.resize((W, H), Image.Resampling.BILINEAR)


def _occlude(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> bool:
    """Something stands between camera and person; True where it hides the feet."""
    color = tuple(int(v) for v in rng.integers(40, 190, 3))
    kind = rng.integers(3)
    if kind == 0:  # a post
        x, w = rng.uniform(0.05, 0.95) * W, rng.uniform(0.04, 0.1) * W
        draw.rectangle((x, 0, x + w, H), fill=color)
        draw.rectangle((x, 0, x + w * 0.35, H), fill=tuple(min(255, c + 24) for c in color))
        return False
    if kind == 1:  # a car's bonnet, a planter, a bench
        top = rng.uniform(0.74, 0.86) * H
        left = rng.choice((-0.2, 0.25)) * W
        draw.rounded_rectangle((left, top, left + W, H + 40), radius=26, fill=color)
        draw.rounded_rectangle((left, top, left + W, top + 16), radius=8, fill=tuple(min(255, c + 36) for c in color))
        return True
    side = rng.choice((-1, 1))  # the shoulder of a passer-by
    x = (0.5 + side * 0.5) * W
    r = rng.uniform(0.12, 0.24) * W
    top = rng.uniform(0.15, 0.4) * H
    draw.rounded_rectangle((x - r, top, x + r, H + 40), radius=int(r * 0.8), fill=color)
    return False


def render(who: Identity, *, seed: tuple[int, ...]) -> Photo:
    """One photograph of `who`, 288 x 96 RGB; `seed` decides everything but the person."""
    rng = np.random.default_rng(list(seed))
    view = ("front", "back", "side")[int(rng.choice(3, p=(0.45, 0.25, 0.3)))]
    turn = {"front": 0.0, "back": np.pi, "side": np.pi / 2 * rng.choice((-1, 1))}[view] + rng.normal(0, 0.24)
    walking = bool(rng.random() < 0.7)
    scale = rng.uniform(0.80, 0.95) * H
    foot = (W / 2 + rng.normal(0, 0.045) * W, rng.uniform(0.935, 0.985) * H)
    pose = _Pose(rng, walking, float(turn), who.build, scale, foot)

    image = _street(rng)
    reach = int(scale * 0.2)
    shadow = Image.new("L", (reach // 2, reach // 4))
    ImageDraw.Draw(shadow).ellipse((reach * 0.08, reach * 0.06, reach * 0.42, reach * 0.19), fill=150)
    shadow = shadow.filter(ImageFilter.GaussianBlur(3)).resize((2 * reach, reach))
    image.paste((12, 12, 16), (int(foot[0]) - reach, int(foot[1]) - reach // 2), shadow)
    _draw_person(_Canvas(image, scale, float(rng.choice((-1, 1)) * rng.uniform(0.3, 1.0))), who, pose)
    feet_hidden = rng.random() < 0.25 and _occlude(ImageDraw.Draw(image), rng)
    image = image.reduce(SUPERSAMPLING)
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.3))))

    pixels = np.asarray(image, np.float32)
    warmth = rng.normal(0, 0.06)
    gain = rng.uniform(0.68, 1.22) * np.array((1 + warmth, 1, 1 - warmth))
    side_light = 1 + rng.normal(0, 0.12) * np.linspace(-1, 1, WIDTH)[None, :, None]
    veil = rng.uniform(0, 26)  # haze lifts the dark tones
    pixels = pixels * (gain * side_light * (1 - veil / 255)).astype(np.float32) + veil
    pixels += rng.standard_normal((HEIGHT, WIDTH, 1), np.float32) * rng.uniform(1.5, 8)
    return Photo(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), view, walking, bool(feet_hidden))
