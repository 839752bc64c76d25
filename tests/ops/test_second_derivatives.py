"""A second derivative is right, where plain PyTorch operations give it for nothing, or an error: never a number."""

import pytest
import torch
from helpers.errors import explains
from torch.autograd import gradgradcheck

from fmfa_losses.functional import (
    asdm_loss,
    cmpm_loss,
    efa_loss,
    hard_similarity,
    itc_loss,
    sdm_loss,
    sigmoid_loss,
    sparse_aggregate,
    tal_loss,
    triplet_loss,
    trl_loss,
)
from fmfa_losses.ops.linear_cross_entropy import linear_cross_entropy
from fmfa_losses.ops.precision import unit_rows

PIDS = torch.tensor([0, 1, 2, 1, 3])
DIFFERENT = torch.arange(5)  # TAL and TRL weigh several positives by constants, which no second derivative sees
TWICE = {
    "cmpm": lambda image, text: cmpm_loss(image, text, PIDS),
    "tal": lambda image, text: tal_loss(image, text, DIFFERENT, temperature=0.5),
    "trl": lambda image, text: trl_loss(image, text, DIFFERENT),
    "triplet": lambda image, text: triplet_loss(image, text, negatives="all"),
    "sigmoid": lambda image, text: sigmoid_loss(image, text, PIDS, logit_scale=4.0),
}
ONCE = {
    "similarity_distribution_loss, asdm": lambda x, y: asdm_loss(x, y, PIDS, temperature=0.5),
    "similarity_distribution_loss, sdm": lambda x, y: sdm_loss(x, y, PIDS, temperature=0.5),
    "similarity_distribution_loss, itc": lambda x, y: itc_loss(x, y, logit_scale=4.0),
    "linear_cross_entropy": lambda x, y: linear_cross_entropy(x, y, None, PIDS)[0],
    "sparse_aggregate": lambda x, y: sparse_aggregate(x[None], y[None]).square().sum(),
    "hard_similarity": lambda x, y: hard_similarity(x[None], y[None]).square().sum(),
    "efa_loss, efa": lambda x, y: efa_loss(x[:, None], y[:, None].expand(-1, 3, -1)),
}


def draw():
    return [torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize("masked", [False, True])
def test_unit_rows(masked):
    mask = torch.tensor([True, False, True, True, False]) if masked else None
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x: unit_rows(x, mask), x)


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_right(name, frozen):
    inputs = draw()
    if frozen is not None:
        inputs[frozen].requires_grad_(False)
    assert gradgradcheck(TWICE[name], inputs)


@pytest.mark.parametrize("name", ONCE)
def test_refused(name):
    loss = ONCE[name]
    x, y = draw()
    (expected,) = torch.autograd.grad(loss(x, y), x)
    (gradient,) = torch.autograd.grad(loss(x, y), x, create_graph=True)
    assert torch.equal(gradient, expected)
    with explains(RuntimeError, "differentiable once", "second derivative", "create_graph") as caught:
        gradient.square().sum().backward()
    assert str(caught.value).split()[0] in name


@pytest.mark.filterwarnings("ignore:Using backward")  # of a cycle between a leaf and its gradient, broken below
@pytest.mark.parametrize("name", ONCE)
def test_create_graph_is_fine(name):
    x, y = draw()
    ONCE[name](x, y).backward(create_graph=True)
    assert x.grad.norm() > 0
    x.grad = y.grad = None
