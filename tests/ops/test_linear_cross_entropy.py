"""A linear layer with its cross-entropy: the torch path against the reference, its memory, and torch's view of it."""

import math
import subprocess
import sys

import pytest
import torch
from helpers.budget import assert_within_budget
from helpers.compare import assert_close, value_and_grads
from helpers.errors import explains
from torch._dynamo.testing import CompileCounter
from torch.autograd import gradcheck

from fmfa_losses.ops import linear_cross_entropy as module
from fmfa_losses.ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_backward_op,
    linear_cross_entropy_op,
    linear_cross_entropy_reference,
)

# Rows, classes, width. Where rows are few beside the width, their logits are kept.
SIZES = [(1, 1, 1), (5, 63, 16), (63, 77, 8), (193, 507, 33), (3, 2, 507)]
BLOCKS = [None, (7, 5), (64, 128)]


def draw(M, V, D, dtype=torch.float64):
    return torch.randn(M, D).to(dtype), torch.randn(V, D).to(dtype), torch.randn(V).to(dtype)


def some_targets(M, V):
    targets = torch.where(torch.rand(M) < 0.4, -100, torch.randint(V, (M,)))
    targets[0] = V - 1
    return targets


def of(function, targets, **options):
    return lambda states, weight, bias=None: function(states, weight, bias, targets, **options)[0]


@pytest.fixture(params=["processor", "accelerator"])
def place(request, monkeypatch):
    """On an accelerator the host does not know which rows count; the same operations run here."""
    if request.param == "accelerator":
        monkeypatch.setattr(module, "on_processor", lambda x: False)


@pytest.fixture(params=BLOCKS, ids=str)
def blocks(request, monkeypatch):
    if request.param is not None:
        for name in ("BLOCK", "BLOCK_ON_ACCELERATOR"):
            monkeypatch.setattr(module, name, 1)
        monkeypatch.setattr(module, "ROWS", request.param[0])
        monkeypatch.setattr(module, "COLUMNS", request.param[1])


def test_by_hand():
    states, weight = torch.tensor([[1.0, 0], [0, 2], [3, 3]]), torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    bias, targets = torch.tensor([0.0, 1, -1]), torch.tensor([0, 7, 2])
    rows = [[1.0, 1, 0], None, [3.0, 4, 5]]
    loss = sum(math.log(sum(map(math.exp, z))) - z[t] for z, t in ((rows[0], 0), (rows[2], 2)))
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        got, right = function(states, weight, bias, targets, ignore_index=7)
        torch.testing.assert_close(got, torch.tensor(loss))
        assert right == 2, "of equal logits the first one is the prediction"


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_matches_reference(place, blocks, size, biased):
    inputs, targets = draw(*size)[: 2 + biased], some_targets(size[0], size[1])
    ours, reference = (of(f, targets) for f in (linear_cross_entropy, linear_cross_entropy_reference))
    assert_close(value_and_grads(ours, inputs), value_and_grads(reference, inputs), 1e-12)
    bias = inputs[2] if biased else None
    right, expected = (f(*inputs[:2], bias, targets)[1] for f in (linear_cross_entropy, linear_cross_entropy_reference))
    assert right == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(40, 507, 64), (193, 300, 33)])
