"""Linear cross-entropy, and the IRR head that is made of it, on a CUDA device."""

import pytest
import torch
from helpers.compare import value_and_grads
from helpers.gpu import DTYPES, assert_function_within_budget, needs_cuda, needs_memory, waiting_raises

from benchmarks.budget import relative_error
from fmfa_losses import IRRHead
from fmfa_losses.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

pytestmark = needs_cuda

SIZES = [(1, 63, 16), (77, 507, 40), (193, 3000, 512), (600, 49408, 512)]  # rows, classes, width


def draw(M, V, D):
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, D, generator=generator) / D**0.25 for n in (M, V))
    targets = torch.where(torch.rand(M, generator=generator) < 0.5, -100, torch.randint(V, (M,), generator=generator))
    targets[0] = V - 1
    return [states.cuda(), weight.cuda(), torch.randn(V, generator=generator).cuda()], targets.cuda()


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size, precision):
    inputs, targets = draw(*size)
    assert_function_within_budget(
        lambda *x: linear_cross_entropy(*x, targets, backend="triton")[0],
        lambda *x: linear_cross_entropy_reference(*x, targets)[0],
        inputs,
        precision,
        amplification=50,
    )


@pytest.mark.parametrize("size", SIZES[1:])
def test_the_same_bits_twice_and_near_those_of_the_torch_path(size):
    inputs, targets = draw(*size)
    of = lambda backend: lambda *x: linear_cross_entropy(*x, targets, backend=backend)[0]  # noqa: E731
    first, second, torch_path = (value_and_grads(of(backend), inputs) for backend in ("triton", "triton", "torch"))
    for a, b, c in zip(first, second, torch_path, strict=True):
        assert torch.equal(a, b)
        assert relative_error(a, c) < 1e-5


def test_memory_of_all_rows_and_nobody_waits():
    """B 64, L 77: logits of 929 MiB. Beside states, weights and gradients the largest buffer is 64 MiB."""
    needs_memory(4)
    states, weight, bias = (torch.randn(shape, device="cuda") / 8 for shape in ((4928, 512), (49408, 512), (49408,)))
    targets = torch.randint(49408, (4928,), device="cuda")
    leaves = [x.requires_grad_() for x in (states, weight, bias)]

    def step():
        return torch.autograd.grad(linear_cross_entropy(*leaves, targets)[0], leaves)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with waiting_raises():
        gradients = step()
    grown = torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in gradients)
    assert grown < 100e6


@pytest.mark.parametrize("max_masked", [None, 300])
def test_labels_on_the_device_give_the_loss_of_labels_on_the_host(max_masked):
    torch.manual_seed(0)
    head = IRRHead(64, 3000, depth=1, max_masked=max_masked).cuda()
    image, text = torch.randn(8, 20, 64, device="cuda"), torch.randn(8, 50, 64, device="cuda")
    labels = torch.where(torch.rand(8, 50) < 0.3, torch.randint(1, 3000, (8, 50)), 0)
    expected, on_device = head(image, text, labels), labels.cuda()
    with waiting_raises():
        got = head(image, text, on_device)
        got.loss.backward()
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.accuracy, expected.accuracy)
