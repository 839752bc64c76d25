"""Executed and needed products by hand; and a kernel that nobody counts is an error."""

from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel for this platform")

from benchmarks import compile_check, products
from benchmarks.products import PRODUCTS, Call, Counted


def call(name, grid, **arguments):
    return Call(SimpleNamespace(__name__=name, src="tl.dot(a, b)"), grid, arguments)


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


def test_samples_with_all_tokens_are_in_the_widest_class_alone():
    narrow = call("_match_kernel", (3,), **MATCH | {"LIST_E": True, "Q": 17, "UNIT": 16})
    wide = call("_match_kernel", (4,), **MATCH | {"LIST_E": True, "Q": 17, "UNIT": 24, "column_tiles": 4})
    (row, everything) = products.count([narrow, wide])
    assert row.needed == pytest.approx(2e-9 * 10 * 7 * 17 * 20)
    assert row.executed == pytest.approx(2e-9 * 16 * 4 * 48 * 32)
    assert (row.launches, everything.kernel) == (2, "all")


def test_de_multiplies_one_hot_weights():
    de = call("_de_kernel", (7, 1, 2), Bx=2, P=5, Be=7, Q=4, D=20, BLOCK_OWN=16, BLOCK_SUM=32, BLOCK_OUT=16)
    assert PRODUCTS["_de_kernel"].needed(de) == 28 * 10 * 20
    assert PRODUCTS["_de_kernel"].executed(de) == (7 * 16) * 32 * (2 * 16)


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
    found = {name for name, kernel in kernels.items() if products.multiplies_tiles(kernel)}
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
        "EFA, B 128: executed / needed 1.16 > 1.15"
    ]
    assert products.exceeded([("EFA, B 128", [Counted("all", 1, 100, 115)])]) == []
