"""TokenSelection against RDE's equations, token by token in float64; its edges; RDE's checkpoints."""

import copy
import math
import pickle

import pytest
import torch
from helpers.compare import assert_close, assert_finite
from helpers.errors import explains
from torch import Tensor, nn

from fmfa_losses import TokenSelection

B, T, D, E = 5, 17, 12, 10
START, END, WORD = 90, 91, 80
LENGTHS = [15, 4, 9, 1, 12]  # words; k is 4 of 17 at the ratio 0.3
RESIDUAL = {"image": "fc", "text": "linear"}
EITHER = pytest.mark.parametrize("modality", ["image", "text"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def captions(lengths=tuple(LENGTHS), width=T) -> Tensor:
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, words in enumerate(lengths):
        ids[row, : words + 2] = torch.tensor([START, *torch.randint(1, WORD, (words,)).tolist(), END])
    return ids


def make(modality, dtype=torch.float64, ratio=0.3):
    head = TokenSelection(modality, D, E, ratio).to(dtype)
    for name, value in head.state_dict().items():  # batch norm that does something
        if name.startswith("mlp.bns") and value.is_floating_point():
            value.uniform_(0.5, 2)
    tokens = torch.randn(B, T, D, dtype=dtype, requires_grad=True)
    attention = torch.randn(B, T, T, dtype=dtype).softmax(-1)
    ids = captions()
    if modality == "text":  # causal, as CLIP's is
        attention = attention.tril()
        attention = attention / attention.sum(-1, keepdim=True)
    return head, tokens, attention, (ids,) if modality == "text" else ()


def plain(head, tokens, attention, ids=None):
    """RDE's equations, a token at a time; returns features and the rows that batch norm sees."""
    weights = {**dict(head.named_parameters()), **dict(head.named_buffers())}
    special = 2 if head.modality == "text" else 1
    k = math.floor((tokens.shape[1] - special) * head.ratio)
    rows, words = [], []
    for b in range(len(tokens)):
        length = tokens.shape[1] if ids is None else int((ids[b] != 0).sum())
        query = 0 if ids is None else length - 1
        content = [t for t in range(1, length) if ids is None or t != query]
        content.sort(key=lambda t, b=b, query=query: (-attention[b, query, t].item(), t))
        rest = [*range(length, tokens.shape[1]), 0, query]
        words.append(min(k, len(content)))
        for t in [*content, *rest][:k]:
            rows.append(tokens[b, t] / (tokens[b, t].square().sum().sqrt() + 1e-8))
    units = torch.stack(rows)
    hidden = units @ weights["mlp.layers.0.weight"].T + weights["mlp.layers.0.bias"]
    mean, variance = weights["mlp.bns.0.running_mean"], weights["mlp.bns.0.running_var"]
    if head.training:
        mean, variance = hidden.mean(0), hidden.var(0, correction=0)
    normed = (hidden - mean) / (variance + 1e-5).sqrt() * weights["mlp.bns.0.weight"] + weights["mlp.bns.0.bias"]
    out = normed.clamp(min=0) @ weights["mlp.layers.1.weight"].T + weights["mlp.layers.1.bias"]
    residual = RESIDUAL[head.modality]
    out = out + units @ weights[f"{residual}.weight"].T + weights[f"{residual}.bias"]
    features = [out[b * k : b * k + n].amax(0) if n else out.new_zeros(E) for b, n in enumerate(words)]
    return torch.stack(features), hidden


@EITHER
@pytest.mark.parametrize("training", [False, True])
def test_value_and_gradients(modality, training):
    head, tokens, attention, ids = make(modality)
    head.train(training)
    expected, hidden = plain(head, tokens, attention, *ids)
    inputs = [tokens, *head.parameters()]
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    mean = head.mlp.bns[0].running_mean.clone()
    got = head(tokens, attention, *ids)
    assert got.dtype == torch.float64 and got.shape == (B, E)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for gradient, want in zip(torch.autograd.grad(got, inputs, cotangent), wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-11, atol=1e-12)
    moved = 0.9 * mean + 0.1 * hidden.mean(0) if training else mean
    torch.testing.assert_close(head.mlp.bns[0].running_mean, moved, rtol=1e-12, atol=1e-12)


@EITHER
def test_every_parameter_takes_part(modality):
    """DistributedDataParallel fails where one has no gradient."""
    head, tokens, attention, ids = make(modality)
    head(tokens, attention, *ids).sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


@EITHER
def test_the_attention_is_read_and_no_more(modality):
    head, tokens, attention, ids = make(modality)
    attention.requires_grad_()
    before = attention.detach().clone()
    value = head.eval()(tokens, attention, *ids)
    value.sum().backward()
    assert torch.equal(attention, before) and attention.grad is None
    query = ids[0].argmax(1) if ids else torch.zeros(B, dtype=torch.int64)
    assert torch.equal(head(tokens, before[torch.arange(B), query], *ids), value)  # the row is all that matters


@EITHER
def test_strides_change_nothing(modality):
    head, tokens, attention, ids = make(modality)
    value = head.eval()(tokens, attention, *ids)
    strided = tokens.detach().mT.contiguous().mT, torch.stack([attention, -attention], -1)[..., 0]
    assert not any(x.is_contiguous() for x in strided)
    torch.testing.assert_close(head(*strided, *ids), value, rtol=1e-12, atol=1e-12)
    same = head(tokens[:1].expand(B, -1, -1), attention[:1].expand(B, -1, -1), *(i[:1].expand(B, -1) for i in ids))
    torch.testing.assert_close(same, value[:1].expand(B, -1), rtol=1e-12, atol=1e-12)


def test_of_equal_attention_the_first_words_are_chosen():
    head, tokens, _, (ids,) = make("text")
    even = torch.full((B, T, T), 1 / T, dtype=torch.float64)
    got, wanted = head.eval()(tokens, even, ids), plain(head, tokens, even, ids)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    zero = torch.zeros_like(even)  # a word of no attention still comes before the padding
    torch.testing.assert_close(head(tokens, zero, ids), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_a_caption_without_words_gives_zeros(training):
    head, tokens, attention, _ = make("text")
    head.train(training)
    ids = captions([15, 0, 9, 0, 12])
    got = head(tokens, attention, ids)
    wanted = plain(copy.deepcopy(head), tokens, attention, ids)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert not got[[1, 3]].any() and got[[0, 2, 4]].all()
    got.sum().backward()
    assert_finite([tokens.grad, *(parameter.grad for parameter in head.parameters())])
    if not training:
        assert not tokens.grad[[1, 3]].any()


def test_what_is_not_chosen_may_hold_anything():
    head, tokens, attention, (ids,) = make("text")
    value = head.eval()(tokens, attention, ids)
    poisoned = tokens.detach().masked_fill((ids == 0)[..., None], math.nan).requires_grad_()
    got = head(poisoned, attention, ids)
    assert torch.equal(got, value)
    got.sum().backward()
    assert_finite([poisoned.grad, *(parameter.grad for parameter in head.parameters())])


def test_nan_comes_out_as_nan():
    head, tokens, attention, _ = make("image")
    attention[1, 0, 3] = math.nan
    got = head.eval()(tokens, attention)
    assert got[1].isnan().all() and got[[0, 2, 3, 4]].isfinite().all()
    attention[1, 0, 3] = 1.0
    tokens = tokens.detach()
    tokens[1, 3] = math.nan
    assert head(tokens, attention)[1].isnan().all()


@EITHER
def test_zero_and_huge_tokens(modality):
    head, tokens, attention, ids = make(modality, torch.float32)
    zero = torch.zeros(B, T, D, requires_grad=True)
    head.eval()(zero, attention, *ids).sum().backward()
    assert_finite([zero.grad])
    assert zero.grad.abs().max() < 1e3
    for length in (2.0**66, 2.0**-10):
        torch.testing.assert_close(
            head(tokens * length, attention, *ids), head(tokens, attention, *ids), rtol=1e-4, atol=1e-5
        )


@EITHER
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_are_float32_at_least(modality, dtype):
    """Of rounded inputs, the result is as exact as float32 makes it."""
    head, tokens, attention, ids = make(modality, torch.float32)
    tokens, attention = tokens.detach().to(dtype).requires_grad_(), attention.to(dtype)
    got = head(tokens, attention, *ids)
    wide = copy.deepcopy(head).double()
    leaf = tokens.detach().double().requires_grad_()
    expected = plain(wide, leaf, attention.double(), *ids)[0]
    assert got.dtype == torch.float32
    cotangent = torch.randn_like(got)
    (wanted,) = torch.autograd.grad(expected, leaf, cotangent.double())
    (gradient,) = torch.autograd.grad(got, tokens, cotangent)
    assert_close([got], [expected], 1e-5)
    assert_close([gradient], [wanted], 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


def rounded_as_rde(head):
    for module in head.modules():
        if isinstance(module, nn.Linear):
            module.half()
    return head


@EITHER
@pytest.mark.parametrize("convert", [rounded_as_rde, lambda head: head.half(), lambda head: head.bfloat16()])
def test_weights_in_half_precision(modality, convert):
    """As RDE has them, half Linear beside float32 batch norm, and all in one dtype."""
    head, tokens, attention, ids = make(modality, torch.float32)
    value = head.eval()(tokens, attention, *ids)
    low = convert(copy.deepcopy(head))
    got = low(tokens.half(), attention.half(), *ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, value, rtol=0.1, atol=0.1)
    low.train()(tokens.half(), attention.half(), *ids).sum().backward()
    assert_finite([parameter.grad for parameter in low.parameters()])


def test_autocast():
    head, tokens, attention, ids = make("text", torch.float32)
    value = head.eval()(tokens, attention, *ids)
    with torch.autocast("cpu", torch.bfloat16):
        got = head(tokens, attention, *ids)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, value, rtol=0.1, atol=0.1)


@EITHER
@pytest.mark.parametrize("training", [False, True])
def test_the_host_reads_no_value(modality, training):
    """Tensors of the meta device have none."""
    head, tokens, attention, ids = make(modality)
    head.to("meta").train(training)
    inputs = [x.detach().to("meta") for x in (tokens, attention, *ids)]
    assert head(*inputs).shape == (B, E)
    if modality == "text":
        assert head(*inputs[:2], mask=inputs[2] != 0).shape == (B, E)


# --- other tokenizers, masks, sizes


def test_a_mask_takes_the_place_of_the_ids():
    """Of a tokenizer that pads with the end token, and of one that pads on the left."""
    head, tokens, attention, (ids,) = make("text")
    value = head.eval()(tokens, attention, ids)
    assert torch.equal(head(tokens, attention, mask=ids != 0), value)
    shift = (ids == 0).sum(1)
    place = (torch.arange(T) - shift[:, None]) % T
    left = tokens.gather(1, place[..., None].expand(-1, -1, D))
    rows = attention.gather(1, place[..., None].expand(-1, -1, T)).gather(2, place[:, None].expand(-1, T, -1))
    torch.testing.assert_close(head(left, rows, mask=(ids != 0).gather(1, place)), value, rtol=1e-12, atol=1e-12)


def test_patches_that_are_left_out():
    head, tokens, attention, _ = make("image")
    mask = torch.rand(B, T) > 0.4
    mask[3] = False
    got = head.eval()(tokens, attention, mask=mask)
    kept = attention.masked_fill(~mask[:, None], 0)
    enough = mask[:, 1:].sum(1) >= 4
    torch.testing.assert_close(got[enough], plain(head, tokens, kept)[0][enough], rtol=1e-12, atol=1e-12)
    assert not got[3].any()
    mask[:, 0] = ~mask[:, 0]  # [CLS] is never chosen
    assert torch.equal(head(tokens, attention, mask=mask), got)


@pytest.mark.parametrize(("modality", "size", "k"), [("text", 77, 22), ("image", 193, 57), ("image", 2, 1)])
def test_how_many_tokens_are_chosen(modality, size, k):
    """Those that have a gradient; RDE's sizes."""
    head = TokenSelection(modality, 8, 600, 1.0 if size == 2 else 0.3).double().eval()
    tokens = torch.randn(2, size, 8, dtype=torch.float64, requires_grad=True)
    attention = torch.rand(2, size, size, dtype=torch.float64)
    ids = (captions([size - 2] * 2, size),) if modality == "text" else ()
    head(tokens, attention, *ids).sum().backward()
    best = attention[:, 0 if modality == "image" else -1].clone()
    best[:, [0, -1] if modality == "text" else 0] = -1
    assert (tokens.grad.abs().sum(2) > 0).sum() <= 2 * k
    chosen = torch.zeros(2, size, dtype=torch.bool).scatter(1, best.topk(k).indices, True)
    assert not tokens.grad[~chosen].any()
    tokens.grad = None
    head.mlp.layers[1].weight.data.zero_()
    head(tokens, attention, *ids).sum().backward()
    assert tokens.grad[chosen].any(-1).float().mean() > 0.9  # of 600 maxima, each chosen token has some


def test_a_batch_of_one():
    head, tokens, attention, (ids,) = make("text")
    value = head.eval()(tokens, attention, ids)
    torch.testing.assert_close(head(tokens[:1], attention[:1], ids[:1]), value[:1], rtol=1e-12, atol=1e-12)


# --- checkpoints


def checkpoint_of_rde():
    """Names and shapes of a published state dict: both layers with what they never call, and the backbone."""
    entries = {"base_model.visual.proj": torch.randn(3, 3), "base_model.ln_final.weight": torch.randn(3)}
    for prefix, residuals in (("visul_emb_layer", ("linear", "fc")), ("texual_emb_layer", ("linear",))):
        for name in residuals:
            entries |= {f"{prefix}.{name}.weight": torch.randn(E, D).half(), f"{prefix}.{name}.bias": torch.randn(E)}
        for index, (width, into) in enumerate([(D, E // 2), (E // 2, E)]):
            layer, norm = f"{prefix}.mlp.layers.{index}", f"{prefix}.mlp.bns.{index}"
            entries |= {f"{layer}.weight": torch.randn(into, width).half(), f"{layer}.bias": torch.randn(into).half()}
            entries |= {f"{norm}.{name}": torch.rand(into) for name in ("weight", "bias", "running_mean")}
            entries |= {f"{norm}.running_var": torch.rand(into) + 1, f"{norm}.num_batches_tracked": torch.tensor(7)}
    return entries


@EITHER
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": {f"module.{n}": v for n, v in x.items()}}])
def test_published_checkpoints_load(modality, wrap):
    entries = checkpoint_of_rde()
    prefix = "visul_emb_layer." if modality == "image" else "texual_emb_layer."
    head = TokenSelection(modality, D, E)
    report = head.load_rde_state_dict(wrap(entries))
    assert not report.missing and set(report.loaded) == set(head.state_dict())
    assert len(report.ignored) == len(entries) - len(report.loaded)
    for name, value in head.state_dict().items():
        assert torch.equal(value, entries[prefix + name].to(value.dtype)), name
    alone = TokenSelection(modality, D, E)
    own = {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
    assert not alone.load_rde_state_dict(own).missing
    assert_close(list(alone.state_dict().values()), list(head.state_dict().values()), 0)


def test_a_model_with_both_loads_strictly():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.visul_emb_layer = TokenSelection("image", D, E)
            self.texual_emb_layer = TokenSelection("text", D, E)

    entries = {name: value for name, value in checkpoint_of_rde().items() if not name.startswith("base_model")}
    names, model = list(entries), Model()
    model.load_state_dict(entries)
    assert list(entries) == names
    assert torch.equal(model.visul_emb_layer.fc.bias, entries["visul_emb_layer.fc.bias"])
    with pytest.raises(RuntimeError, match="Unexpected"):
        model.load_state_dict({**entries, "texual_emb_layer.mlp.layers.2.weight": torch.ones(1)})


def test_a_checkpoint_of_another_size():
    head = TokenSelection("text", D, 2 * E)
    before = copy.deepcopy(head.state_dict())
    with explains(ValueError, "shapes of the head", "linear.weight", ("input_dim", "embed_dim")):
        head.load_rde_state_dict(checkpoint_of_rde())
    assert_close(list(head.state_dict().values()), list(before.values()), 0)
    assert not head.load_rde_state_dict({"a": torch.ones(1)}).loaded


# --- what must keep working


@EITHER
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [False, True])
def test_compiled_whole(modality, training):
    head, tokens, attention, ids = make(modality)
    head.train(training)
    expected = copy.deepcopy(head)(tokens, attention, *ids)
    (wanted,) = torch.autograd.grad(expected.sum(), tokens)
    got = torch.compile(head, fullgraph=True, backend="aot_eager")(tokens, attention, *ids)
    (gradient,) = torch.autograd.grad(got.sum(), tokens)
    assert_close([got, gradient], [expected, wanted], 1e-12)
    torch._dynamo.reset()


@EITHER
@pytest.mark.filterwarnings("ignore")
def test_export_with_a_dynamic_batch(modality):
    head, tokens, attention, ids = make(modality)
    size = torch.export.Dim("size", min=2, max=200)
    inputs = (tokens.detach(), attention, *ids)
    exported = torch.export.export(head.eval(), inputs, dynamic_shapes={
        "tokens": {0: size}, "attention": {0: size}, **({"token_ids": {0: size}} if ids else {})
    })  # fmt: skip
    for rows in (slice(0, 2), slice(None)):
        part = [x[rows] for x in inputs]
        torch.testing.assert_close(exported.module()(*part), head(*part))


@EITHER
@pytest.mark.filterwarnings("ignore")
def test_torch_func(modality):
    head, tokens, attention, ids = make(modality)
    head.eval()

    def loss(x):
        return head(x, attention, *ids).sum()

    (wanted,) = torch.autograd.grad(loss(tokens), tokens)
    torch.testing.assert_close(torch.func.grad(loss)(tokens.detach()), wanted)
    direction = torch.randn_like(tokens)
    _, along = torch.func.jvp(loss, (tokens.detach(),), (direction,))
    torch.testing.assert_close(along, (wanted * direction).sum())


@EITHER
def test_copies(modality):
    head, tokens, attention, ids = make(modality)
    value = head.eval()(tokens, attention, *ids)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other(tokens, attention, *ids), value)
        assert other.ratio == 0.3 and repr(other) == repr(head)


@pytest.mark.parametrize(
    ("modality", "change", "error", "parts"),
    [
        ("text", {"tokens": torch.zeros(B, T)}, ValueError, ("tokens must have shape [B T D]", "[5, 17]", ())),
        ("text", {"tokens": torch.zeros(B, T, D).long()}, TypeError, ("tokens", "int64", ".float()")),
        ("text", {"tokens": torch.zeros(B, T, 3)}, ValueError, ("input_dim = 12", "[5, 17, 3]", "input_dim=3")),
        ("image", {"attention": torch.zeros(B, 2, T, T)}, ValueError, ("[B T T]", "[5, 2, 17, 17]", "mean(1)")),
        ("image", {"attention": torch.zeros(B, T, 3)}, ValueError, ("[5, 17, 17]", "[5, 17, 3]")),
        ("image", {"attention": torch.zeros(B, 3)}, ValueError, ("[5, 17]", "[5, 3]")),
        ("image", {"attention": None}, TypeError, ("attention must be a tensor", "None", ())),
        ("image", {"attention": torch.full((B, T, T), -0.5)}, ValueError, (">= 0", "-0.5", "need_weights")),
        ("image", {"attention": torch.zeros(B, T, T, device="meta")}, ValueError, ("one device", "meta", ())),
        ("image", {"token_ids": captions()}, ValueError, ("token_ids", "int64 [5, 17]", "'text'")),
        ("image", {"mask": torch.ones(B, T)}, TypeError, ("mask must be a boolean", "float32", ".bool()")),
        ("text", {"token_ids": None}, ValueError, ("either token_ids or mask", "none", "tokenizer")),
        ("text", {"mask": captions() != 0}, ValueError, ("either token_ids or mask", "both", "tokenizer")),
        ("text", {"token_ids": captions()[:3]}, ValueError, ("[5, 17]", "[3, 17]")),
        ("text", {"token_ids": captions().float()}, TypeError, ("token_ids must be an integer", "float32", ".long()")),
    ],
)
def test_bad_input_says_what_to_change(modality, change, error, parts):
    arguments = {"tokens": torch.randn(B, T, D), "attention": torch.zeros(B, T, T)}
    if modality == "text":
        arguments["token_ids"] = captions()
    with explains(error, *parts):
        TokenSelection(modality, D, E)(**(arguments | change))


def test_bad_hyperparameters():
    for ratio in (-0.1, 0, 1.5):
        with pytest.raises(ValueError, match=r"ratio must (be a finite number > 0|lie in \[0, 1\])"):
            TokenSelection("text", ratio=ratio)
    with pytest.raises(ValueError, match="modality must be one of 'image', 'text', got 'video'"):
        TokenSelection("video")
    with explains(ValueError, ("ratio", "one token"), "0.05", "raise it"):
        TokenSelection("image", D, E, 0.05)(torch.zeros(B, T, D), torch.zeros(B, T, T))
