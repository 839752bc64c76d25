"""C-ITC and SimCLR against the equations written out as loops; blocks, published code's form, edges, bad input."""

import math
from functools import partial

import pytest
import torch
from helpers.budget import assert_function_within_budget
from helpers.compare import assert_close, assert_finite, value_and_grads
from helpers.errors import explains
from helpers.soft_targets import cosines

from fmfa_losses import CITCLoss, SimCLRLoss
from fmfa_losses.functional import citc_loss, simclr_loss
from fmfa_losses.ops import rows_in_blocks

B, D, SCALE = 7, 5, 4.0
g = torch.Generator().manual_seed(0)
FIRST, SECOND = torch.randn(2, B, D, generator=g, dtype=torch.float64)


def citc(v, t, weights=(0.25, 0.25)):
    """[B], pair by pair."""
    vv, tt, tv = cosines(v, v), cosines(t, t), cosines(t, v)
    rows = []
    for i in range(len(v)):
        terms = [
            weights[0] * (vv[i, j] - tt[i, j]) ** 2 + weights[1] * (tv[i, j] - tv[j, i]) ** 2 for j in range(len(v))
        ]
        rows.append(sum(terms) / len(v))
    return torch.stack(rows)


def simclr(a, b, scale):
    """[B], of all 2 B vectors, each with 2 B - 1 candidates."""
    n, z = len(a), scale * cosines(torch.cat([a, b]), torch.cat([a, b]))
    rows = []
    for i in range(2 * n):
        candidates = [z[i, j].exp() for j in range(2 * n) if j != i]
        rows.append(sum(candidates).log() - z[i, (i + n) % (2 * n)])
    return torch.stack([(rows[i] + rows[i + n]) / 2 for i in range(n)])


CASES = {
    "citc": (citc_loss, citc, (FIRST, SECOND)),
    "citc weights": (partial(citc_loss, lambda1=2.0, lambda2=0.5), partial(citc, weights=(2.0, 0.5)), (FIRST, SECOND)),
    "citc within": (partial(citc_loss, lambda2=0.0), partial(citc, weights=(0.25, 0.0)), (FIRST, SECOND)),
    "simclr": (
        lambda a, b, s, **options: simclr_loss(a, b, logit_scale=s, **options),
        simclr,
        (FIRST, SECOND, torch.tensor(SCALE, dtype=torch.float64)),
    ),
}
EVERY = pytest.mark.parametrize("name", CASES)


@EVERY
def test_value_and_gradients_are_those_of_the_equation(name, monkeypatch):
    ours, plain, inputs = CASES[name]
    expected = value_and_grads(plain, inputs)
    assert_close(value_and_grads(partial(ours, reduction="none"), inputs), expected, 1e-9)
    mean = value_and_grads(lambda *x: plain(*x).mean(), inputs)
    assert_close(value_and_grads(ours, inputs), mean, 1e-9)
    monkeypatch.setattr(rows_in_blocks, "MOST_SCORES", 0)
    monkeypatch.setattr(rows_in_blocks, "BLOCK_SCORES", 2 * 2 * B)
    assert_close(value_and_grads(partial(ours, reduction="none"), inputs), expected, 1e-9)


def test_the_forms_of_published_code():
    """Differences of logits over the squared scale; four matrices, a mask, and cross-entropies."""
    s, (v, t) = 30.0, (torch.nn.functional.normalize(x) for x in (FIRST, SECOND))
    within = (s * v @ v.T - s * t @ t.T).square().mean() / s**2
    across = (s * v @ t.T - s * t @ v.T).square().mean() / s**2
    torch.testing.assert_close(CITCLoss(0.25, 0.75)(FIRST, SECOND), 0.25 * within + 0.75 * across)
    own = torch.zeros(B, B, dtype=torch.float64).fill_diagonal_(-torch.inf)
    labels = torch.arange(B)
    of_a = torch.nn.functional.cross_entropy(torch.cat([v @ t.T, v @ v.T + own], 1) / 0.1, labels)
    of_b = torch.nn.functional.cross_entropy(torch.cat([t @ v.T, t @ t.T + own], 1) / 0.1, labels)
    torch.testing.assert_close(SimCLRLoss()(FIRST, SECOND), (of_a + of_b) / 2)


