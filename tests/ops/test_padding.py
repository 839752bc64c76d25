"""Padding behind the longest caption is not computed, and nobody can tell."""

import pytest
import torch
from helpers.compare import value_and_grads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fmfa_losses import EFALoss, IRRHead
from fmfa_losses.ops.padding import longest


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ([[1, 1, 0, 0], [1, 0, 0, 0]], 2),
        ([[0, 0, 1, 0], [0, 1, 0, 0]], 3),
        ([[1, 0, 0, 1]], 4),
        ([[0, 0, 0]], 1),
        ([[1]], 1),
    ],
)
def test_longest(kept, expected):
    assert longest(torch.tensor(kept, dtype=torch.bool)) == expected


def test_an_accelerator_is_not_asked():
    assert longest(torch.zeros(2, 7, dtype=torch.bool, device="meta")) == 7


def captions(dtype=torch.float64):
    """Three captions of at most 4 tokens, one with a hole and one empty, in 9."""
    torch.manual_seed(0)
    image, text = torch.randn(3, 5, 64, dtype=dtype), torch.randn(3, 9, 64, dtype=dtype)
    keep = torch.zeros(3, 9, dtype=torch.bool)
    keep[0, [0, 1, 3]], keep[1, :2] = True, True
    return image, text, keep


def test_efa_without_the_padding_is_efa_with_it():
    image, text, keep = captions()
    whole = value_and_grads(lambda i, t: EFALoss()(i, t, text_mask=keep), (image, text))
    cut = value_and_grads(lambda i, t: EFALoss()(i, t, text_mask=keep[:, :4]), (image, text[:, :4]))
    torch.testing.assert_close(whole[:2], cut[:2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole[2][:, :4], cut[2], rtol=1e-12, atol=1e-12)
    assert whole[2][:, 4:].abs().max() == 0


def test_irr_computes_what_is_kept(monkeypatch):
    image, text, keep = captions()
    torch.manual_seed(1)
    head = IRRHead(64, 20, depth=2).double()
    labels = torch.zeros(3, 9, dtype=torch.long)
    labels[0, 1], labels[1, 0], labels[1, 7] = 3, 5, 9  # the last one stands in the padding
    seen = []
    head.cross_attn.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))

    def run():
        return value_and_grads(lambda i, t: head(i, t, labels, text_mask=keep).loss, (image, text))

    cut = run()
    monkeypatch.setattr("fmfa_losses.heads.irr.longest", lambda mask: mask.shape[1])
    torch.testing.assert_close(cut, run(), rtol=1e-12, atol=1e-12)
    assert seen == [4, 9]


@pytest.mark.parametrize("given", ["text_mask", "text_lengths"])
def test_tensors_without_values_are_not_asked(given):
    image, text, keep = captions()
    head, labels = IRRHead(64, 20, depth=1).double(), torch.zeros(3, 9, dtype=torch.long)
    what = {"text_mask": keep, "text_lengths": keep.sum(dim=1)}[given]

    def losses(image, text, what):
        return EFALoss()(image, text, **{given: what}), head(image, text, labels, **{given: what}).loss

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert [loss.shape for loss in losses(*map(mode.from_tensor, (image, text, what)))] == [(), ()]
    traced = make_fx(losses)(image, text, what)
    other = torch.ones_like(what) if given == "text_mask" else torch.full_like(what, 9)
    for got, expected in zip(traced(image, text, other), losses(image, text, other), strict=True):
        torch.testing.assert_close(got, expected)
