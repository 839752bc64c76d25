"""The kernels of a linear layer with its cross-entropy, through the interpreter: values, gradients, edges, strides."""

import math

import pytest
import torch
from fmfa_losses.kernels import linear_cross_entropy as kernels
from fmfa_losses.kernels import linear_cross_entropy_gradient as gradient
from helpers.budget import assert_within_budget
from helpers.compare import value_and_grads

from benchmarks.budget import relative_error
from fmfa_losses import IRRHead
from fmfa_losses.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

# Rows, classes, width: alone, of one block, and of several; classes of several parts of the forward.
SIZES = [(1, 1, 1), (63, 77, 16), (193, 300, 20), (70, 1100, 5)]


def draw(M, V, D, dtype=torch.float32):
    return torch.randn(M, D).to(dtype), torch.randn(V, D).to(dtype), torch.randn(V).to(dtype)


def some_targets(M, V, ignored=0.4):
    """A few rows do not count (-100), and a whole block of them at the end."""
    targets = torch.where(torch.rand(M) < ignored, -100, torch.randint(V, (M,)))
    targets[M // 2 :] = -100
    targets[0] = V - 1
    return targets


def both(inputs, targets, scale=1.0, **options):
    """Value and gradients by the kernels, twice, by plain PyTorch, and by PyTorch in float64."""

    def of(function, **backend):
        return lambda states, weight, bias=None: scale * function(states, weight, bias, targets, **backend)[0]

    ours = (value_and_grads(of(linear_cross_entropy, backend="triton", **options), inputs) for _ in range(2))
    plain = value_and_grads(of(linear_cross_entropy_reference, **options), inputs)
    exact = value_and_grads(of(linear_cross_entropy_reference, **options), [x.double() for x in inputs])
    return *ours, plain, exact


@pytest.mark.parametrize(("dtype", "biased"), [(torch.float32, False), (torch.float32, True), (torch.float16, True)])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(monkeypatch, size, biased, dtype):
    inputs, targets = draw(*size, dtype)[: 2 + biased], some_targets(size[0], size[1])
    chunks = []
    for columns in (gradient.CHUNK, 1):  # all columns at once, and as few as a chunk may have
        monkeypatch.setattr(gradient, "CHUNK", columns)
        ours, again, plain, exact = both(inputs, targets)
        for index, (a, b, c, d) in enumerate(zip(ours, again, plain, exact, strict=True)):
            assert a.dtype == c.dtype
            # Logits of up to 20 are rounded before exp.
            assert_within_budget(a, c, d, amplification=40, name=f"entry {index}")
            assert torch.equal(a, b)
        chunks.append(ours)
    assert torch.equal(chunks[0][2], chunks[1][2]), "an element of the gradient of weight has one sum, over rows"


def test_improbable_classes_keep_their_gradient_in_half_precision():
    """Probabilities of 8e-7 are far below the least normal number of float16, 6e-5."""
    states, weight, bias = draw(30, 300, 16)
    states, weight, bias = (states / 8).half(), (weight / 8).half().float(), bias - 14
    bias[0] = 0
    targets = torch.zeros(30, dtype=torch.int64)
    statistics = kernels.forward(states, weight, bias, targets, -100)[2]
    dweight = gradient.backward(torch.tensor(1.0), statistics, states, weight, bias, targets, -100, False, True, False)[
        1
    ]
    inputs = states.double(), weight.double(), bias.double()
    exact = value_and_grads(lambda *x: linear_cross_entropy_reference(*x, targets)[0], inputs, torch.tensor(1.0))[2]
    assert relative_error(dweight[1:], exact[1:]) < 2**-11


def test_half_states_with_weights_of_float32_as_autocast_has_them():
    states, weight, bias = draw(65, 300, 24)
    targets = some_targets(65, 300)
    loss, right, statistics = kernels.forward(states.half(), weight, bias, targets, -100)
    rounded = states.half().double(), weight.half().double(), bias.double()
    exact = value_and_grads(lambda *x: linear_cross_entropy_reference(*x, targets)[0], rounded, torch.tensor(1.0))
    assert_within_budget(loss, loss, exact[0], amplification=40)
    assert right == linear_cross_entropy_reference(*rounded, targets)[1]
    one = torch.tensor(1.0)
    got = gradient.backward(one, statistics, states.half(), weight, bias, targets, -100, True, True, True)
    for a, b, dtype in zip(got, exact[1:], (torch.float16, torch.float32, torch.float32), strict=True):
        assert a.dtype == dtype
        assert_within_budget(a, a, b, precision="fp16", amplification=40)
    dweight = got[1]
    assert not torch.equal(dweight, dweight.half().float()), "rounded once, to float32"


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_one_gradient_alone(wanted):
    (states, weight, bias), targets = draw(40, 300, 8), some_targets(40, 300)
    _, _, statistics = kernels.forward(states, weight, bias, targets, -100)
    arguments = (torch.tensor(0.5), statistics, states, weight, bias, targets, -100)
    every, one = gradient.backward(*arguments, True, True, True), gradient.backward(*arguments, *wanted)
    for a, b, asked in zip(one, every, wanted, strict=True):
        assert torch.equal(a, b) if asked else a.numel() == 0


def test_equal_logits_the_first_one_is_the_prediction():
    states, weight = torch.ones(3, 2), torch.zeros(1300, 2)
    for first in (0, 5, 200, 1290):  # in the first tile, a later one, and a later part
        weight.zero_()
        weight[[first, first + 1, 1299]] = 1
        for target in (first, first + 1, 1299):
            _, right, _ = kernels.forward(states, weight, None, torch.full((3,), target), -100)
            assert right == (3 if target == first else 0)


def test_a_row_that_is_nan_is_not_predicted():
    states, weight, _ = draw(2, 300, 4)
    weight[7], states[1] = 100 * states[0], math.nan
    assert linear_cross_entropy(states, weight, None, torch.tensor([7, 0]), backend="triton")[1] == 1


def test_a_class_that_is_no_class_is_nan_and_an_ignored_row_is_nothing():
    states, weight, bias = draw(5, 20, 8)
    for wrong in (-1, 20, 30):
        targets = torch.tensor([3, wrong, -100, 4, -100])
        loss, _, statistics = kernels.forward(states, weight, bias, targets, -100)
        assert loss.isnan()
        dstates, *_ = gradient.backward(
            torch.tensor(1.0), statistics, states, weight, bias, targets, -100, True, True, True
        )
        assert dstates.isnan().any(dim=1).tolist() == [False, True, False, False, False]
        assert not dstates[[2, 4]].any()


@pytest.mark.parametrize("M", [0, 5, 130])
def test_without_a_row_that_counts_all_is_zero(M):
    (states, weight, bias), targets = draw(M, 300, 8), torch.full((M,), 7)
    loss, right, statistics = kernels.forward(states, weight, bias, targets, 7)
    assert loss == right == 0
    arguments = (torch.tensor(1.0), statistics, states, weight, bias, targets, 7)
    for got, like in zip(gradient.backward(*arguments, True, True, True), (states, weight, bias), strict=True):
        assert got.shape == like.shape
        assert not got.any()


def test_what_a_row_behind_the_last_one_that_counts_holds_is_not_read():
    states, weight, bias = draw(140, 300, 8)
    targets = torch.cat([torch.randint(300, (9,)), torch.full((131,), -100)])
    one = torch.tensor(1.0)
    results = []
    for content in (0.0, math.nan):
        states[9:] = content
        loss, right, statistics = kernels.forward(states, weight, bias, targets, -100)
        arguments = (one, statistics, states, weight, bias, targets, -100)
        results.append((loss, right, *gradient.backward(*arguments, True, True, True)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("entry", [math.nan, math.inf])
def test_an_infinite_logit_or_nan_shows(entry):
    states, weight, bias = draw(4, 300, 8)
    targets = torch.tensor([3, 290, 4, 5])
    weight[290, 2] = entry
    loss, right, _ = kernels.forward(states, weight, bias, targets, -100)
    assert loss.isnan()
    if math.isnan(entry):
        assert right == 0


@pytest.mark.parametrize("banned", [290, slice(0, 128)])  # one class, and a whole tile
def test_a_class_with_a_bias_of_minus_infinity_is_never_predicted(banned):
    inputs, targets = draw(4, 300, 8), torch.tensor([3, 200, 4, 290])
    inputs[2][banned] = -math.inf
    loss, right, _ = kernels.forward(*inputs, targets, -100)
    expected, count = linear_cross_entropy_reference(*inputs, targets)
    assert loss == expected == math.inf
    assert right == count
    ours, _, plain, exact = both(inputs, torch.tensor([200, 150, 201, 299]))
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert_within_budget(a, b, c, amplification=40)


def test_an_ignored_class_of_the_vocabulary():
    """As in IRR, where the padding's id is the label of what is not masked."""
    inputs, targets = draw(70, 20, 6), torch.randint(3, (70,))
    ours, _, plain, exact = both(inputs, targets, ignore_index=0)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert_within_budget(a, b, c, amplification=40)


@pytest.mark.parametrize("max_masked", [None, 60])
def test_the_irr_head_is_made_of_them(monkeypatch, max_masked):
    """Labels as on an accelerator: all rows, those that are masked first."""
    head = IRRHead(16, 300, depth=1, num_heads=2, max_masked=max_masked)
    image, text = torch.randn(4, 5, 16), torch.randn(4, 40, 16)
    labels = torch.where(torch.rand(4, 40) < 0.2, torch.randint(1, 300, (4, 40)), 0)
    monkeypatch.setattr("fmfa_losses.heads.irr.on_host", lambda labels: False)
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("FMFA_LOSSES_BACKEND", backend)
        loss, accuracy = head(image, text, labels)
        results.append([loss, accuracy, *torch.autograd.grad(loss, list(head.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_strides():
    states, weight, bias = draw(33, 70, 12)
    targets = some_targets(33, 70)
    strided = states.T.contiguous().T, weight.T.contiguous().T, bias.repeat_interleave(2)[::2]
    for a, b in zip(kernels.forward(states, weight, bias, targets, -100),
                    kernels.forward(*strided, targets.repeat_interleave(2)[::2], -100), strict=True):  # fmt: skip
        assert torch.equal(a, b)
    expanded = torch.randn(1, 12).expand(33, -1), weight, bias[:1].expand(70)
    both_ways = [linear_cross_entropy(*x, targets, backend="triton")[0] for x in (expanded, [y + 0 for y in expanded])]
    assert torch.equal(*both_ways)
