"""EFA: golden values, the reference operators underneath, properties, degenerate and bad input."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.budget import assert_function_within_budget
from helpers.compare import assert_close, assert_finite, value_and_grads
from helpers.golden import golden
from hypothesis import given, settings
from hypothesis import strategies as st

import fmfa_losses
from fmfa_losses import EFALoss
from fmfa_losses.functional import efa_loss
from fmfa_losses.ops.aggregation import sparse_aggregate_reference
from fmfa_losses.ops.hard_similarity import hard_similarity_reference

GOLDEN = {
    "efa_paper_cuhk": {},
    "efa_paper_icfg": {"margin_text": 0.2, "margin_image": 1.0},
    "efa_paper_lambda4_tau05": {"margin_text": 0.2, "margin_image": 0.8, "pool_scale": 4.0, "temperature": 0.5},
    "efa_paper_masked": {},
    "efa_paper_sigma": {"sparsity": 0.6},
}


def draw(B, N, L, D, dtype=torch.float64):
    return torch.randn(B, N, D, dtype=dtype), torch.randn(B, L, D, dtype=dtype)


def plain(image, text, image_mask=None, text_mask=None, pids=None, margin=0.1, pool_scale=1.0):
    """Eq. 5-12 on the reference operators."""
    joint = sparse_aggregate_reference(image, text, image_mask=image_mask)
    B, total = len(image), 0
    for x, mask in ((text, text_mask), (image, image_mask)):
        sim = hard_similarity_reference(x, joint, x_mask=mask, e_mask=text_mask, pool_scale=pool_scale)
        for s in (sim, sim.T):
            for i in range(B):
                rivals = [j for j in range(B) if j != i and (pids is None or pids[i] != pids[j])]
                if rivals:
                    total = total + torch.logsumexp(s[i, rivals] - s[i, i] + margin, 0) / B
    return total


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, dtype, tolerance):
    case = golden(name)
    inputs = case.leaf_inputs(dtype)
    loss = EFALoss(**GOLDEN[name])(
        inputs["patches"], inputs["text"], image_mask=inputs.get("patch_mask"), text_mask=inputs.get("text_mask")
    )
    loss.backward()
    grads = [inputs["patches"].grad, inputs["text"].grad]
    assert_close([loss.detach(), *grads], [case.value, case.grads["patches"], case.grads["text"]], tolerance)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 5, 4, 6), (3, 63, 7, 16), (4, 1, 3, 8), (4, 9, 1, 8), (5, 129, 77, 4)])
def test_matches_the_equations(shape, masked):
    image, text = draw(*shape)
    masks = (
        {"image_mask": torch.rand(shape[:2]) > 0.4, "text_mask": torch.rand(shape[0], shape[2]) > 0.4} if masked else {}
    )
    if masked and shape[0] > 1:
        masks["image_mask"][0] = masks["text_mask"][1] = False
    if shape[0] == 1:
        assert efa_loss(image, text, **masks) == 0
        return
    assert_close(
        value_and_grads(lambda i, t: efa_loss(i, t, **masks), (image, text)),
        value_and_grads(lambda i, t: plain(i, t, **masks), (image, text)),
        1e-9,
    )


LENGTHS = {
    "all": None,
    "captions, some equally long": torch.tensor([3, 5, 3, 5, 4]),
    "captions, one empty": torch.tensor([3, 5, 0, 5, 4]),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("pool_scale", [1e-6, 1e-3, 0.2, 1.0, 1e4, 1e6])
def test_every_scale_of_the_pooling(pool_scale, lengths):
    """In float32: log n / pool_scale, which differs between captions of unequal length, must not take the digits."""
    image, text = (t.float().double() for t in draw(5, 12, 6, 16))
    masks = {}
    if LENGTHS[lengths] is not None:
        masks = {"text_mask": torch.arange(6) < LENGTHS[lengths][:, None], "image_mask": torch.rand(5, 12) > 0.3}
    exact = value_and_grads(lambda i, t: plain(i, t, **masks, pool_scale=pool_scale), (image, text))
    got = value_and_grads(lambda i, t: efa_loss(i, t, **masks, pool_scale=pool_scale), (image.float(), text.float()))
    assert_close(got, exact, 2e-6 if pool_scale <= 1 else 1e-4)


def test_negatives_of_a_different_identity():
    image, text = draw(5, 6, 4, 8)
    pids = torch.tensor([1, 2, 1, 3, 1])
    assert_close(
        value_and_grads(lambda i, t: efa_loss(i, t, negatives="different_identity", pids=pids), (image, text)),
        value_and_grads(lambda i, t: plain(i, t, pids=pids), (image, text)),
        1e-9,
    )


def test_gradcheck():
    image, text = (t.requires_grad_() for t in draw(3, 5, 4, 3))
    masks = {"image_mask": torch.rand(3, 5) > 0.3, "text_mask": torch.rand(3, 4) > 0.3}
    assert torch.autograd.gradcheck(lambda i, t: efa_loss(i, t, pool_scale=2.0, **masks), (image, text))


@pytest.mark.parametrize("sparsity", [None, 0.0, 0.25, 0.6, 1.0])
def test_masks_that_keep_everything_change_nothing(sparsity):
    image, text = (torch.randint(-3, 4, (4, tokens, 6)).float() for tokens in (8, 5))  # many at the threshold
    masks = {name: torch.ones(t.shape[:2], dtype=torch.bool) for name, t in (("image", image), ("text", text))}
    results = [
        value_and_grads(lambda i, t, given=given: efa_loss(i, t, sparsity=sparsity, **given), inputs)
        for inputs in [(image, text)]
        for given in ({}, {"image_mask": masks["image"]}, {"text_mask": masks["text"]})
    ]
    for masked in results[1:]:
        assert_close(masked, results[0], 1e-6)


def test_reductions():
    image, text = draw(5, 6, 4, 8)
    per_sample = efa_loss(image, text, reduction="none")
    assert per_sample.shape == (5,)
    torch.testing.assert_close(efa_loss(image, text), per_sample.mean())
    torch.testing.assert_close(efa_loss(image, text, reduction="sum"), per_sample.sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_budget(dtype):
    def in_dtype(image, text):
        s = text @ image.mT
        n = (s - s.amin(-1, keepdim=True)) / (s.amax(-1, keepdim=True) - s.amin(-1, keepdim=True))
        m = torch.where(n >= 1 / image.shape[1], n, 0)
        joint = torch.nn.functional.normalize((m / m.sum(-1, keepdim=True)) @ image, dim=-1)
        total = 0
        for x in (text, image):
            x = torch.nn.functional.normalize(x, dim=-1)
            sim = torch.einsum("ild,jkd->ijlk", x, joint).max(-1).values.logsumexp(-1)
            for s in (sim, sim.T):
                logits = (s - s.diagonal()[:, None] + 0.1).masked_fill(torch.eye(len(s), dtype=torch.bool), -torch.inf)
                total = total + logits.logsumexp(1).mean()
        return total

    torch.manual_seed(5)
    image, text = draw(6, 12, 7, 32, torch.float32)
    assert_function_within_budget(efa_loss, in_dtype, (image, text), dtype)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(1, 7), st.integers(1, 5), st.integers(0, 10**6))
def test_properties(B, N, L, seed):
    torch.manual_seed(seed)
    image, text = draw(B, N, L, 5)
    masks = {"image_mask": torch.rand(B, N) > 0.3, "text_mask": torch.rand(B, L) > 0.3}
    got = value_and_grads(lambda i, t: efa_loss(i, t, **masks), (image, text))
    assert_finite(got)
    order = torch.randperm(B)
    permuted = {name: mask[order] for name, mask in masks.items()}
    torch.testing.assert_close(efa_loss(image[order], text[order], **permuted), got[0])
    poisoned = [t.masked_fill(~m[..., None], torch.nan) for t, m in zip((image, text), masks.values(), strict=True)]
    for a, b in zip(value_and_grads(lambda i, t: efa_loss(i, t, **masks), poisoned), got, strict=True):
        assert torch.equal(a, b)
    assert got[1][~masks["image_mask"]].abs().sum() == 0
    assert got[2][~masks["text_mask"]].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_degenerate_input_is_finite(dtype):
    def run(image, text, **kwargs):
        return value_and_grads(lambda i, t: efa_loss(i, t, **kwargs), (image, text))

    image, text = draw(4, 6, 5, 8, dtype)
    assert_finite(run(image[:1], text[:1]))
    assert_finite(run(image[:, :1], text))
    assert_finite(run(image, text[:, :1]))
    assert_finite(run(image[:, :1].expand(4, 6, 8), text))
    assert_finite(run(torch.zeros_like(image), text))
    assert_finite(run(image, torch.zeros_like(text)))
    assert_finite(run(image, text, temperature=0.01, pool_scale=100.0))
    large = torch.finfo(torch.float16).max / 2
    assert_finite(run((image * large).clamp(-large, large), (text * large).clamp(-large, large)))
    nothing = {"image_mask": torch.ones(4, 6, dtype=torch.bool), "text_mask": torch.ones(4, 5, dtype=torch.bool)}
    nothing["image_mask"][1] = nothing["text_mask"][1] = False
    assert_finite(run(image, text, **nothing))


def test_no_negatives_count_zero():
    image, text = draw(3, 4, 5, 6)
    got = value_and_grads(
        lambda i, t: efa_loss(i, t, negatives="different_identity", pids=torch.ones(3, dtype=torch.long)), (image, text)
    )
    for tensor in got:
        assert tensor.abs().sum() == 0


def test_nan_shows():
    image, text = draw(3, 4, 5, 6)
    image[1, 2, 0] = torch.nan
    assert efa_loss(image, text).isnan()


def test_autocast_does_not_lower_the_precision():
    image, text = draw(3, 4, 5, 16, torch.float32)
    expected = value_and_grads(efa_loss, (image, text))
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(value_and_grads(efa_loss, (image, text)), expected, strict=True):
            assert torch.equal(a, b)


def functions_called(call):
    """How often each function of the package is called; parts of a comprehension are no functions."""
    package = Path(fmfa_losses.__file__).parent
    called = Counter()

    def on_event(frame, event, argument):
        file = Path(frame.f_code.co_filename)
        if event == "call" and package in file.parents and not frame.f_code.co_name.endswith(("comp>", "genexpr>")):
            called[file.relative_to(package).as_posix(), frame.f_code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        call()
    finally:
        sys.setprofile(before)
    return called


@pytest.mark.parametrize(("masked", "most", "most_checks"), [(False, 61, 12), (True, 76, 16)])
def test_checks_are_made_once(masked, most, most_checks):
    """One forward in training: what the public name has checked is not checked again below."""
    image, text = (t.requires_grad_() for t in draw(4, 12, 5, 16, torch.float32))
    masks = {"image_mask": torch.rand(4, 12) > 0.3, "text_mask": torch.rand(4, 5) > 0.3} if masked else {}
    loss = EFALoss()
    loss(image, text, **masks)
    called = functions_called(lambda: loss(image, text, **masks))
    # What the kernels do instead is counted by launches and host time.
    called = {of: n for of, n in called.items() if not of[0].startswith(("ops/rows/", "ops/threads"))}
    checks = {name: n for (file, name), n in called.items() if file == "ops/checks.py"}
    assert 0 < sum(checks.values()) <= most_checks, checks
    assert sum(called.values()) <= most, called


IMAGE, TEXT = torch.randn(3, 5, 4), torch.randn(3, 2, 4)
BAD = [
    (lambda: EFALoss(temperature=-1.0), ValueError, "temperature must be a finite number > 0"),
    (lambda: EFALoss(pool_scale=0), ValueError, "pool_scale must be a finite number > 0"),
    (lambda: EFALoss(margin_text=float("nan")), ValueError, "margin_text must be a finite number"),
    (lambda: EFALoss(negatives="hard"), ValueError, "negatives must be one of"),
    (lambda: efa_loss(IMAGE, TEXT[:2]), ValueError, "agree in B"),
    (lambda: efa_loss(IMAGE, TEXT[..., :3]), ValueError, "agree in D"),
    (lambda: efa_loss(IMAGE, TEXT[0]), ValueError, r"text_tokens must have shape \[B, L, D\]"),
    (
        lambda: efa_loss(IMAGE, TEXT, text_mask=torch.ones(3, 5, dtype=torch.bool)),
        ValueError,
        r"text_mask must have shape \[3, 2\]",
    ),
    (lambda: efa_loss(IMAGE, TEXT, image_mask=torch.ones(3, 5)), TypeError, "image_mask must be a boolean"),
    (lambda: efa_loss(IMAGE, TEXT, negatives="different_identity"), ValueError, r"pass pids \[B\]"),
    (lambda: efa_loss(IMAGE, TEXT, pids=torch.ones(2, dtype=torch.long)), ValueError, r"pids must have shape \[3\]"),
    (lambda: efa_loss(IMAGE, TEXT, sparsity=2.0), ValueError, "sparsity must lie in"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
