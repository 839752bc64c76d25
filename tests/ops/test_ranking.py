"""The ranking: four terms of a pair, their edges and gradients, and the operator as torch sees it."""

import math

import pytest
import torch
from helpers.compare import value_and_grads
from helpers.errors import explains
from torch.autograd import gradcheck

from fmfa_losses.ops.ranking import ranking, ranking_backward_op, ranking_op, ranking_reference

PIDS = torch.tensor([0, 1, 0, 2, 1])


def draw(B, dtype=torch.float64):
    return torch.randn(B, B, dtype=dtype), torch.randn(B, B, dtype=dtype)


def by_hand(text, image, pids, margin, scale):
    losses = []
    for i in range(len(text)):
        negatives = [j for j in range(len(text)) if (j != i if pids is None else pids[j] != pids[i])]
        terms = [
            math.log(sum(math.exp((sim[i][j] - sim[i][i] + margin) * scale) for j in negatives)) if negatives else 0.0
            for sim in (text.tolist(), text.T.tolist(), image.tolist(), image.T.tolist())
        ]
        losses.append(sum(terms))
    return torch.tensor(losses, dtype=text.dtype)


@pytest.mark.parametrize("pids", [None, PIDS, torch.zeros(5, dtype=torch.int64)])
@pytest.mark.parametrize("function", [ranking, ranking_reference])
def test_by_hand(function, pids):
    text, image = draw(5)
    expected = by_hand(text, image, pids, 0.3, 4.0)
    torch.testing.assert_close(function(text, image, pids, margin=0.3, logit_scale=4.0), expected)
    scale = torch.tensor(4.0, dtype=torch.float64)
    torch.testing.assert_close(function(text, image, pids, margin=0.3, logit_scale=scale), expected)


@pytest.mark.parametrize("pids", [None, PIDS])
def test_gradients(pids):
    inputs = [x.requires_grad_() for x in (*draw(5), torch.tensor(3.0, dtype=torch.float64))]
    assert gradcheck(lambda text, image, scale: ranking(text, image, pids, margin=0.2, logit_scale=scale), inputs)
    assert gradcheck(lambda text, image: ranking(text, image, pids, margin=0.2, logit_scale=5.0), inputs[:2])


@pytest.mark.parametrize("B", [1, 2, 5])
def test_without_negatives_loss_and_gradient_are_zero(B):
    pids = torch.zeros(B, dtype=torch.int64)
    inputs = (*draw(B, torch.float32), torch.tensor(1e30))
    for value in value_and_grads(lambda t, i, s: ranking(t, i, pids, logit_scale=s), inputs):
        assert not value.any()


def edges():
    """Similarities with entries beyond what their differences or products can hold, and with a sample of nothing."""
    for entry in (math.inf, -math.inf, math.nan, 3e38):
        for i, j in ((1, 1), (1, 2)):
            text, image = draw(5, torch.float32)
            text[i, j] = entry
            yield text, image, 2.0
    text, image = draw(5, torch.float32)
    yield text, image, 1e38  # all but the largest logit vanish
    yield text, image, 3e38  # logits overflow, upwards and downwards


@pytest.mark.parametrize("pids", [None, PIDS])
def test_edges_are_those_of_the_reference(pids):
    small = torch.linspace(-1e-3, 2e-3, 5)  # times a scale of 3e38 a number still
    for text, image, scale in edges():
        run = [
            value_and_grads(lambda t, i: f(t, i, pids, logit_scale=scale), (text, image), small)  # noqa: B023
            for f in (ranking, ranking_reference)
        ]
        for got, expected in zip(*run, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("scale", [3.0, torch.tensor(3.0)])
@pytest.mark.parametrize("pids", [None, PIDS])
def test_opcheck(pids, scale):
    text, image = (x.requires_grad_() for x in draw(5, torch.float32))
    tensor, number = (scale.clone().requires_grad_(), 1.0) if isinstance(scale, torch.Tensor) else (None, scale)
    arguments = (text, image, pids, tensor, 0.1, number, "torch")
    torch.library.opcheck(ranking_op, arguments)
    loss, statistics, moment = (x.detach() for x in ranking_op(*arguments))
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    backward = (torch.ones_like(loss), statistics, moment, *detached[:-1], tensor is not None, "torch")
    torch.library.opcheck(ranking_backward_op, backward)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals, by version
def test_compiled(dynamic):
    torch._dynamo.reset()
    f = lambda text, image, scale: ranking(text, image, PIDS, margin=0.2, logit_scale=scale)  # noqa: E731
    inputs = (*draw(5, torch.float32), torch.tensor(3.0))
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for a, b in zip(value_and_grads(compiled, inputs), value_and_grads(f, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_dtypes():
    text, image = draw(4)
    assert ranking(text.half(), image.half()).dtype == torch.float32
    assert ranking(text.half(), image).dtype == torch.float64
    leaf = text.half().requires_grad_()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    ranking(leaf, image.half(), logit_scale=scale).sum().backward()
    assert leaf.grad.dtype == torch.float16
    assert scale.grad.dtype == torch.float64


def test_inputs_that_do_not_fit():
    text, image = draw(4)
    with explains(ValueError, "text_sim must be square", ("4, 3", "[4, 3]"), "one batch"):
        ranking(text[:, :3], image[:, :3])
    with explains(ValueError, "text_sim and image_sim must agree", "3", None):
        ranking(text, image[:3, :3])
    with pytest.raises(ValueError, match="pids"):
        ranking(text, image, PIDS)
    with pytest.raises(ValueError, match="margin"):
        ranking(text, image, margin=math.inf)
    with pytest.raises(ValueError, match="logit_scale"):
        ranking(text, image, logit_scale=-1.0)


def test_second_derivatives_are_refused():
    text, image = (x.requires_grad_() for x in draw(4))
    (gradient,) = torch.autograd.grad(ranking(text, image).sum(), text, create_graph=True)
    with explains(RuntimeError, "ranking is differentiable once", "second derivative", "create_graph"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("scale", [1e6, 1e37])
def test_equal_negatives_share_the_gradient_at_any_temperature(scale):
    """A log-sum-exp of 1e6 has no digits left for the logarithm of their number."""
    text, image = torch.eye(5).sub(1), torch.eye(5)
    run = lambda t, i: ranking(t, i, logit_scale=scale)  # noqa: E731
    _, dtext, dimage = value_and_grads(run, (text, image), torch.ones(5))
    expected = 0.5 - 2.5 * torch.eye(5)
    torch.testing.assert_close(dtext / scale, expected)
    torch.testing.assert_close(dimage / scale, expected)
