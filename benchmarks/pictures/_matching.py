"""Figures of hard coding, its pooling and the ranking, Eq. 9-12, and of the winners that the backward reads."""

import struct
from pathlib import Path

import torch

from ._aggregation import numbers
from ._board import BLUE, GREEN, GREY, ORANGE, VERMILION, Board, shade
from ._tiny import PATCHES, WORDS, Alignment

__all__ = ["draw_matching"]


def draw_matching(folder: Path) -> None:
    tiny = Alignment()
    _words(folder, tiny)
    _patches(folder, tiny)
    _pool(folder, tiny)
    _packed(folder, tiny)
    _gradient(folder, tiny)


def _matches(
    board: Board, x: float, y: float, cos: torch.Tensor, rows: tuple[str, ...], columns: tuple[str, ...], colour: str
) -> None:
    """Cosines of one pair, the winner of every row outlined, and the maxima beside them."""
    best = cos.max(dim=1)
    board.table(
        x, y, [numbers(row, 3) for row in cos], cell=(0.62, 0.36), rows=rows, columns=columns, colour=colour,
        strength=(0.6 * cos.clamp(min=0)).tolist(), outlined=list(enumerate(best.indices.tolist())), size=10.5,
    )  # fmt: skip
    right = x + 0.62 * cos.shape[1]
    board.text(right + 0.6, y - 0.14, "best", size=10, align="center", colour=VERMILION, bold=True)
    for r, value in enumerate(numbers(best.values, 3)):
        board.arrow((right + 0.06, y + 0.36 * r + 0.18), (right + 0.3, y + 0.36 * r + 0.18), line=1.2)
        board.text(right + 0.6, y + 0.36 * r + 0.18, value, size=11, align="center", bold=True)


def _words(folder: Path, tiny: Alignment) -> None:
    board = Board(5.3, "5  Each word takes its best joint embedding")
    _of_both_pairs(board, 2.25, "words of text 0", tiny.text_cos[0], WORDS[0], BLUE)
    board.text(0.15, 5.1, "cosines; one winner a row, also where it is the wrong one", size=9.5, colour=GREY)
    board.save(folder, "how_hard_words")


def _patches(folder: Path, tiny: Alignment) -> None:
    board = Board(6.75, "6  So does each patch")
    _of_both_pairs(board, 2.95, "patches of image 0", tiny.image_cos[0], PATCHES[0], ORANGE)
    board.text(0.15, 6.52, "The columns are the same e; image 0 has four joint embeddings.", size=9.5, colour=GREY)
    board.save(folder, "how_hard_patches")


def _of_both_pairs(board: Board, step: float, what: str, cos: torch.Tensor, rows: list[str], colour: str) -> None:
    """Tokens with the joint embeddings of pair 0, and `step` below them with those of pair 1; cos [2, tokens, e]."""
    for j in range(2):
        y = 1.2 + step * j
        board.text(0.15, y - 0.5, f"{what}, joint embeddings e of pair {j}", size=10.5, colour=GREEN, bold=True)
        _matches(board, 0.95, y, cos[j], rows, WORDS[j], colour)


def _pool(folder: Path, tiny: Alignment) -> None:
    board = Board(5.75, "7  Pool the best ones: one number a pair")
    best = tiny.text_cos[0, 0].amax(1)
    board.table(0.95, 0.95, [numbers(best)], cell=(0.62, 0.4), columns=WORDS[0], strength=[(0.6 * best).tolist()])
    board.text(0.15, 1.15, "best", size=11)
    board.text(0.15, 1.68, "S = log( exp 0.87 + exp 0.99 + exp 0.99 + exp 0.72 )", size=11)
    board.text(0.15, 1.98, f"   = {tiny.text_sim[0, 0]:.2f}", size=12, bold=True, colour=VERMILION)
    for x, sims, name, colour in ((0.95, tiny.text_sim, "text", BLUE), (3.35, tiny.image_sim, "image", ORANGE)):
        board.text(x - 0.8, 2.5, f"S of {name}s", size=11, bold=True, colour=colour)
        board.table(
            x, 2.95, [numbers(row, 3) for row in sims], cell=(0.66, 0.45), rows=[f"{name} 0", f"{name} 1"],
            columns=["e of 0", "e of 1"], outlined=[(0, 0), (1, 1)], size=11,
        )  # fmt: skip
    board.text(0.15, 4.25, "8  The own pair should win by the margin 0.1", size=12.5, bold=True)
    terms = tiny.terms()
    board.text(0.15, 4.62, "text 0:  log exp( 2.224 − 2.284 + 0.1 )  =  " + numbers(terms[0])[0], size=11)
    board.text(0.15, 4.95, "and so for columns, images, and pair 1.", size=11)
    board.text(
        0.15,
        5.38,
        f"EFA = mean over pairs of the four terms = {terms.sum(0).mean():.4f}",
        size=11,
        bold=True,
        colour=VERMILION,
    )
    board.save(folder, "how_hard_pool")


