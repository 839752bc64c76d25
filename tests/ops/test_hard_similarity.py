"""Hard similarity: the torch path against its reference, golden values, properties, degenerate and bad input."""

from functools import partial

import pytest
import torch
from helpers.budget import assert_function_within_budget
from helpers.compare import assert_close, assert_finite, value_and_grads
from helpers.golden import golden
from helpers.processes import forked
from hypothesis import given, settings
from hypothesis import strategies as st

from fmfa_losses.functional import hard_similarity
from fmfa_losses.ops import hard_similarity as module
from fmfa_losses.ops.hard_similarity import hard_similarity_reference
from fmfa_losses.ops.rows import match

SHAPES = [
    (1, 1, 1, 1, 1),
    (3, 2, 63, 77, 16),
    (2, 4, 77, 193, 5),
    (5, 3, 1, 7, 24),
    (2, 2, 193, 1, 8),
    (2, 3, 12, 507, 3),
]


def draw(Bx, Be, P, Q, D, dtype=torch.float64):
    return torch.randn(Bx, P, D, dtype=dtype), torch.randn(Be, Q, D, dtype=dtype)


def some_masks(x, e):
    """Random masks; the first sample of each side loses everything where there is a second one."""
    x_mask, e_mask = torch.rand(x.shape[:2]) > 0.4, torch.rand(e.shape[:2]) > 0.4
    if len(x) > 1:
        x_mask[0] = False
    if len(e) > 1:
        e_mask[0] = False
    return x_mask, e_mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("fn", [hard_similarity, hard_similarity_reference])
def test_golden(fn, dtype, tolerance):
    case = golden("hard_similarity_masked")
    x, e = case.inputs["x"].to(dtype), case.inputs["e"].to(dtype)
    got = value_and_grads(
        lambda x, e: fn(x, e, x_mask=case.inputs["x_mask"], e_mask=case.inputs["e_mask"]), (x, e), torch.ones(8, 8)
    )
    assert_close(got, [case.value, case.grads["x"], case.grads["e"]], tolerance)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pool", ["lse", "sum", "mean"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, pool, masked):
    x, e = draw(*shape)
    x_mask, e_mask = some_masks(x, e) if masked else (None, None)
    kwargs = {"x_mask": x_mask, "e_mask": e_mask, "pool": pool, "pool_scale": 3.0}
    assert_close(
        value_and_grads(lambda x, e: hard_similarity(x, e, **kwargs), (x, e)),
        value_and_grads(lambda x, e: hard_similarity_reference(x, e, **kwargs), (x, e)),
        1e-12,
    )


def test_tiles_do_not_show(monkeypatch):
    """Many small tiles of rows, columns and matches give what one big tile gives."""
    x, e = draw(7, 9, 5, 300, 6)
    masks = dict(zip(("x_mask", "e_mask"), some_masks(x, e), strict=True))
    whole = value_and_grads(lambda x, e: hard_similarity(x, e, **masks), (x, e))
    monkeypatch.setattr(match, "COLUMNS", (8, 8))
    monkeypatch.setattr(match, "ROWS", (8, 8))
    monkeypatch.setattr(match, "MATCHES", (32, 32))
    assert_close(value_and_grads(lambda x, e: hard_similarity(x, e, **masks), (x, e)), whole, 1e-12)


