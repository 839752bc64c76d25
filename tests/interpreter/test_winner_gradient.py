"""de by products (float16) and by sorted lists (float32), against the sum over all matches in float64."""

import pytest
import torch
from fmfa_losses.kernels import token_lists, winner_gradient, winner_lists, winner_products
from helpers.budget import assert_within_budget

DTYPES = (torch.float16, torch.float32)
SIZES = [1, 12, 33, 77, 130, 300]


def packed(weights, winners, dtype):
    """One number for each match, as the kernels of the match make it."""
    half = dtype == torch.float16
    kind, bits, low = (torch.float16, torch.int16, 16) if half else (torch.float32, torch.int32, 32)
    high = weights.to(kind).contiguous().view(bits).long() << low
    return (high | (winners.long() & (2**low - 1))).to(torch.int32 if half else torch.int64)


def case(dtype, Bx=3, Be=2, P=19, Q=41, D=64, masked=False, pool="lse"):
    """dsim, weights, winners, matches, x, masks: unit rows, zeros where masked out, -1 where nothing won."""
    x = torch.nn.functional.normalize(torch.randn(Bx, P, D), dim=-1)
    cosines = torch.randn(Bx, Be, P, Q) / 8
    masks = (None, None)
    if masked:
        x_mask, e_mask = torch.rand(Bx, P) < 0.6, torch.rand(Be, Q) < torch.rand(Be, 1)
        x_mask[0], e_mask[-1] = False, False  # samples without a token
        masks = x_mask, e_mask
        x = x * x_mask[:, :, None]
        cosines = cosines.masked_fill(~e_mask[None, :, None], -2)
    best, winners = cosines.max(dim=-1)
    weights = {
        "lse": (10 * best).softmax(dim=-1),
        "log_mean": (0.1 * (best - best.mean(dim=-1, keepdim=True))).exp(),
        "sum": torch.ones_like(best),
    }[pool]
    if masked:
        nothing = ~(x_mask[:, None] & e_mask.any(dim=1)[None, :, None])
        winners, weights = winners.masked_fill(nothing, -1), weights.masked_fill(nothing, 0)
    return torch.randn(Bx, Be), weights, winners, packed(weights, winners, dtype), x.to(dtype), masks


def formula(dsim, weights, winners, x, Q, dtype=torch.float64):
    """de_jk = sum over (i, l) with winner k of dsim_ij p_ijl x_il."""
    w = torch.where(winners >= 0, dsim.to(dtype)[:, :, None] * weights.to(dtype), 0)
    chosen = torch.nn.functional.one_hot(winners.clamp(min=0).long(), Q).to(dtype)
    return torch.einsum("ijl,ijlk,ild->jkd", w, chosen, x.to(dtype))


def launched(dsim, matches, x, masks, Q, out=None, accumulate=False):
    lists = [None if mask is None else token_lists.make(mask) for mask in masks]
    if out is None:
        out = torch.full((matches.shape[1], Q, x.shape[-1]), float("nan"))
    winner_gradient.de(dsim, matches, x, *lists, Q, out, accumulate)
    return out


