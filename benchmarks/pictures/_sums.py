"""Figures of the deterministic backward, and of A-SDM's row statistics."""

import struct
from pathlib import Path

import torch

from ._aggregation import numbers
from ._board import BLUE, GREEN, GREY, ORANGE, PALE, VERMILION, Board, shade
from ._tiny import FEATURES, WORDS, Alignment, Statistics

__all__ = ["TOKEN", "draw_sums"]

TOKEN, FEATURE = 2, 2  # "jeans" of pair 0, whose list has three rows; its number "blue"


def draw_sums(folder: Path) -> None:
    tiny = Alignment()
    _lists(folder, tiny)
    _orders(folder, tiny)
    _programs(folder, tiny)
    _blocks(folder)
    _merge(folder)


def bits(x: torch.Tensor) -> str:
    return struct.pack(">f", x.item()).hex().upper()


def _lists(folder: Path, tiny: Alignment) -> None:
    board = Board(4.9, "11  Sort the rows by winner")
    winners, starts, lists = tiny.lists(0)
    colours = [shade(c, 0.35) for c in (BLUE, ORANGE, GREEN, VERMILION)]
    board.text(0.15, 0.68, "row", size=10.5, colour=GREY)
    board.text(0.15, 1.12, "winner", size=10.5, colour=GREY)
    for row, winner in enumerate(winners):
        board.text(0.95 + 0.48 * row + 0.24, 0.68, str(row), size=11, align="center")
        board.box(0.95 + 0.48 * row, 0.92, 0.48, 0.4, str(winner), fill=colours[winner], size=12)
    board.arrow((2.87, 1.45), (2.87, 1.95))
    board.text(3.05, 1.7, "count, then place, in order", size=10, colour=GREY)
    board.text(0.15, 2.28, "rows", size=10.5, colour=GREY)
    flat = [(k, row) for k, rows in enumerate(lists) for row in rows]
    for at, (k, row) in enumerate(flat):
        board.box(0.95 + 0.48 * at, 2.08, 0.48, 0.4, str(row), fill=colours[k], size=12)
    board.text(0.15, 2.72, "starts", size=10.5, colour=GREY)
    for start in starts:
        board.text(0.95 + 0.48 * start, 2.72, str(start), size=11, align="center", bold=True)
    for k, rows in enumerate(lists):
        y = 3.15 + 0.38 * k
        board.box(0.15, y, 0.95, 0.32, f"e{k}  {WORDS[0][k]}", fill=colours[k], size=10.5)
        board.text(
            1.25,
            y + 0.16,
            ("adds up rows " if len(rows) > 1 else "takes row ")
            + ", ".join(map(str, rows))
            + (", in this order" if len(rows) > 1 else " alone"),
            size=11,
        )
    board.save(folder, "how_sums_lists")


def _orders(folder: Path, tiny: Alignment) -> None:
    board = Board(4.5, "10  The order of a sum changes its bits")
    parts = tiny.parts(0, TOKEN, FEATURE)
    rows = tiny.lists(0)[2][TOKEN]
    board.text(
        0.15, 0.62, f'gradient of e2 "jeans", its number "{FEATURES[FEATURE]}", in float32', size=10, colour=GREY
    )
    for at, (row, part) in enumerate(zip(rows, parts, strict=True)):
        board.box(
            0.15 + 1.6 * at, 0.85, 1.5, 0.6, f"row {row}\n{part.item():.8f}".replace("-", "−"), fill=shade(BLUE, 0.2)
        )
    for block, (order, colour) in enumerate((((0, 1, 2), GREEN), ((1, 2, 0), VERMILION))):
        y = 1.75 + 1.05 * block
        total = torch.zeros(())
        for at in order:
            total = total + parts[at]
        names = "  +  ".join(f"row {rows[at]}" for at in order)
        board.box(0.15, y, 4.7, 0.85, fill=shade(colour, 0.12), edge=colour, line=1.4)
        board.text(0.3, y + 0.25, names, size=11)
        board.text(0.3, y + 0.6, f"= {total.item():.8f}", size=12, bold=True)
        board.text(4.7, y + 0.6, f"bits {bits(total)}", size=12, bold=True, colour=colour, align="right")
    board.text(0.15, 4.0, "An atomic add takes the rows as they happen to come.", size=10.5)
    board.text(0.15, 4.28, "So the last bits may differ from run to run.", size=10.5, bold=True, colour=VERMILION)
    board.save(folder, "how_sums_orders")


