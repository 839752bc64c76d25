"""A-SDM: golden values, the equations written out, properties, degenerate and bad input."""

import pytest
import torch
from helpers.budget import assert_function_within_budget
from helpers.compare import assert_close, assert_finite, value_and_grads
from helpers.golden import golden
from helpers.plain_asdm import plain
from hypothesis import given, settings
from hypothesis import strategies as st

from fmfa_losses import ASDMLoss
from fmfa_losses.functional import asdm_loss
from fmfa_losses.ops.similarity_distribution.blocks import torch_blocks

GOLDEN = {
    "sdm": {"alpha": 0.0},
    "asdm_paper_alpha1": {"alpha": 1.0},
    "asdm_paper_alpha10": {"alpha": 10.0},
    "asdm_any_positive_alpha10": {"alpha": 10.0, "positive": "any"},
}
VARIANTS = [
    {"positive": positive, "detach_weight": detach} for positive in ("paired", "any") for detach in (False, True)
]


def draw(B, D, dtype=torch.float64, ids=3):
    return torch.randn(B, D, dtype=dtype), torch.randn(B, D, dtype=dtype), torch.randint(ids, (B,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, dtype, tolerance):
    case = golden(name)
    inputs = case.leaf_inputs(dtype)
    loss = ASDMLoss(**GOLDEN[name])(
        inputs["image_features"], inputs["text_features"], inputs["pids"], image_ids=inputs.get("image_ids")
    )
    loss.backward()
    grads = [inputs[k].grad for k in ("image_features", "text_features")]
    assert_close(
        [loss.detach(), *grads], [case.value, case.grads["image_features"], case.grads["text_features"]], tolerance
    )


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("B", [2, 33])
def test_matches_the_equations(B, variant, soft):
    image, text, pids = draw(B, 24)
    image_ids = torch.randint(B, (B,)) if soft else None
    assert_close(
        value_and_grads(
            lambda i, t: asdm_loss(i, t, pids, image_ids=image_ids, reduction="none", **variant), (image, text)
        ),
        value_and_grads(lambda i, t: plain(i, t, pids, image_ids=image_ids, **variant), (image, text)),
        1e-9,
    )


@pytest.mark.parametrize("variant", VARIANTS[::2])
def test_gradcheck(variant):
    image, text, pids = draw(5, 4)
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda i, t, s: asdm_loss(i, t, pids, logit_scale=s, **variant),
        (image.requires_grad_(), text.requires_grad_(), scale),
    )


def test_row_blocks_do_not_show(monkeypatch):
    image, text, pids = draw(23, 8)
    whole = value_and_grads(lambda i, t: asdm_loss(i, t, pids), (image, text))
    monkeypatch.setattr(torch_blocks, "block_elements", 64)
    assert_close(value_and_grads(lambda i, t: asdm_loss(i, t, pids), (image, text)), whole, 1e-12)


@pytest.mark.parametrize("scale", [50.0, torch.tensor(50.0), torch.tensor([50.0], dtype=torch.float16)])
def test_logit_scale_is_one_over_temperature(scale):
    image, text, pids = draw(6, 8, torch.float32)
    torch.testing.assert_close(
        asdm_loss(image, text, pids, logit_scale=scale, temperature=9.0), asdm_loss(image, text, pids, temperature=0.02)
    )


def test_learnable_logit_scale_gets_its_gradient():
    image, text, pids = draw(6, 8, torch.float32)
    scale = torch.nn.Parameter(torch.tensor(20.0))
    loss = asdm_loss(image, text, pids, logit_scale=scale)
    loss.backward()
    step = 1e-3
    up, down = (asdm_loss(image.double(), text.double(), pids, logit_scale=20.0 + d) for d in (step, -step))
    torch.testing.assert_close(scale.grad, ((up - down) / (2 * step)).float(), rtol=1e-3, atol=1e-6)


