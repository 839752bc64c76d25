"""Rows in blocks: values and derivatives are those of whole matrices, for the engine alone and for every loss on it."""

import pytest
import torch
from helpers.budget import assert_within_budget
from helpers.compare import assert_close
from helpers.every_loss import VARIANTS, Model, another, build, evaluate, gradients, hyperparameters
from helpers.global_batch import batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fmfa_losses import CMPMLoss, SigmoidLoss, TALLoss, TripletLoss
from fmfa_losses.ops import rows_in_blocks
from fmfa_losses.ops.rows_in_blocks import rows_in_blocks as in_blocks

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
B, C, D = 7, 11, 3
# EFA has no rows of global features.
ON_ROWS = [name for name in VARIANTS if not name.startswith("EFALoss")]
EVERY = pytest.mark.parametrize("name", ON_ROWS)


@pytest.fixture
def small_blocks(monkeypatch):
    """Every matrix of more than a few scores is cut into blocks, of two or three rows in what follows."""
    monkeypatch.setattr(rows_in_blocks, "MOST_SCORES", 0)
    monkeypatch.setattr(rows_in_blocks, "BLOCK_SCORES", 3 * C - 1)


def equation(first: int, scores: Tensor, own: Tensor, level: Tensor, scale: Tensor) -> Tensor:
    """Something of everything: the number of a row, what is cut, what is whole, what some blocks do not use."""
    index = torch.arange(first, first + len(scores), dtype=scores.dtype)
    value = (scores + level).logsumexp(dim=1) * own + index * scores[:, 0]
    return value if first > 2 else torch.where(index > 2, value, value * scale)


def inputs(dtype=torch.float64, given: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(B, C)] if given else [(B, D), (C, D)]
    made = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in [*shapes, (B,), (C,), ()]]
    return [x.to(dtype).requires_grad_() for x in made]


def whole(*tensors: Tensor) -> Tensor:
    *factors, own, level, scale = tensors
    scores = factors[0] @ factors[1].T if len(factors) == 2 else factors[0]
    return torch.cat([equation(i, scores[i : i + 1], own[i : i + 1], level, scale) for i in range(B)])


def blocks(*tensors: Tensor) -> Tensor:
    *factors, own, level, scale = tensors
    return in_blocks(equation, tuple(factors), {"own": own}, {"level": level, "scale": scale})


def derivatives(function, tensors: list[Tensor], order: int) -> list[Tensor]:
    weight = torch.linspace(-1, 1, B, dtype=tensors[0].dtype)
    value = function(*tensors)
    first = torch.autograd.grad((weight * value).sum(), tensors, create_graph=order > 1, materialize_grads=True)
    if order == 1:
        return [value, *first]
    second = torch.autograd.grad(sum(x.square().sum() for x in first), tensors, materialize_grads=True)
    return [value, *first, *second]


@pytest.mark.parametrize("given", [False, True], ids=["factors", "scores"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 3, B, 100])
def test_blocks_of_any_size_give_the_same(rows, order, given, monkeypatch):
    monkeypatch.setattr(rows_in_blocks, "BLOCK_SCORES", rows * C)
    tensors = inputs(given=given)
    assert_close(derivatives(blocks, tensors, order), derivatives(whole, tensors, order), 1e-12)


def test_second_derivatives_are_those_of_differences(small_blocks):
    assert torch.autograd.gradcheck(blocks, inputs())
    assert torch.autograd.gradgradcheck(blocks, inputs())


def test_only_what_is_asked_for_is_differentiated(small_blocks):
    for wanted in range(5):
        tensors = [x.detach().requires_grad_(n == wanted) for n, x in enumerate(inputs())]
        (found,) = torch.autograd.grad(blocks(*tensors).sum(), tensors[wanted])
        (expected,) = torch.autograd.grad(whole(*tensors).sum(), tensors[wanted])
        torch.testing.assert_close(found, expected)
    assert not blocks(*(x.detach() for x in inputs())).requires_grad
    with torch.no_grad():
        assert not blocks(*inputs()).requires_grad


def test_strided_expanded_and_batched_gradients(small_blocks):
    queries, keys, own, level, scale = inputs()
    strided = [queries.detach().T.contiguous().T, keys.detach().repeat(1, 2)[:, ::2]]
    expanded = [own.detach()[:1].expand(B), level.detach()[:1].expand(C), scale]
    tensors = [x.requires_grad_() for x in (*strided, *expanded)]
    assert_close(derivatives(blocks, tensors, 1), derivatives(whole, tensors, 1), 1e-12)
    tensors, basis = inputs(), torch.eye(B, dtype=torch.float64)
    found = torch.autograd.grad(blocks(*tensors), tensors, basis, is_grads_batched=True, materialize_grads=True)
    expected = torch.autograd.grad(whole(*tensors), tensors, basis, is_grads_batched=True, materialize_grads=True)
    assert_close([*found], [*expected], 1e-12)


def dependent(function, x: Tensor, scale: Tensor) -> list[Tensor]:
    """Every input of the equation comes from others of its inputs."""
    return function(x, x.repeat(2, 1)[:C] * x[0], x.sum(dim=1), x.repeat(2, 1)[:C, 0] * scale, scale)


