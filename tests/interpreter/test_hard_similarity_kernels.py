import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from fmfa_losses.kernels import (
    _tile,
    gather_gradient,
    hard_similarity,
    match,
    persistent_match,
    unit_rows,
    winner_lists,
    winner_products,
)
from fmfa_losses.kernels import pool as pooling
from fmfa_losses.kernels._launch import recording
from fmfa_losses.kernels._matches import buffer_of, sections_of
from fmfa_losses.kernels._tile import max_or_nan, operands, row_max
from helpers.budget import assert_within_budget
from helpers.compare import assert_close, default_dtype, value_and_grads
from helpers.reference import unit_similarity_reference

from benchmarks.budget import relative_error
from fmfa_losses import functional
from fmfa_losses.compat.released import released_efa
from fmfa_losses.ops import hard_similarity as operators
from fmfa_losses.ops.hard_similarity import (
    FLAT,
    UnitTokens,
    hard_similarity_backward_op,
    hard_similarity_op,
    unit_similarity,
)

# Bx, Be, P, Q, D: several samples a tile, one, and samples wider than a tile; a width that no vector divides.
SHAPES = [
    (1, 1, 1, 1, 16),
    (3, 5, 63, 77, 64),
    (1, 2, 129, 193, 64),
    (4, 2, 77, 150, 16),
    (2, 9, 130, 20, 64),
    (2, 3, 5, 9, 507),
    (2, 2, 3, 5, 530),
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


def winners_of(matches):
    """And -1 where there is none, in the lower halves."""
    return matches.to(torch.int16 if matches.dtype == torch.int32 else torch.int32).long()


def values_of(matches):
    """Weights, in the upper halves."""
    if matches.dtype == torch.int32:
        return (matches >> 16).to(torch.int16).view(torch.float16)
    return (matches >> 32).to(torch.int32).view(torch.float32)


def run(x, e, x_mask, e_mask, pool, scale, dsim):
    sim, matches = hard_similarity.forward(x, e, x_mask, e_mask, pool, scale, True)
    grads = hard_similarity.backward(dsim, matches, x, e, x_mask, e_mask, pool)
    return (sim, *grads), winners_of(matches)


def plain(x, e, x_mask, e_mask, pool, scale, dsim, dtype):
    x, e = (t.detach().to(dtype).requires_grad_() for t in (x, e))
    sim, winners = unit_similarity_reference(x, e, x_mask, e_mask, pool, scale)
    return (sim.detach(), *torch.autograd.grad(sim, (x, e), dsim.to(dtype))), winners


def check(case, pool, scale):
    x, e = case[:2]
    dsim = torch.randn(x.shape[0], e.shape[0]) * 1e-3
    exact, right_winners = plain(*case, pool, scale, dsim, torch.float64)
    rounded, _ = plain(*case, pool, scale, dsim, x.dtype)
    values, winners = run(*case, pool, scale, dsim)
    assert torch.equal(winners, right_winners)
    assert [value.dtype for value in values] == [torch.float32, x.dtype, x.dtype]
    for value, right, same_dtype in zip(values, exact, rounded, strict=True):
        assert_within_budget(value, right, same_dtype, amplification=8 + scale)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_float32(shape, masked):
    pool, scale = POOLS[(SHAPES.index(shape) + 2 * masked) % len(POOLS)]
    check(inputs(*shape, torch.float32, masked), pool, scale)


@pytest.mark.parametrize("pool, scale", POOLS)
def test_every_pool(pool, scale):
    check(inputs(3, 4, 20, 33, 16, torch.float32, masked=True), pool, scale)


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e-3, 0.24, 0.25, 4.0, 33.0, 1e4, 1e30])
def test_every_scale_of_the_pooling(scale):
    x, e, x_mask, e_mask = inputs(3, 4, 70, 9, 16, torch.float32, masked=True)
    x[:, 1], x_mask[:, 1] = x[:, 0], x_mask[:, 0]  # equally similar: each has half of the weight
    kwargs = {"x_mask": x_mask, "e_mask": e_mask, "pool_scale": scale}
    exact = value_and_grads(lambda x, e: functional.hard_similarity(x, e, **kwargs), (x.double(), e.double()))
    got = value_and_grads(lambda x, e: functional.hard_similarity(x, e, backend="triton", **kwargs), (x, e))
    assert_close(got, exact, 2e-6 + 3e-8 * min(scale, 200))
    units = [UnitTokens(t.double(), mask, None) for t, mask in ((x, x_mask), (e, e_mask))]
    if scale < FLAT:  # the log mean, which no level hides
        exact = unit_similarity(*units, pool="log_mean", pool_scale=scale, backend="torch")
        sim, _ = hard_similarity.forward(x, e, x_mask, e_mask, "log_mean", scale, False)
        assert_close([sim], [exact], 1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pool, scale", POOLS)
def test_values_and_gradients_float16(pool, scale, masked):
    check(inputs(3, 4, 40, 33, 64, torch.float16, masked), pool, scale)


def test_gradients_far_below_float16_keep_their_digits():
    x, e, _, _ = inputs(2, 3, 20, 17, 16, torch.float16)
    dsim = torch.randn(2, 3)
    ones = run(x.float(), e.float(), None, None, "sum", 1.0, dsim)[0]
    _, dx, de = run(x, e, None, None, "sum", 1.0, dsim * 2.0**-12)[0]
    torch.testing.assert_close(dx.float() * 2.0**12, ones[1], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(de.float() * 2.0**12, ones[2], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("what", ["mask", "zeros"])
def test_samples_that_move_nothing_do_not_drown_the_others(what):
    """Float16: a released row of similarities that is all zero sends 1e12 times the gradient back, to no token."""
    x, e, x_mask, e_mask = inputs(4, 5, 9, 7, 16, torch.float16)
    if what == "mask":
        x_mask, e_mask = torch.ones(4, 9, dtype=torch.bool), torch.ones(5, 7, dtype=torch.bool)
        x_mask[1], e_mask[3] = False, False
    else:
        x[1], e[3] = 0, 0
    dsim = torch.randn(4, 5)
    dsim[1] *= 1e12
    dsim[:, 3] *= 1e12
    exact, _ = plain(x, e, x_mask, e_mask, "mean", 1.0, dsim, torch.float64)
    got, _ = run(x, e, x_mask, e_mask, "mean", 1.0, dsim)
    others = torch.arange(4) != 1, torch.arange(5) != 3  # the gradient of a zero vector is large itself
    for value, right, kept in zip(got[1:], exact[1:], others, strict=True):
        assert_close([value[kept]], [right[kept]], 2e-3)


def test_every_sample_of_e_has_its_own_range():
    """Float16: cotangents of 1e-9 next to others of 1."""
    x, e, _, _ = inputs(3, 4, 20, 17, 16, torch.float16)
    dsim = torch.randn(3, 4)
    right = run(x.float(), e.float(), None, None, "sum", 1.0, dsim)[0][2]
    ranges = torch.tensor([1.0, 2.0**-13, 2.0**10, 2.0**-4])
    de = run(x, e, None, None, "sum", 1.0, dsim * ranges)[0][2]
    for j in range(4):
        assert_close([de[j].float() / ranges[j]], [right[j]], 3e-3)


@pytest.mark.parametrize("pool", ["lse", "mean"])
def test_a_cotangent_that_is_not_finite_shows_in_its_own_pairs(pool):
    x, e, _, _ = inputs(3, 4, 5, 7, 16, torch.float16)
    dsim = torch.ones(3, 4)
    dsim[0, 1], dsim[2, 3] = torch.nan, torch.inf
    (_, dx, de), _ = run(x, e, None, None, pool, 2.0, dsim)
    assert [dx[i].isfinite().all().item() for i in range(3)] == [False, True, False]
    assert [de[j].isfinite().all().item() for j in range(4)] == [True, False, True, False]


@pytest.mark.parametrize("loss", [functional.efa_loss, released_efa])
@pytest.mark.parametrize("empty", [None, "caption", "image"])
def test_efa_in_float16_with_an_empty_sample(empty, loss):
    image, text = torch.randn(4, 12, 16).half(), torch.randn(4, 6, 16).half()
    masks = {"image_mask": torch.ones(4, 12, dtype=torch.bool), "text_mask": torch.ones(4, 6, dtype=torch.bool)}
    if empty is not None:
        masks["image_mask" if empty == "image" else "text_mask"][2] = False
    exact, got = (
        value_and_grads(
            lambda i, t, b=backend: loss(i, t, backend=b, **masks),
            [t.to(dtype) for t in (image, text)],
        )
        for backend, dtype in (("torch", torch.float64), ("triton", torch.float16))
    )
    assert_close(got, exact, 3e-3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("Q", [24, 300])
def test_ties_go_to_the_lowest_token(Q, masked):
    # Integers up to 4: their products' sums are exact in any order, so that equal tokens tie on every processor.
    x, e = (torch.randint(-4, 5, (2, tokens, 16)).float() for tokens in (9, Q))
    e[:, Q // 2 :] = e[:, : Q - Q // 2]  # every token twice, in different tiles when there are several
    e_mask = torch.ones(2, Q, dtype=torch.bool)
    e_mask[1, 0] = not masked
    _, matches = hard_similarity.forward(x, e, None, e_mask if masked else None, "sum", 1.0, True)
    products = torch.einsum("ild,jkd->ijlk", x, e).masked_fill(~e_mask[None, :, None], -1000)
    ties = products == products.amax(-1, keepdim=True)
    assert (ties.sum(-1) > 1).float().mean() > 0.9
    assert torch.equal(winners_of(matches), ties.to(torch.uint8).argmax(-1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("Q", [1, 20, 77, 300])
def test_columns_that_hold_no_token_never_win(Q, masked):
    x, e, x_mask, e_mask = inputs(2, 5, 9, Q, 16, torch.float32, masked)
    x, e = x.abs(), -e.abs()  # every cosine is negative: a zero would win
    sim, matches = hard_similarity.forward(x, e, x_mask, e_mask, "mean", 1.0, True)
    right, right_winners = unit_similarity_reference(x.double(), e.double(), x_mask, e_mask, "mean", 1.0)
    torch.testing.assert_close(sim, right.float())
    assert torch.equal(winners_of(matches), right_winners)


@pytest.mark.parametrize("pool", ["lse", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_saved(pool, dtype):
    x, e, _, _ = inputs(2, 3, 5, 7, 16, dtype)
    sim, matches = hard_similarity.forward(x, e, None, None, pool, 1.0, False)
    again, kept = hard_similarity.forward(x, e, None, None, pool, 1.0, True)
    assert (matches.shape, kept.shape) == ((0,), (2, 3, 5))
    assert kept.dtype == (torch.int64 if dtype == torch.float32 else torch.int32)
    assert torch.equal(sim, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_tokens_need_wider_winners(dtype):
    x, e, _, _ = inputs(1, 1, 2, 32800, 16, torch.float32)
    x, e = x.to(dtype), e.to(dtype)
    e[0, 32790] = x[0, 0] * 4
    _, matches = hard_similarity.forward(x, e, None, None, "sum", 1.0, True)
    assert matches.dtype == torch.int64
    assert torch.equal(winners_of(matches), torch.einsum("ild,jkd->ijlk", x.double(), e.double()).argmax(-1))
    assert winners_of(matches)[0, 0, 0] == 32790


@triton.jit
def _row_max_kernel(x_ptr, out_ptr, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    x = tl.load(x_ptr + r[:, None] * C + c[None, :])
    tl.store(out_ptr + r, row_max(x))
    tl.store(out_ptr + R + r, tl.reduce(x, 1, max_or_nan))


def test_a_row_with_a_nan_has_no_largest_number():
    x = torch.randn(8, 4)
    x[2, 1], x[5], x[6, 3], x[7] = float("nan"), float("nan"), float("inf"), -float("inf")
    out = torch.empty(2, 8)
    _row_max_kernel[(1,)](x, out, R=8, C=4)  # as it is interpreted, and as it is compiled
    torch.testing.assert_close(out, x.amax(1).expand(2, 8), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("Q", "pool"), [(7, "lse"), (40, "mean"), (140, "sum")])
def test_one_nan_token_shows_wherever_it_stands(Q, pool):
    for token in (0, Q // 2, Q - 1):
        x, e, _, _ = inputs(2, 4, 5, Q, 16, torch.float32)
        e[2, token, 3] = float("nan")
        sim, matches = hard_similarity.forward(x, e, None, None, pool, 2.0, True)
        winners = winners_of(matches)
        assert torch.equal(sim.isnan(), torch.tensor([[False, False, True, False]] * 2))
        assert ((winners >= 0) & (winners < Q)).all()
        dx, de = hard_similarity.backward(torch.ones_like(sim), matches, x, e, None, None, pool)
        assert dx.isnan().any(-1).all()
        assert torch.equal(de.isnan().flatten(1).any(1), torch.tensor([False, False, True, False]))


@pytest.mark.parametrize("pool", ["lse", "sum", "mean"])
def test_nan_shows_in_its_own_pairs_and_nowhere_else(pool):
    x, e, _, _ = inputs(3, 4, 5, 7, 16, torch.float32)
    x[1, 2, 3] = float("nan")
    e[2] = float("nan")
    broken = torch.zeros(3, 4, dtype=torch.bool)
    broken[1], broken[:, 2] = True, True
    sim, matches = hard_similarity.forward(x, e, None, None, pool, 2.0, True)
    assert torch.equal(sim.isnan(), broken)
    assert torch.equal(values_of(matches).isnan(), broken.unsqueeze(-1).expand(matches.shape))
    dx, _ = hard_similarity.backward(torch.ones_like(sim), matches, x, e, None, None, pool)
    assert dx.isnan().any()


def test_a_nan_does_not_show_where_a_row_is_masked_out():
    x, e, x_mask, _ = inputs(3, 4, 9, 7, 16, torch.float32, masked=True)
    e[1] = float("nan")
    sim, matches = hard_similarity.forward(x, e, x_mask, None, "lse", 2.0, True)
    dx, _ = hard_similarity.backward(torch.ones_like(sim), matches, x, e, x_mask, None, "lse")
    assert dx[x_mask].isnan().all()
    assert (dx[~x_mask] == 0).all()


def test_two_runs_are_equal_bit_for_bit():
    case = inputs(3, 4, 40, 33, 24, torch.float32, masked=True)
    dsim = torch.randn(3, 4)
    runs = [run(*case, "lse", 3.0, dsim)[0] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


STRIDED = {
    "sliced": lambda t: torch.cat([t[:, :1], t], dim=1)[:, 1:],
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("strided", STRIDED)
def test_strided_masks_and_tokens(strided):
    """A kernel that took them for contiguous would read another sample's, and past the end of the expanded ones."""
    make = STRIDED[strided]
    x, e, x_mask, e_mask = inputs(4, 3, 9, 7, 16, torch.float32, masked=True)
    x_mask[:, 0] = e_mask[:, 0] = True
    assert not any(make(t).is_contiguous() for t in (x, e, x_mask, e_mask))

    def run(backend, make_masks):
        masks = {"x_mask": make_masks(x_mask), "e_mask": make_masks(e_mask)}
        return value_and_grads(
            lambda x, e: functional.hard_similarity(make(x), make(e), backend=backend, **masks), (x, e)
        )

    got = run("triton", make)
    for a, b in zip(got, run("triton", lambda mask: make(mask).contiguous()), strict=True):
        assert torch.equal(a, b)
    assert_close(got, run("torch", make), 1e-5)


@pytest.mark.parametrize("strided", [None, *STRIDED])
def test_strided_masks_and_tokens_of_efa(strided):
    make = STRIDED.get(strided, lambda t: t)
    image, text = torch.randn(4, 9, 16), torch.randn(4, 7, 16)
    text_mask = torch.rand(4, 7) < 0.7
    text_mask[:, 0] = True
    text_mask[:, 5:] = False  # padding, which EFA cuts on a CPU: a strided mask again
    tokens = make if strided != "expanded" else lambda t: t  # equal pairs have no gradient
    results = [
        value_and_grads(
            lambda i, t, backend=backend: functional.efa_loss(
                tokens(i), tokens(t), text_mask=make(text_mask), backend=backend
            ),
            (image, text),
        )
        for backend in ("triton", "torch")
    ]
    assert_close(*results, 2e-5)


@pytest.mark.of_torch
def test_permuted_tokens_are_promised_and_compiled_as_they_come():
    """CLIP's tokens come as [L, B, D]; gradients are contiguous in the fake kernels as in the real ones."""
    x, e, x_mask, e_mask = inputs(3, 4, 9, 7, 16, torch.float32, masked=True)
    permuted = STRIDED["transposed"]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for backend in ("triton", "torch"):
        args = (permuted(x).requires_grad_(), permuted(e).requires_grad_(), permuted(x_mask), permuted(e_mask))
        args += ("lse", 1.0, True, backend)
        torch.library.opcheck(hard_similarity_op, args, test_utils=tests)
        saved = [t.detach() for t in hard_similarity_op(*args)]
        tokens = [t.detach() for t in args[:2]]
        backward = (torch.ones_like(saved[0]), *saved[1:], *tokens, *args[2:5], backend)
        torch.library.opcheck(hard_similarity_backward_op, backward, test_utils=tests)


@pytest.mark.of_torch
@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_permuted_tokens_compile(backend):
    image, text = torch.randn(9, 3, 16), torch.randn(7, 3, 16)
    text_mask = torch.rand(3, 7) < 0.7

    def loss(image, text):
        image, text = image.transpose(0, 1), text.transpose(0, 1)
        similarity = functional.hard_similarity(image, text, e_mask=text_mask, backend=backend)
        return similarity.sum() + functional.efa_loss(image, text, text_mask=text_mask, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert_close(value_and_grads(compiled, (image, text)), value_and_grads(loss, (image, text)), 1e-6)


@pytest.mark.of_torch
@pytest.mark.parametrize(
    ("dtype", "default"),
    [(torch.float32, torch.float64), (torch.float32, torch.bfloat16), (torch.float16, torch.float64)],
)
def test_the_default_dtype_does_not_show(monkeypatch, dtype, default):
    x, e, x_mask, e_mask = inputs(3, 4, 9, 7, 16, dtype, masked=True)
    dtypes, launch = [], match.launch  # of what the kernels get: the interpreter takes any

    def recorded(kernel, grid, *args, **options):
        dtypes.append([arg.dtype for arg in args if isinstance(arg, torch.Tensor)])
        launch(kernel, grid, *args, **options)

    for module in (match, pooling, gather_gradient, winner_products, winner_lists, unit_rows):
        monkeypatch.setattr(module, "launch", recorded)

    def run():
        return (
            *value_and_grads(lambda x, e: functional.hard_similarity(x, e, x_mask=x_mask, backend="triton"), (x, e)),
            *value_and_grads(
                lambda x, e: functional.efa_loss(x, e[:3], text_mask=e_mask[:3], backend="triton"), (x, e)
            ),
        )

    expected = run()
    with default_dtype(default):
        got = run()
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert dtypes[: len(dtypes) // 2] == dtypes[len(dtypes) // 2 :]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_similarity_nobody_differentiates_costs_no_backward(monkeypatch, backend):
    x, e, _, _ = inputs(2, 3, 5, 7, 16, torch.float32)
    sim, weights, winners = hard_similarity_op(x.requires_grad_(), e, None, None, "lse", 1.0, True, backend)
    assert sim.requires_grad
    assert not winners.requires_grad
    if backend == "triton":
        assert not weights.requires_grad
    else:
        monkeypatch.setattr(operators, "hard_similarity_backward_op", lambda *args: pytest.fail("nobody asked"))
        assert torch.autograd.grad(weights.sum(), x, allow_unused=True) == (None,)


def launched(B, P, Q, masked):
    """What is constant when compiling, of every launch of one step."""
    x, e = (torch.empty(B, tokens, 16, dtype=torch.bfloat16, device="meta") for tokens in (P, Q))
    masks = [torch.empty(B, tokens, dtype=torch.bool, device="meta") if masked else None for tokens in (P, Q)]
    with recording("sm_90") as launches:
        sim, matches = hard_similarity.forward(x, e, *masks, "lse", 1.0, True)
        hard_similarity.backward(sim, matches, x, e, *masks, "lse")
    return {
        (one.kernel.__name__, *one.options.items(), *(getattr(arg, "dtype", arg is None) for arg in one.args))
        for one in launches
    }


@pytest.mark.parametrize("masked", [False, True])
def test_neither_batch_nor_length_make_another_kernel(masked):
    usual = launched(64, 77, 77, masked)
    for B in (1, 37, 128):
        for tokens in (33, 50, 64, 80) + ((12, 16, 32) if masked else ()):
            assert launched(B, tokens, tokens, masked) <= usual
    wider = 129 if masked else 81
    assert not launched(64, 77, wider, masked) <= usual


@pytest.mark.parametrize("Q", [15, 16, 17, 32, 33, 79, 80, 81, 128, 129, 257])
def test_every_class_of_width(Q):
    """Of the match alone: the gradients do not know the classes."""
    x, e, _, e_mask = inputs(1, 7, 3, Q, 16, torch.float32, masked=True)
    for mask in (None, e_mask):
        sim, matches = hard_similarity.forward(x, e, None, mask, "lse", 2.0, True)
        right, winners = unit_similarity_reference(x.double(), e.double(), None, mask, "lse", 2.0)
        torch.testing.assert_close(sim, right.float(), rtol=1e-6, atol=1e-6)
        assert torch.equal(winners_of(matches), winners)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 63, 77, 64), (2, 2, 3, 5, 530)])
def test_cosines_of_winners(shape, masked):
    """Whatever stood there: of a winner its cosine, where nothing won what was there, and NaN stays."""
    x, e, x_mask, e_mask = inputs(*shape, torch.float32, masked)
    Bx, Be, P, Q, D = shape
    _, before = hard_similarity.forward(x, e, x_mask, e_mask, "sum", 1.0, True)
    winners = winners_of(before)
    won = winners >= 0
    assert won.all() != masked
    values = torch.full(before.shape, 7.0)
    values[0, 0, 0] = float("nan")
    matches = (values.view(torch.int32).long() << 32) | (winners & 0xFFFFFFFF)
    sections = [sections_of(buffer_of(mask, None), *t.shape[:2]) for t, mask in ((x, x_mask), (e, e_mask))]
    sizes = {"LIST_X": masked, "LIST_E": masked, "BLOCK_OWN": 16, "BLOCK_D": 256}
    match._cosine_kernel[(-(-Bx * P // 16),)](
        matches, x, e, *sections[0][-2:], sections[1][1], Bx, Be, P, Q, D, **sizes, num_warps=1
    )
    exact = torch.einsum("ild,ijld->ijl", x.double(), e.double()[torch.arange(Be)[:, None], winners.clamp(min=0)])
    got = values_of(matches)
    assert torch.equal(winners_of(matches), winners)
    assert got[0, 0, 0].isnan()
    got[0, 0, 0] = exact[0, 0, 0]
    torch.testing.assert_close(got[won].double(), exact[won], rtol=0, atol=2e-7)
    assert (got[~won] == 7).all()


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.2, 1.0, 50.0, 1e4, 1e6])
@pytest.mark.parametrize(
    ("P", "dtype"), [(1, torch.float16), (77, torch.float32), (130, torch.float16), (300, torch.float32)]
)
def test_weights_of_every_pool(P, scale, dtype):
    """Of given maxima, against float64: similarities, and weights in place. What is not pooled is not read."""
    Bx, Be = 3, 18
    maxima = (torch.rand(Bx, Be, P) * 2 - 1).to(dtype)
    maxima[0, 0, -1] = maxima[0, 0, 0]
    winners = torch.randint(0, 500, (Bx, Be, P))
    x_mask, counts = torch.rand(Bx, P) < 0.7, torch.ones(Be, dtype=torch.int32)
    x_mask[1], x_mask[0, 0], counts[3] = False, True, 0
    kept = x_mask[:, None, :] & (counts > 0)[None, :, None]
    width, integers = (32, torch.int32) if dtype == torch.float32 else (16, torch.int16)
    garbage = torch.where(kept, maxima, torch.tensor(float("nan"), dtype=dtype))
    matches = garbage.view(integers).long() << width | (winners & (2**width - 1))
    matches = matches if width == 32 else matches.to(torch.int32)
    exact, n = maxima.double().masked_fill(~kept, 0), kept.sum(-1)
    z = (scale * exact).masked_fill(~kept, -torch.inf)
    some = torch.where(n > 0, 1.0, 0.0)
    for how in ("lse", "log_mean", "sum", "mean"):
        if how == "log_mean" and scale >= FLAT:
            continue
        saved = matches.clone()
        sim = pooling.pool(saved, x_mask, counts, how, scale, True)
        assert torch.equal(sim, pooling.pool(garbage, x_mask, counts, how, scale, False))
        right, weights = exact.sum(-1), kept.double()
        if how == "mean":
            right = right / n.clamp(min=1)
        elif how == "lse":
            right, weights = z.logsumexp(-1).nan_to_num(0, neginf=0) / scale, z.softmax(-1).nan_to_num(0)
        elif how == "log_mean":
            right = torch.log1p(torch.expm1(scale * exact).sum(-1) / n.clamp(min=1)) / scale
            weights = torch.exp(scale * (exact - right.unsqueeze(-1))) * kept
        torch.testing.assert_close(sim.double(), right * some, rtol=1e-6, atol=1e-6)
        unit = 2**-24 if dtype == torch.float32 else 2**-11
        got = values_of(saved).double()
        assert ((got - weights).abs() <= 8 * unit * weights + 1e-6 * (dtype == torch.float16) + 1e-9).all()
        assert torch.equal(winners_of(saved), winners.masked_fill(~kept, -1))


@pytest.mark.parametrize("how", ["lse", "log_mean", "sum", "mean"])
def test_a_nan_maximum_has_nan_weights_and_no_pair_else(how):
    maxima = torch.rand(2, 3, 300)
    maxima[1, 2, 280] = float("nan")
    matches = maxima.view(torch.int32).long() << 32 | 5
    sim = pooling.pool(matches, None, None, how, 0.1, True)
    broken = torch.zeros(2, 3, dtype=torch.bool)
    broken[1, 2] = True
    assert torch.equal(sim.isnan(), broken)
    assert torch.equal(values_of(matches).isnan(), broken.unsqueeze(-1).expand(2, 3, 300))
    assert (winners_of(matches) == 5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("D", [16, 530, 1030, 2050])
def test_the_gradient_through_the_normalisation_in_place(D, masked, dtype):
    """In `units`, whose rows become the gradient of the tokens they were made of; de is added to what there is."""
    torch.manual_seed(D)
    tokens = torch.randn(3, 9, D).double()
    _, e, x_mask, e_mask = inputs(3, 4, 9, 7, D, dtype, masked)
    tokens[0, 1] = 0
    if masked:
        tokens = tokens.masked_fill(~x_mask.unsqueeze(-1), 0)
    lengths = tokens.norm(dim=-1)
    lengths = torch.where(lengths == 0, 1, lengths)
    units = (tokens / lengths.unsqueeze(-1)).to(dtype)
    dsim = torch.randn(3, 4)
    _, matches = hard_similarity.forward(units, e, x_mask, e_mask, "lse", 2.0, True)
    # w_ijl e_j,winner, and the same of x, in float64 from what was saved.
    won = winners_of(matches) >= 0
    w = torch.where(won, dsim.double().unsqueeze(-1) * values_of(matches).double(), 0)
    chosen = F.one_hot(winners_of(matches).clamp(min=0).long(), e.shape[1]).double()
    dx = torch.einsum("ijl,ijlk,jkd->ild", w, chosen, e.double())
    de = torch.einsum("ijl,ijlk,ild->jkd", w, chosen, units.double())
    rows = tokens.double() / lengths.double().unsqueeze(-1)  # not `units`, which are rounded
    exact = (dx - rows * (rows * dx).sum(-1, keepdim=True)) / lengths.unsqueeze(-1)
    before = torch.randn(e.shape)
    added, lists = before.clone(), [buffer_of(mask, None) for mask in (x_mask, e_mask)]
    hard_similarity.add_gradients(
        dsim, matches, units, tokens, e, x_mask, "lse", *lists, (1 / lengths).float(), added, accumulate=True
    )
    assert_close([units.float()], [exact.float()], 2e-6 if dtype == torch.float32 else 1e-3)
    assert_close([added], [(before + de).float()], 2e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("shape", [(3, 5, 63, 77, 64), (9, 7, 63, 20, 130), (5, 2, 3, 100, 16), (1, 1, 1, 1, 16)])
@pytest.mark.parametrize("save", [True, False])
def test_a_persistent_match_has_the_same_bits(monkeypatch, shape, save):
    x, e, *_ = inputs(*shape, torch.float16)
    e[-1, :, 2] = float("nan") if shape[0] == 3 else 0
    nothing = sections_of(None, 1, 1)
    expected = match.match(x, e, nothing, nothing, save, True)
    launched, launch = [], persistent_match.launch
    monkeypatch.setattr(
        persistent_match, "launch", lambda kernel, *args, **kw: launched.append(kernel) or launch(kernel, *args, **kw)
    )
    monkeypatch.setattr(match, "PERSISTENT", True)
    got = match.match(x, e, nothing, nothing, save, True)
    assert len(launched) == 1
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


@pytest.fixture
def high():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 63, 77, 64), (2, 2, 20, 150, 40), (2, 3, 5, 9, 507)])
def test_three_products_of_tf32_have_the_error_budget_of_ieee(high, shape, masked):
    """The interpreter multiplies exactly what it is given, and what it is given are TF32 numbers."""
    pool, scale = ("lse", 50.0) if masked == (shape[0] == 3) else ("mean", 1.0)
    case = inputs(*shape, torch.float32, masked)
    dsim = torch.randn(shape[:2])
    exact, right_winners = plain(*case, pool, scale, dsim, torch.float64)
    rounded, _ = plain(*case, pool, scale, dsim, torch.float32)
    values, winners = run(*case, pool, scale, dsim)
    assert torch.equal(winners, right_winners)
    for value, right, same_dtype in list(zip(values, exact, rounded, strict=True))[:2]:  # de is another product
        assert_within_budget(value, right, same_dtype, amplification=8 + scale)


def test_the_two_parts_of_an_operand_are_tf32_and_add_up(monkeypatch):
    x, e, *_ = inputs(3, 4, 40, 33, 512, torch.float32)
    captured, launch = [], match.launch

    def recorded(kernel, grid, *args, **options):
        launch(kernel, grid, *args, **options)
        if kernel.__name__ == "_split_kernel":
            captured.append(args[1])

    monkeypatch.setattr(match, "launch", recorded)
    monkeypatch.setattr(match, "match_precision", lambda like: "tf32x3")
    nothing = sections_of(None, 1, 1)
    match.match(x, e, nothing, nothing, False, False)
    for parts, whole in zip(captured, (x, e), strict=True):
        assert (parts.view(torch.int32) & 8191 == 0).all()
        assert ((parts.double().sum(-2) - whole).abs() <= 2.0**-23 * whole.abs()).all()
    # The products themselves, before winners get better ones: as good as float32's.
    (xh, xl), (eh, el) = (parts.flatten(0, 1).unbind(1) for parts in captured)
    exact = x.flatten(0, 1).double() @ e.flatten(0, 1).double().T
    assert_within_budget(xl @ eh.T + xh @ el.T + xh @ eh.T, exact, x.flatten(0, 1) @ e.flatten(0, 1).T)
    one = relative_error(xh @ eh.T, exact)
    assert one > 1e-4


def test_operands_are_the_nearest_tf32(monkeypatch):
    low, high = 1.0, 1.0 + 2**-10
    x = torch.tensor([low, low + 2**-12, high - 2**-12, -high + 2**-12, float("inf"), 0.0, 3e-41, 5.0])
    x[-1:].view(torch.int32).fill_(0x7FFFFFFF)  # the NaN that NVIDIA's arithmetic makes
    (same,) = operands(x)
    assert same.data_ptr() == x.data_ptr()
    monkeypatch.setattr(_tile, "dot_precision", lambda dtype: "tf32" if dtype == torch.float32 else "ieee")
    (got,) = operands(x)
    assert got[:6].tolist() == [low, low, high, -high, float("inf"), 0.0]
    assert got[-1].isnan()
    (half,) = operands(x.half())
    assert half.dtype == torch.float16
