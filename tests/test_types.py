"""What a type checker tells a user, and what repr shows of a module."""

import inspect
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

import fmfa_losses
from fmfa_losses import ASDMLoss, EFALoss, FMFALoss, IDHead, IRRHead, NegativesQueue, TRLLoss
from fmfa_losses.ops import options as _options

ROOT = Path(__file__).parents[1]

RIGHT = """
from typing import assert_type

import torch
from torch import Tensor

import fmfa_losses as f
from fmfa_losses import functional as F

x, tokens, pids = torch.randn(4, 64), torch.randn(4, 3, 64), torch.arange(4)
assert_type(f.ASDMLoss(positive="any", gather="ring")(x, x, pids), Tensor)
assert_type(f.SDMLoss(eps=1e-6)(x, x, pids), Tensor)
assert_type(f.EFALoss(negatives="different_identity", gather=True)(tokens, tokens), Tensor)
assert_type(f.ITCLoss(targets="identity")(x, x, pids), Tensor)
assert_type(f.ITCLoss(softlabel_ratio=0.5)(x, x, momentum_features=(x, x)), Tensor)
assert_type(f.SDMLoss()(x, x, soft_targets=torch.ones(4, 4)), Tensor)
assert_type(f.RITCLoss()(x, x, pids, soft_targets=lambda scores, positive: scores.exp() * positive), Tensor)
assert_type(f.CITCLoss(0.25, lambda2=0.5)(x, x), Tensor)
assert_type(f.SimCLRLoss(0.1)(x, x, logit_scale=torch.ones(())), Tensor)
assert_type(f.CMPMLoss(normalize="released")(x, x, pids), Tensor)
assert_type(f.TALLoss(reduction="none")(x, x, pids), Tensor)
assert_type(f.TRLLoss(negatives="released")(x, x, pids), Tensor)
assert_type(f.TripletLoss(negatives="all")(x, x), Tensor)
assert_type(f.SigmoidLoss(positives="paired")(x, x), Tensor)
assert_type(f.IDHead(64, 10)(x, x, pids), f.IDOutput)
assert_type(f.IRRHead(64, 10)(tokens, tokens, pids).accuracy, Tensor)
assert_type(f.TokenSelection("image", 64)(tokens, tokens[..., :3]), Tensor)
objective = f.FMFALoss.for_dataset("RSTPReid", 64, 10, gather=bool(x.numel()))
assert_type(objective(x, x, tokens, tokens, pids), f.FMFAOutput)
assert_type(objective.asdm.alpha, float)
assert_type(F.asdm_loss(x, x, pids, backend="torch"), Tensor)
"""

WRONG = """
import torch

import fmfa_losses as f
from fmfa_losses import functional as F

x, pids, option = torch.randn(4, 64), torch.arange(4), str("mean")
f.ASDMLoss(positive="first")
f.ASDMLoss(reduction=option)
f.EFALoss(gather="rings")
f.TRLLoss(negatives="all")
f.FMFALoss(64, 10, vocabsize=5)
f.FMFALoss(64, 10, backend="tirton")
f.FMFALoss.for_dataset("MSMT17", 64, 10)
F.itc_loss(x, x, targets="pairs")
f.ASDMLoss()(x, x)
f.ASDMLoss()(x, x, pids, image_id=pids)
f.IDHead(64, 10)(x, x, pids).accuracy
f.ITCLoss(softlabel_ratio=0.5)(x, x, momentum_features=x)
f.CITCLoss()(x, x, pids)
f.TokenSelection("video")
"""


def lines_with_errors(code: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], str]:
    from mypy import api

    monkeypatch.chdir(ROOT)
    path.write_text(code)
    out, crash, _ = api.run(["--config-file", str(ROOT / "pyproject.toml"), "--python-version", "3.11", str(path)])
    assert not crash, crash
    lines = code.splitlines()
    return {lines[int(number) - 1] for number in re.findall(rf"{path.name}:(\d+): error", out)}, out


def test_a_type_checker_knows_what_a_module_returns(tmp_path, monkeypatch):
    wrong, out = lines_with_errors(RIGHT, tmp_path / "right.py", monkeypatch)
    assert not wrong, out
    assert "Success" in out, out


def test_a_type_checker_finds_misspelt_options_and_keywords(tmp_path, monkeypatch):
    wrong, out = lines_with_errors(WRONG, tmp_path / "wrong.py", monkeypatch)
    assert wrong == {line for line in WRONG.splitlines() if line.startswith(("f.", "F."))}, out