def check(dsim, weights, winners, matches, x, masks, Q, got):
    if x.dtype == torch.float16:
        weights = weights.half()
    exact = formula(dsim, weights, winners, x, Q)
    half = x.dtype == torch.float16
    plain = formula(dsim, weights, winners, x, Q, torch.float32)
    assert_within_budget(got, plain, exact, precision="fp16" if half else "fp32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("Q", SIZES)
def test_it_is_the_sum_over_all_matches(dtype, masked, Q):
    *given, masks = case(dtype, Q=Q, masked=masked)
    dsim, _, winners, matches, x = given
    got = launched(dsim, matches, x, masks, Q)
    check(*given, masks, Q, got)
    never = torch.ones(got.shape[:2], dtype=torch.bool)
    for j in range(winners.shape[1]):
        never[j, winners[:, j][winners[:, j] >= 0]] = False
    assert (got[never] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pool", "D"), [("log_mean", 5), ("sum", 64), ("log_mean", 96), ("lse", 530)])
def test_weights_of_every_pool_and_widths(dtype, pool, D):
    *given, masks = case(dtype, Bx=2, Be=5, P=70, Q=20, D=D, pool=pool)
    dsim, _, _, matches, x = given
    check(*given, masks, 20, launched(dsim, matches, x, masks, 20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_added_to_what_is_there(dtype, masked):
    *given, masks = case(dtype, masked=masked)
    dsim, _, _, matches, x = given
    before = torch.randn(2, 41, 64)
    once = launched(dsim, matches, x, masks, 41)
    both = launched(dsim, matches, x, masks, 41, before.clone(), accumulate=True)
    assert torch.equal(both, before + once)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_in_the_dtype_of_the_tokens(dtype):
    *given, masks = case(dtype)
    dsim, _, _, matches, x = given
    out = torch.full((2, 41, 64), float("nan"), dtype=dtype)
    wide = launched(dsim, matches, x, masks, 41)
    assert torch.equal(launched(dsim, matches, x, masks, 41, out), wide.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_strided_similarity_gradient(dtype):
    dsim, _, _, matches, x, masks = case(dtype)
    strided = dsim.T.contiguous().T
    assert torch.equal(launched(strided, matches, x, masks, 41), launched(dsim, matches, x, masks, 41))
    expanded = torch.ones(()).expand(3, 2)
    ones = torch.ones(3, 2)
    assert torch.equal(launched(expanded, matches, x, masks, 41), launched(ones, matches, x, masks, 41))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_samples_in_a_tile_and_many_tiles(dtype):
    *given, masks = case(dtype, Bx=2, Be=35, P=5, Q=9, D=16, masked=True)
    dsim, _, _, matches, x = given
    check(*given, masks, 9, launched(dsim, matches, x, masks, 9))


def test_granules_are_counted_in_blocks_of_samples(monkeypatch):
    monkeypatch.setattr(winner_products, "BLOCK_B", 8)
    *given, masks = case(torch.float16, Bx=2, Be=37, P=5, Q=40, D=16, masked=True)
    dsim, _, _, matches, x = given
    check(*given, masks, 40, launched(dsim, matches, x, masks, 40))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_wins_everything(dtype):
    *given, masks = case(dtype, Bx=8, P=150, Q=20, D=16, pool="sum")
    dsim, weights, winners, _, x = given
    winners = torch.full_like(winners, 7)
    matches = packed(weights, winners, dtype)
    got = launched(dsim, matches, x, masks, 20)
    check(dsim, weights, winners, matches, x, masks, 20, got)
    assert (got[:, :7] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_the_same_bits_twice(dtype, masked):
    dsim, _, _, matches, x, masks = case(dtype, masked=masked)
    assert torch.equal(launched(dsim, matches, x, masks, 41), launched(dsim, matches, x, masks, 41))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered in reduce:RuntimeWarning")
def test_what_is_no_number_shows_where_it_belongs(dtype, value):
    dsim, _, winners, matches, x, masks = case(dtype)
    right = launched(dsim, matches, x, masks, 41)
    dsim[1, 0] = value
    got = launched(dsim, matches, x, masks, 41)
    touched = torch.zeros(2, 41, dtype=torch.bool)
    touched[0, winners[1, 0]] = True
    assert not got[touched].isfinite().any()
    assert got[1].equal(right[1])
    assert got[~touched].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_similarity_that_is_no_number(dtype):
    dsim, weights, winners, _, x, masks = case(dtype)
    weights[2, 1] = float("nan")
    got = launched(dsim, packed(weights, winners, dtype), x, masks, 41)
    assert got[1, winners[2, 1]].isnan().all()
    assert got[0].isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e6, 1e30])
def test_float16_takes_gradients_of_any_size(scale):
    *given, masks = case(torch.float16)
    dsim, weights, winners, matches, x = given
    dsim = dsim * torch.tensor([scale, 1])
    got = launched(dsim, matches, x, masks, 41)
    for j in range(2):
        exact = formula(dsim, weights.half(), winners, x, 41)[j]
        assert_within_budget(got[j], exact.float(), exact, precision="fp16")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("huge", [1e30, 3e38])
def test_samples_that_add_nothing_take_no_digits_of_float16(masked, huge):
    *given, masks = case(torch.float16, masked=masked)
    dsim, weights, winners, matches, x = given
    x = x.clone()
    x[0] = 0
    dsim = 1e-6 * dsim
    dsim[0] = huge
    got = launched(dsim, matches, x, masks, 41)
    check(dsim.index_fill(0, torch.tensor([0]), 0), weights, winners, matches, x, masks, 41, got)


@pytest.mark.parametrize("masked", [False, True])
def test_lists_serve_float16_with_more_tokens_than_16_bits(masked):
    dsim, weights, winners, _, x, masks = case(torch.float32, masked=masked)
    matches, x = packed(weights, winners, torch.float32), x.half()
    got = launched(dsim, matches, x, masks, 41)
    assert_within_budget(got, got, formula(dsim, weights, winners, x, 41))


@pytest.mark.parametrize("block", [16, 32])
def test_starts_of_several_blocks_of_tokens(monkeypatch, block):
    monkeypatch.setattr(winner_lists, "SORT", (block, 16, 4))
    *given, masks = case(torch.float32, Q=41, masked=True)
    dsim, _, _, matches, x = given
    check(*given, masks, 41, launched(dsim, matches, x, masks, 41))