def test_error_budget(place, blocks, size, dtype):
    inputs, targets = [x / 2 for x in draw(*size, dtype)], some_targets(size[0], size[1])
    plain, ours = (of(f, targets) for f in (linear_cross_entropy_reference, linear_cross_entropy))
    exact = value_and_grads(plain, [x.double() for x in inputs])
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    for index, (a, b, c) in enumerate(
        zip(value_and_grads(ours, inputs), value_and_grads(plain, inputs), exact, strict=True)
    ):
        assert a.dtype == b.dtype
        assert_within_budget(a, b, c, precision=precision, amplification=20, name=f"entry {index}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_multiplies_in_its_dtype_and_leaves_the_gradient_of_weights_whole(dtype):
    inputs, targets = draw(40, 300, 64, torch.float32), some_targets(40, 300)
    plain, ours = (of(f, targets) for f in (linear_cross_entropy_reference, linear_cross_entropy))
    exact = value_and_grads(plain, [x.double() for x in inputs])
    with torch.autocast("cpu", dtype):
        results = value_and_grads(ours, inputs), value_and_grads(plain, inputs)
    for a, b, c in zip(*results, exact, strict=True):
        assert a.dtype == torch.float32
        assert_within_budget(a, b, c, precision="bf16" if dtype == torch.bfloat16 else "fp16", amplification=20)
    dweight = results[0][2]
    assert not torch.equal(dweight, dweight.to(dtype).float()), "added up and left in float32"
    with torch.autocast("cpu", dtype):
        assert of(linear_cross_entropy, targets)(*(x.double() for x in inputs)).dtype == torch.float64


def test_an_ignored_class_of_the_vocabulary(place, blocks):
    """As in IRR, where the padding's id is the label of what is not masked."""
    inputs, targets = draw(30, 20, 6), torch.randint(3, (30,))
    ours, reference = (of(f, targets, ignore_index=0) for f in (linear_cross_entropy, linear_cross_entropy_reference))
    assert_close(value_and_grads(ours, inputs), value_and_grads(reference, inputs), 1e-12)


def test_gradients(place, blocks):
    inputs = [x.requires_grad_() for x in draw(6, 9, 5)]
    targets = torch.tensor([3, -100, 8, 0, -100, 3])
    assert gradcheck(of(linear_cross_entropy, targets), inputs)
    assert gradcheck(of(linear_cross_entropy, targets), inputs[:2])
    for asked in range(3):
        some = [x if n == asked else x.detach() for n, x in enumerate(inputs)]
        assert gradcheck(of(linear_cross_entropy, targets), some)


def test_improbable_classes_keep_their_gradient_in_half_precision(place):
    """Probabilities of 8e-7 are far below the least normal number of float16, 6e-5."""
    states, weight, bias = draw(30, 300, 16, torch.float32)
    states, weight, bias = (states / 8).half(), (weight / 8).half(), bias - 14
    bias[0] = 0
    inputs, targets = (states, weight, bias.half()), torch.zeros(30, dtype=torch.int64)
    scaled = lambda f: lambda *x: 65536 * of(f, targets)(*x)  # noqa: E731, as a GradScaler does
    exact = value_and_grads(scaled(linear_cross_entropy_reference), [x.double() for x in inputs])
    got = value_and_grads(scaled(linear_cross_entropy), inputs)
    for a, b in zip(got[2:], exact[2:], strict=True):
        assert (a[1:].double() - b[1:]).norm() < 2**-10 * b[1:].norm()


def test_a_word_of_many_rows_has_a_gradient_in_half_precision(place):
    """Times the factor of the logits' gradient, the sum over its 400 rows is beyond the largest number of float16."""
    states, weight, bias = draw(500, 300, 16, torch.float32)
    states, weight, targets = (2 + states / 8).half(), (weight / 8).half(), torch.arange(500).sub(399).clamp(min=0)
    exact = value_and_grads(of(linear_cross_entropy_reference, targets), [x.double() for x in (states, weight, bias)])
    got = value_and_grads(of(linear_cross_entropy, targets), (states, weight, bias.half()))
    for a, b in zip(got[1:], exact[1:], strict=True):
        assert (a.double() - b).norm() < 2**-10 * b.norm()


def test_large_logits_of_rows_that_do_not_count_are_nothing(place, blocks):
    """exp(z) of them overflows in float32."""
    for M in (4, 30):  # with logits that are kept, and made again
        states, weight, bias = draw(M, 20, 8, torch.float32)
        states[1::2] *= 1e3
        targets = torch.arange(M) % 20
        targets[1::2] = -100
        got, exact = (
            value_and_grads(of(f, targets), [x.to(dtype) for x in (states, weight, bias)])
            for f, dtype in ((linear_cross_entropy, torch.float32), (linear_cross_entropy_reference, torch.float64))
        )
        assert_close(got, exact, 1e-5)


@pytest.mark.parametrize("entry", [math.nan, math.inf, -math.inf])
def test_edges_are_those_of_the_reference(place, blocks, entry):
    states, weight, bias = draw(8, 40, 8)
    for targets in (torch.arange(8), torch.arange(8) + 30):
        for column in (0, 33, 39, slice(5)):  # one of many, and a whole block
            bias_, states_ = bias.clone(), states.clone()
            bias_[column] = entry
            states_[2, 3] = entry if entry > 0 else states_[2, 3]
            got, expected = (
                value_and_grads(of(f, targets), (states_, weight, bias_))
                for f in (linear_cross_entropy, linear_cross_entropy_reference)
            )
            torch.testing.assert_close(got[0], expected[0], equal_nan=True)
            if entry < 0:  # a class that nobody predicts; NaN is spread otherwise where the loss is NaN already
                torch.testing.assert_close(got[1:], expected[1:], equal_nan=True)


@pytest.mark.parametrize("M", [0, 1, 9])
def test_without_a_row_that_counts_all_is_zero(place, blocks, M):
    states, weight, bias = (x.requires_grad_() for x in draw(M, 20, 4))
    loss, right = module.summed_cross_entropy(states, weight, bias, torch.full((M,), 3), 3)
    assert loss == right == 0
    for gradient in torch.autograd.grad(loss, (states, weight, bias)):
        assert not gradient.any()


def test_a_class_that_is_no_class_is_nan(place, blocks):
    states, weight, bias = (x.requires_grad_() for x in draw(5, 20, 8))
    for wrong in (-1, 20, 30):
        loss, _ = linear_cross_entropy(states, weight, bias, torch.tensor([3, wrong, -100, 4, -100]))
        assert loss.isnan()
        (dstates,) = torch.autograd.grad(loss, states)
        assert dstates.isnan().any(dim=1).tolist() == [False, True, False, False, False]


def test_the_first_of_equal_logits_is_the_prediction(place, blocks):
    states, weight = torch.ones(1, 2), torch.zeros(300, 2)
    weight[[4, 5, 299]] = 1
    right = [int(linear_cross_entropy(states, weight, None, torch.tensor([t]))[1]) for t in (4, 5, 299)]
    assert right == [1, 0, 0]


def test_a_row_that_is_nan_is_not_predicted(place, blocks):
    states, weight, _ = draw(2, 300, 4)
    weight[7], states[1] = 100 * states[0], math.nan
    assert linear_cross_entropy(states, weight, None, torch.tensor([7, 0]))[1] == 1


def test_a_backward_under_autocast_multiplies_as_the_forward_did(place):
    states, weight, _ = draw(30, 77, 8, torch.float16)
    leaves, targets, gradients = [states.requires_grad_(), weight.requires_grad_()], some_targets(30, 77), []
    for enabled in (False, True):
        loss = of(linear_cross_entropy, targets)(*leaves)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(loss, leaves))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("size", [(3, 77, 12), (20, 77, 12)])
