"""IRRHead at its edges: padding, sizes of one, dtypes, and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.irr_head import D, L, V, assert_same, call, dense, gradients, make_head, make_inputs, make_text_mask
from torch import Tensor, nn

from fmfa_losses.heads import irr
from fmfa_losses.heads.irr import IRRHead


@pytest.mark.parametrize("text_mask", [None, make_text_mask()])
@pytest.mark.parametrize("static", [False, True])
def test_no_masked_position_gives_zero_and_zero_gradients(static, text_mask):
    head, (image, text, labels) = make_head(), make_inputs()
    out = call(head, image, text, torch.zeros_like(labels), text_mask, static=static)
    assert out.loss.item() == 0
    assert out.accuracy.item() == 0
    assert all(grad.abs().max() == 0 for grad in gradients(head, out.loss, image, text).values())


@pytest.mark.parametrize("static", [False, True])
def test_padding_changes_nothing_and_gets_no_gradient(static):
    head, (image, text, labels) = make_head(), make_inputs()
    text_mask = make_text_mask()
    out = call(head, image, text, labels, text_mask, static=static)
    grads = gradients(head, out.loss, image, text)
    assert grads["input 1"][~text_mask].abs().max() == 0
    for content in (1e4, math.nan):
        other = text.detach().masked_fill(~text_mask[..., None], content).requires_grad_()
        other_labels = labels.masked_fill(~text_mask, 9)
        other_out = call(head, image, other, other_labels, text_mask, static=static)
        assert other_out.loss.item() == pytest.approx(out.loss.item(), rel=1e-13)
        assert_same(gradients(head, other_out.loss, image, other), grads, 1e-12)


def test_a_caption_that_is_all_padding_takes_no_part():
    head, (image, text, labels) = make_head(), make_inputs()
    text_mask = make_text_mask()
    text_mask[1] = False
    out = head(image, text, labels, text_mask=text_mask)
    grads = gradients(head, out.loss, image, text)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert grads["input 0"][1].abs().max() == grads["input 1"][1].abs().max() == 0
    kept = [0, 2]
    torch.testing.assert_close(out.loss, head(image[kept], text[kept], labels[kept], text_mask=text_mask[kept]).loss)
    nothing = head(image, text, labels, text_mask=torch.zeros_like(text_mask))
    assert nothing.loss.item() == 0
    assert all(grad.abs().max() == 0 for grad in gradients(head, nothing.loss, image, text).values())


def test_attention_always_has_something_to_attend_to(monkeypatch):
    # A row without a key is NaN in some kernels and zero in others: none may be asked.
    masks = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *x, attn_mask: masks.append(attn_mask) or attention(*x, attn_mask)
    )
    head, inputs = make_head(), make_inputs()
    head(*inputs, text_mask=torch.tensor([[True] * L, [False] * L, [False] * (L - 1) + [True]]))
    assert [mask is None for mask in masks] == [True, False, False], "cross-attention, then the blocks"
    assert all(mask.any(-1).all() for mask in masks[1:])


@pytest.mark.parametrize("weights", [torch.float16, torch.float32])
def test_layer_norm_computes_in_float32_and_in_one_dtype(monkeypatch, weights):
    seen = []
    norm = F.layer_norm
    monkeypatch.setattr(
        F, "layer_norm", lambda *x: seen.extend(t.dtype for t in x if isinstance(t, Tensor)) or norm(*x)
    )
    assert irr.LayerNorm(D).to(weights)(torch.randn(2, D).half()).dtype == torch.float16
    assert seen == [torch.float32] * 3  # kernels of accelerators take no mixture


def test_permuting_the_batch_changes_nothing():
    head, (image, text, labels) = make_head(), make_inputs()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(head(image, text, labels).loss, head(image[order], text[order], labels[order]).loss)


@pytest.mark.parametrize(("b", "n", "l"), [(1, 5, 7), (3, 1, 7), (3, 5, 1), (1, 1, 1)])
def test_sizes_of_one(b, n, l):
    head, (image, text, labels) = make_head(), make_inputs(b=b, n=n, l=l)
    expected = dense(head, image, text, labels)
    out = head(image, text, labels)
    torch.testing.assert_close(out.loss, expected.loss)
    assert_same(gradients(head, out.loss, image, text), gradients(head, expected.loss, image, text), 1e-11)


DEGENERATE = {
    "a zero token": lambda x: x * (torch.arange(x.shape[1]) != 1)[:, None],
    "all zero": lambda x: x * 0,
    "identical": lambda x: x[:, :1].expand_as(x),
    "large": lambda x: x * 1e4,
}


@pytest.mark.parametrize("fill", DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_degenerate_tokens_stay_finite(dtype, fill):
    head, (image, text, labels) = make_head(dtype), make_inputs(dtype)
    change = DEGENERATE[fill]
    # All image tokens zero: four LayerNorms of zeros, each a factor 1 / sqrt(eps), put the exact gradient at 2e5, past
    # the largest float16. The value is finite all the same.
    unrepresentable = dtype == torch.float16 and fill == "all zero"
    assert head(change(image), change(text), labels).loss.isfinite()
    out = head(image if unrepresentable else change(image), change(text), labels)
    assert out.loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(head, out.loss, image, text).values())


@pytest.mark.parametrize("side", [0, 1])
def test_nan_is_not_hidden(side):
    head, inputs = make_head(), make_inputs()
    with torch.no_grad():
        inputs[side][0, 0, 0] = math.nan
    assert head(*inputs).loss.isnan()


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tokens_are_cast_to_the_dtype_of_the_weights(tokens, weights):
    head, (image, text, labels) = make_head(weights), make_inputs(tokens)
    out = head(image, text, labels)
    assert out.loss.dtype == torch.promote_types(weights, torch.float32)
    torch.testing.assert_close(out.loss, head(image.to(weights), text.to(weights), labels).loss, rtol=0, atol=0)
    out.loss.backward()
    assert text.grad.dtype == tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    head, (image, text, labels) = make_head(torch.float32), make_inputs(dtype)
    exact = head(image, text, labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        out = head(image, text, labels)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() != exact.item(), "autocast had an effect"
    assert out.loss.item() == pytest.approx(exact.item(), rel=2e-2)
    assert all(grad.isfinite().all() for grad in gradients(head, out.loss, image, text).values())


def test_weights_cast_the_way_of_clip_codebases():
    head, (image, text, labels) = make_head(torch.float32), make_inputs(torch.float16)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            module.weight.data, module.bias.data = module.weight.data.half(), module.bias.data.half()
        if isinstance(module, nn.MultiheadAttention):
            module.in_proj_weight.data = module.in_proj_weight.data.half()
            module.in_proj_bias.data = module.in_proj_bias.data.half()
    halves = {name for name, parameter in head.named_parameters() if parameter.dtype == torch.float16}
    assert halves == {name for name, _ in head.named_parameters() if "ln" not in name}
    out = head(image, text, labels)
    assert out.loss.isfinite()
    assert out.loss.dtype == torch.float32


def test_integer_labels_of_any_width_and_another_ignore_index():
    head, (image, text, labels) = make_head(), make_inputs()
    expected = head(image, text, labels).loss
    for dtype in (torch.uint8, torch.int16, torch.int32):
        torch.testing.assert_close(head(image, text, labels.to(dtype)).loss, expected, rtol=0, atol=0)
    other = make_head(ignore_index=-100)
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other(image, text, torch.where(labels == 0, -100, labels)).loss, expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embed_dim": 100}, r'embed_dim must be divisible by 64 .*got 100; pass num_heads.* irr=\{"num_heads": ...\}'),
        ({"embed_dim": 64, "num_heads": 5}, r"num_heads must divide embed_dim = 64, got 5"),
        ({"embed_dim": 0}, r"embed_dim must be an integer >= 1, got 0"),
        ({"vocab_size": -1}, r"vocab_size must be an integer >= 1, got -1"),
        ({"depth": 0}, r"depth must be an integer >= 1, got 0"),
        ({"max_masked": 0}, r"max_masked must be an integer >= 1, got 0"),
        ({"num_heads": 2.0}, r"num_heads must be an integer >= 1, got 2.0"),
    ],
)
def test_bad_hyperparameters(kwargs, message):
    with pytest.raises(ValueError, match=message):
        IRRHead(**{"embed_dim": 64, "vocab_size": 10, "depth": 1, **kwargs})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": lambda x: x[0]}, ValueError, r"image_tokens must have shape \[B N D\], got .*\[5, 16\]"),
        (
            {"text": lambda x: x[..., :8]},
            ValueError,
            r"masked_text_tokens must have the width embed_dim = 16.*embed_dim=8",
        ),
        ({"text": lambda x: x.long()}, TypeError, r"masked_text_tokens must be a floating-point tensor.*int64"),
        ({"text": lambda x: x[:0]}, ValueError, r"must not be empty"),
        ({"image": lambda x: x[:2]}, ValueError, r"image_tokens and masked_text_tokens must agree in B .*\[2, 5, 16\]"),
        ({"image": lambda x: x.to("meta")}, ValueError, r"image_tokens and the head must be on one device"),
        ({"labels": lambda x: x[:, :-1]}, ValueError, r"labels must have shape \[3, 7\].*\[3, 6\]"),
        ({"labels": lambda x: x.float()}, TypeError, r"labels must be an integer tensor.*labels.long\(\)"),
        ({"labels": lambda x: x.bool()}, TypeError, r"labels must be an integer tensor"),
        ({"labels": lambda x: x.tolist()}, TypeError, r"labels must be an integer tensor.*torch.as_tensor"),
        ({"labels": lambda x: x.to("meta")}, ValueError, r"labels must be on the CPU or on cpu"),
        (
            {"labels": lambda x: x + V},
            ValueError,
            r"labels must be ignore_index = 0 or lie in \[0, vocab_size = 31\), got",
        ),
        ({"labels": lambda x: x - 100}, ValueError, r"ignore_index and vocab_size of the tokenizer"),
        ({"mask": lambda x: x[:, 1:]}, ValueError, r"text_mask must have shape \[3, 7\]"),
        ({"mask": lambda x: x.float()}, TypeError, r"text_mask must be a boolean tensor \(True = keep\)"),
        ({"mask": lambda x: x.to("meta")}, ValueError, r"text_mask must be on cpu"),
    ],
)
def test_bad_input(change, error, message):
    image, text, labels = make_inputs()
    inputs = {"image": image, "text": text, "labels": labels, "mask": make_text_mask()}
    inputs |= {name: function(inputs[name]) for name, function in change.items()}
    with pytest.raises(error, match=message):
        make_head()(inputs["image"], inputs["text"], inputs["labels"], text_mask=inputs["mask"])
