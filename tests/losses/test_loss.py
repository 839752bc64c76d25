"""What every parameter-free loss has from its base: names for editors, copies, messages; a loss of a few lines."""

import copy
import inspect
import pickle
import sys
from dataclasses import KW_ONLY
from typing import get_type_hints

import numpy as np
import pytest
import torch
from helpers.errors import explains
from torch import Tensor

import fmfa_losses as fl
from fmfa_losses import functional
from fmfa_losses.losses.loss import Loss, hyperparameter
from fmfa_losses.losses.score_loss import ScaledScoreLoss
from fmfa_losses.ops.checks import check_fraction, check_nonnegative

PUBLIC = [x for x in map(vars(fl).get, fl.__all__) if isinstance(x, type) and issubclass(x, Loss)]
LOSSES = {loss.__name__.removesuffix("Loss").lower(): loss for loss in PUBLIC}
EVERY = pytest.mark.parametrize("name", LOSSES)
COMMON = {"reduction", "gather", "process_group", "equal_batches", "backend"}
FUNCTIONS = {name: short for name in functional.__all__ if (short := name.split("_loss")[0].replace("_", "")) in LOSSES}
OF_FEATURES = {short: getattr(functional, name) for name, short in FUNCTIONS.items() if name.endswith("_loss")}
WITH_FUNCTION = pytest.mark.parametrize("name", OF_FEATURES)


@EVERY
def test_every_loss_takes_the_same_options(name):
    loss = LOSSES[name]
    assert inspect.signature(loss).parameters.keys() >= COMMON
    assert "sample_weight" in inspect.signature(loss.forward).parameters
    has_temperature = "temperature" in inspect.signature(loss).parameters
    assert ("logit_scale" in inspect.signature(loss.forward).parameters) is has_temperature


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_of_functions_have_the_names_and_defaults_of_the_loss(name):
    function, short = getattr(functional, name), FUNCTIONS[name]
    shown, built = inspect.signature(function).parameters, inspect.signature(LOSSES[short]).parameters
    assert not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in shown.values())
    assert "peers" not in shown and {"sample_weight", "reduction"} <= shown.keys()
    for option, one in built.items():
        if name.endswith("_from_scores") and option in COMMON - {"reduction"}:
            assert option not in shown
        else:
            assert shown[option].default == one.default and shown[option].kind is inspect.Parameter.KEYWORD_ONLY


@WITH_FUNCTION
def test_type_checkers_are_told_every_keyword_of_the_function(name):
    """The TypedDict beside a loss says its names a second time, for type checkers; here they are compared."""
    prefix = LOSSES[name].__name__.removesuffix("Loss")
    hints = get_type_hints(getattr(sys.modules[LOSSES[name].__module__], f"{prefix}Options"))
    shown = inspect.signature(OF_FEATURES[name]).parameters
    keywords = {word: one for word, one in shown.items() if one.kind is inspect.Parameter.KEYWORD_ONLY}
    assert hints.keys() == keywords.keys()
    declared = get_type_hints(LOSSES[name])
    assert all(hints[word] == declared[word] for word in hints.keys() & declared.keys())


@EVERY
def test_copies_and_pickles_are_equal(name):
    loss = LOSSES[name](reduction="sum", equal_batches=True)
    for copied in (copy.deepcopy(loss), copy.copy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(copied) == repr(loss) and copied.settings() == loss.settings()
    group = object()
    shared = LOSSES[name](process_group=group)
    assert copy.deepcopy(torch.nn.Sequential(shared))[0].process_group is group
    assert copy.copy(shared).process_group is group
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(shared)


@WITH_FUNCTION
def test_an_unknown_keyword_names_the_loss_and_the_nearest_one(name):
    title, function = LOSSES[name].__name__, OF_FEATURES[name]
    tensors = (torch.eye(3)[:, None],) * 2 if name == "efa" else (torch.eye(3),) * 2
    pids = {} if name in ("efa", "citc", "simclr") else {"pids": torch.arange(3)}
    for call in (lambda **k: LOSSES[name](**k), lambda **k: function(*tensors, **pids, **k)):
        with pytest.raises(TypeError, match=rf"^{title} .*'reducton'.*'reduction'\?"):
            call(reducton="sum")
    with pytest.raises(TypeError, match=rf"^{title} .*'sample_weight'.* the call"):
        LOSSES[name](sample_weight=torch.ones(3))


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: fl.ASDMLoss(gap="cosine"), "gap"),
        (lambda: fl.ASDMLoss(target="column"), "target"),
        (lambda: fl.SDMLoss(target="column"), "target"),
        (lambda: fl.EFALoss(ranking="released"), "ranking"),
        (lambda: fl.FMFALoss(8, 4, asdm={"gap": "cosine"}), "gap"),
    ],
)
def test_what_moved_to_compat_is_told(build, word):
    with pytest.raises(TypeError, match=rf"takes no '{word}'.*fmfa_losses\.compat"):
        build()


def test_the_first_positive_of_the_released_code_is_told():
    with explains(ValueError, ("positive", "'paired'", "'any'"), "'first'"):
        fl.ASDMLoss(positive="first")