def test_inputs_that_come_from_each_other_are_counted_once(small_blocks):
    x, *_, scale = inputs()
    basis = torch.eye(B, dtype=torch.float64)
    for order in (1, 2):
        found, expected = (derivatives(lambda *t, f=f: dependent(f, *t), [x, scale], order) for f in (blocks, whole))
        assert_close(found, expected, 1e-12)
    found, expected = (
        torch.autograd.grad(dependent(f, x, scale), [x, scale], basis, is_grads_batched=True) for f in (blocks, whole)
    )
    assert_close([*found], [*expected], 1e-12)


def test_float32_has_the_error_of_whole_matrices(small_blocks):
    found, plain = (derivatives(f, inputs(torch.float32), 1) for f in (blocks, whole))
    for got, other, exact in zip(found, plain, derivatives(whole, inputs(), 1), strict=True):
        assert_within_budget(got, other, exact)


@EVERY
def test_every_loss_is_the_same_in_blocks(name, monkeypatch):
    data, results = batch(9), []
    for most in (2**22, 0):
        monkeypatch.setattr(rows_in_blocks, "MOST_SCORES", most)
        monkeypatch.setattr(rows_in_blocks, "BLOCK_SCORES", 2 * 9 + 5)
        model = Model()
        value = evaluate(build(name), model, data)
        results.append([value.detach(), gradients(value, model)])
        rows = evaluate(build(name, reduction="none"), model, data)
        results[-1].append(rows.detach())
    assert_close(results[1], results[0], 1e-12)


@EVERY
def test_a_hyperparameter_that_changes_before_the_backward_is_that_of_the_call(name, monkeypatch):
    """As of a schedule that sets the next value while losses are still added up."""
    monkeypatch.setattr(rows_in_blocks, "MOST_SCORES", 0)
    monkeypatch.setattr(rows_in_blocks, "BLOCK_SCORES", 2 * 9 + 5)
    data, model, loss = batch(9), Model(), build(name)
    expected = gradients(evaluate(loss, model, data), model)
    for option in hyperparameters(type(loss)):
        loss = build(name)
        value = evaluate(loss, model, data)
        setattr(loss, option, another(loss, option))
        assert torch.equal(gradients(value, model), expected), option


class Largest(TorchDispatchMode):
    """The most numbers that a result had."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= x.itemsize * x.numel():
                self.numbers = max(self.numbers, x.numel())
        return result


def largest(name: str) -> int:
    data = batch(96)
    model = Model()
    with Largest() as seen:
        gradients(evaluate(build(name), model, data), model)
    return seen.numbers


@pytest.mark.parametrize("name", [name for name in ON_ROWS if "ASDM" not in name])
def test_in_blocks_no_matrix_of_all_scores_exists(name, monkeypatch):
    data = batch(96)
    tokens = max(data["image"].numel(), data["text"].numel())
    assert tokens < 96 * 96 / 2
    monkeypatch.setattr(rows_in_blocks, "MOST_SCORES", 0)
    monkeypatch.setattr(rows_in_blocks, "BLOCK_SCORES", 4 * 96)
    in_blocks = largest(name)
    monkeypatch.setattr(rows_in_blocks, "MOST_SCORES", 2**22)
    assert largest(name) >= 96 * 96  # this is seen
    if not name.startswith(("SDMLoss", "ITCLoss", "RITCLoss")) or "softlabel" in name or "mutual" in name:
        assert in_blocks < 96 * 96 / 2


@pytest.mark.parametrize("pairs", [2048, 2300])
def test_by_itself_a_loss_of_more_than_2048_pairs_takes_blocks(pairs):
    x = torch.randn(pairs, 2, requires_grad=True)
    with Largest() as seen:
        torch.autograd.grad(TripletLoss(negatives="all")(x, x.detach()), x)
    assert (seen.numbers >= pairs**2) == (pairs <= 2048)
    assert seen.numbers < pairs**2 / 2 or pairs <= 2048


@pytest.mark.parametrize("loss", [TALLoss(), CMPMLoss(), SigmoidLoss()])
def test_autocast_checkpointing_and_a_second_run(loss, small_blocks):
    torch.manual_seed(0)
    image, text = (torch.randn(9, 4, requires_grad=True) for _ in range(2))
    pids = torch.arange(9) // 2

    def run(
        forward_autocast: bool = False, backward_autocast: bool = False, checkpointed: bool = False
    ) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=forward_autocast):
            if checkpointed:
                value = checkpoint(loss, image, text, pids, use_reentrant=False)
            else:
                value = loss(image, text, pids)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward_autocast):
            return [value, *torch.autograd.grad(value, [image, text])]

    expected = run()
    for options in ({}, {"forward_autocast": True}, {"backward_autocast": True}, {"checkpointed": True}):
        assert all(torch.equal(a, b) for a, b in zip(run(**options), expected, strict=True)), options


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
def test_what_sees_every_operation_gets_whole_matrices(small_blocks):
    """torch.func, forward mode and torch.compile need operations that they can transform."""
    torch.manual_seed(0)
    image, text, loss, pids = torch.randn(9, 4), torch.randn(9, 4), TALLoss(temperature=0.2), torch.arange(9)
    expected = torch.autograd.functional.jacobian(lambda i: loss(i, text, pids), image)
    torch.testing.assert_close(torch.func.grad(lambda i: loss(i, text, pids))(image), expected)
    tangent = torch.randn(9, 4)
    _, along = torch.func.jvp(lambda i: loss(i, text, pids), (image,), (tangent,))
    torch.testing.assert_close(along, (expected * tangent).sum())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image, text, pids), loss(image, text, pids))
