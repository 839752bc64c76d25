"""Executed and needed products by hand; and a kernel that nobody counts is an error."""

from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel for this platform")

from benchmarks import compile_check, products
from benchmarks.launch_products import PRODUCTS, Call, multiplies_tiles
from benchmarks.products import Counted


def call(name, grid, lengths=None, **arguments):
    return Call(SimpleNamespace(__name__=name, src="tl.dot(a, b)"), grid, arguments, lengths or {})


# 5 tokens of 2 samples against 4 of 7 samples, 3 a tile of 48 columns.
MATCH = {"Bx": 2, "P": 5, "Be": 7, "Q": 4, "D": 20, "row_tiles": 1, "column_tiles": 3, "LIST_E": False, "UNIT": 16,
         "BLOCK_M": 16, "BLOCK_N": 48, "BLOCK_D": 16}  # fmt: skip


def test_a_match_multiplies_whole_tiles():
    match = call("_match_kernel", (3,), **MATCH)
    assert PRODUCTS["_match_kernel"].needed(match) == 10 * 28 * 20
    assert PRODUCTS["_match_kernel"].executed(match) == 16 * (3 * 48) * 32


def test_a_sample_wider_than_a_tile_takes_several():
    match = call("_match_kernel", (7,), **MATCH | {"Q": 50, "UNIT": 48, "column_tiles": 7})
    assert PRODUCTS["_match_kernel"].executed(match) == 16 * (7 * 96) * 32


def test_samples_of_e_are_in_the_class_of_their_length():
    lengths = {17: [3, 17, 0, 17, 5, 12, 9], 40: [33, 0, 40, 32, 1, 35, 39]}
    match = MATCH | {"LIST_E": True, "Q": 40, "UNIT": 16, "FIRST": 0, "LAST": 1}
    short = call("_match_kernel", (3,), lengths, **match)
    wide = call("_match_kernel", (4,), lengths, **match | {"UNIT": 24, "FIRST": 1, "LAST": 3})
    (row, everything) = products.count([short, wide])
    assert row.needed == pytest.approx(2e-9 * 10 * (33 + 40 + 32 + 1 + 35 + 39) * 20)
    assert row.executed == pytest.approx(2e-9 * 16 * (1 + 2) * 48 * 32)  # 2 samples of 3 a tile; 4 of 2 a tile
    assert (row.launches, row.programs, row.idle, everything.kernel) == (2, 7, 4, "all")


def test_samples_of_different_lengths_share_the_tiles_of_one_match():
    lengths = {200: [3, 130, 0, 128, 5, 121], 5: [5, 1]}  # 8, -, 0, 128, 8, 128 columns
    match = MATCH | {"Be": 6, "Q": 200, "BLOCK_N": 256, "column_tiles": 3}
    (row, _) = products.count([call("_packed_match_kernel", (3,), lengths, **match)])
    assert row.needed == pytest.approx(2e-9 * 6 * (3 + 128 + 5 + 121) * 20)
    assert row.executed == pytest.approx(2e-9 * 16 * (2 * 256) * 32)
    assert (row.programs, row.idle) == (3, 1)


def test_a_sample_wider_than_a_tile_has_as_many_as_it_needs():
    lengths = {600: [600, 100, 129, 256]}
    match = MATCH | {"Be": 4, "Q": 600, "BLOCK_N": 128, "UNIT": 128, "LIST_E": True, "FIRST": 2, "LAST": 3}
    (row, _) = products.count([call("_match_kernel", (4,), lengths, **match)])
    assert row.needed == pytest.approx(2e-9 * 10 * (600 + 129 + 256) * 20)
    assert row.executed == pytest.approx(2e-9 * 16 * (640 + 256 + 256) * 32)


def test_de_multiplies_one_hot_weights():
    de = {"Bx": 2, "P": 5, "Be": 7, "Q": 4, "D": 20, "BLOCK_OWN": 16, "BLOCK_SUM": 32, "BLOCK_OUT": 16, "GRANULE": 8}
    full = call("_products_kernel", (4, 2), **de)
    assert PRODUCTS["_products_kernel"].needed(full) == 28 * 10 * 20
    assert PRODUCTS["_products_kernel"].executed(full) == (4 * 16) * 32 * (2 * 16)
    short = call("_products_kernel", (4, 2), {4: [0, 1, 2, 0, 4, 0, 0]}, **de)
    assert PRODUCTS["_products_kernel"].needed(short) == 7 * 10 * 20
    assert PRODUCTS["_products_kernel"].executed(short) == (2 * 16) * 32 * (2 * 16)
    assert PRODUCTS["_products_kernel"].busy(short) == 2 * 2


