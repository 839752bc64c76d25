import pytest
import torch
import torch.nn.functional as F
from fmfa_losses.kernels import hard_similarity
from reference import hard_similarity_reference, within_budget

# Bx, Be, P, Q, D: several samples a tile, one, and samples wider than a tile; a width that no vector divides.
SHAPES = [
    (1, 1, 1, 1, 16),
    (3, 5, 63, 77, 64),
    (1, 2, 129, 193, 64),
    (4, 2, 77, 300, 16),
    (2, 9, 193, 20, 64),
    (2, 3, 5, 9, 507),
]
POOLS = [("lse", 1.0), ("lse", 50.0), ("sum", 1.0), ("mean", 1.0)]


def inputs(Bx, Be, P, Q, D, dtype, masked=False):
    x, e = (F.normalize(torch.randn(*shape, D), dim=-1).to(dtype) for shape in ((Bx, P), (Be, Q)))
    if not masked:
        return x, e, None, None
    x_mask, e_mask = torch.rand(Bx, P) < 0.6, torch.rand(Be, Q) < torch.rand(Be, 1)
    x_mask[0, 0] = e_mask[0, -1] = True
    x_mask[Bx // 2 :, :] &= Bx < 2  # samples without any token
    e_mask[Be // 2, :] &= Be < 2
    return x.masked_fill(~x_mask.unsqueeze(-1), 0), e.masked_fill(~e_mask.unsqueeze(-1), 0), x_mask, e_mask


def run(x, e, x_mask, e_mask, pool, scale, dsim, gather):
    sim, maxima, winners = hard_similarity.forward(x, e, x_mask, e_mask, pool, scale, True)
    grads = hard_similarity.backward(dsim, sim, maxima, winners, x, e, x_mask, e_mask, pool, scale, gather)
    return (sim, *grads), winners


def plain(x, e, x_mask, e_mask, pool, scale, dsim, dtype):
    x, e = (t.detach().to(dtype).requires_grad_() for t in (x, e))
    sim, winners = hard_similarity_reference(x, e, x_mask, e_mask, pool, scale)
    return (sim.detach(), *torch.autograd.grad(sim, (x, e), dsim.to(dtype))), winners


def check(case, pool, scale, gather):
    x, e = case[:2]
    dsim = torch.randn(x.shape[0], e.shape[0]) * 1e-3
    exact, right_winners = plain(*case, pool, scale, dsim, torch.float64)
    rounded, _ = plain(*case, pool, scale, dsim, x.dtype)
    values, winners = run(*case, pool, scale, dsim, gather)
    assert torch.equal(winners.long(), right_winners)
    assert winners.dtype == torch.int16
    assert [value.dtype for value in values] == [torch.float32, x.dtype, x.dtype]
    for value, right, same_dtype in zip(values, exact, rounded, strict=True):
        within_budget(value, right, same_dtype, scale)


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_float32(shape, masked, gather):
    pool, scale = POOLS[(SHAPES.index(shape) + 2 * masked + gather) % len(POOLS)]
    check(inputs(*shape, torch.float32, masked), pool, scale, gather)


@pytest.mark.parametrize("pool, scale", POOLS)
def test_every_pool(pool, scale):
    check(inputs(3, 4, 20, 33, 16, torch.float32, masked=True), pool, scale, True)


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("pool, scale", POOLS[:3])
def test_values_and_gradients_float16(pool, scale, gather):
    check(inputs(3, 4, 40, 33, 64, torch.float16, masked=gather), pool, scale, gather)


def test_gradients_far_below_float16_keep_their_digits():
    x, e, _, _ = inputs(2, 3, 20, 17, 16, torch.float16)
    dsim = torch.randn(2, 3)
    ones = run(x.float(), e.float(), None, None, "sum", 1.0, dsim, False)[0]
    _, dx, de = run(x, e, None, None, "sum", 1.0, dsim * 2.0**-12, False)[0]
    torch.testing.assert_close(dx.float() * 2.0**12, ones[1], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(de.float() * 2.0**12, ones[2], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("Q", [24, 300])
def test_ties_go_to_the_lowest_token(Q):
    x, e, _, _ = inputs(2, 2, 9, Q, 16, torch.float32)
    e[:, Q // 2 :] = e[:, : Q - Q // 2]  # every token twice, in different tiles when there are several
    e_mask = torch.ones(2, Q, dtype=torch.bool)
    e_mask[1, 0] = False
    _, _, winners = hard_similarity.forward(x, e, None, e_mask, "sum", 1.0, True)
    cos = torch.einsum("ild,jkd->ijlk", x, e).masked_fill(~e_mask[None, :, None], -2)
    assert torch.equal(winners.long(), (cos >= cos.amax(-1, keepdim=True) - 1e-6).to(torch.uint8).argmax(-1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("Q", [1, 20, 77, 300])
def test_columns_that_hold_no_token_never_win(Q, masked):
    x, e, x_mask, e_mask = inputs(2, 5, 9, Q, 16, torch.float32, masked)
    x, e = x.abs(), -e.abs()  # every cosine is negative: a zero would win
    sim, _, winners = hard_similarity.forward(x, e, x_mask, e_mask, "mean", 1.0, True)
    right, right_winners = hard_similarity_reference(x.double(), e.double(), x_mask, e_mask, "mean", 1.0)
    torch.testing.assert_close(sim, right.float())
    assert torch.equal(winners.long(), right_winners)


@pytest.mark.parametrize("pool, saved", [("lse", (2, 3, 5)), ("sum", (0,))])
def test_what_is_saved(pool, saved):
    x, e, _, _ = inputs(2, 3, 5, 7, 16, torch.float32)
    sim, maxima, winners = hard_similarity.forward(x, e, None, None, pool, 1.0, False)
    again, kept_maxima, kept_winners = hard_similarity.forward(x, e, None, None, pool, 1.0, True)
    assert (maxima.shape, winners.shape) == ((0,), (0,))
    assert (kept_maxima.shape, kept_winners.shape) == (saved, (2, 3, 5))
    assert torch.equal(sim, again)


def test_many_tokens_need_wider_winners():
    x, e, _, _ = inputs(1, 1, 2, 32800, 16, torch.float32)
    _, _, winners = hard_similarity.forward(x, e, None, None, "sum", 1.0, True)
    assert winners.dtype == torch.int32
    assert torch.equal(winners.long(), torch.einsum("ild,jkd->ijlk", x, e).argmax(-1))


@pytest.mark.parametrize("pool", ["lse", "sum", "mean"])
def test_nan_shows_in_its_own_pairs_and_nowhere_else(pool):
    x, e, _, _ = inputs(3, 4, 5, 7, 16, torch.float32)
    x[1, 2, 3] = float("nan")
    e[2] = float("nan")
    broken = torch.zeros(3, 4, dtype=torch.bool)
    broken[1], broken[:, 2] = True, True
    sim, maxima, winners = hard_similarity.forward(x, e, None, None, pool, 2.0, True)
    assert torch.equal(sim.isnan(), broken)
    dsim = torch.ones_like(sim)
    dx, _ = hard_similarity.backward(dsim, sim, maxima, winners, x, e, None, None, pool, 2.0)
    assert dx.isnan().any()


def test_two_runs_are_equal_bit_for_bit():
    case = inputs(3, 4, 40, 33, 24, torch.float32, masked=True)
    dsim = torch.randn(3, 4)
    for gather in (True, False):
        runs = [run(*case, "lse", 3.0, dsim, gather)[0] for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