def test_limits():
    rotation = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    assert CITCLoss(1.0, 0.0)(FIRST, FIRST @ rotation) < 1e-25  # images lie as texts do
    assert CITCLoss()(FIRST, FIRST) < 1e-30
    assert CITCLoss(0.0, 0.0)(FIRST, SECOND) == 0
    exact = math.log(math.e + 2 * (B - 1)) - 1
    assert abs(SimCLRLoss(temperature=1.0)(torch.eye(B), torch.eye(B)).item() - exact) < 1e-6


@pytest.mark.parametrize("loss", [CITCLoss, SimCLRLoss])
def test_degenerate_batches(loss):
    one = value_and_grads(loss(), (FIRST[:1], SECOND[:1]))
    assert one[0].abs() < 1e-30
    assert_close(one[1:], [torch.zeros(1, D, dtype=torch.float64)] * 2, 1e-12)
    zeros, same = torch.zeros(B, D), torch.ones(B, D)
    for pair in ((zeros, SECOND), (zeros, zeros), (same, same)):
        assert_finite(value_and_grads(loss(), pair))
    scale = torch.tensor(100.0, requires_grad=True)
    if loss is SimCLRLoss:
        value = loss()(1e4 * FIRST.float(), SECOND.float(), logit_scale=scale)
        value.backward()
        assert value.isfinite() and scale.grad.isfinite()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_strided_and_expanded_inputs(name, dtype):
    ours, plain, inputs = CASES[name]

    def every_second(x):
        return torch.stack([x, -x], dim=2).flatten(1)[:, ::2]

    assert_function_within_budget(
        lambda a, b: ours(every_second(a), every_second(b), *inputs[2:], reduction="none"),
        lambda a, b: plain(a, b, *inputs[2:]),
        inputs[:2],
        dtype,
        amplification=SCALE,
    )
    one = torch.randn(1, D, dtype=torch.float64)
    expanded = value_and_grads(lambda x: ours(x.expand(B, D), *inputs[1:]), (one,))
    assert_close(expanded, value_and_grads(lambda x: ours(x.repeat(B, 1), *inputs[1:]), (one,)), 1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["citc", "simclr"])
def test_derivatives(name):
    ours, _, inputs = CASES[name]
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(ours, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, leaves)
    torch.testing.assert_close(torch.func.grad(ours)(*inputs), value_and_grads(ours, inputs, torch.ones(()))[1])
    several = torch.stack([FIRST, FIRST.flip(0)])
    batched = torch.vmap(lambda x: ours(x, *inputs[1:]))(several)
    torch.testing.assert_close(batched, torch.stack([ours(x, *inputs[1:]) for x in several]))


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
@pytest.mark.parametrize("name", ["citc", "simclr"])
def test_compiled(name):
    ours, _, inputs = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_close(value_and_grads(compiled, inputs), value_and_grads(ours, inputs), 1e-12)
    torch._dynamo.reset()


def test_sample_weight_and_sum():
    weight = torch.tensor([1.0, 0, 2, 0, 0, 1, 3])
    for loss, plain in ((CITCLoss, citc), (SimCLRLoss, partial(simclr, scale=10.0))):
        rows = plain(FIRST, SECOND)
        got = loss()(FIRST, SECOND, sample_weight=weight)
        torch.testing.assert_close(got, (weight * rows).sum() / weight.sum())
        torch.testing.assert_close(loss(reduction="sum")(FIRST, SECOND), rows.sum())


def test_bad_input():
    with explains(ValueError, ("lambda1", ">= 0"), "-1"):
        CITCLoss(lambda1=-1)
    with explains(ValueError, ("first_view and second_view", "B"), "[4, 5]"):
        SimCLRLoss()(FIRST, SECOND[:4])
    with explains(TypeError, ("first_view", "floating-point"), "int64", ()):
        SimCLRLoss()(FIRST.long(), SECOND)
    with explains(ValueError, ("backend", '"auto"'), ("triton", "no kernel"), '"auto"'):
        CITCLoss(backend="triton")
    with pytest.raises(TypeError):
        CITCLoss()(FIRST, SECOND, torch.arange(B))
