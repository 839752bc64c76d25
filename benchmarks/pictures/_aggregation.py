"""Figures of the tiny batch and of the sparse aggregation, Eq. 5-8."""

from pathlib import Path

import torch

from ._board import BLUE, GREEN, GREY, ORANGE, PALE, VERMILION, Board, shade
from ._tiny import FEATURES, IMAGE, PATCHES, RED, TEXT, WORDS, Alignment

__all__ = ["PATCH_COLOURS", "draw_aggregation"]

PATCH_COLOURS = (
    ("#F2C9A1", "#DDE6EE", "#D64541", "#D64541", "#3B6EA8", "#3B6EA8"),
    ("#F2C9A1", "#F0DAD8", "#3B6EA8", "#3B6EA8", "#8B7D77", "#C9605B"),
)


def draw_aggregation(folder: Path) -> None:
    tiny = Alignment()
    _batch(folder)
    _similarities(folder, tiny)
    _weights(folder, tiny)
    _joint(folder, tiny)
    _memory(folder)
    _backward(folder, tiny)


def numbers(row: torch.Tensor, digits: int = 2) -> list[str]:
    """As the page prints them: no -0, no zeros behind."""
    return [f"{round(x, digits) + 0.0:.{digits}f}".rstrip("0").rstrip(".").replace("-", "−") for x in row.tolist()]


def person(board: Board, pair: int, x: float, y: float, size: float) -> None:
    """The image: six patches, two in a row."""
    for patch, name in enumerate(PATCHES[pair]):
        left, top = x + patch % 2 * size, y + patch // 2 * size
        dark = PATCH_COLOURS[pair][patch] in ("#D64541", "#3B6EA8", "#8B7D77", "#C9605B")
        board.box(left, top, size, size, name, fill=PATCH_COLOURS[pair][patch], colour="white" if dark else "black")


def _batch(folder: Path) -> None:
    board = Board(6.15, "The batch: 2 pairs, 6 patches, 4 words, D = 4")
    for pair in range(2):
        y = 0.65 + 2.75 * pair
        board.text(0.15, y, f"pair {pair}", bold=True)
        board.text(0.15, y + 0.27, '"' + " ".join(WORDS[pair]) + '"', colour=BLUE, size=10)
        person(board, pair, 0.15, y + 0.55, 0.5)
        tables = ((1.75, PATCHES[pair], IMAGE[pair], ORANGE), (3.69, WORDS[pair], TEXT[pair], BLUE))
        for x, names, tokens, colour in tables:
            board.table(
                x, y + 0.55, [numbers(row, 1) for row in tokens], cell=(0.31, 0.31), rows=names,
                strength=(tokens.clamp(min=0) / 3).tolist(), colour=colour, size=8.5, columns=FEATURES,
            )  # fmt: skip
    board.text(0.15, 5.95, "orange: patches v;  blue: words t;  a row is one token", size=9.5, colour=GREY)
    board.save(folder, "how_batch")


def _similarities(folder: Path, tiny: Alignment) -> None:
    board = Board(3.55, "1  Every word meets every patch: s = t · v")
    person(board, 0, 0.15, 0.85, 0.56)
    board.text(0.15, 0.63, "image 0", size=10, colour=GREY)
    s = tiny.s[0]
    board.table(
        2.0, 0.85, [numbers(row, 1) for row in s], cell=(0.48, 0.42), rows=WORDS[0], columns=PATCHES[0],
        strength=(s.clamp(min=0) / 6).tolist(), size=10,
        outlined=[(RED, 2)],
    )  # fmt: skip
    board.text(0.15, 2.85, '"red" · jacket  =  0.3·0 + 2·3 − 0.1·0 + 0.3·0  =  6', size=11, colour=VERMILION)
    board.text(0.15, 3.2, "Only patches of the word's own image. Inner product, not cosine.", size=9.5, colour=GREY)
    board.save(folder, "how_aggregation_similarities")


def _weights(folder: Path, tiny: Alignment) -> None:
    board = Board(5.55, '2  From similarities to weights, for "red"')
    steps = [
        ("s", tiny.s[0, RED], 1, 6.0, "similarity with each patch", ()),
        ("n", tiny.n[0, RED], 2, 1.0, "min-max: (s − min) / (max − min)", ()),
        ("m", tiny.m[0, RED], 2, 1.0, "threshold: below 1/6 = 0.17 becomes 0", (0, 1, 5)),
        ("a", tiny.a[0, RED], 2, 1.0, "divided by their sum: weights", ()),
    ]
    for row, (name, values, digits, top, what, dropped) in enumerate(steps):
        y = 1.05 + 1.15 * row
        board.text(0.42, y - (0.36 if row == 0 else 0.19), what, size=10.5, colour=GREY)
        cells = numbers(values, digits)
        board.table(
            0.42, y, [cells], cell=(0.73, 0.48), columns=PATCHES[0] if row == 0 else (), size=12.5,
            strength=[(values.clamp(min=0) / top).tolist()],
            faint=[(0, c) for c in range(6) if row >= 2 and cells[c] == "0"],
        )  # fmt: skip
        board.text(0.12, y + 0.24, name, size=14, bold=True, colour=BLUE)
        for c in dropped:
            x = 0.42 + 0.73 * c
            board.axes.plot([x + 0.12, x + 0.61], [y - 0.75, y - 1.07], color=VERMILION, linewidth=2, zorder=6)
        if row < 3:
            board.arrow((4.9, y + 0.5), (4.9, y + 1.1))
    board.text(0.42, 5.28, "jacket 58 %, strap 42 %, nothing else: sparse", size=11.5, bold=True, colour=VERMILION)
    board.save(folder, "how_aggregation_weights")


