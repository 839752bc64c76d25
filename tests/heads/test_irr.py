"""IRRHead against the golden values, against a dense head on PyTorch's own attention, and at its edges."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.golden import load
from torch import Tensor, nn

from fmfa_losses.heads import irr
from fmfa_losses.heads.irr import IRRHead, IRROutput

B, N, L, D, V = 3, 5, 7, 16, 31


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_head(dtype: torch.dtype = torch.float64, **kwargs) -> IRRHead:
    return IRRHead(D, V, **{"depth": 2, "num_heads": 2, **kwargs}).to(dtype)


def make_inputs(
    dtype: torch.dtype = torch.float64, b: int = B, n: int = N, l: int = L
) -> tuple[Tensor, Tensor, Tensor]:
    image = torch.randn(b, n, D).to(dtype).requires_grad_()
    text = torch.randn(b, l, D).to(dtype).requires_grad_()
    labels = torch.where(torch.rand(b, l) < 0.4, torch.randint(1, V, (b, l)), 0)
    labels[0, 0] = 3
    return image, text, labels


def make_text_mask() -> Tensor:
    return torch.arange(L) < torch.tensor([[L], [4], [2]])


def dense(head: IRRHead, image: Tensor, text: Tensor, labels: Tensor, text_mask: Tensor | None = None) -> IRROutput:
    """Every position through every block, through PyTorch's own multi-head attention, and through the vocabulary."""
    attend = nn.MultiheadAttention.forward
    padding = None if text_mask is None else ~text_mask
    context = head.ln_pre_i(image)
    x = attend(head.cross_attn, head.ln_pre_t(text), context, context, need_weights=False)[0]
    for block in head.cross_modal_transformer.resblocks:
        y = block.ln_1(x)
        x = x + attend(block.attn, y, y, y, key_padding_mask=padding, need_weights=False)[0]
        x = x + block.mlp(block.ln_2(x))
    logits = head.mlm_head(head.ln_post(x)).flatten(0, 1)
    targets = (labels if text_mask is None else labels * text_mask).flatten()
    masked = targets != 0
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, ignore_index=0)
    return IRROutput(loss, (logits.argmax(1) == targets)[masked].double().mean())