def test_reductions():
    image, text, pids = draw(7, 8)
    per_sample = asdm_loss(image, text, pids, reduction="none")
    assert per_sample.shape == (7,)
    torch.testing.assert_close(asdm_loss(image, text, pids), per_sample.mean())
    torch.testing.assert_close(asdm_loss(image, text, pids, reduction="sum"), per_sample.sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_budget(dtype):
    torch.manual_seed(3)
    image, text, pids = draw(16, 64, torch.float32, ids=8)
    text = image + 3 * text  # hard enough that a gradient is no rounding of zero

    def in_float32(image, text):
        """Plain PyTorch: eps is 0 in float16, and makes NaN."""
        wide = torch.promote_types(image.dtype, torch.float32)
        return plain(image.to(wide), text.to(wide), pids).mean()

    assert_function_within_budget(
        lambda i, t: asdm_loss(i, t, pids), in_float32, (image, text), dtype, amplification=50
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from(VARIANTS))
def test_properties(B, ids, seed, variant):
    torch.manual_seed(seed)
    image, text, pids = draw(B, 5, ids=ids)
    per_sample = asdm_loss(image, text, pids, reduction="none", **variant)
    order = torch.randperm(B)
    permuted = asdm_loss(image[order], text[order], pids[order], reduction="none", **variant)
    torch.testing.assert_close(permuted, per_sample[order], rtol=1e-9, atol=1e-9)
    lengths = torch.rand(B, 1, dtype=image.dtype) + 0.1
    torch.testing.assert_close(
        asdm_loss(image * lengths, text, pids, reduction="none", **variant), per_sample, rtol=1e-9, atol=1e-9
    )
    # alpha = 0 is SDM, which no choice of positive can change; a weight never lowers the loss of a row above 0.
    sdm = asdm_loss(image, text, pids, alpha=0.0, reduction="none", **variant)
    torch.testing.assert_close(sdm, plain(image, text, pids, alpha=0.0), rtol=1e-9, atol=1e-9)
    # Swapping the modalities swaps the directions.
    torch.testing.assert_close(asdm_loss(text, image, pids, reduction="none", **variant), per_sample)


@pytest.mark.parametrize("variant", VARIANTS[::2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_degenerate_input_is_finite(variant, dtype):
    def run(image, text, pids, **kwargs):
        return value_and_grads(lambda i, t: asdm_loss(i, t, pids, **variant, **kwargs), (image, text))

    image, text, pids = draw(6, 8, dtype)
    assert_finite(run(image[:1], text[:1], pids[:1]))
    assert asdm_loss(image[:1], text[:1], pids[:1]).abs() < 1e-6
    assert_finite(run(image, text, torch.zeros_like(pids)))
    assert_finite(run(torch.zeros_like(image), text, pids))
    assert_finite(run(image[:1].expand(6, 8), text[:1].expand(6, 8), pids))
    assert_finite(run(image, text, pids, temperature=0.01))
    large = torch.finfo(torch.float16).max / 8
    assert_finite(run((image * large).clamp(-large, large), (text * large).clamp(-large, large), pids))


def test_nan_shows():
    image, text, pids = draw(4, 8)
    image[2, 3] = torch.nan
    assert asdm_loss(image, text, pids).isnan()


def test_autocast_does_not_lower_the_precision():
    image, text, pids = draw(6, 16, torch.float32)
    expected = value_and_grads(lambda i, t: asdm_loss(i, t, pids), (image, text))
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(value_and_grads(lambda i, t: asdm_loss(i, t, pids), (image, text)), expected, strict=True):
            assert torch.equal(a, b)


IMAGE, TEXT, PIDS = draw(4, 8, torch.float32)
BAD = [
    (lambda: ASDMLoss(temperature=0.0), ValueError, "temperature must be a finite number > 0, got 0.0"),
    (lambda: ASDMLoss(alpha=-1.0), ValueError, "alpha must be a finite number >= 0"),
    (lambda: ASDMLoss(positive="first"), ValueError, "positive must be one of 'paired', 'any', got 'first'"),
    (lambda: ASDMLoss(gap="cosine"), TypeError, "gap"),  # moved to fmfa_losses.compat
    (lambda: ASDMLoss(reduction="max"), ValueError, "reduction must be one of"),
    (lambda: asdm_loss(IMAGE, TEXT[:3], PIDS), ValueError, "agree in B"),
    (lambda: asdm_loss(IMAGE, TEXT[:, :7], PIDS), ValueError, "agree in D"),
    (lambda: asdm_loss(IMAGE[None], TEXT, PIDS), ValueError, r"image_features must have shape \[B D\]"),
    (lambda: asdm_loss(IMAGE.long(), TEXT, PIDS), TypeError, "floating-point"),
    (lambda: asdm_loss(IMAGE, TEXT, PIDS[:3]), ValueError, r"pids must have shape \[4\]"),
    (lambda: asdm_loss(IMAGE, TEXT, PIDS.float()), TypeError, r"pids must be an integer tensor.*pids\.long"),
    (lambda: asdm_loss(IMAGE, TEXT, PIDS.to("meta")), ValueError, "pids must be on cpu"),
    (lambda: asdm_loss(IMAGE, TEXT, PIDS, image_ids=PIDS[:2]), ValueError, "image_ids must have shape"),
    (lambda: asdm_loss(IMAGE, TEXT, PIDS, logit_scale=torch.ones(2)), ValueError, "logit_scale must be a number"),
    (lambda: asdm_loss(IMAGE, TEXT, PIDS, logit_scale=-1.0), ValueError, "logit_scale must be a finite number > 0"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