def _joint(folder: Path, tiny: Alignment) -> None:
    board = Board(6.5, "3  One joint embedding for each word: e = Σ a v")
    for word, name in enumerate(WORDS[0]):
        y = 0.62 + 1.4 * word
        board.text(0.15, y + 0.55, name, size=12, bold=True)
        for patch in range(6):
            weight = tiny.a[0, word, patch].item()
            x, top = 0.95 + patch % 2 * 0.55, y + patch // 2 * 0.4
            fill = shade(PATCH_COLOURS[0][patch], 0.3 + 1.4 * weight) if weight else PALE
            board.box(x, top, 0.55, 0.4, f"{weight:.2f}" if weight else "", fill=fill, size=10)
        board.arrow((2.15, y + 0.6), (2.6, y + 0.6))
        e = tiny.joint[0, word]
        strength = [(e / 3).tolist()]
        board.table(2.7, y + 0.4, [numbers(e)], cell=(0.54, 0.42), columns=FEATURES, strength=strength, colour=GREEN)
    board.text(0.15, 6.28, "e is what the image shows of the word: the red of jacket and strap.", size=9.5, colour=GREY)
    board.save(folder, "how_aggregation_joint")


def _memory(folder: Path) -> None:
    """B 128, L 77, N 192, D 512 in float32."""
    board = Board(3.55, "What is in memory")
    pairs, tokens, patches, width = 128, 77, 192, 512
    scores, joint = (4 * pairs * tokens * n / 2**20 for n in (patches, width))
    board.text(0.15, 0.6, "B 128, L 77, N 192, D 512, float32, forward", size=10, colour=GREY)
    board.text(0.15, 0.95, "plain PyTorch makes s, n, m, a, then e", size=11)
    x, scale = 0.15, 4.6 / (4 * scores + joint)
    for name in "snma":
        board.box(x, 1.15, scores * scale, 0.5, name, fill=shade(VERMILION, 0.45), size=12)
        x += scores * scale
    board.box(x, 1.15, joint * scale, 0.5, "e", fill=shade(GREEN, 0.45), size=12)
    board.text(0.15, 1.85, f"{scores:.1f} MiB for each of s, n, m, a;  e {joint:.1f} MiB", size=10, colour=GREY)
    board.text(0.15, 2.3, "the kernel writes e, and one sum for each word", size=11)
    board.box(0.15, 2.5, joint * scale, 0.5, "e", fill=shade(GREEN, 0.45), size=12)
    board.text(2.45, 2.75, "s, n, m, a live in registers,\none block of words at a time", size=10, colour=GREY)
    board.text(0.15, 3.25, "Computed from shapes, not measured.", size=9.5, colour=GREY)
    board.save(folder, "how_aggregation_memory")


def _backward(folder: Path, tiny: Alignment) -> None:
    board = Board(5.3, '4  Backward of "red", de = (0, 1, 0, 0)')
    da, ds = tiny.ds(torch.tensor([0.0, 1, 0, 0], dtype=torch.float64))
    rows = [
        ("a", tiny.a[0, RED], "the weights, made again from t and v", BLUE),
        ("da", da, "da = de · v: the red of each patch", ORANGE),
        ("ds", ds, "kept: (da − mean) / 10.9;  minimum: the opposite sum", VERMILION),
    ]
    for row, (name, values, what, colour) in enumerate(rows):
        y = 1.05 + 1.2 * row
        board.text(0.5, y - (0.4 if row == 0 else 0.2), what, size=10.5, colour=GREY)
        top = values.abs().max()
        cells = numbers(values, 3 if row == 2 else 2)
        board.table(
            0.5, y, [cells], cell=(0.73, 0.48), columns=PATCHES[0] if row == 0 else (), size=12,
            strength=[(values.abs() / top * 0.9).tolist()], colour=colour,
            faint=[(0, c) for c in range(6) if cells[c] == "0"],
        )  # fmt: skip
        board.text(0.1, y + 0.24, name, size=13, bold=True, colour=colour)
    board.text(0.5, 4.2, "mean = Σ a da = 0.58·3 + 0.42·2 = 2.58", size=10.5, colour=GREY)
    board.text(0.5, 4.5, "10.9 = Σ (s − min) of the kept patches", size=10.5, colour=GREY)
    board.text(0.15, 4.95, "Only kept patches and the minimum get a gradient.", size=11, bold=True, colour=VERMILION)
    board.save(folder, "how_aggregation_backward")