def _programs(folder: Path, tiny: Alignment) -> None:
    board = Board(4.1, "12  One program writes one token's sum")
    lists = tiny.lists(0)[2]
    for k, rows in enumerate(lists):
        y = 0.65 + 0.72 * k
        board.box(0.15, y, 1.25, 0.5, f"program {k}", fill=PALE, size=11)
        for at, row in enumerate(rows):
            board.box(1.75 + 0.42 * at, y + 0.06, 0.38, 0.38, str(row), fill=shade(BLUE, 0.25), size=11)
        board.arrow((1.43, y + 0.25), (1.72, y + 0.25))
        board.arrow((1.78 + 0.42 * len(rows), y + 0.25), (3.45, y + 0.25))
        board.box(3.5, y, 1.35, 0.5, f"de{k}  {WORDS[0][k]}", fill=shade(GREEN, 0.25), size=11)
    board.text(0.15, 3.62, "No two programs write the same number: nothing to wait", size=10)
    board.text(0.15, 3.85, "for, no atomic, the same bits in every run.", size=10)
    board.save(folder, "how_sums_programs")


def _blocks(folder: Path) -> None:
    row = Statistics()
    board = Board(4.75, "13  A row of A-SDM in two blocks")
    board.text(0.15, 0.62, "text 0 with four images; z = 50 cos", size=10, colour=GREY)
    for block, (columns, statistics, colour) in enumerate(
        zip(((0, 1), (2, 3)), row.blocks, (BLUE, ORANGE), strict=True)
    ):
        x = 0.35 + 2.4 * block
        board.text(x + 0.95, 0.92, f"block or rank {block}", size=11, bold=True, colour=colour, align="center")
        for at, column in enumerate(columns):
            name = f"image {column}" + (" (own)" if column == 0 else "")
            board.text(x + 0.95 * at + 0.47, 1.2, name, size=9, colour=GREY, align="center")
            value = numbers(row.z[column : column + 1])[0]
            board.box(x + 0.95 * at, 1.35, 0.95, 0.45, value, fill=shade(colour, 0.3), size=13)
        board.arrow((x + 0.95, 1.85), (x + 0.95, 2.3), colour)
        top, sum_e, excess = statistics
        for at, (name, value) in enumerate((("top", top), ("sum e", sum_e), ("excess", excess))):
            board.box(x, 2.35 + 0.42 * at, 0.9, 0.42, name, fill=PALE, size=10.5)
            board.box(x + 0.9, 2.35 + 0.42 * at, 1.0, 0.42, f"{value:.4g}", size=11.5, bold=True)
    board.text(0.15, 3.95, "e = exp(z − top)", size=10.5)
    board.text(0.15, 4.2, "excess = Σ e (z − top − log(q + 1e-8))", size=10.5)
    board.text(0.15, 4.5, "Three numbers instead of a row, however long it is.", size=10.5, bold=True, colour=VERMILION)
    board.save(folder, "how_statistics_blocks")


def _merge(folder: Path) -> None:
    row = Statistics()
    top, sum_e, excess = row.merged
    shrink = torch.tensor(row.blocks[1][0] - top).exp().item()
    board = Board(5.35, "14  Merge, and only then divide")
    board.text(0.15, 0.7, "common top = max(17, 15.5) = 17", size=11.5)
    board.text(0.15, 1.05, f"block 1 shrinks by exp(15.5 − 17) = {shrink:.3f}", size=11.5)
    board.text(0.15, 1.45, f"sum e   = 1.135 + {shrink:.3f} · 1.223 = {sum_e:.3f}", size=11.5, bold=True, colour=BLUE)
    board.text(
        0.15,
        1.8,
        f"excess = 18.15 + {shrink:.3f} · (22.20 − 1.5 · 1.223) = {excess:.2f}",
        size=11,
        bold=True,
        colour=BLUE,
    )
    board.arrow((2.5, 2.0), (2.5, 2.35))
    names = ["p own", "p 1", "p 2", "p 3"]
    board.table(
        0.85,
        2.7,
        [numbers(row.p)],
        cell=(0.8, 0.45),
        columns=names,
        strength=[(0.75 * row.p).tolist()],
        outlined=[(0, 0)],
        size=12,
    )
    board.text(0.15, 3.5, f"KL = {excess:.2f} / {sum_e:.3f} − log {sum_e:.3f} = {row.divergence:.2f}", size=11.5)
    board.text(0.15, 3.85, f"gap = {row.p.max():.2f} − {row.p[0]:.2f} = {row.gap:.2f}", size=11.5)
    board.text(0.15, 4.2, f"weight = 1 + 10 · {row.gap:.3f} = {row.weight:.2f}", size=11.5)
    board.text(
        0.15,
        4.6,
        f"loss of the row = {row.weight:.2f} · {row.divergence:.2f} = {row.loss:.1f}",
        size=12,
        bold=True,
        colour=VERMILION,
    )
    board.text(0.15, 5.05, "Any grouping of blocks: the same result, up to rounding.", size=10, colour=GREY)
    board.save(folder, "how_statistics_merge")
