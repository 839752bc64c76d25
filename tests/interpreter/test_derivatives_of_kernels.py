"""The kernels under torch.func and forward mode: right, or the same clear error as the torch path."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

from fmfa_losses.functional import asdm_loss, efa_loss, hard_similarity, itc_loss, sparse_aggregate

# PyTorch's forward mode loads decompositions that are scripted, which it deprecates itself.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")

LOSSES = {
    "asdm": lambda x, y, backend: asdm_loss(
        x[:, 0], y[:, 0], torch.tensor([0, 1, 0]), temperature=0.5, backend=backend
    ),
    "itc": lambda x, y, backend: itc_loss(x[:, 0], y[:, 0], logit_scale=4.0, backend=backend),
    "efa": lambda x, y, backend: efa_loss(x, y, backend=backend),
    "hard_similarity": lambda x, y, backend: hard_similarity(x, y, backend=backend).square().sum(),
    "sparse_aggregate": lambda x, y, backend: sparse_aggregate(x, y, backend=backend).square().sum(),
}


@pytest.mark.of_torch
@pytest.mark.parametrize("name", LOSSES)
def test_by_torch_func(name):
    inputs = torch.randn(2, 3, 4, 16)
    y = torch.randn(3, 2, 16)
    f, plain = ((lambda x, backend=backend: LOSSES[name](x, y, backend)) for backend in ("triton", "torch"))
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    first = inputs[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(plain(first), first)
    close(grad(f)(inputs[0]), expected)
    close(jacrev(lambda x: torch.stack([f(x), 3 * f(x)]))(inputs[0]), torch.stack([expected, 3 * expected]))
    close(vmap(grad(f))(inputs), vmap(grad(plain))(inputs))
    close(grad(lambda x: vmap(f)(x).sum())(inputs), vmap(grad(plain))(inputs))


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_and_second_derivatives_are_refused(name):
    x, y = torch.randn(3, 4, 16), torch.randn(3, 2, 16)
    f = lambda x: LOSSES[name](x, y, "triton")  # noqa: E731
    for derivative in (lambda: jvp(f, (x,), (x,)), lambda: hessian(f)(x)):
        with pytest.raises(RuntimeError, match="in reverse mode, got a tangent"):
            derivative()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="in reverse mode, got a tangent"):
        f(forward_ad.make_dual(x, x))
    with pytest.raises(RuntimeError, match="got a second derivative of it"):
        grad(lambda x: grad(f)(x).square().sum())(x)