def test_strides_and_poisoned_memory(monkeypatch, place, blocks, size):
    states, weight, bias = draw(*size, torch.float32)
    targets = some_targets(*size[:2])
    expected = value_and_grads(of(linear_cross_entropy, targets), (states, weight, bias))
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = new_empty(self, *args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    strided = states.T.contiguous().T, weight.T.contiguous().T, bias.repeat_interleave(2)[::2]
    for inputs in ((states, weight, bias), strided):
        leaves = [x.detach().requires_grad_() for x in inputs]
        loss = of(linear_cross_entropy, targets)(*leaves)
        got = torch.autograd.grad(loss, leaves, torch.tensor(-1.0))
        assert all(x.isfinite().all() for x in got)
        assert_close([loss.detach(), *got], expected, 1e-6)
        assert got[1].is_contiguous(), "as the optimizer wants it"


def test_the_same_bits_twice():
    inputs, targets = draw(300, 2000, 64, torch.float32), some_targets(300, 2000)
    first, second = (value_and_grads(of(linear_cross_entropy, targets), inputs) for _ in range(2))
    assert all(map(torch.equal, first, second))


def saved(M, V, D):
    """Numbers that are kept for the backward, besides the inputs."""
    inputs, kept = [x.requires_grad_() for x in draw(M, V, D, torch.float32)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear_cross_entropy(*inputs, torch.randint(V, (M,)))
    return sum(x.numel() for x in kept if not any(x.data_ptr() == y.data_ptr() for y in inputs))


def test_logits_are_kept_of_a_few_rows_alone():
    assert saved(13, 300, 16) == 13 + 2 * 13  # targets, and two numbers a row
    assert saved(12, 300, 16) == 12 + 2 * 12 + 12 * 300


def test_memory_is_a_block():
    """4928 rows and 49408 classes: logits of 929 MiB."""
    code = """
import torch
from benchmarks.measure import peak_process_bytes
from fmfa_losses.ops.linear_cross_entropy import linear_cross_entropy
def step(M, V):
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((M, 16), (V, 16), (V,))]
    loss, _ = linear_cross_entropy(*inputs, torch.randint(V, (M,)))
    loss.backward()
step(600, 2000)
before = peak_process_bytes()
step(4928, 49408)
print((peak_process_bytes() - before) / 2**20)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert grown < 40  # weights, their gradient, states: 10 MiB; a few blocks of 1 MiB


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_opcheck(keep, biased):
    states, weight, bias = (x.requires_grad_() for x in draw(4, 9, 6, torch.float32))
    arguments = (states, weight, bias if biased else None, torch.tensor([3, 8, 0, 5]), -100, keep, False, "torch")
    torch.library.opcheck(linear_cross_entropy_op, arguments)
    loss, _, *kept = (x.detach() for x in linear_cross_entropy_op(*arguments))
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments[:4]]
    for wanted in ((True, True, biased), (True, False, False)):
        backward = (torch.ones_like(loss), *kept, *detached, -100, *wanted, "torch")
        torch.library.opcheck(linear_cross_entropy_backward_op, backward)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals, by version
def test_compiled(dynamic):
    torch._dynamo.reset()
    f = lambda *x: linear_cross_entropy(*x)[0]  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for M in (5, 40):
        inputs, targets = draw(M, 30, 16, torch.float32), some_targets(M, 30)
        got, expected = (value_and_grads(lambda *x, g=g: g(*x, targets), inputs) for g in (compiled, f))  # noqa: B023
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore")
def test_few_rows_and_many_are_compiled_once():
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(lambda *x: linear_cross_entropy(*x)[0], fullgraph=True, dynamic=True, backend=graphs)
    for M in (5, 13, 40):  # of the first one eager code keeps the logits
        inputs = [x.requires_grad_() for x in draw(M, 30, 16, torch.float32)]
        compiled(*inputs, some_targets(M, 30))
    assert graphs.frame_count == 1


def test_second_derivatives_are_refused():
    states, weight, bias = (x.requires_grad_() for x in draw(4, 9, 6))
    loss, _ = linear_cross_entropy(states, weight, bias, torch.tensor([3, 8, 0, 5]))
    (gradient,) = torch.autograd.grad(loss, states, create_graph=True)
    with explains(RuntimeError, "linear_cross_entropy is differentiable once", "second derivative", "create_graph"):
        gradient.square().sum().backward()


def test_inputs_that_do_not_fit():
    states, weight, bias = draw(4, 9, 6)
    targets = torch.zeros(4, dtype=torch.int64)
    with explains(ValueError, "states and weight must agree in D", "[4, 5]", None):
        linear_cross_entropy(states[:, :5], weight, bias, targets)
    with explains(ValueError, "weight and bias must agree in V", "[8]", None):
        linear_cross_entropy(states, weight, bias[:8], targets)
    with explains(ValueError, "targets must have shape [4]", "[3]", None):
        linear_cross_entropy(states, weight, bias, targets[:3])
    with explains(TypeError, "targets must be an integer", "float64", None):
        linear_cross_entropy(states, weight, bias, targets.double())
    with explains(TypeError, "states and weight must have one dtype", "float32", "states.to(weight.dtype)"):
        linear_cross_entropy(states.float(), weight, bias, targets)
    with explains(TypeError, "bias and weight must have one dtype", "float32", "bias.to(weight.dtype)"):
        linear_cross_entropy(states, weight, bias.float(), targets)
    with torch.autocast("cpu", torch.bfloat16), explains(TypeError, "autocast makes one", "float64", "call states.to"):
        linear_cross_entropy(states, weight.float(), bias.float(), targets)
    for wrong, error in ((0.5, ValueError), (None, TypeError), (True, TypeError)):
        with explains(error, "ignore_index must be an integer", repr(wrong), None):
            linear_cross_entropy(states, weight, bias, targets, ignore_index=wrong)
    with explains(ValueError, "states and weight must be on one device", "meta", None):
        linear_cross_entropy(states, weight.to("meta"), bias, targets)
