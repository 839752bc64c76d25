"""The ranking kernels through the interpreter: values, gradients, edges, strides, determinism."""

import math

import pytest
import torch
from fmfa_losses.kernels import ranking as kernels
from helpers.budget import assert_within_budget
from helpers.compare import value_and_grads

from fmfa_losses.ops.ranking import ranking, ranking_reference

SIZES = [1, 2, 63, 77, 193]


def draw(B):
    return torch.randn(B, B), torch.randn(B, B)


def identities(B, kind):
    return {"all": None, "some": torch.arange(B) // 2, "one": torch.zeros(B, dtype=torch.int64)}[kind]


@pytest.mark.parametrize("kind", ["all", "some", "one"])
@pytest.mark.parametrize("B", SIZES)
@pytest.mark.parametrize("learned", [False, True])
def test_values_and_gradients(B, kind, learned):
    pids, inputs = identities(B, kind), (*draw(B), torch.tensor(7.0))

    def of(function, **backend):
        def run(text, image, scale=7.0):
            return function(text, image, pids, margin=0.3, logit_scale=scale, **backend)

        return run

    inputs = inputs if learned else inputs[:2]
    exact = value_and_grads(of(ranking_reference), [x.double() for x in inputs])
    plain = value_and_grads(of(ranking_reference), inputs)
    ours = value_and_grads(of(ranking, backend="triton"), inputs)
    again = value_and_grads(of(ranking, backend="triton"), inputs)
    for index, (a, b, c, d) in enumerate(zip(ours, plain, exact, again, strict=True)):
        # Differences of up to 10, times 7, are rounded before exp; the gradient of the scale adds what cancels.
        assert_within_budget(a, b, c, amplification=70, name=f"entry {index}")
        assert torch.equal(a, d)


@pytest.mark.table
@pytest.mark.parametrize("B", [3, 77])
def test_the_gradient_of_a_mean_and_transposed_similarities_are_read_where_they_are(B):
    text, image = draw(B)
    loss, statistics, moment = kernels.forward(text.T, image.T, None, None, 0.1, 2.0)
    mean = torch.full((), 1 / B).expand(B)
    dtext, dimage, dscale = kernels.backward(mean, statistics, moment, text.T, image.T, None, None, 0.1, 2.0, False)
    expected = kernels.forward(text.T.contiguous(), image.T.contiguous(), None, None, 0.1, 2.0)[0]
    assert torch.equal(loss, expected)
    arguments = (statistics, moment, text.T.contiguous(), image.T.contiguous(), None, None, 0.1, 2.0, False)
    again = kernels.backward(mean.contiguous(), *arguments)
    assert torch.equal(dtext, again[0])
    assert torch.equal(dimage, again[1])
    assert dscale.shape == (0,)
    every_second = torch.arange(2.0 * B)[::2]
    assert torch.equal(kernels.backward(every_second, *arguments)[0], kernels.backward(every_second + 0, *arguments)[0])


def edges(B):
    """Entries and scales beyond what differences and products can hold; they are in a later tile, too."""
    for entry in (math.inf, -math.inf, math.nan, 3e38):
        for i, j in ((1, 1), (1, 2)) if B < 9 else ((2, B - 1),):
            text, image = draw(B)
            text[i, j] = entry
            yield text, image, 2.0
    yield *draw(B), 3e38


@pytest.mark.parametrize("kind", ["all", "some"])
@pytest.mark.parametrize("B", [5, 131])
def test_edges_are_those_of_the_reference(B, kind):
    pids, small = identities(B, kind), torch.linspace(-1e-3, 2e-3, B)  # times a scale of 3e38 a number still
    for text, image, scale in edges(B):
        ours, reference = (
            value_and_grads(lambda t, i: f(t, i, pids, logit_scale=scale, **backend), (text, image), small)  # noqa: B023
            for f, backend in ((ranking, {"backend": "triton"}), (ranking_reference, {}))
        )
        for got, expected in zip(ours, reference, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("scale", [1e6, 1e37])
def test_equal_negatives_share_the_gradient_at_any_temperature(scale):
    B = 129
    run = lambda t, i: ranking(t, i, logit_scale=scale, backend="triton")  # noqa: E731
    _, dtext, _ = value_and_grads(run, (torch.eye(B), torch.eye(B)), torch.ones(B))
    torch.testing.assert_close(dtext / scale, 2 / (B - 1) - (2 / (B - 1) + 2) * torch.eye(B))


def test_an_empty_batch():
    empty = torch.empty(0, 0)
    loss, statistics, moment = kernels.forward(empty, empty, None, torch.tensor(2.0), 0.1, 1.0)
    assert loss.shape == moment.shape == (0,)
    dtext, _, dscale = kernels.backward(loss, statistics, moment, empty, empty, None, torch.tensor(2.0), 0.1, 1.0, True)
    assert dtext.shape == (0, 0)
    assert dscale == 0
