"""IRRHead: names of its parameters, how they begin, and published checkpoints."""

import pytest
import torch
from helpers.errors import explains
from helpers.golden import load
from helpers.irr_head import D, V, golden_head, make_head, make_inputs

from fmfa_losses.heads.irr import IRRHead


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
    assert "mlm_head.fc.weight" in str(report) and "more" not in str(report)
    other = {name: before[name] for name in ("ln_post.weight", "ln_post.bias")}  # the transformer has another layout
    assert "and 32 more, all in report.missing; ignored 0" in str(head.load_irra_state_dict(other))
    torch.testing.assert_close(head.mlm_head.fc.weight.data, before["mlm_head.fc.weight"])


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        ({"depth": 3}, ("2 blocks", "3", "IRRHead(depth=3)")),
        ({"depth": 1}, ("2 blocks", "1", "IRRHead(depth=1)")),
        ({"vocab_size": 32}, ("shapes", ("mlm_head.fc.weight", "checkpoint [32, 16]", "head [31, 16]"), "vocab_size")),
    ],
)
def test_load_of_another_shape_raises_and_changes_nothing(kwargs, parts):
    head = make_head()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    other = IRRHead(D, kwargs.get("vocab_size", V), depth=kwargs.get("depth", 2), num_heads=2)
    with explains(ValueError, *parts):
        head.load_irra_state_dict(published(other))
    for name, value in head.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_load_of_no_mapping_raises():
    with explains(TypeError, ("state_dict", "mapping"), "list", "torch.load"):
        make_head().load_irra_state_dict([1])
