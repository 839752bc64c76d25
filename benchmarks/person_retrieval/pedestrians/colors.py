"""The palette: what each colour name looks like on cloth, denim, hair and skin."""

__all__ = ["COLORS", "HAIR_COLORS", "JEANS", "SKINS", "Color", "shift"]

Color = tuple[int, int, int]

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
HAIR_COLORS = {"black": (26, 22, 22), "brown": (84, 54, 34), "blond": (206, 168, 98), "gray": (168, 166, 164)}
SKINS = ((246, 212, 186), (228, 184, 150), (190, 138, 100), (134, 90, 62), (86, 56, 40))
JEANS = {"blue": (58, 84, 128), "light blue": (138, 168, 204), "black": (44, 46, 54), "gray": (110, 116, 126)}


def shift(color: Color, amount: float) -> Color:
    """Lighter, or darker where `amount` is negative."""
    r, g, b = (int(min(255, max(0, channel + amount))) for channel in color)
    return r, g, b