def gradients(head: IRRHead, loss: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    named = {**dict(head.named_parameters()), **{f"input {i}": x for i, x in enumerate(inputs)}}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest entry of each tensor; 1e-15 for gradients that are zero but for rounding."""
    assert got.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max().item()
        error = (got[name].double() - expected[name].double()).abs().max().item()
        assert error <= tolerance * scale + 1e-15, f"{name}: {error} of {scale}"


# --- golden ---------------------------------------------------------------------------------------------------------


def golden_head(dtype: torch.dtype) -> tuple[IRRHead, dict[str, Tensor]]:
    arrays = {
        name: torch.from_numpy(value) if value.ndim else torch.tensor(value) for name, value in load("irr_head").items()
    }
    state = {name.removeprefix("state/"): value for name, value in arrays.items() if name.startswith("state/")}
    head = IRRHead(64, 53, depth=2).to(dtype)
    head.load_state_dict(state, strict=True)
    return head, arrays


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("static", [False, True])
def test_golden_value_gradients_and_logits(dtype, tolerance, static):
    head, arrays = golden_head(dtype)
    image, text = (arrays[name].to(dtype).requires_grad_() for name in ("image", "text"))
    out = head._forward(image, text, arrays["labels"], None, static)
    expected = {f"{name}": arrays[f"grad_state/{name}"] for name, _ in head.named_parameters()}
    expected |= {"input 0": arrays["grad_image"], "input 1": arrays["grad_text"]}

    assert out.loss.dtype == dtype
    torch.testing.assert_close(out.loss.double(), arrays["loss"], rtol=tolerance, atol=0)
    torch.testing.assert_close(out.accuracy.double(), arrays["acc"], rtol=tolerance, atol=0)
    assert_same(gradients(head, out.loss, image, text), expected, tolerance)

    rows = (arrays["labels"].flatten() != 0).nonzero().squeeze(1)
    logits = head.mlm_head(head._encode(image, text, None, rows))
    assert_same({"logits": logits}, {"logits": arrays["masked_logits"]}, tolerance)


# --- exact: against the dense head ----------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("chunk", [1024, 2])
def test_equals_the_dense_head(monkeypatch, padded, static, chunk):
    monkeypatch.setattr(irr, "CHUNK_ROWS", chunk)
    head, (image, text, labels) = make_head(), make_inputs()
    text_mask = make_text_mask() if padded else None
    expected = dense(head, image, text, labels, text_mask)
    out = head._forward(image, text, labels, text_mask, static)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)
    assert out.accuracy.item() == pytest.approx(expected.accuracy.item(), abs=1e-7)
    assert not out.accuracy.requires_grad
    assert_same(gradients(head, out.loss, image, text), gradients(head, expected.loss, image, text), 1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_stay_within_the_error_of_the_dense_head(dtype):
    head, (image, text, labels) = make_head(), make_inputs()
    exact = gradients(head, head(image, text, labels).loss, image, text)
    head.to(dtype)
    for module in head.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()  # as IRRA trains
    image, text = (x.detach().to(dtype).requires_grad_() for x in (image, text))
    out, plain = head(image, text, labels), dense(head, image, text, labels)
    assert out.loss.dtype == torch.float32
    got, reference = (gradients(head, x.loss, image, text) for x in (out, plain))
    for name in exact:
        budget = (reference[name].double() - exact[name]).norm() * 1.2 + exact[name].norm() * torch.finfo(dtype).eps
        assert (got[name].double() - exact[name]).norm() <= budget, name


def test_gradcheck():
    head = IRRHead(4, 5, depth=1, num_heads=2).double()
    image, text = torch.randn(2, 3, 4).double().requires_grad_(), torch.randn(2, 3, 4).double().requires_grad_()
    labels, text_mask = torch.tensor([[0, 2, 4], [1, 0, 3]]), torch.tensor([[True, True, True], [True, True, False]])
    parameters = dict(head.named_parameters())

    def loss(image, text, *values):
        head_with = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(head, head_with, (image, text, labels), {"text_mask": text_mask}).loss

    assert torch.autograd.gradcheck(loss, (image, text, *parameters.values()))


def test_accuracy_is_a_fraction_of_the_masked_positions():
    head, (image, text, labels) = make_head(), make_inputs()
    labels = torch.full_like(labels, 7)
    with torch.no_grad():
        head.mlm_head.fc.bias[7] = 1e3  # every prediction is 7
    assert head(image, text, labels).accuracy == 1
    labels[0, :3] = 8
    assert head(image, text, labels).accuracy.item() == pytest.approx(1 - 3 / labels.numel())


def test_predicting_the_ignored_id_at_an_unmasked_position_is_not_a_hit():
    head, (image, text, labels) = make_head(), make_inputs()
    with torch.no_grad():
        head.mlm_head.fc.bias[0] = 1e3  # every prediction is the ignore_index
    assert head._forward(image, text, labels, None, True).accuracy == 0


# --- the vocabulary is met by the masked rows alone, and nobody waits -------------------------------------------------


def rows_projected(head: IRRHead) -> list[int]:
    seen: list[int] = []
    head.mlm_head.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    return seen


def test_only_masked_rows_meet_the_vocabulary():
    head, (image, text, labels) = make_head(), make_inputs()
    seen = rows_projected(head)
    head(image, text, labels)
    assert seen == [int((labels != 0).sum())]


def test_max_masked_bounds_the_static_rows_and_is_exact_up_to_the_bound():
    image, text, labels = make_inputs()
    masked = int((labels != 0).sum())
    for bound in (masked, masked + 2, 10 * B * L):
        head = make_head(max_masked=bound)
        seen = rows_projected(head)
        exact, out = head(image, text, labels), head._forward(image, text, labels, None, True)
        assert seen == [masked, min(bound, B * L)]
        torch.testing.assert_close(out.loss, exact.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(out.accuracy, exact.accuracy)
        assert_same(gradients(head, out.loss, image, text), gradients(head, exact.loss, image, text), 1e-11)


def test_more_than_max_masked_is_nan_and_never_a_truncation():
    image, text, labels = make_inputs()
    head = make_head(max_masked=int((labels != 0).sum()) - 1)
    out = head._forward(image, text, labels, None, True)
    assert out.loss.isnan()
    assert out.accuracy.isnan()
    assert torch.autograd.grad(out.loss, head.mlm_head.fc.weight)[0].isnan().any()
    assert head(image, text, labels).loss.isfinite(), "labels on the CPU need no bound"


def test_padded_labels_do_not_count_against_max_masked():
    image, text, _ = make_inputs()
    text_mask = make_text_mask()
    head = make_head(max_masked=int(text_mask.sum()))
    labels = torch.full((B, L), 5)
    out, exact = (head._forward(image, text, labels, text_mask, static) for static in (True, False))
    torch.testing.assert_close(out.loss, exact.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("max_masked", [None, 4])
@pytest.mark.parametrize("labels_on", ["cpu", "meta"])
def test_nothing_reads_values_of_an_accelerator(labels_on, max_masked):
    # Meta tensors have no values: whatever would wait for an accelerator (item, nonzero, bool) raises here.
    head = make_head(torch.float32, max_masked=max_masked).to("meta")
    image, text, labels = make_inputs(torch.float32)
    image, text = (x.detach().to("meta").requires_grad_() for x in (image, text))
    out = head(image, text, labels.to(labels_on), text_mask=make_text_mask().to("meta"))
    out.loss.backward()
    assert out.loss.shape == out.accuracy.shape == ()
    assert text.grad.shape == text.shape


def test_check_labels_looks_at_values_where_it_is_asked_to():
    head, (image, text, labels) = make_head(check_labels=True).to("meta"), make_inputs()
    with pytest.raises((RuntimeError, NotImplementedError)):  # meta tensors have no values to look at
        head(image.to("meta"), text.to("meta"), labels.to("meta"))


def test_static_path_compiles_without_a_graph_break():
    head, (image, text, labels) = make_head(torch.float32, max_masked=30), make_inputs(torch.float32)
    compiled = torch.compile(
        lambda *args: tuple(head._forward(*args, make_text_mask(), True)), fullgraph=True, backend="aot_eager"
    )
    expected = head(image, text, labels, text_mask=make_text_mask())
    loss, accuracy = compiled(image, text, labels)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(accuracy, expected.accuracy)
    assert_same(gradients(head, loss, image, text), gradients(head, expected.loss, image, text), 1e-5)


@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals, by version
@pytest.mark.parametrize("wrong", [-1, V])
def test_a_wrong_label_under_compile_is_nan_or_an_error(wrong):
    head, (image, text, labels) = make_head(torch.float32), make_inputs(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: tuple(head(*args)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image, text, labels), tuple(head(image, text, labels)))
    labels[0, 0] = wrong
    try:
        loss, accuracy = compiled(image, text, labels)
    except IndexError:
        return
    assert loss.isnan() and accuracy.isnan()


@pytest.mark.filterwarnings("ignore")  # the tracer warns of what it cannot follow, and that it is deprecated
def test_a_trace_is_refused():
    head, (image, text, labels) = make_head(torch.float32), make_inputs(torch.float32)
    with pytest.raises(RuntimeError, match=r"torch.jit.trace cannot follow IRRHead.*use torch.compile"):
        torch.jit.trace(lambda image, text: head(image, text, labels).loss, (image, text))


# --- parts are called -------------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """What adapters put in a linear module's stead: the module, and a low-rank product beside it."""

    def __init__(self, base: nn.Linear, dropout: float = 0.0) -> None:
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(dropout)
        self.A = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.B = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.dropout(x) @ self.A.T @ self.B.T

    def merged(self) -> nn.Linear:
        linear = copy.deepcopy(self.base)
        linear.weight.data += self.B.data @ self.A.data
        return linear


LINEAR = [name for name, part in IRRHead(D, V, depth=2, num_heads=2).named_modules() if isinstance(part, nn.Linear)]


def replace(head: IRRHead, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(head.get_submodule(parent), child, module)


@pytest.mark.parametrize("chunk", [1024, 2])
def test_an_adapter_in_the_stead_of_any_linear_module_is_called(monkeypatch, chunk):
    monkeypatch.setattr(irr, "CHUNK_ROWS", chunk)
    head, (image, text, labels) = make_head(), make_inputs()
    adapters = {name: LoRA(head.get_submodule(name)) for name in LINEAR}
    merged = copy.deepcopy(head)
    for name, adapter in adapters.items():
        replace(head, name, adapter)
        replace(merged, name, adapter.merged())
    out, expected = head(image, text, labels), merged(image, text, labels)
    torch.testing.assert_close(out.loss, expected.loss)
    got, want = gradients(head, out.loss, image, text), gradients(merged, expected.loss, image, text)
    for name in LINEAR:
        dweight = want[f"{name}.weight"]
        want[f"{name}.A"], want[f"{name}.B"] = adapters[name].B.T @ dweight, dweight @ adapters[name].A.T
        want[f"{name}.base.weight"], want[f"{name}.base.bias"] = want.pop(f"{name}.weight"), want.pop(f"{name}.bias")
    assert_same(got, want, 1e-10)


@pytest.mark.parametrize("name", LINEAR)
def test_hooks_of_parts_run(name):
    head, inputs = make_head(), make_inputs()
    before = head(*inputs).loss.item()
    head.get_submodule(name).register_forward_hook(lambda module, args, output: output + output.sin())
    assert head(*inputs).loss.item() != before


def test_in_proj_may_be_parametrised():
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    head, inputs = make_head(), make_inputs()
    twice = copy.deepcopy(head)
    twice.cross_attn.in_proj_weight.data *= 2
    nn.utils.parametrize.register_parametrization(head.cross_attn, "in_proj_weight", Twice())
    torch.testing.assert_close(head(*inputs).loss, twice(*inputs).loss)


def test_what_replaces_a_whole_attention_module_is_no_silent_bypass():
    head, inputs = make_head(), make_inputs()
    head.cross_modal_transformer.resblocks[0].attn = nn.MultiheadAttention(D, 2, batch_first=True).double()
    with pytest.raises((TypeError, AttributeError, AssertionError, RuntimeError)):
        head(*inputs)


def test_random_parts_of_the_vocabulary_get_the_gradient_of_the_forward_that_was(monkeypatch):
    monkeypatch.setattr(irr, "CHUNK_ROWS", 2)
    head, (image, text, labels) = make_head(), make_inputs()
    head.mlm_head.fc = LoRA(head.mlm_head.fc, dropout=0.5)
    calls = rows_projected(head)

    def loss() -> Tensor:
        torch.manual_seed(5)
        return head(image, text, labels).loss

    torch.manual_seed(6)
    direction = torch.randn_like(head.mlm_head.fc.A)
    value = loss()
    torch.rand(7)  # another state of the generator than the forward had
    (grad,) = torch.autograd.grad(value, head.mlm_head.fc.A)
    assert sum(calls) == int((labels != 0).sum()), "no second forward"
    at = []
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            head.mlm_head.fc.A += step * direction
            at.append(loss().item())
            head.mlm_head.fc.A -= step * direction
    assert (grad * direction).sum().item() == pytest.approx((at[0] - at[1]) / 2e-4, rel=1e-6)


def test_a_head_without_adapters_keeps_no_logits(monkeypatch):
    monkeypatch.setattr(irr, "CHUNK_ROWS", 2)
    head, (image, text, labels) = make_head(), make_inputs()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        head(image, text, labels)
    weights = {parameter.data_ptr() for parameter in head.parameters()}
    assert not [x.shape for x in kept if x.shape[-1:] == (V,) and x.data_ptr() not in weights]


# --- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text_mask", [None, make_text_mask()])
@pytest.mark.parametrize("static", [False, True])
def test_no_masked_position_gives_zero_and_zero_gradients(static, text_mask):
    head, (image, text, labels) = make_head(), make_inputs()
    out = head._forward(image, text, torch.zeros_like(labels), text_mask, static)
    assert out.loss.item() == 0
    assert out.accuracy.item() == 0
    assert all(grad.abs().max() == 0 for grad in gradients(head, out.loss, image, text).values())


@pytest.mark.parametrize("static", [False, True])
def test_padding_changes_nothing_and_gets_no_gradient(static):
    head, (image, text, labels) = make_head(), make_inputs()
    text_mask = make_text_mask()
    out = head._forward(image, text, labels, text_mask, static)
    grads = gradients(head, out.loss, image, text)
    assert grads["input 1"][~text_mask].abs().max() == 0
    for content in (1e4, math.nan):
        other = text.detach().masked_fill(~text_mask[..., None], content).requires_grad_()
        other_labels = labels.masked_fill(~text_mask, 9)
        other_out = head._forward(image, other, other_labels, text_mask, static)
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


# --- names, initialisation, checkpoints -------------------------------------------------------------------------------


def test_parameter_names_are_those_of_irra():
    names = {name for name, _ in IRRHead(64, 53, depth=2).named_parameters()}
    assert names == {name.removeprefix("state/") for name in load("irr_head") if name.startswith("state/")}
    assert all("cross" in name or "mlm_head" in name for name in names if not name.startswith("ln_"))


def test_initialisation():
    head = IRRHead(256, 500, depth=3)
    attn, proj, fc = 256**-0.5, 256**-0.5 * 6**-0.5, 512**-0.5
    block = head.cross_modal_transformer.resblocks[1]
    for weight, std in (
        (head.cross_attn.in_proj_weight, attn),
        (head.cross_attn.out_proj.weight, proj),
        (block.attn.in_proj_weight, attn),
        (block.attn.out_proj.weight, proj),
        (block.mlp.c_fc.weight, fc),
        (block.mlp.c_proj.weight, proj),
        (head.mlm_head.dense.weight, fc),
        (head.mlm_head.fc.weight, proj),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.02)  # 4 standard errors of 65536 draws: 0.011
        assert abs(weight.mean().item()) < 0.02 * std
    assert head.num_heads == 4
    assert head.cross_attn.in_proj_bias.abs().max() == block.attn.out_proj.bias.abs().max() == 0


def test_state_dict_round_trip():
    head, other, inputs = make_head(), make_head(), make_inputs()
    assert head(*inputs).loss != other(*inputs).loss
    other.load_state_dict(head.state_dict(), strict=True)
    torch.testing.assert_close(head(*inputs).loss, other(*inputs).loss, rtol=0, atol=0)


def published(head: IRRHead) -> dict[str, object]:
    """A checkpoint as codebases publish them: nested, prefixed, half beside float, other modules, other entries."""
    weights = {
        f"module.{name}": value.half() if "ln" not in name else value.float()
        for name, value in head.state_dict().items()
    }
    return {"model": {"module.base_model.visual.proj": torch.zeros(2), **weights}, "epoch": 60, "optimizer": {}}


def test_load_irra_state_dict():
    head, other = make_head(), make_head()
    report = other.load_irra_state_dict(published(head))
    for name, value in other.state_dict().items():
        expected = head.state_dict()[name]
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, (expected.half() if "ln" not in name else expected.float()).double())
    assert set(report.loaded) == set(head.state_dict())
    assert report.missing == ()
    assert report.ignored == ("base_model.visual.proj",)
    assert str(report) == "loaded 40 of 40 tensors; ignored 1 other entries of the checkpoint"


def test_load_strips_the_prefixes_of_compile_and_ddp():
    head, other = make_head(), make_head()
    weights = {f"_orig_mod.module.{name}": value for name, value in head.state_dict().items()}
    assert other.load_irra_state_dict(weights).missing == ()


def test_load_plain_state_dict_of_the_golden_head():
    head, _ = golden_head(torch.float64)
    other = IRRHead(64, 53, depth=2)
    assert other.load_irra_state_dict(head.state_dict()).missing == ()


def test_load_reports_an_absent_and_a_partial_head():
    head = make_head()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    report = head.load_irra_state_dict({"state_dict": {"base_model.x": torch.zeros(1)}})
    assert report.loaded == ()
    assert set(report.missing) == set(before)
    assert str(report).startswith("nothing loaded: the checkpoint holds none of the 40 tensors of the head")
    partial = {name: torch.ones_like(value) for name, value in before.items() if not name.startswith("mlm_head")}
    report = head.load_irra_state_dict(partial)
    assert set(report.missing) == {name for name in before if name.startswith("mlm_head")}
    assert "mlm_head.fc.weight" in str(report)
    torch.testing.assert_close(head.mlm_head.fc.weight.data, before["mlm_head.fc.weight"])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depth": 3}, r"must have the 2 blocks of the head, got 3 .*IRRHead\(depth=3\)"),
        ({"depth": 1}, r"must have the 2 blocks of the head, got 1 .*IRRHead\(depth=1\)"),
        ({"vocab_size": 32}, r"mlm_head.fc.weight: checkpoint \[32, 16\], head \[31, 16\].*vocab_size"),
    ],
)
def test_load_of_another_shape_raises_and_changes_nothing(kwargs, message):
    head = make_head()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    other = IRRHead(D, kwargs.get("vocab_size", V), depth=kwargs.get("depth", 2), num_heads=2)
    with pytest.raises(ValueError, match=message):
        head.load_irra_state_dict(published(other))
    for name, value in head.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_load_of_no_mapping_raises():
    with pytest.raises(TypeError, match=r"must be a mapping of names to tensors, got list; pass what torch.load"):
        make_head().load_irra_state_dict([1])


# --- bad input --------------------------------------------------------------------------------------------------------


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