def packed(cosine: float, winner: int) -> tuple[str, str]:
    """float32 and winner in 8 bytes, float16 and winner in 4 (kernels/_matches.py), as hexadecimal digits."""
    wide = struct.pack(">fi", cosine, winner).hex().upper()
    narrow = struct.pack(">eh", cosine, winner).hex().upper()
    return f"{wide[:8]} {wide[8:]}", f"{narrow[:4]} {narrow[4:]}"


def _packed(folder: Path, tiny: Alignment) -> None:
    board = Board(4.3, "What is kept: one integer a match")
    best = tiny.text_cos[0, 0].max(dim=1)
    board.text(1.05, 0.66, "cosine", size=10, colour=GREY)
    board.text(1.85, 0.66, "winner", size=10, colour=GREY)
    board.text(2.75, 0.66, "8 bytes: float32, int32", size=10, colour=GREY)
    for row, (word, value, winner) in enumerate(
        zip(WORDS[0], best.values.tolist(), best.indices.tolist(), strict=True)
    ):
        y = 0.98 + 0.42 * row
        wide, _ = packed(value, winner)
        board.text(0.15, y, word, size=11)
        board.text(1.05, y, f"{value:.4f}", size=11)
        board.text(2.05, y, str(winner), size=11)
        board.box(2.75, y - 0.16, 1.05, 0.32, wide[:8], fill=shade(BLUE, 0.25), size=10.5)
        board.box(3.8, y - 0.16, 1.05, 0.32, wide[9:], fill=shade(VERMILION, 0.25), size=10.5)
    board.text(0.15, 2.75, "B 128, N 192, L 77:", size=11, bold=True)
    cosines, matches = (4 * 128 * 128 * 192 * 77 / 2**20, 8 * 128 * 128 * 192 / 2**20)
    board.box(0.15, 2.98, 4.7, 0.3, f"all cosines, float32: {cosines:.0f} MiB", fill=shade(VERMILION, 0.35))
    board.box(0.15, 3.38, 4.7 * matches / cosines, 0.3, fill=shade(BLUE, 0.7))
    board.text(0.4, 3.53, f"matches: {matches:.0f} MiB", size=10.5)
    board.text(0.15, 4.0, "Computed from shapes, not measured.", size=9.5, colour=GREY)
    board.save(folder, "how_hard_winner")


def _gradient(folder: Path, tiny: Alignment) -> None:
    board = Board(6.1, "9  Backward: only winners get a gradient")
    winners, _, _ = tiny.lists(0)
    weights = tiny.weights()
    board.text(1.0, 0.62, "words of both texts", size=10, colour=GREY, align="center")
    board.text(4.1, 0.62, "joint emb. of pair 0", size=10, colour=GREY, align="center")
    for row in range(8):
        i, word = divmod(row, 4)
        y = 0.85 + 0.55 * row + (0.15 if i else 0)
        weight = weights[i, 0, word].item()
        colour = GREEN if weight < 0 else VERMILION
        board.box(0.15, y, 1.1, 0.42, f"{row}  {WORDS[i][word]}", fill=shade(BLUE, 0.2), size=11)
        text = f"{weight:+.2f}".replace("-", "−")
        board.box(1.25, y, 0.65, 0.42, text, fill=shade(colour, 0.15), colour=colour, bold=True, size=11)
        target = 1.35 + 1.05 * winners[row]
        board.arrow((1.93, y + 0.21), (3.48, target + 0.21), colour, line=1.8)
    for token, word in enumerate(WORDS[0]):
        board.box(3.5, 1.35 + 1.05 * token, 1.3, 0.42, f"e{token}  {word}", fill=shade(GREEN, 0.25), size=11)
    board.text(0.15, 5.6, "green: own pair, closer;  red: other pair, apart", size=10.5)
    board.text(0.15, 5.88, "number: dL/dS times the softmax over the text's words", size=10, colour=GREY)
    board.save(folder, "how_hard_gradient")