@pytest.mark.parametrize("pool", ["lse", "sum", "mean"])
def test_gradcheck(pool):
    x, e = (t.requires_grad_() for t in draw(3, 2, 4, 5, 3))
    masks = dict(zip(("x_mask", "e_mask"), some_masks(x, e), strict=True))
    assert torch.autograd.gradcheck(lambda x, e: hard_similarity(x, e, pool=pool, pool_scale=2.0, **masks), (x, e))


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.24, 0.25, 4.0, 50.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_scale_of_the_pooling(dtype, scale):
    """Value and gradients, also of tokens that are equally similar: each of them has half of the weight."""
    x, e = draw(3, 4, 20, 9, 16)
    x[:, 1] = x[:, 0]
    x, e = x.float().double(), e.float().double()
    kwargs = dict(zip(("x_mask", "e_mask"), some_masks(x, e), strict=True)) | {"pool_scale": scale}
    exact = value_and_grads(lambda x, e: hard_similarity_reference(x, e, **kwargs), (x, e))
    got = value_and_grads(lambda x, e: hard_similarity(x, e, **kwargs), (x.to(dtype), e.to(dtype)))
    # float64: what the reference loses, log P / scale and scale cos. float32: cosines, times the scale in the weights.
    tolerance = 1e-15 * max(1 / scale, scale, 100) if dtype == torch.float64 else 2e-6 + 3e-8 * min(scale, 200)
    assert_close(got, exact, tolerance)


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e-12, 1e12, 1e30, 1e39])
def test_scales_beyond_all_digits_are_the_limits(scale):
    x, e = draw(2, 3, 5, 4, 6, torch.float32)
    if scale > 1:
        limit = module.unit_rows(x) @ module.unit_rows(e).flatten(0, 1).T  # [i, l, j k]
        torch.testing.assert_close(hard_similarity(x, e, pool_scale=scale), limit.view(2, 5, 3, 4).amax((1, 3)))
    else:
        units = [module.UnitTokens(module.unit_rows(t), None, None) for t in (x, e)]
        got = value_and_grads(
            lambda x, e: module.unit_similarity(
                units[0]._replace(rows=x), units[1]._replace(rows=e), pool="log_mean", pool_scale=scale, backend="torch"
            ),
            [t.rows for t in units],
        )
        means = value_and_grads(
            lambda x, e: module.unit_similarity(
                units[0]._replace(rows=x), units[1]._replace(rows=e), pool="mean", pool_scale=1.0, backend="torch"
            ),
            [t.rows for t in units],
        )
        assert_close(got, means, 1e-6)


def test_ties_go_to_the_lowest_k():
    x = torch.tensor([[[1.0, 0.0]]])
    e = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [2.0, 0.0]]])
    _, _, de = value_and_grads(lambda x, e: hard_similarity(x, e), (x, e + torch.tensor([0.0, 0.5])), torch.ones(1, 1))
    assert de[0, 1].abs().sum() > 0
    assert de[0, 2].abs().sum() == 0
    assert de[0, 0].abs().sum() == 0


