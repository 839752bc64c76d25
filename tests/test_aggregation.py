"""Sparse aggregation: the torch path against its reference, golden values, properties, degenerate and bad input."""

import pytest
import torch
from compare import assert_close, assert_finite, assert_within_budget, value_and_grads
from golden import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from fmfa_losses.functional import sparse_aggregate
from fmfa_losses.ops.aggregation import sparse_aggregate_reference

SHAPES = [(1, 1, 1, 1), (2, 193, 77, 16), (3, 63, 7, 5), (2, 1, 9, 8), (4, 129, 1, 3), (2, 507, 3, 4)]  # B N L D


def draw(B, N, L, D, dtype=torch.float64):
    return torch.randn(B, N, D, dtype=dtype), torch.randn(B, L, D, dtype=dtype)


def some_mask(image):
    mask = torch.rand(image.shape[:2]) > 0.4
    mask[0] = False
    return mask


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("fn", [sparse_aggregate, sparse_aggregate_reference])
def test_golden(fn, dtype, tolerance):
    case = golden("aggregate_paper_masked")
    inputs = case.inputs["patches"].to(dtype), case.inputs["text"].to(dtype)
    got = value_and_grads(
        lambda i, t: fn(i, t, image_mask=case.inputs["patch_mask"]), inputs, torch.ones(case.value.shape)
    )
    assert_close(got, [case.value, case.grads["patches"], case.grads["text"]], tolerance)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sparsity", [None, 0.0, 0.6, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, sparsity, masked):
    inputs = draw(*shape)
    mask = some_mask(inputs[0]) if masked else None
    assert_close(
        value_and_grads(lambda i, t: sparse_aggregate(i, t, image_mask=mask, sparsity=sparsity), inputs),
        value_and_grads(lambda i, t: sparse_aggregate_reference(i, t, image_mask=mask, sparsity=sparsity), inputs),
        1e-11,
    )


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked):
    image, text = (t.requires_grad_() for t in draw(3, 6, 4, 3))
    mask = some_mask(image) if masked else None
    assert torch.autograd.gradcheck(lambda i, t: sparse_aggregate(i, t, image_mask=mask), (image, text))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_budget(dtype):
    def plain(image, text):
        s = text @ image.mT
        n = (s - s.amin(-1, keepdim=True)) / (s.amax(-1, keepdim=True) - s.amin(-1, keepdim=True))
        m = torch.where(n >= 1 / image.shape[1], n, 0)
        return (m / m.sum(-1, keepdim=True)) @ image

    torch.manual_seed(2)
    assert_within_budget(sparse_aggregate, plain, draw(3, 24, 5, 32, torch.float32), dtype, 1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6))
def test_properties(B, N, L, seed):
    torch.manual_seed(seed)
    image, text = draw(B, N, L, 4)
    mask = some_mask(image)
    got = value_and_grads(lambda i, t: sparse_aggregate(i, t, image_mask=mask), (image, text))
    # Masked-out patches, even NaN, change nothing; a sample without patches gives zeros.
    poisoned = image.masked_fill(~mask[..., None], torch.nan)
    again = value_and_grads(lambda i, t: sparse_aggregate(i, t, image_mask=mask), (poisoned, text))
    for a, b in zip(again, got, strict=True):
        assert torch.equal(a, b)
    assert got[0][0].abs().sum() == 0
    # A mask equals leaving the patches out.
    for b in range(1, B):
        if mask[b].any():
            kept = sparse_aggregate(image[b : b + 1, mask[b]], text[b : b + 1])
            torch.testing.assert_close(kept, got[0][b : b + 1])
    # The order of the patches does not matter, and the joint embedding lies within their box.
    order = torch.randperm(N)
    torch.testing.assert_close(sparse_aggregate(image[:, order], text), sparse_aggregate(image, text))
    joint = sparse_aggregate(image, text)
    assert (joint <= image.amax(1, keepdim=True) + 1e-9).all()
    assert (joint >= image.amin(1, keepdim=True) - 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_constant_rows_aggregate_uniformly(dtype):
    """Identical patches: their mean, and no gradient through the similarities, although these carry rounding noise."""
    image = torch.randn(2, 1, 65, dtype=dtype).expand(2, 193, 65).contiguous()
    text = 5 * torch.randn(2, 7, 65, dtype=dtype)
    joint, dimage, dtext = value_and_grads(sparse_aggregate, (image, text), torch.ones(2, 7, 65))
    torch.testing.assert_close(joint, image[:, :1].expand(2, 7, 65).to(joint.dtype))
    assert dtext.abs().max() == 0
    torch.testing.assert_close(dimage, torch.full_like(dimage, 7 / 193))


def test_zero_tokens_and_huge_halves_are_finite():
    image, text = draw(2, 12, 3, 8, torch.float32)
    text[0] = 0
    assert_finite(value_and_grads(sparse_aggregate, (image, text)))
    assert_finite(
        value_and_grads(sparse_aggregate, tuple((t * 3e4).clamp(-65000, 65000).half() for t in (image, text)))
    )


def test_nan_shows():
    image, text = draw(2, 5, 3, 4)
    image[1, 2, 0] = torch.nan
    joint = sparse_aggregate(image, text)
    assert joint[1].isnan().any(-1).all()
    assert joint[0].isfinite().all()


IMAGE, TEXT = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
BAD = [
    (lambda: sparse_aggregate(IMAGE[0], TEXT), ValueError, r"image_tokens must have shape \[B N D\]"),
    (lambda: sparse_aggregate(IMAGE, TEXT[:1]), ValueError, "agree in B"),
    (lambda: sparse_aggregate(IMAGE, TEXT[..., :2]), ValueError, "agree in D"),
    (lambda: sparse_aggregate(IMAGE, TEXT, image_mask=torch.ones(2, 5)), TypeError, "boolean"),
    (lambda: sparse_aggregate(IMAGE, TEXT, sparsity=1.5), ValueError, r"sparsity must lie in \[0, 1\]"),
    (lambda: sparse_aggregate(IMAGE.int(), TEXT), TypeError, "floating-point"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
