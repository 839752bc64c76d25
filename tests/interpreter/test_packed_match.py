"""Samples of different lengths in the tiles of one match: how they are packed, and what is matched in every layout."""

import pytest
import torch
import torch.nn.functional as F
from fmfa_losses.kernels import hard_similarity, match, packed_match, token_lists
from helpers.compare import assert_close

from benchmarks.launch_products import next_fit
from fmfa_losses.functional import hard_similarity as similarity

LAYOUTS = {tuple(layout) for layout in packed_match.LAYOUT.values() if layout is not None}


def columns_of(mask, Q, N=256):
    """The lists of a mask's tiles, as match makes them."""
    Be = len(mask)
    recorded = {}
    launch = packed_match.launch

    def columns_alone(kernel, grid, *args, **options):
        if kernel.__name__ == "_columns_kernel":
            launch(kernel, grid, *args, **options)
            recorded.update(columns=args[5], granules=args[6])

    lists = token_lists.sections(token_lists.make(mask), Be, Q)
    patch = pytest.MonkeyPatch()
    patch.setattr(packed_match, "launch", columns_alone)
    x, e = torch.zeros(1, 2, 16), torch.zeros(Be, Q, 16)
    blocks = (16, N, 16, 8, 4, 1)
    packed_match.packed_match(x, e, torch.zeros(1, Be, 2), True, (None,) * 7, lists, Q, (16, 8, 1, 1, 2), blocks)
    patch.undo()
    return recorded["columns"], recorded["granules"]


LENGTHS = {
    "captions": [25, 31, 18, 22, 40, 77, 12, 25, 25, 19, 33, 28, 0, 51, 16, 8],
    "one": [5],
    "none": [0, 0, 0],
    "all": [77] * 9,
    "the widest": [128, 1, 128, 0, 127, 120],
    "wide ones beside": [200, 3, 129, 128],
    "many": [1 + i % 9 for i in range(300)],
}


@pytest.mark.parametrize("name", LENGTHS)
def test_tiles_hold_the_next_samples_that_fit(name):
    lengths = LENGTHS[name]
    Q = max(*lengths, 77)
    order = torch.stack([torch.randperm(Q) for _ in lengths])
    mask = torch.zeros(len(lengths), Q, dtype=torch.bool)
    for b, n in enumerate(lengths):
        mask[b, order[b, :n]] = True
    columns, granules = columns_of(mask, Q)
    tiles = next_fit([n for n in lengths if n <= token_lists.PACKED])
    assert len(tiles) <= len(columns) == packed_match.column_tiles(len(lengths), Q, 256)
    for t, (of_tile, granules_of_tile) in enumerate(zip(columns.tolist(), granules.tolist(), strict=True)):
        expected, expected_granules = [], []
        for b in tiles[t] if t < len(tiles) else ():
            b = [i for i, n in enumerate(lengths) if n <= token_lists.PACKED][b]
            tokens = (b * Q + mask[b].nonzero().flatten()).tolist()
            count = -(-len(tokens) // token_lists.GRANULE)
            expected += tokens + [tokens[-1]] * (count * token_lists.GRANULE - len(tokens))
            expected_granules += [2 * b] * (count - 1) + [2 * b + 1]
        assert of_tile == expected + [-1] * (256 - len(expected))
        assert granules_of_tile == expected_granules + [-2] * (256 // token_lists.GRANULE - len(expected_granules))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_every_column_to_one_granule(layout):
    A, lane, C, part, E = layout
    assert lane * part == token_lists.GRANULE and A * C * E * token_lists.GRANULE == 256


def matches(x, e, x_mask, e_mask):
    sim, packed = hard_similarity.forward(x, e, x_mask, e_mask, "lse", 5.0, True)
    return sim, packed


def batch(dtype, lengths, P=5, D=32):
    Q = max(lengths)
    x, e = F.normalize(torch.randn(2, P, D), dim=-1).to(dtype), F.normalize(torch.randn(len(lengths), Q, D), dim=-1)
    mask = torch.arange(Q) < torch.tensor(lengths)[:, None]
    return x, e.masked_fill(~mask[..., None], 0).to(dtype), torch.rand(2, P) < 0.8, mask


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_matches_as_classes_of_width_do(monkeypatch, layout, dtype):
    inputs = batch(dtype, [25, 31, 0, 18, 8, 77, 12, 1, 33, 130])
    for key in packed_match.LAYOUT:
        monkeypatch.setitem(packed_match.LAYOUT, key, None)
    expected = matches(*inputs)
    for key in packed_match.LAYOUT:
        monkeypatch.setitem(packed_match.LAYOUT, key, layout)
    assert all(torch.equal(a, b) for a, b in zip(matches(*inputs), expected, strict=True))


def test_ties_go_to_the_lowest_token_and_nan_shows():
    lengths = [20, 9, 17, 3]
    x, e, _, mask = batch(torch.float16, lengths)
    e[0] = e[0, :1]  # twenty times the same
    e[1, 4], e[1, 7] = x[0, 0], x[0, 0]  # between granules no tie, inside one
    e[2, 3], e[2, 11], e[2, 16] = x[0, 0], x[0, 0], x[0, 0]  # in all its granules
    e[3, 1, 0] = float("nan")
    x[1, 2, 0] = float("nan")
    out = match.match(
        x, e, (None,) * 7, token_lists.sections(token_lists.make(mask), *mask.shape), save=True, exponential=True
    )
    winners, values = out.to(torch.int16), (out >> 16).to(torch.int16).view(torch.float16)
    assert winners[0, 0, 0] == 0 and winners[0, 1, 0] == 4 and winners[0, 2, 0] == 3
    assert (winners[0, 0] == 0).all()
    assert values[:, 3].isnan().all() and values[1, :, 2].isnan().all()
    rest = torch.ones(2, 4, 5, dtype=torch.bool)
    rest[:, 3] = rest[1, :, 2] = False
    assert values[rest].isfinite().all()
    for j, n in enumerate(lengths):
        assert ((winners[:, j] >= 0) & (winners[:, j] < n)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_in_one_granule_shows_whatever_the_others_hold(monkeypatch, layout):
    for key in packed_match.LAYOUT:
        monkeypatch.setitem(packed_match.LAYOUT, key, layout)
    x, e, _, mask = batch(torch.float32, [20, 20, 20, 20], P=3)
    for sample, token in enumerate((2, 11, 19)):  # of the first granule, the second and the last
        e[sample, token, 0] = float("nan")
    sim, _ = matches(x, e, None, mask)
    assert sim.isnan().tolist() == [[True, True, True, False]] * 2


@pytest.mark.parametrize("pool", ["lse", "sum", "mean"])
def test_similarities_of_many_lengths(pool):
    lengths = torch.randint(0, 60, (23,)).tolist()
    x, e, x_mask, e_mask = batch(torch.float16, [*lengths, 60], P=9)
    given = {"x_mask": x_mask, "e_mask": e_mask, "pool": pool}
    exact = similarity(x.double(), e.double(), **given)
    assert_close([similarity(x, e, backend="triton", **given)], [exact], 4e-3)
    first, second = (similarity(x, e, backend="triton", **given) for _ in range(2))
    assert torch.equal(first, second)