def test_every_option_is_checked_against_its_type():
    types = {name: value for name, value in vars(_options).items() if name[0].isupper() and not name.isupper()}
    values = {name: value for name, value in vars(_options).items() if isinstance(value, tuple)}
    for name, options in values.items():
        assert options == _options.GATHER or options in [get_args(one) for one in types.values()], name


MODULES = [
    one
    for one in map(vars(fmfa_losses).get, fmfa_losses.__all__)
    if isinstance(one, type) and issubclass(one, torch.nn.Module)
]
SIZES = {"embed_dim": 64, "num_identities": 5, "vocab_size": 11, "modality": "text", "batches": 2}
# For every argument, a value that is not its default; what a part shows, in the words of the part.
OTHER = {
    "temperature": 0.5, "alpha": 3.0, "margin": 0.75, "margin_text": 0.75, "margin_image": 0.25, "pool_scale": 2.0,
    "sparsity": 0.125, "bias": -3.0, "eps": 1e-6, "image_id_factor": 0.75, "detach_weight": True, "check_labels": True,
    "mutual_neighbors": 3, "equal_batches": True, "reduction": "sum", "positive": "any",
    "normalize": "released", "targets": "identity", "positives": "paired", "gather": "ring",
    "backend": "torch", "depth": 3, "num_heads": 2, "ignore_index": -100, "max_masked": 9, "weights": {"efa": 0.5},
    "input_dim": 64,
    **SIZES,
}  # fmt: skip
BY_PARTS = {
    (IDHead, "embed_dim"): "in_features=64",
    (IDHead, "num_identities"): "out_features=5",
    (FMFALoss, "num_identities"): "out_features=5",
    (FMFALoss, "asdm"): ({"alpha": 3.0}, "ASDMLoss(alpha=3.0)"),
    (FMFALoss, "efa"): ({"margin_text": 0.75}, "EFALoss(margin_text=0.75)"),
    (FMFALoss, "irr"): ({"depth": 1}, "depth=1"),
}


def arguments(module: type) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(module.__init__).parameters.items())[1:])


def another(one: inspect.Parameter) -> object:
    """A value that is not the default, for an argument without an entry above."""
    if isinstance(one.default, bool):
        return not one.default
    if isinstance(one.default, float):
        return one.default / 2 or 0.5
    return next((option for option in get_args(one.annotation) if option != one.default), None)


def required(module: type) -> dict[str, object]:
    return {name: SIZES[name] for name, one in arguments(module).items() if one.default is inspect.Parameter.empty}


@pytest.mark.parametrize("module", MODULES)
def test_repr_shows_every_argument_that_is_not_at_its_default(module):
    assert len(MODULES) >= 12
    for name, one in arguments(module).items():
        if name == "process_group":
            value, shown = object(), "process_group=..."
        elif name == "negatives":
            value = {"TRLLoss": "released", "TripletLoss": "all"}.get(module.__name__, "different_identity")
            shown = f"negatives={value!r}"
        elif name == "gather" and module is NegativesQueue:  # which has no ring
            value, shown = True, "gather=True"
        else:
            value = OTHER[name] if name in OTHER else another(one)
            shown = BY_PARTS.get((module, name), f"{name}={value!r}")
            if isinstance(shown, tuple):
                value, shown = shown
        assert shown in repr(module(**(required(module) | {name: value}))), name


@pytest.mark.parametrize("module", [one for one in MODULES if not required(one) and one is not IRRHead])
def test_repr_of_defaults_is_the_name(module):
    assert repr(module()) == f"{module.__name__}()"


def test_repr_follows_attributes_and_subclasses():
    class Ours(ASDMLoss):
        def __init__(self, beta: float, **others):
            super().__init__(alpha=3.0, **others)
            self.beta = beta

    assert repr(Ours(2.0, eps=1e-6)) == "Ours(alpha=3.0, eps=1e-06, beta=2.0)"
    loss = EFALoss(0.2, gather=True)
    loss.gather, loss.temperature = False, 2.0
    assert repr(loss) == "EFALoss(margin_text=0.2, temperature=2.0)"
    assert repr(TRLLoss(margin=torch.tensor(0.25).numpy())) == "TRLLoss(margin=0.25)"


def test_repr_of_the_objective():
    first = repr(FMFALoss(64, 5, vocab_size=11, irr={"depth": 1}, weights={"id": 0, "efa": 0.5, "asdm": 1}))
    assert first.startswith("FMFALoss(\n  weights={'id': 0.0, 'efa': 0.5}\n  (asdm): ASDMLoss()\n  (efa): EFALoss()\n")
    assert repr(FMFALoss(64, 5, irr={"depth": 1})).startswith("FMFALoss(\n  (asdm): ASDMLoss()\n")
