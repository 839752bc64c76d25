"""What a launch of a kernel multiplies, and what of that its result needs: a line for each kernel, `PRODUCTS`.

`products.py` adds them up for a step. A launch knows its arguments, its grid and its blocks; where a mask leaves
samples of different lengths, these come beside it (`Call.lengths`), and what the device does with its lists of them is
done here again: tests/interpreter compares both.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from fmfa_losses.kernels.token_lists import GRANULE, PACKED, SHORT

__all__ = ["GATHERS", "PAIRWISE", "PRODUCTS", "Call", "Products", "multiplies_tiles", "next_fit"]


class Call(NamedTuple):
    """A launch, its arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    lengths: Mapping[int, Sequence[int]] = {}  # kept tokens of each sample, by the tokens that it has with padding

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def programs(self) -> int:
        return prod(self.grid)

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def padded(self, size: str, block: str) -> int:
        """As many D as whole blocks hold."""
        return self.whole(self[size], block)

    def whole(self, size: int, block: str) -> int:
        return -(-size // self[block]) * self[block]

    def counts(self, samples: str, tokens: str) -> Sequence[int]:
        """Of each sample, the tokens that a mask leaves."""
        return self.lengths.get(self[tokens]) or [self[tokens]] * self[samples]

    def blocks(self, counts: Iterable[int], block: str) -> int:
        """Numbers in the blocks that hold each sample's tokens by itself."""
        return sum(self.whole(count, block) for count in counts)


class Products(NamedTuple):
    """Multiply-adds of one launch, and programs that have something to do."""

    needed: Callable[[Call], int]
    executed: Callable[[Call], int]
    busy: Callable[[Call], int] = lambda a: a.programs


def _nothing(_: Call) -> int:
    return 0


def _x(a: Call) -> int:
    return sum(a.counts("Bx", "P"))


def _class(a: Call) -> list[int]:
    """Lengths of the samples of e that a match has."""
    counts = a.counts("Be", "Q")
    if a.name == "_packed_match_kernel":
        return [count for count in counts if 0 < count <= PACKED]
    if not a.arguments.get("LIST_E"):
        return list(counts)
    bounds = (0, SHORT, PACKED, a["Q"])
    return [count for count in counts if bounds[a["FIRST"]] < count <= bounds[a["LAST"]]]


def _alignment(a: Call) -> int:
    """All tokens of x with all tokens of e."""
    return _x(a) * sum(_class(a)) * a["D"]


def next_fit(lengths: Sequence[int], columns: int = 256) -> list[list[int]]:
    """Samples of each column tile of packed_match.py: in order of their lengths, as many as have room together."""
    tiles: list[list[int]] = []
    left = 0
    for b in sorted(range(len(lengths)), key=lambda b: lengths[b]):
        width = -(-lengths[b] // GRANULE) * GRANULE
        if width and width > left:
            tiles.append([])
            left = columns
        if width:
            tiles[-1].append(b)
            left -= width
    return tiles


def _column_tiles(a: Call) -> int:
    if a.name == "_packed_match_kernel":
        return len(next_fit(_class(a), a["BLOCK_N"]))
    return -(-len(_class(a)) // (a["BLOCK_N"] // a["UNIT"]))


def _match(a: Call) -> int:
    columns = _column_tiles(a) * a["BLOCK_N"]
    if a.arguments.get("UNIT") == a["BLOCK_N"]:  # as many tiles as a sample needs
        columns = a.blocks(_class(a), "BLOCK_N")
    return a.whole(_x(a), "BLOCK_M") * columns * a.padded("D", "BLOCK_D")


def _match_busy(a: Call) -> int:
    return -(-_x(a) // a["BLOCK_M"]) * _column_tiles(a)


def _persistent_match(a: Call) -> int:
    return a["row_tiles"] * a["BLOCK_M"] * a["column_tiles"] * a["BLOCK_N"] * a.padded("D", "BLOCK_D")


def _gathered(a: Call) -> int:
    """One row of D for every winner."""
    return _x(a) * a["Be"] * a["D"]


def _dx(a: Call) -> int:
    return a.whole(_x(a), "BLOCK_OWN") * a["Be"] * a["D"]


def _dx_busy(a: Call) -> int:
    return -(-_x(a) // a["BLOCK_OWN"])


def _de_needed(a: Call) -> int:
    return _x(a) * sum(a.counts("Be", "Q")) * a["D"]


def _de(a: Call) -> int:
    return _de_busy(a) * a["BLOCK_OWN"] * a.whole(_x(a), "BLOCK_SUM") * a["BLOCK_OUT"]


def _de_busy(a: Call) -> int:
    own = a.blocks(a.counts("Be", "Q"), "GRANULE")
    return -(-own // a["BLOCK_OWN"]) * a.grid[1]


def _aggregation(products: int) -> Callable[[Call], int]:
    """So many products of [L, N] with D for each sample."""
    return lambda a: products * sum(_text(a)) * a["N"] * a["D"]


def _text(a: Call) -> Sequence[int]:
    """Of each sample, the tokens that are left."""
    samples = int(next(value for name, value in a.arguments.items() if name in ("image_ptr", "text_ptr")).shape[0])
    return a.lengths.get(a["L"]) or [a["L"]] * samples


def _chunks(a: Call) -> int:
    return a.grid[1] if len(a.grid) > 1 else 1


def _token_blocks(a: Call) -> int:
    counts = _text(a)
    if a.name == "_rows_kernel" and a["PRECISION"] == "ieee" and a["text_ptr"].element_size() == 4:  # leaves none out
        counts = [a["L"]] * len(counts)
    return a.blocks(counts, "BLOCK_L") // a["BLOCK_L"] * _chunks(a)


def _forward(a: Call) -> int:
    """s and the weighted sum; where a row is longer than a tile, s twice, and a chunk of D for each program."""
    tile, scores = a["BLOCK_L"] * a.padded("N", "BLOCK_N"), a.padded("D", "BLOCK_D")
    each = scores + a.padded("D", "BLOCK_OUT") if a["WHOLE_ROW"] else 2 * scores + a["BLOCK_OUT"]
    return _token_blocks(a) * tile * each


def _of_token_blocks(each: Callable[[Call], int]) -> Callable[[Call], int]:
    return lambda a: _token_blocks(a) * a["BLOCK_L"] * a.padded("N", "BLOCK_N") * each(a)


def _of_patch_blocks(each: Callable[[Call], int]) -> Callable[[Call], int]:
    """Every block of patches goes through its sample's tokens up to the last one."""
    return lambda a: a.padded("N", "BLOCK_N") * a.blocks(_text(a), "BLOCK_L") * _chunks(a) * each(a)


_statistics = _of_token_blocks(lambda a: 3 * a.padded("D", "BLOCK_D"))  # s, then s and da
_dtext = _of_token_blocks(lambda a: 2 * a.padded("D", "BLOCK_D") + a["BLOCK_OUT"])  # s, da for each chunk of ds v
_rows = _of_token_blocks(lambda a: 2 * a.padded("D", "BLOCK_D") + a.padded("D", "BLOCK_OUT"))  # s, da and ds v
# s and da for each chunk of a djoint and ds t
_dimage = _of_patch_blocks(lambda a: 2 * a.padded("D", "BLOCK_D") + 2 * a["BLOCK_OUT"])
_dimage_product = _of_patch_blocks(lambda a: 2 * a["BLOCK_OUT"])


def _logits(rows: str, columns: str, products: int = 1) -> Callable[[Call], int]:
    """Of both directions; none where an earlier kernel keeps them."""
    return lambda a: 0 if a.arguments.get("KEPT") else products * a[rows] * a[columns] * a["D"]


def _row_loss(a: Call) -> int:
    """The logits once for each direction, unless they are kept."""
    if a.arguments.get("KEPT"):
        return 0
    return a.programs * a["BLOCK_M"] * a.padded("Y", "BLOCK_N") * a.padded("D", "BLOCK_D")


def _gradient(a: Call) -> int:
    each = a.padded("D", "BLOCK_D") + a["BLOCK_OUT"]  # the logits again, and one chunk of the gradient
    return a.programs * a["BLOCK_M"] * a.padded("Y", "BLOCK_N") * each


def _gradient_needed(a: Call) -> int:
    return a.grid[1] * a["X"] * a["Y"] * a["D"]


def _tile_of_logits(a: Call) -> int:
    return a.programs * a["BLOCK_M"] * a["BLOCK_N"] * a.padded("D", "BLOCK_D")


def _kept_gradient(a: Call) -> int:
    return a.programs * a["BLOCK_M"] * a.padded("C", "BLOCK_N") * a["BLOCK_OUT"]


def _classes(a: Call) -> int:
    """All rows, as if all counted, with all classes."""
    return a.padded("M", "BLOCK_M") * a.padded("V", "BLOCK_N") * a.padded("D", "BLOCK_D")


def _rows_of(a: Call) -> int:
    return int(a["states_ptr"].shape[0])


def _dweight(a: Call) -> int:
    return a.programs * a["BLOCK_OWN"] * a["BLOCK_OUT"] * (-(-_rows_of(a) // a["BLOCK_SUM"]) * a["BLOCK_SUM"])


def _dstates(a: Call) -> int:
    return a.programs * a["BLOCK_OWN"] * a["BLOCK_OUT"] * a.padded("size", "BLOCK_SUM")


# What is made again, because it was not kept, is executed and not needed.
PRODUCTS: dict[str, Products] = {
    "_match_kernel": Products(_alignment, _match, _match_busy),
    "_packed_match_kernel": Products(_alignment, _match, _match_busy),
    "_persistent_match_kernel": Products(_alignment, _persistent_match),
    "_dx_kernel": Products(_gathered, _dx, _dx_busy),
    "_products_kernel": Products(_de_needed, _de, _de_busy),  # as one-hot weights [Be Q, Bx P] times x
    "_forward_kernel": Products(_aggregation(2), _forward, _token_blocks),
    "_statistics_kernel": Products(_aggregation(1), _statistics, _token_blocks),  # da
    "_dtext_kernel": Products(_aggregation(1), _dtext, _token_blocks),
    "_dimage_kernel": Products(_aggregation(2), _dimage),
    "_rows_kernel": Products(_aggregation(2), _rows, _token_blocks),  # da, dtext
    "_dimage_product_kernel": Products(_aggregation(2), _dimage_product),
    "_row_loss_kernel": Products(_logits("X", "Y"), _row_loss),
    "_gradient_kernel": Products(_gradient_needed, _gradient),
    "_cosines_kernel": Products(_logits("R", "C"), _tile_of_logits),
    "_kept_dlogits_kernel": Products(_nothing, _tile_of_logits),
    "_kept_gradient_kernel": Products(_logits("R", "C", 2), _kept_gradient),
    "_linear_cross_entropy_kernel": Products(_logits("M", "V"), _classes),
    "_dz_kernel": Products(_nothing, _tile_of_logits),
    "_dweight_kernel": Products(lambda a: _rows_of(a) * a["size"] * a["D"], _dweight),
    "_dstates_kernel": Products(_logits("M", "size"), _dstates),
}

# Of EFA, those that compare all pairs.
PAIRWISE = {"_match_kernel", "_packed_match_kernel", "_persistent_match_kernel", "_dx_kernel", "_products_kernel"}
GATHERS = {"_dx_kernel"}  # no tiles of products, but as many multiply-adds


def multiplies_tiles(kernel: Any, seen: frozenset[str] = frozenset()) -> bool:
    """Whether tl.dot is in a kernel or in a function that it calls."""
    if "tl.dot(" in kernel.src:
        return True
    called = {name: kernel.fn.__globals__.get(name) for name in re.findall(r"\b([A-Za-z_]\w*)\(", kernel.src)}
    return any(
        multiplies_tiles(function, seen | {kernel.__name__})
        for name, function in called.items()
        if hasattr(function, "src") and name not in seen
    )
