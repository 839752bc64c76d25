"""FMFALoss: the sum of its terms, the paper's presets, what it leaves out, bad input."""

import pytest
import torch
from compare import assert_finite

from fmfa_losses import ASDMLoss, EFALoss, FMFALoss

B, N, L, D, V = 4, 6, 5, 64, 30


def small(**kwargs):
    return FMFALoss(D, 10, vocab_size=V, irr={"depth": 1}, **kwargs)


def batch(masked=True):
    image, text = torch.randn(B, N, D), torch.randn(B, L, D)
    labels = torch.zeros(B, L, dtype=torch.long)
    labels[:, 2] = torch.arange(1, B + 1)
    inputs = {
        "image_features": image.mean(1).requires_grad_(),
        "text_features": text.mean(1).requires_grad_(),
        "image_tokens": image.requires_grad_(),
        "text_tokens": text.requires_grad_(),
        "pids": torch.tensor([3, 1, 3, 9]),
        "text_mask": torch.ones(B, L, dtype=torch.bool),
    }
    if masked:
        inputs |= {"masked_text_tokens": torch.randn(B, L, D, requires_grad=True), "masked_labels": labels}
    return inputs


def test_total_is_the_weighted_sum_of_the_terms():
    objective = small(weights={"efa": 0.5, "irr": 2.0})
    inputs = batch()
    out = objective(**inputs)
    assert set(out.terms) == {"id", "irr", "efa", "asdm"}
    expected = out.terms["id"] + 2 * out.terms["irr"] + 0.5 * out.terms["efa"] + out.terms["asdm"]
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(
        out.terms["asdm"], ASDMLoss()(inputs["image_features"], inputs["text_features"], inputs["pids"])
    )
    torch.testing.assert_close(
        out.terms["efa"], EFALoss()(inputs["image_tokens"], inputs["text_tokens"], text_mask=inputs["text_mask"])
    )
    tokens = torch.cat([inputs["image_features"][:, None], inputs["image_tokens"]], dim=1)
    irr = objective.irr(tokens, inputs["masked_text_tokens"], inputs["masked_labels"], text_mask=inputs["text_mask"])
    torch.testing.assert_close(out.terms["irr"], irr.loss)
    assert set(out.metrics) == {"image_accuracy", "text_accuracy", "mlm_accuracy"}
    out.loss.backward()
    assert_finite([t.grad for t in inputs.values() if t.is_floating_point() and t.requires_grad])
    assert_finite([p.grad for p in objective.parameters()])


def test_terms_left_out():
    out = small()(**batch(masked=False))
    assert set(out.terms) == {"id", "efa", "asdm"}
    out = small(weights={"id": 0, "efa": 0, "irr": 0, "asdm": 0})(**batch())
    assert out.terms == {}
    assert out.loss == 0


@pytest.mark.parametrize(
    ("name", "alpha", "margins"),
    [("CUHK-PEDES", 10.0, (0.1, 0.1)), ("ICFG-PEDES", 10.0, (0.2, 1.0)), ("RSTPReid", 1.0, (0.2, 0.8))],
)
def test_presets_are_the_papers(name, alpha, margins):
    objective = FMFALoss.for_dataset(name, D, 10, vocab_size=V, irr={"depth": 1}, efa={"pool_scale": 2.0})
    assert objective.asdm.alpha == alpha
    assert (objective.efa.margin_text, objective.efa.margin_image) == margins
    assert objective.efa.pool_scale == 2.0
    assert all(weight == 1 for weight in objective.weights.values())


def test_modules_may_be_given():
    asdm = ASDMLoss(alpha=0.0)
    assert FMFALoss.for_dataset("RSTPReid", D, 10, vocab_size=V, irr={"depth": 1}, asdm=asdm).asdm is asdm


def test_parameter_names_carry_the_parts_that_raise_the_learning_rate():
    names = [name for name, _ in small().named_parameters()]
    for part in ("cross_attn", "cross_modal_transformer", "mlm_head", "classifier"):
        assert any(part in name for name in names)


BAD = [
    (lambda: small(weights={"sdm": 1.0}), "weights must be one of 'id', 'irr', 'efa', 'asdm', got 'sdm'"),
    (lambda: FMFALoss.for_dataset("MSMT17", D, 10), "name must be one of 'CUHK-PEDES'"),
    (lambda: small()(**{**batch(), "masked_labels": None}), "come together"),
    (lambda: small()(**{**batch(), "image_tokens": torch.randn(B + 1, N, D)}), "agree in B"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
