"""What PyTorch can ask of a loss is right or one clear error: torch.func, forward mode, compiled, inside autocast.

Plain reverse mode, which the other tests compare with equations and finite differences, is the measure here.
"""

import contextlib

import pytest
import torch
from helpers.errors import explains
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from fmfa_losses import IDHead
from fmfa_losses.compat import fmfa, rde
from fmfa_losses.compat.released import released_efa
from fmfa_losses.functional import (
    asdm_loss,
    cmpm_loss,
    efa_loss,
    hard_similarity,
    id_loss,
    itc_loss,
    itc_loss_from_scores,
    sdm_loss,
    sdm_loss_from_scores,
    sigmoid_loss,
    sparse_aggregate,
    tal_loss,
    triplet_loss,
    trl_loss,
)
from fmfa_losses.ops.linear_cross_entropy import linear_cross_entropy
from fmfa_losses.ops.precision import product, product_op, unit_rows

# PyTorch's forward mode loads decompositions that are scripted, which it deprecates itself.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")

B, N, L, D = 4, 5, 3, 6
PIDS = torch.tensor([0, 1, 2, 1])
DIFFERENT = torch.arange(B)  # TAL and TRL weigh several positives by constants, which no second derivative sees
MASK = torch.tensor([[True, True, False], [True] * 3, [False] * 3, [True, False, False]])


HEAD = IDHead(D, 3).double()

# (image, text) -> scalar; tokens [B, N, D] and [B, L, D] for those of TOKENS, features [B, D] otherwise.
TWICE = {
    "cmpm": lambda x, y: cmpm_loss(x, y, PIDS),
    "tal": lambda x, y: tal_loss(x, y, DIFFERENT, temperature=0.5),
    "trl": lambda x, y: trl_loss(x, y, DIFFERENT),
    "triplet": lambda x, y: triplet_loss(x, y, PIDS),
    "sigmoid": lambda x, y: sigmoid_loss(x, y, PIDS, logit_scale=4.0),
    "sdm_from_scores": lambda x, y: sdm_loss_from_scores(product(x, y), PIDS, temperature=0.5),
    "itc_from_scores": lambda x, y: itc_loss_from_scores(product(x, y), temperature=0.5),
    "id_loss": lambda x, y: id_loss(x, y, PIDS),
    "id head": lambda x, y: HEAD(x, y, PIDS).loss,
    "fmfa with image ids": lambda x, y: fmfa.compute_sdm(x, y, PIDS, 4.0, image_id=DIFFERENT, use_weight=True),
    "rde": lambda x, y: sum(rde.compute_rbs(x, y, 2 * x, y, DIFFERENT, torch.ones(B), tau=0.5)),
}
ONCE = {
    "asdm": lambda x, y: asdm_loss(x, y, PIDS, temperature=0.5),
    "sdm": lambda x, y: sdm_loss(x, y, PIDS, temperature=0.5),
    "itc": lambda x, y: itc_loss(x, y, logit_scale=4.0),
    "linear_cross_entropy": lambda x, y: linear_cross_entropy(x, y, None, PIDS)[0],
}
TOKENS = {
    "sparse_aggregate": lambda x, y: sparse_aggregate(x, y).square().sum(),
    "hard_similarity": lambda x, y: hard_similarity(x, y).square().sum(),
    "efa": lambda x, y: efa_loss(x, y),
    "efa masked": lambda x, y: efa_loss(x, y, text_mask=MASK),
    "efa released": released_efa,
    "fmfa alignment": lambda x, y: fmfa.compute_minmax_info_loss(y, x, y + 1),
}
LOSSES = {**TWICE, **ONCE, **TOKENS}
REFUSED = "differentiable once and in reverse mode, got a tangent"


def draw(name, dtype=torch.float64):
    shapes = ((B, N, D), (B, L, D)) if name in TOKENS else ((B, D), (B, D))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def reverse(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LOSSES)