def test_no_gradient_needed_saves_nothing():
    x, e = draw(2, 2, 3, 4, 5)
    _, weights, winners = module.hard_similarity_op(x, e, None, None, "lse", 1.0, False, "torch")
    assert weights.numel() == winners.numel() == 0
    _, weights, winners = module.hard_similarity_op(x, e, None, None, "lse", 1.0, True, "torch")
    assert winners.dtype == torch.int16
    assert winners.shape == weights.shape == (2, 2, 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, dtype=weights.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pool", ["lse", "mean"])
def test_error_budget(dtype, pool):
    """Inputs without two candidates so close that rounding in `dtype` could swap the winner."""
    torch.manual_seed(1)
    inputs = draw(4, 3, 9, 11, 32, torch.float32)

    ours, plain = (partial(fn, pool=pool) for fn in (hard_similarity, hard_similarity_reference))
    assert_function_within_budget(ours, plain, inputs, dtype)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_properties(Bx, Be, P, Q, seed):
    torch.manual_seed(seed)
    x, e = draw(Bx, Be, P, Q, 4)
    x_mask, e_mask = some_masks(x, e)
    sim, dx, de = value_and_grads(lambda x, e: hard_similarity(x, e, x_mask=x_mask, e_mask=e_mask), (x, e))
    # Permuting samples permutes rows and columns.
    px, pe = torch.randperm(Bx), torch.randperm(Be)
    permuted = hard_similarity(x[px], e[pe], x_mask=x_mask[px], e_mask=e_mask[pe])
    torch.testing.assert_close(permuted, sim[px][:, pe], rtol=1e-12, atol=1e-12)
    # Cosines do not see the length of a token.
    lengths = torch.rand(Bx, P, 1, dtype=x.dtype) + 0.1
    torch.testing.assert_close(hard_similarity(x * lengths, e, x_mask=x_mask, e_mask=e_mask), sim)
    # What is masked out changes nothing, even NaN, and gets no gradient.
    x2 = x.masked_fill(~x_mask[..., None], torch.nan)
    e2 = e.masked_fill(~e_mask[..., None], torch.nan)
    again = value_and_grads(lambda x, e: hard_similarity(x, e, x_mask=x_mask, e_mask=e_mask), (x2, e2))
    for a, b in zip(again, (sim, dx, de), strict=True):
        assert torch.equal(a, b)
    assert dx[~x_mask].abs().sum() == 0
    assert de[~e_mask].abs().sum() == 0
    # A pair with nothing left has similarity 0.
    assert (sim[~x_mask.any(1)] == 0).all()
    assert (sim[:, ~e_mask.any(1)] == 0).all()


def test_large_pool_scale_tends_to_the_maximum():
    x, e = draw(3, 4, 6, 7, 8)
    best = torch.einsum("ild,jkd->ijlk", x / x.norm(dim=-1, keepdim=True), e / e.norm(dim=-1, keepdim=True)).amax(
        (2, 3)
    )
    errors = [(hard_similarity(x, e, pool_scale=scale) - best).abs().max() for scale in (1.0, 30.0, 1e4)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def test_degenerate_input_is_finite():
    x, e = draw(2, 3, 4, 5, 6, torch.float32)
    x[0], e[1, 2] = 0, 0
    assert_finite(value_and_grads(hard_similarity, (x, e)))
    assert (hard_similarity(x, e, pool="sum")[0] == 0).all()
    huge = value_and_grads(hard_similarity, tuple((t * 3e4).clamp(-65000, 65000).half() for t in (x, e)))
    assert_finite(huge)


def test_nan_shows():
    x, e = draw(2, 3, 4, 5, 6)
    e[1, 2, 0] = torch.nan
    sim = hard_similarity(x, e)
    assert sim[:, 1].isnan().all()
    assert sim[:, [0, 2]].isfinite().all()


SWITCHES = [
    ("", "ieee", "ieee"),
    ("torch.set_float32_matmul_precision('high')", "tf32", "tf32x3"),
    ("torch.set_float32_matmul_precision('medium')", "tf32", "tf32"),
    ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32", "tf32x3"),
    ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32", "tf32x3"),
    ("torch.backends.fp32_precision = 'tf32'", "tf32", "tf32x3"),
]
IMPORTS = """
import warnings
import torch
import benchmarks  # noqa: F401, a checkout that is not installed finds its kernels
from fmfa_losses.kernels._launch import match_precision, precision
"""
PRECISION = """
warnings.simplefilter("error")
x = torch.ones(1)
print(precision(x.dtype), match_precision(x), match_precision(x.half()), match_precision(x.bfloat16()))
"""


def test_the_match_follows_torch():
    """Each in its own process: torch raises where older switches are read after a newer one was set."""
    newer = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    switches = [one for one in SWITCHES if newer or "fp32_precision" not in one[0]]
    printed = forked(IMPORTS, [switch + PRECISION for switch, *_ in switches])
    got = {switch: out.split() for (switch, *_), out in zip(switches, printed, strict=True)}
    assert got == {switch: [products, match, "half", "half"] for switch, products, match in switches}


def test_autocast_does_not_lower_the_precision():
    x, e = draw(2, 2, 3, 4, 16, torch.float32)
    plain = value_and_grads(hard_similarity, (x, e))
    with torch.autocast("cpu", torch.bfloat16):
        cast = value_and_grads(hard_similarity, (x, e))
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


X, E = torch.randn(2, 3, 4), torch.randn(5, 6, 4)
BAD = [
    (lambda: hard_similarity(X[0], E), ValueError, r"x must have shape \[Bx P D\].*\[3, 4\]"),
    (lambda: hard_similarity(X, E[..., :3]), ValueError, "agree in D"),
    (lambda: hard_similarity(X.long(), E), TypeError, "x must be a floating-point tensor, got int64"),
    (lambda: hard_similarity(X, None), TypeError, "e must be a tensor"),
    (lambda: hard_similarity(X[:0], E), ValueError, "must not be empty"),
    (lambda: hard_similarity(X, E, x_mask=torch.ones(2, 3)), TypeError, r"x_mask must be a boolean.*x_mask\.bool"),
    (
        lambda: hard_similarity(X, E, e_mask=torch.ones(2, 6, dtype=torch.bool)),
        ValueError,
        r"e_mask must have shape \[5, 6\]",
    ),
    (lambda: hard_similarity(X, E.to("meta")), ValueError, "on one device"),
    (lambda: hard_similarity(X, E, pool="max"), ValueError, "'lse', 'sum', 'mean', got 'max'"),
    (lambda: hard_similarity(X, E, pool_scale=0.0), ValueError, "pool_scale must be a finite number > 0"),
    (lambda: hard_similarity(X, E, backend="cuda"), ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
