"""fmfa_losses.compat.released: EFA of the released code in one call, with masks, against its equations."""

import pytest
import torch
from helpers.compare import assert_close, assert_finite, value_and_grads
from helpers.golden import golden

from fmfa_losses.compat.released import released_aggregate, released_efa
from fmfa_losses.functional import sparse_aggregate
from fmfa_losses.ops.hard_similarity import hard_similarity_reference

GOLDEN = {"efa_released_2025_08": {}, "efa_released_2025_04": {"margin_image": 0.1, "pool_scale": 10.0}}


def draw(B, N, L, D, dtype=torch.float64):
    return torch.randn(B, N, D, dtype=dtype), torch.randn(B, L, D, dtype=dtype)


def plain_aggregate(image, text, image_mask=None):
    """As released, sample by sample, of the kept patches alone."""
    joint = torch.zeros_like(text)
    for b, patches in enumerate(image):
        patches = patches if image_mask is None else patches[image_mask[b]]
        s = text[b] @ patches.T
        n = (s - s.amin(1, keepdim=True)) / (s.amax(1, keepdim=True) - s.amin(1, keepdim=True))
        m = n * (n > 1 / len(patches))
        joint[b] = m / m.sum(1, keepdim=True) @ patches
    return joint


def plain(image, text, image_mask=None, text_mask=None, margin_text=0.1, margin_image=0.9, pool_scale=1.0):
    joint, total = plain_aggregate(image, text, image_mask), 0
    for x, mask, margin in ((text, text_mask, margin_text), (image, image_mask, margin_image)):
        sim = hard_similarity_reference(x, joint, x_mask=mask, e_mask=text_mask, pool_scale=pool_scale)
        sim = torch.nn.functional.normalize(sim, dim=1)
        for positive in (sim.diagonal()[:, None], sim.diagonal()):
            terms = (sim - positive + margin).exp() * (1 - torch.eye(len(sim)))
            total = total + (1 + terms.sum(0)).log().mean()
    return total


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, dtype, tolerance):
    case = golden(name)
    inputs = case.inputs["patches"].to(dtype), case.inputs["text"].to(dtype)
    got = value_and_grads(lambda i, t: released_efa(i, t, **GOLDEN[name]), inputs, torch.ones(()))
    assert_close(got, [case.value, case.grads["patches"], case.grads["text"]], tolerance)


@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_equations(masked):
    image, text = draw(5, 9, 4, 8)
    masks = {"image_mask": torch.rand(5, 9) > 0.3, "text_mask": torch.rand(5, 4) > 0.3} if masked else {}
    options = {"margin_text": 0.3, "margin_image": 0.7, "pool_scale": 3.0} | masks
    assert_close(
        value_and_grads(lambda i, t: released_efa(i, t, **options), (image, text)),
        value_and_grads(lambda i, t: plain(i, t, **options), (image, text)),
        1e-9,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_the_threshold_is_strict(masked, dtype):
    """A patch that lies exactly at 1/N counts in the paper and not in the released code."""
    image = torch.tensor([[0.0, 3.0], [1.0, 7.0], [2.0, 1.0], [4.0, 2.0]], dtype=dtype)[None]
    text = torch.tensor([[[1.0, 0.0]]], dtype=dtype)  # s = 0, 1, 2, 4; n = 0, 1/4, 1/2, 1
    mask = None
    if masked:
        image = torch.cat([image, torch.full((1, 3, 2), 9.0, dtype=dtype)], dim=1)
        mask = torch.tensor([[True] * 4 + [False] * 3])
    released = released_aggregate(image, text, image_mask=mask)
    torch.testing.assert_close(released, (image[:, 2:3] / 2 + image[:, 3:4]) / 1.5)
    torch.testing.assert_close(released, sparse_aggregate(image, text, image_mask=mask, sparsity=0.25 + 1e-6))
    assert not torch.allclose(released, sparse_aggregate(image, text, image_mask=mask))


@pytest.mark.parametrize("given", ["image", "text"])
def test_masks_that_keep_everything_change_nothing(given):
    image, text = (torch.randint(-3, 4, (4, tokens, 6)).float() for tokens in (8, 5))  # many at the threshold
    mask = {f"{given}_mask": torch.ones((image if given == "image" else text).shape[:2], dtype=torch.bool)}
    masked = value_and_grads(lambda i, t: released_efa(i, t, **mask), (image, text))
    assert_close(masked, value_and_grads(released_efa, (image, text)), 1e-6)


def test_gradcheck():
    image, text = (t.requires_grad_() for t in draw(3, 5, 4, 3))
    assert torch.autograd.gradcheck(lambda i, t: released_efa(i, t, pool_scale=2.0), (image, text))


def test_rows_whose_squares_overflow():
    """log n / pool_scale is 1e19 and more; an empty caption has 0."""
    image, text = (t.float().double() for t in draw(4, 5, 3, 8))
    options = {"text_mask": torch.arange(3) < torch.tensor([3, 0, 2, 3])[:, None], "margin_image": 0.1}
    options["pool_scale"] = 1e-19
    exact = value_and_grads(lambda i, t: released_efa(i, t, **options), (image, text))
    got = value_and_grads(lambda i, t: released_efa(i, t, **options), (image.float(), text.float()))
    assert_close(got, exact, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_degenerate_input_is_finite(dtype):
    image, text = draw(4, 6, 5, 8, dtype)
    large = torch.finfo(torch.float16).max / 2
    for inputs in (
        (image[:1], text[:1]),
        (image[:, :1], text),
        (image, text[:, :1]),
        (image[:, :1].expand(4, 6, 8), text),
        (torch.zeros_like(image), text),
        (image, torch.zeros_like(text)),
        ((image * large).clamp(-large, large), (text * large).clamp(-large, large)),
    ):
        assert_finite(value_and_grads(released_efa, inputs))
    masks = {"image_mask": torch.ones(4, 6, dtype=torch.bool), "text_mask": torch.ones(4, 5, dtype=torch.bool)}
    masks["image_mask"][1] = masks["text_mask"][1] = False
    assert_finite(value_and_grads(lambda i, t: released_efa(i, t, **masks, pool_scale=100.0), (image, text)))


IMAGE, TEXT = torch.randn(3, 5, 4), torch.randn(3, 2, 4)
BAD = [
    (lambda: released_efa(IMAGE, TEXT[:2]), ValueError, "agree in B"),
    (lambda: released_efa(IMAGE[0], TEXT), ValueError, "image_tokens must have shape"),
    (lambda: released_efa(IMAGE, TEXT, margin_text=float("nan")), ValueError, "margin_text must be a finite"),
    (lambda: released_efa(IMAGE, TEXT, pool_scale=0), ValueError, "pool_scale must be a finite number > 0"),
    (lambda: released_efa(IMAGE, TEXT, image_mask=torch.ones(3, 5)), TypeError, "image_mask must be a boolean"),
    (lambda: released_efa(IMAGE, TEXT, text_mask=torch.ones(3, 2)), TypeError, "text_mask must be a boolean"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