def test_first_derivatives_by_torch_func(name):
    x, y = draw(name)
    f = lambda x: LOSSES[name](x, y)  # noqa: E731
    expected = reverse(f, x)
    close(grad(f)(x), expected)
    close(grad(lambda y: LOSSES[name](x, y))(y), reverse(lambda y: LOSSES[name](x, y), y))
    value, pull = vjp(f, x)
    close(value, f(x))
    close(pull(torch.full_like(value, 2.0))[0], 2 * expected)
    close(jacrev(lambda x: torch.stack([f(x), 3 * f(x)]))(x), torch.stack([expected, 3 * expected]))


@pytest.mark.parametrize("name", LOSSES)
def test_vmap_over_problems(name):
    x, y = draw(name)
    f = lambda x: LOSSES[name](x, y)  # noqa: E731
    both = torch.stack([x, draw(name)[0]])
    values, gradients = torch.stack([f(x) for x in both]), torch.stack([reverse(f, x) for x in both])
    close(vmap(f)(both), values)
    close(vmap(grad(f))(both), gradients)
    close(grad(lambda both: vmap(f)(both).sum())(both), gradients)
    close(reverse(lambda both: vmap(f)(both).sum(), both), gradients)


def test_vmap_over_ids_masks_and_scales():
    x, y = draw("asdm")
    tokens, words = draw("efa")
    cases = (
        (lambda pids: asdm_loss(x, y, pids, image_ids=pids, reduction="none"), torch.stack([PIDS, DIFFERENT])),
        (lambda pids: tal_loss(x, y, pids), torch.stack([PIDS, DIFFERENT])),
        (lambda scale: itc_loss(x, y, logit_scale=scale), torch.tensor([2.0, 3.0])),
        (lambda mask: efa_loss(tokens, words, text_mask=mask), torch.stack([MASK, MASK.roll(1, 0)])),
        (lambda mask: hard_similarity(words, tokens, x_mask=mask), torch.stack([MASK, MASK.roll(1, 0)])),
    )
    for f, inputs in cases:
        close(vmap(f)(inputs), torch.stack([f(one) for one in inputs]))


def dual(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


def forward_mode(f, x, v):
    """Every way to a tangent."""
    return (
        lambda: jvp(f, (x,), (v,))[1],
        lambda: dual(f, x, v),
        lambda: dual(f, x.clone().requires_grad_(), v),
        lambda: (jacfwd(f)(x) * v).sum(),
    )


@pytest.mark.parametrize("name", TWICE)
def test_forward_mode_is_right(name):
    x, y = draw(name)
    f, v = lambda x: TWICE[name](x, y), torch.randn_like(x)
    for tangent in forward_mode(f, x, v):
        close(tangent(), (reverse(f, x) * v).sum())
    other = lambda y: TWICE[name](x, y)  # noqa: E731
    close(jvp(other, (y,), (v,))[1], (reverse(other, y) * v).sum())


@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives_by_torch_func(name):
    x, y = draw(name)
    f, v = lambda x: TWICE[name](x, y), torch.randn_like(x)
    expected = torch.autograd.functional.hvp(f, x, v)[1]  # reverse over reverse
    close((hessian(f)(x) * v).sum((-2, -1)), expected)
    close(grad(lambda x: (grad(f)(x) * v).sum())(x), expected)
    close(jvp(grad(f), (x,), (v,))[1], expected)
    close(grad(lambda x: jvp(f, (x,), (v,))[1])(x), expected)


@pytest.mark.parametrize("name", {**ONCE, **TOKENS})
def test_forward_mode_is_refused(name):
    x, y = draw(name)
    f, v = lambda x: LOSSES[name](x, y), torch.randn_like(x)
    for tangent in forward_mode(f, x, v):
        with pytest.raises(RuntimeError, match=REFUSED):
            tangent()


@pytest.mark.parametrize("name", {**ONCE, **TOKENS})
def test_second_derivatives_by_torch_func_are_refused(name):
    x, y = draw(name)
    f, v = lambda x: LOSSES[name](x, y), torch.randn_like(x)
    for derivative in (
        lambda: hessian(f)(x),
        lambda: jvp(grad(f), (x,), (v,)),
        lambda: grad(lambda x: jvp(f, (x,), (v,))[1])(x),
    ):
        with pytest.raises(RuntimeError, match=REFUSED):
            derivative()
    with explains(RuntimeError, "differentiable once", "second derivative", "create_graph"):
        grad(lambda x: (grad(f)(x) * v).sum())(x)


def test_a_tangent_of_the_scale_counts():
    x, y = draw("itc")
    with pytest.raises(RuntimeError, match=REFUSED):
        jvp(lambda s: itc_loss(x, y, logit_scale=s), (torch.tensor(2.0),), (torch.tensor(1.0),))


COMPILED = [name for name in LOSSES if name != "id head"]  # its look at the labels breaks the graph


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals, by version
def test_compiled(name):
    torch._dynamo.reset()
    x, y = draw(name)
    f, v = lambda x: LOSSES[name](x, y), torch.randn_like(x)
    compiled = lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)  # noqa: E731
    expected = reverse(f, x)
    close(compiled(grad(f))(x), expected)
    for tangent in (lambda: compiled(lambda x, v: jvp(f, (x,), (v,))[1])(x, v), lambda: dual(compiled(f), x, v)):
        if name in TWICE:
            close(tangent(), (expected * v).sum())
        else:
            with pytest.raises(RuntimeError, match=REFUSED):
                tangent()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals, by version