def test_what_is_computed_again_is_executed_and_not_needed():
    shape = SimpleNamespace(shape=(2, 12, 20))
    rows = call(
        "_dtext_kernel", (2, 2), image_ptr=shape, L=4, N=12, D=20, BLOCK_L=16, BLOCK_N=8, BLOCK_D=32, BLOCK_OUT=16
    )
    assert PRODUCTS["_dtext_kernel"].needed(rows) == 2 * 4 * 12 * 20
    assert PRODUCTS["_dtext_kernel"].executed(rows) == 2 * (16 * 16) * 2 * (2 * 32 + 16)
    logits = call("_row_loss_kernel", (2, 2), X=20, Y=20, D=20, BLOCK_M=16, BLOCK_N=16, BLOCK_D=32)
    (row, _) = products.count([logits])
    assert row.ratio == pytest.approx(2 * 32 * 32 * 32 / 20**3)


def test_a_linear_cross_entropy_makes_its_logits_twice():
    """10 rows, 40 classes, width 20, in blocks of 16."""
    blocks = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_D": 16}
    products_of = {"BLOCK_OWN": 16, "BLOCK_OUT": 16, "BLOCK_SUM": 16}
    rows = {"states_ptr": SimpleNamespace(shape=(10, 20)), "M": 10, "D": 20, "size": 40}
    calls = [
        call("_linear_cross_entropy_kernel", (1, 1), V=40, **rows, **blocks),
        call("_dz_kernel", (1, 3), **rows, **blocks),
        call("_dweight_kernel", (2, 3), **rows, **products_of),
        call("_dstates_kernel", (2, 1), **rows, **products_of),
    ]
    *each, everything = products.count(calls)
    assert [row.executed for row in each] == [pytest.approx(2e-9 * 16 * 48 * 32)] * 4
    assert everything.needed == pytest.approx(2e-9 * 3 * 10 * 40 * 20)


def test_a_kernel_that_nobody_counts_is_an_error():
    kernels = {launch.kernel.__name__: launch.kernel for launch in compile_check.record("sm_90", "bfloat16")}
    found = {name for name, kernel in kernels.items() if multiplies_tiles(kernel)}
    assert {"_match_kernel", "_forward_kernel", "_gradient_kernel"} <= found <= PRODUCTS.keys()
    assert {"_pool_kernel", "_tokens_kernel"} <= kernels.keys() - found
    names = {"src": "def _new_kernel(x): helper(x)", "fn": SimpleNamespace(__globals__={})}
    kernel = SimpleNamespace(__name__="_new_kernel", **names)
    assert products.count([Call(kernel, (1,), {})])[-1].needed == 0
    kernel.fn.__globals__["helper"] = SimpleNamespace(
        __name__="helper", src="return tl.dot(x, x)", fn=SimpleNamespace(__globals__={})
    )
    with pytest.raises(KeyError, match="_new_kernel multiplies tiles"):
        products.count([Call(kernel, (1,), {})])


def test_only_efa_has_a_limit():
    much = [Counted("all", 1, 100, 116)]
    assert products.exceeded([("EFA, B 128", much), ("A-SDM, B 64", much)]) == [
        "EFA, B 128, all: executed / needed 1.16 > 1.15"
    ]
    assert products.exceeded([("EFA, B 128", [Counted("all", 1, 100, 115)])]) == []


def test_real_lengths_have_a_limit_for_every_kernel_of_all_pairs():
    rows = [Counted("_products_kernel", 1, 100, 126), Counted("_rows_kernel", 1, 1, 3), Counted("all", 1, 101, 125)]
    assert products.exceeded([("EFA, B 64, captions of 25", rows), ("EFA, B 64", rows[:2])]) == [
        "EFA, B 64, captions of 25, _products_kernel: executed / needed 1.26 > 1.25"
    ]


def test_a_step_with_real_captions_stays_within_its_limits():
    steps = [
        (
            f"EFA, B {B}, {products.SHORT_CAPTIONS}",
            products.count(products.step_launches("efa", products.SHORT_CAPTIONS, B)),
        )
        for B in (64, 128)
    ]
    assert products.exceeded(steps) == []
    for _, rows in steps:
        by_name = {row.kernel: row for row in rows}
        assert by_name["_packed_match_kernel"].ratio < 1.25 and by_name["_packed_match_kernel"].idle > 0
        assert by_name["all"].ratio == pytest.approx(1.2, abs=0.05)
