"""IRRHead against the golden values, and against a dense head on PyTorch's own attention."""

import copy

import pytest
import torch
from helpers.irr_head import (
    B,
    D,
    L,
    V,
    assert_same,
    call,
    dense,
    golden_head,
    gradients,
    make_head,
    make_inputs,
    make_text_mask,
)
from torch import Tensor, nn

from fmfa_losses.heads.irr import IRRHead
from fmfa_losses.ops import linear_cross_entropy


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("static", [False, True])
def test_golden_value_gradients_and_logits(dtype, tolerance, static):
    head, arrays = golden_head(dtype)
    image, text = (arrays[name].to(dtype).requires_grad_() for name in ("image", "text"))
    logits = []
    head.mlm_head.register_forward_hook(lambda module, args, out: logits.append(out))
    out = call(head, image, text, arrays["labels"], static=static)
    expected = {f"{name}": arrays[f"grad_state/{name}"] for name, _ in head.named_parameters()}
    expected |= {"input 0": arrays["grad_image"], "input 1": arrays["grad_text"]}

    assert out.loss.dtype == dtype
    torch.testing.assert_close(out.loss.double(), arrays["loss"], rtol=tolerance, atol=0)
    torch.testing.assert_close(out.accuracy.double(), arrays["acc"], rtol=tolerance, atol=0)
    assert_same(gradients(head, out.loss, image, text), expected, tolerance)

    masked = torch.cat(logits)[: int((arrays["labels"] != 0).sum())]  # masked rows come first
    assert_same({"logits": masked}, {"logits": arrays["masked_logits"]}, tolerance)


def in_blocks(monkeypatch, blocks):
    """So many rows and columns of logits at once; as many as ever where it is None."""
    if blocks is not None:
        monkeypatch.setattr(linear_cross_entropy, "BLOCK", 1)
        monkeypatch.setattr(linear_cross_entropy, "ROWS", blocks[0])
        monkeypatch.setattr(linear_cross_entropy, "COLUMNS", blocks[1])


# --- exact: against the dense head ----------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("blocks", [None, (2, 7), (5, 16)])
def test_equals_the_dense_head(monkeypatch, padded, static, blocks):
    in_blocks(monkeypatch, blocks)
    head, (image, text, labels) = make_head(), make_inputs()
    text_mask = make_text_mask() if padded else None
    expected = dense(head, image, text, labels, text_mask)
    out = call(head, image, text, labels, text_mask, static=static)
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
    assert call(head, image, text, labels, static=True).accuracy == 0


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
        exact, out = head(image, text, labels), call(head, image, text, labels, static=True)
        assert seen == [masked, min(bound, B * L)]
        torch.testing.assert_close(out.loss, exact.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(out.accuracy, exact.accuracy)
        assert_same(gradients(head, out.loss, image, text), gradients(head, exact.loss, image, text), 1e-11)


def test_more_than_max_masked_is_nan_and_never_a_truncation():
    image, text, labels = make_inputs()
    head = make_head(max_masked=int((labels != 0).sum()) - 1)
    out = call(head, image, text, labels, static=True)
    assert out.loss.isnan()
    assert out.accuracy.isnan()
    assert torch.autograd.grad(out.loss, head.mlm_head.fc.weight)[0].isnan().any()
    assert head(image, text, labels).loss.isfinite(), "labels on the CPU need no bound"


def test_padded_labels_do_not_count_against_max_masked():
    image, text, _ = make_inputs()
    text_mask = make_text_mask()
    head = make_head(max_masked=int(text_mask.sum()))
    labels = torch.full((B, L), 5)
    out, exact = (call(head, image, text, labels, text_mask, static=static) for static in (True, False))
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
        lambda *args: tuple(head(*args, text_mask=make_text_mask())), fullgraph=True, backend="aot_eager"
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
    with pytest.raises(RuntimeError, match=r"trace.* IRRHead.*use torch.compile"):
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


@pytest.mark.parametrize("blocks", [None, (2, 7)])
def test_an_adapter_in_the_stead_of_any_linear_module_is_called(monkeypatch, blocks):
    in_blocks(monkeypatch, blocks)
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


@pytest.mark.parametrize("name", [*LINEAR, "mlm_head"])
def test_a_forward_that_is_set_on_a_part_is_called(name):
    """The way of those who off-load weights: the module stays, its `forward` is another."""
    head, inputs = make_head(), make_inputs()
    before = head(*inputs).loss.item()
    part = head.get_submodule(name)
    own = part.forward
    part.forward = lambda x: own(x) + own(x).sin()
    assert head(*inputs).loss.item() != before


def test_hooks_of_all_modules_see_every_part():
    head, inputs, seen = make_head(), make_inputs(), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    head(*inputs)
    hook.remove()
    assert all(part in seen for part in (head.mlm_head, *head.mlm_head))


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


def test_random_parts_of_the_vocabulary_get_the_gradient_of_the_forward_that_was():
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


def test_a_head_without_adapters_keeps_no_logits():
    head, (image, text, labels) = make_head(), make_inputs()
    labels = torch.full_like(labels, 3)  # more rows than have their logits kept
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        head(image, text, labels)
    weights = {parameter.data_ptr() for parameter in head.parameters()}
    assert len(kept) > 10
    assert not [x.shape for x in kept if V in x.shape and x.data_ptr() not in weights]
