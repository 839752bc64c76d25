"""EFA's similarities in one operator on the kernels: what the two operators compute one after the other."""

import pytest
import torch
from fmfa_losses.kernels import gather_gradient, match, unit_rows, winner_lists
from helpers.budget import assert_within_budget
from helpers.compare import value_and_grads

from fmfa_losses.functional import efa_loss, hard_similarity, sparse_aggregate
from fmfa_losses.ops.alignment import alignment_backward_op, alignment_op, alignment_similarities

B, N, L, D = 4, 21, 9, 24
PRECISION = {torch.float32: "fp32", torch.float16: "fp16"}


def tokens(dtype=torch.float32, width=D):
    return [torch.randn(B, length, width).to(dtype) for length in (N, L)]


def masks():
    image_mask, text_mask = torch.rand(B, N) > 0.3, torch.rand(B, L) > 0.3
    image_mask[1] = text_mask[2] = False
    return image_mask, text_mask


def one_operator(image_mask=None, text_mask=None, sparsity=None, pool_scale=1.0):
    def similarities(image, text):
        arguments = (image, text, image_mask, text_mask)
        return torch.stack(
            alignment_similarities(*arguments, sparsity=sparsity, pool="lse", pool_scale=pool_scale, backend="triton")
        )

    return similarities


def two_operators(image_mask=None, text_mask=None, sparsity=None, pool_scale=1.0):
    def similarities(image, text):
        joint = sparse_aggregate(image, text, image_mask=image_mask, sparsity=sparsity, backend="torch")
        return torch.stack([
            hard_similarity(x, joint, x_mask=mask, e_mask=text_mask, pool_scale=pool_scale, backend="torch")
            for x, mask in ((text, text_mask), (image, image_mask))
        ])  # fmt: skip

    return similarities


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pool_scale", [1.0, 8.0])
def test_values_and_gradients(dtype, masked, pool_scale):
    options = (*(masks() if masked else (None, None)), None, pool_scale)
    inputs = tokens(dtype)
    exact = value_and_grads(two_operators(*options), [x.double() for x in inputs])
    plain = value_and_grads(two_operators(*options), inputs)
    got = value_and_grads(one_operator(*options), inputs)
    for a, b, c in zip(got, plain, exact, strict=True):
        assert_within_budget(a, b, c, precision=PRECISION[dtype], amplification=8 * pool_scale)


def test_what_the_masks_leave_out_may_hold_anything():
    image_mask, text_mask = masks()
    image, text = tokens()
    clean = value_and_grads(one_operator(image_mask, text_mask), [image, text])
    image[~image_mask], text[~text_mask] = float("nan"), float("inf")
    for a, b in zip(value_and_grads(one_operator(image_mask, text_mask), [image, text]), clean, strict=True):
        assert torch.equal(a, b)


def test_gradients_are_zero_where_the_masks_leave_out():
    image_mask, text_mask = masks()
    _, dimage, dtext = value_and_grads(one_operator(image_mask, text_mask), tokens())
    assert (dimage[~image_mask] == 0).all()
    assert (dtext[~text_mask] == 0).all()


def test_rows_wider_than_one_tile(monkeypatch):
    monkeypatch.setattr(unit_rows, "WIDEST", 64)
    monkeypatch.setattr(match, "COSINE", (32, 64, 1))
    monkeypatch.setattr(winner_lists, "GATHER", (8, 64, 4))
    for key, (own, _, *others) in gather_gradient.DX.items():
        monkeypatch.setitem(gather_gradient.DX, key, (own, 64, *others))
    inputs = [torch.randn(2, length, 150) for length in (5, 3)]
    exact = value_and_grads(two_operators(), [x.double() for x in inputs])
    plain = value_and_grads(two_operators(), inputs)
    for a, b, c in zip(value_and_grads(one_operator(), inputs), plain, exact, strict=True):
        assert_within_budget(a, b, c, amplification=8)


def test_strided_and_expanded_tokens():
    image = torch.randn(N + 1, B, D).permute(1, 0, 2)[:, 1:]
    text = torch.randn(1, L, D).expand(B, L, D)
    got = one_operator()(image, text)
    assert torch.equal(got, one_operator()(image.contiguous(), text.contiguous()))


def test_the_same_bits_twice_and_a_graph_used_twice():
    inputs = [x.requires_grad_() for x in tokens()]
    value = one_operator()(*inputs).sum()
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    second = torch.autograd.grad(value, inputs)
    again = torch.autograd.grad(one_operator()(*inputs).sum(), inputs)
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("which", [0, 1])
def test_one_similarity_alone_has_a_gradient(which):
    inputs = tokens()
    exact = value_and_grads(lambda *x: two_operators()(*x)[which], [x.double() for x in inputs])
    plain = value_and_grads(lambda *x: two_operators()(*x)[which], inputs)
    got = value_and_grads(lambda *x: one_operator()(*x)[which], inputs)
    for a, b, c in zip(got, plain, exact, strict=True):
        assert_within_budget(a, b, c, amplification=8)


def test_no_matches_are_kept_without_a_gradient():
    arguments = (*tokens(), None, None, None, "lse", 1.0)
    assert [alignment_op(*arguments, save)[5].numel() for save in (False, True)] == [0, B * B * L]


@pytest.mark.of_torch
@pytest.mark.parametrize(("dtype", "masked"), [(torch.float32, True), (torch.float16, False)])
def test_opcheck(dtype, masked):
    both = tuple(mask[:2] for mask in masks()) if masked else (None, None)
    inputs = [x[:2].requires_grad_() for x in tokens(dtype)]
    torch.library.opcheck(alignment_op, (*inputs, *both, None, "lse", 1.0, True))
    outputs = alignment_op(*[x.detach() for x in inputs], *both, 0.3, "lse", 1.0, True)
    sims = [torch.ones(2, 2) for _ in range(2)]
    arguments = (*sims, *outputs[2:], *[x.detach() for x in inputs], *both, 0.3, "lse")
    torch.library.opcheck(alignment_backward_op, arguments)


def test_a_second_derivative_raises():
    inputs = [x.requires_grad_() for x in tokens()]
    (gradient, _) = torch.autograd.grad(efa_loss(*inputs, backend="triton"), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_saved_tensors_are_read_once():
    """Activation checkpointing computes them at the first reading and refuses a second one."""
    inputs = [x.requires_grad_() for x in tokens()]
    packed, unpacked = [], []

    def unpack(x):
        unpacked.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, unpack):
        one_operator()(*inputs)[1].sum().backward()
    assert len(packed) == len(unpacked) > 0