def test_positions_stay():
    assert repr(fl.ASDMLoss(0.5, 3)) == "ASDMLoss(temperature=0.5, alpha=3.0)"
    assert repr(fl.EFALoss(0.2, 0.8)) == "EFALoss(margin_text=0.2, margin_image=0.8)"
    assert repr(fl.TALLoss(0.5, np.float32(0.5))) == "TALLoss(temperature=0.5, margin=0.5)"
    assert repr(fl.SigmoidLoss(0.5, np.int64(-3))) == "SigmoidLoss(temperature=0.5, bias=-3.0)"
    for loss in (fl.CMPMLoss, fl.SDMLoss):
        with pytest.raises(TypeError, match="positional"):
            loss(0.5, 1e-6)


class Smoothed(ScaledScoreLoss):
    """InfoNCE whose targets are smoothed over the batch: a loss of a few lines."""

    _: KW_ONLY
    smoothing: float = hyperparameter(default=0.1, check=check_fraction)

    def rows(self, scores: Tensor, positive: Tensor, offset: int, scale: float | Tensor) -> Tensor:
        log_p = (scale * scores).log_softmax(dim=1)
        return -((1 - self.smoothing) * log_p.diagonal(offset) + self.smoothing * log_p.mean(dim=1)) / 2


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
def test_a_loss_of_a_few_lines_has_everything():
    image, text, pids, weight = torch.randn(5, 8), torch.randn(5, 8), torch.arange(5), torch.rand(5)
    plain = Smoothed(smoothing=0.0)
    torch.testing.assert_close(plain(image, text, pids), fl.ITCLoss()(image, text))
    assert repr(Smoothed(0.5)) == "Smoothed(temperature=0.5)" and repr(plain) == "Smoothed(smoothing=0.0)"
    scale = torch.tensor(3.0, requires_grad=True)
    value = Smoothed()(image, text, pids, logit_scale=scale, sample_weight=weight)
    value.backward()
    assert value.isfinite() and scale.grad.isfinite()
    scores = torch.nn.functional.normalize(text) @ torch.nn.functional.normalize(image).T
    torch.testing.assert_close(Smoothed().from_scores(scores, pids), Smoothed.of(image, text, pids))
    with pytest.raises(ValueError, match=r"smoothing must lie in \[0, 1\]"):
        Smoothed(smoothing=2)
    torch._dynamo.reset()
    compiled = torch.compile(lambda i, t: Smoothed.of(i, t, pids), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image, text), Smoothed()(image, text, pids))


class _Milder(fl.ASDMLoss):
    alpha: float = 3.0


class _OwnConstructor(fl.SDMLoss):
    def __init__(self, extra=0.3):
        super().__init__()
        self.extra = extra


class _Child(_OwnConstructor):
    pass


class _Counting:
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.built = 1


class _Mixed(_Counting, fl.ASDMLoss):
    pass


class _Extended(fl.ASDMLoss):
    beta: float = hyperparameter(default=1.0, check=check_nonnegative, kw_only=True)


def test_subclasses_keep_checks_and_constructors():
    image, text, pids = torch.randn(4, 8), torch.randn(4, 8), torch.tensor([0, 1, 0, 2])
    assert _Milder()(image, text, pids) == fl.ASDMLoss(alpha=3.0)(image, text, pids)
    with pytest.raises(ValueError, match="alpha"):
        _Milder(alpha=-2.0)
    assert _Child(0.7).extra == 0.7
    assert _Mixed(alpha=2.0).built == 1
    assert _Extended()(image, text, pids) == fl.ASDMLoss()(image, text, pids)


@pytest.mark.parametrize(("name", "value"), [("reduction", "avg"), ("alpha", -5.0), ("eps", -1.0), ("backend", "cuda")])
def test_hyperparameters_are_checked_when_they_are_set_later(name, value):
    with pytest.raises(ValueError, match=name):
        setattr(fl.ASDMLoss(), name, value)


def test_batched_gradients():
    image, text = torch.randn(6, 5, dtype=torch.float64).requires_grad_(), torch.randn(6, 5, dtype=torch.float64)
    loss = fl.ASDMLoss(reduction="none")(image, text, torch.tensor([0, 1, 0, 2, 1, 3]))
    every = torch.eye(6, dtype=torch.float64)
    (batched,) = torch.autograd.grad(loss, image, every, is_grads_batched=True, retain_graph=True)
    for row, g in zip(batched, every, strict=True):
        torch.testing.assert_close(row, torch.autograd.grad(loss, image, g, retain_graph=True)[0])


@pytest.mark.parametrize("loss", [fl.SDMLoss, fl.RITCLoss, fl.CMPMLoss, fl.TALLoss, fl.TRLLoss])
def test_forgotten_and_swapped_arguments(loss):
    image, text, pids = torch.randn(3, 4), torch.randn(3, 4), torch.arange(3)
    with explains(TypeError, "pids must be an integer tensor [B]", "None", loss.__name__):
        loss()(image, text)
    with explains(TypeError, "image_features must be a floating-point tensor [B D]", "int64 [3]", "order"):
        loss()(pids, image, text)
    with explains(TypeError, "pids must be an integer tensor [B]", "float32 [3, 4]", "order"):
        loss()(image, text, image)
    with explains(TypeError, "sample_weight must be a tensor", "ndarray float64 [3]", "as_tensor"):
        loss()(image, text, pids, sample_weight=np.ones(3))