def test_unit_rows_with_a_zero_vector(masked):
    mask = torch.tensor([True, False, True, True]) if masked else None
    x, weights = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    x[0, 2] = 0
    f = lambda x: (unit_rows(x, mask) * weights).sum()  # noqa: E731
    expected, v = reverse(f, x), torch.randn_like(x)
    assert torch.equal(expected[0, 2], weights[0, 2])
    for gradient in (grad, jacfwd, jacrev):
        close(gradient(f)(x), expected)
    close(jvp(f, (x,), (v,))[1], (expected * v).sum())
    torch._dynamo.reset()
    close(torch.compile(grad(f), backend="aot_eager", fullgraph=True)(x), expected)


@pytest.mark.parametrize("shapes", [((4, 3), (5, 3)), ((2, 4, 3), (2, 5, 3))])
def test_product(shapes):
    a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.equal(product(a, b), a @ b.mT)
    assert gradcheck(product, (a, b), check_forward_ad=True)
    assert gradgradcheck(product, (a, b), check_fwd_over_rev=True, check_rev_over_rev=True)
    torch.library.opcheck(product_op, (a, b))
    torch.library.opcheck(product_op, (a.detach().mT.contiguous().mT.requires_grad_(), b))


HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # the roundings of half precision
# The products of two run in what autocast chooses.
EAGER = [name for name in LOSSES if name not in ("id head", "linear_cross_entropy")]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", EAGER)
@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals, by version
def test_gradients_keep_their_precision_under_autocast(name, compiled, dtype):
    """The loss is computed under autocast; its backward runs outside, as it should, or inside, as it often does."""
    inputs = draw(name, torch.float32)
    exact = LOSSES[name](*(leaves := [x.double().requires_grad_() for x in inputs]))
    expected = torch.autograd.grad(exact, leaves)
    loss = LOSSES[name]
    if compiled:
        torch._dynamo.reset()
        loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for inside in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", dtype):
            value = loss(*leaves)
        assert value.dtype == torch.float32
        with torch.autocast("cpu", dtype) if inside else contextlib.nullcontext():
            (value * 65536).backward()  # a GradScaler's: float16 would overflow
        for leaf, gradient in zip(leaves, expected, strict=True):
            error = (leaf.grad.double() / 65536 - gradient).norm() / gradient.norm()
            assert error < HALF[dtype] / 64, f"backward {'inside' if inside else 'outside'}"


def test_second_derivatives_keep_their_precision_inside_autocast():
    inputs = draw("tal", torch.float32)

    def penalty(leaves):
        value = TWICE["tal"](*leaves)
        gradients = torch.autograd.grad(value, leaves, create_graph=True)
        return torch.autograd.grad(value + sum(g.square().sum() for g in gradients), leaves)

    expected = penalty([x.double().requires_grad_() for x in inputs])
    with torch.autocast("cpu", torch.bfloat16):
        actual = penalty([x.clone().requires_grad_() for x in inputs])
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e).norm() < 1e-5 * e.norm()
