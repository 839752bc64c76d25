"""FMFALoss: the sum of its terms, the paper's presets, what it leaves out, bad input."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import processes
from helpers.compare import assert_finite
from helpers.errors import explains
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from fmfa_losses import ASDMLoss, EFALoss, FMFALoss, IDHead, IRRHead
from fmfa_losses.functional import efa_loss

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
    assert out.metrics == {}
    assert out.loss == 0


def test_a_head_of_weight_0_is_not_built():
    whole = small()
    for weights, missing, kept in (({"irr": 0.0}, "irr", "identity"), ({"id": np.float64(0)}, "identity", "irr")):
        objective = small(weights=weights)
        assert getattr(objective, missing) is None
        assert {name.split(".")[0] for name, _ in objective.named_parameters()} == {kept}
        objective.load_state_dict(whole.state_dict())  # what it holds of the other head is ignored
        for name, value in objective.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name])
        out = objective(**batch())
        assert set(out.terms) == {"id", "irr", "efa", "asdm"} - {"irr" if missing == "irr" else "id"}
        out.loss.backward()
        assert all(parameter.grad is not None for parameter in objective.parameters())
        with pytest.raises(RuntimeError, match="Missing key.*" + missing):
            whole.load_state_dict(objective.state_dict())
        objective.weights["irr" if missing == "irr" else "id"] = 1.0
        with explains(ValueError, ("weights[", "stay 0"), "1.0", "build FMFALoss"):
            objective(**batch())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*classifer"):
        small(weights={"id": 0}).load_state_dict({**small(weights={"id": 0}).state_dict(), "classifer.weight": None})


def test_without_masked_captions_every_parameter_has_a_zero_gradient():
    objective, without = small(), small(weights={"irr": 0})
    without.load_state_dict(objective.state_dict())
    with torch.no_grad():
        objective.irr.mlm_head.fc.weight[0, 0] = math.nan  # not even that passes
    inputs = batch(masked=False)
    out = objective(**inputs)
    torch.testing.assert_close(out.loss, without(**inputs).loss, rtol=0, atol=0)
    out.loss.backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in objective.irr.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in objective.identity.parameters())


class Trainee(nn.Module):
    """A layer and FMFALoss as one module, the way DistributedDataParallel wants them."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layer = nn.Linear(D, D)
        self.objective = small(**options)

    def forward(self, inputs: dict[str, Tensor | None]) -> Tensor:
        named = {name: self.layer(x) if x is not None and x.is_floating_point() else x for name, x in inputs.items()}
        return self.objective(**named).loss


def trained(options: dict) -> list[float]:
    """Steps in which ranks have masked captions, have none, or mask none of their words; the largest differences of
    gradients from the mean over ranks without DDP."""
    trainee, alone = Trainee(**options), Trainee(**options)
    ddp, differences = DistributedDataParallel(trainee), []
    cases = list(itertools.product(("words", "no words", "no captions"), repeat=2))
    for step, kinds in enumerate(cases):
        grads = []
        for rank, kind in enumerate(kinds):
            torch.manual_seed(10 * step + rank)
            inputs = {name: x.detach() for name, x in batch(masked=kind != "no captions").items()}
            if kind == "no words":
                inputs["masked_labels"].zero_()
            alone.zero_grad(set_to_none=True)
            alone(inputs).backward()
            grads.append([parameter.grad.clone() for parameter in alone.parameters()])
            if rank == dist.get_rank():
                mine = inputs
        trainee.zero_grad(set_to_none=True)
        ddp(mine).backward()
        mean = [sum(pair) / 2 for pair in zip(*grads, strict=True)]
        got = [parameter.grad for parameter in trainee.parameters()]
        differences.append(max((a - b).abs().max().item() for a, b in zip(got, mean, strict=True)))
    return differences


@pytest.mark.parametrize("options", [{}, {"weights": {"irr": 0}}, {"weights": {"id": 0}}])
def test_ranks_with_and_without_masked_captions_train_under_ddp(options):
    for differences in processes.run(2, trained, options):
        assert isinstance(differences, list), differences
        assert len(differences) == 9
        assert max(differences) < 1e-5, differences


def changing(steps: int) -> list[dict[str, Tensor]]:
    """Batches of changing sizes and numbers of masked words: equal sizes, one pair, one token, no word, all words."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(4, 7, 5), (6, 9, 4), (5, 5, 0), (3, 12, 36), (8, 8, 1), (12, 6, 20)]
    sizes += [tuple(torch.randint(2, 12, (3,), generator=generator).tolist()) for _ in range(steps - len(sizes))]
    batches = []
    for b, length, words in sizes:
        image, text, masked_text = (torch.randn(b, n, D, generator=generator) for n in (N, length, length))
        labels = torch.zeros(b * length, dtype=torch.long)
        labels[torch.randperm(b * length, generator=generator)[:words]] = 7
        keep = torch.arange(length) < torch.randint(1, length + 1, (b, 1), generator=generator)
        inputs = {"image_tokens": image, "text_tokens": text, "masked_text_tokens": masked_text}
        inputs |= {"pids": torch.randint(0, 10, (b,), generator=generator), "text_mask": keep}
        batches.append({**inputs, "masked_labels": labels.view(b, length)})
    return batches


def compared() -> dict[str, Callable[..., Tensor]]:
    objective, identity, irr, asdm = small(), IDHead(D, 10), IRRHead(D, V, depth=2), ASDMLoss()

    def total(image_tokens, text_tokens, pids, **rest):
        return objective(image_tokens[:, 0], text_tokens[:, 0], image_tokens, text_tokens, pids, **rest).loss

    return {
        "FMFALoss": total,
        "FMFALoss without masked captions": lambda masked_text_tokens, masked_labels, **rest: total(**rest),
        "IDHead": lambda image_tokens, text_tokens, pids, **_: (
            identity(image_tokens[:, 0], text_tokens[:, 0], pids).loss
        ),
        "IRRHead": lambda image_tokens, masked_text_tokens, masked_labels, text_mask, **_: (
            irr(image_tokens, masked_text_tokens, masked_labels, text_mask=text_mask).loss
        ),
        "EFALoss": lambda image_tokens, text_tokens, text_mask, **_: efa_loss(
            image_tokens, text_tokens, text_mask=text_mask
        ),
        "ASDMLoss": lambda image_tokens, text_tokens, pids, **_: asdm(image_tokens[:, 0], text_tokens[:, 0], pids),
    }


@pytest.mark.parametrize("name", list(compared()))
@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals, by version
def test_changing_batches_take_one_static_and_few_dynamic_graphs(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    function = compared()[name]
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    graphs = []
    for inputs in changing(12):
        torch.testing.assert_close(compiled(**inputs), function(**inputs))
        graphs.append(counter.frame_count)
    assert graphs[-1] <= 2, graphs


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
    (lambda: small(weights={"sdm": 1.0}), (("weights", "'id'", "'irr'", "'efa'", "'asdm'"), "'sdm'")),
    (lambda: FMFALoss.for_dataset("MSMT17", D, 10), "name must be one of 'CUHK-PEDES'"),
    (lambda: small()(**{**batch(), "masked_labels": None}), "come together"),
    (lambda: small()(**{**batch(), "image_tokens": torch.randn(B + 1, N, D)}), "agree in B"),
    (lambda: small()(**{**batch(), "image_tokens": torch.randn(B, N, D + 1)}), "must agree in D, got"),
    (lambda: small(weights={"efa": -1}), (("weights['efa']", "finite number >= 0"), "-1")),
    (lambda: small(weights={"efa": math.nan}), (("weights['efa']", "finite number >= 0"), "nan")),
    (lambda: small(weights={"efa": "2"}), (("weights['efa']", "finite number >= 0"), "str '2'", "number")),
    (lambda: small(weights={"efa": True}), (("weights['efa']", "finite number >= 0"), "bool True", "number")),
    (lambda: small(weights=[1, 1, 1, 1]), ("weights must be a mapping", "list")),
    (lambda: small(efa=False), (("efa", "mapping", 'weights={"efa": 0}'), "bool False")),
    (lambda: small(asdm=False), (("asdm", "mapping", "an ASDMLoss", 'weights={"asdm": 0}'), "bool False")),
    (
        lambda: small(asdm=EFALoss()),
        (("asdm", "mapping", "an ASDMLoss"), "EFALoss"),
    ),
    (lambda: FMFALoss(D, 10, irr=False), (("irr", "mapping", "IRRHead", 'weights={"irr": 0}'), "bool False")),
    (lambda: small(efa={"margin": 0.1}), r"efa \(EFALoss\) takes no 'margin'; did you mean 'margin_text'"),
    (lambda: FMFALoss(D, 10, irr={"vocab": 7}), r"irr \(IRRHead\) takes no 'vocab'"),
    (lambda: small(weight={"efa": 1}), r"FMFALoss .*'weight'; did you mean 'weights'\?"),
    (lambda: FMFALoss.for_dataset("RSTPReid", D, 10, process_groups=1), r"did you mean 'process_group'\?"),
    (
        lambda: FMFALoss.for_dataset("RSTPReid", D, 10, margin_text=0.3),
        r"""'margin_text'; pass efa={"margin_text": \.\.\.""",
    ),
    (lambda: FMFALoss(D, 10, depth=1), r"""takes no 'depth'; pass irr={"depth": \.\.\.}\. It"""),
    (
        lambda: FMFALoss(D, 10, temperature=1),
        r"""pass asdm={"temperature": .* efa={"temperature": """,
    ),
    (lambda: FMFALoss(D, 10, learning=1), r"FMFALoss takes no 'learning'\. It takes embed_dim"),
    (lambda: FMFALoss.for_dataset("cuhk", D, 10), "got 'cuhk'; did you mean 'CUHK-PEDES'"),
    (lambda: FMFALoss.for_dataset("ICFG_pedes", D, 10), "got 'ICFG_pedes'; did you mean 'ICFG-PEDES'"),
    (lambda: FMFALoss.for_dataset("rstp", D, 10), "got 'rstp'; did you mean 'RSTPReid'"),
    (lambda: FMFALoss.for_dataset("MSMT17", D, 10), "got 'MSMT17'; for another data set build FMFALoss"),
    (lambda: FMFALoss.for_dataset(7, D, 10), "got 7; for another data set build FMFALoss"),
    (lambda: FMFALoss(D, 10.5, irr={"depth": 1}), ("num_identities must be an integer >= 1", "10.5")),
    # What the caller of FMFALoss wrote, not what its parts call it.
    (lambda: small()(**{**batch(), "masked_labels": torch.zeros(B, L)}), "^masked_labels must be an integer tensor"),
    (lambda: small()(**{**batch(), "masked_labels": torch.zeros(B, 2).long()}), "^masked_labels must have shape"),
    (lambda: small()(**{**batch(), "masked_labels": torch.full((B, L), V)}), "^masked_labels must be ignore_index"),
    (
        lambda: small()(**{**batch(), "pids": torch.full((B,), 10)}),
        r"^pids must lie in .* = 10\)",
    ),
    (
        lambda: FMFALoss(2 * D, 10, irr={"depth": 1})(**batch()),
        (("image_features", "embed_dim = 128"), "64]", "build FMFALoss(embed_dim=64"),
    ),
    (
        lambda: FMFALoss(2 * D, 10, irr={"depth": 1}, weights={"id": 0})(**batch()),
        (("image_tokens", "embed_dim = 128"), "64]", "build FMFALoss(embed_dim=64"),
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input(call, message):
    """A tuple holds what must hold, what came and what to do; a text is searched for."""
    kinds = (TypeError, ValueError)
    with explains(kinds, *message) if isinstance(message, tuple) else pytest.raises(kinds, match=message):
        call()


@pytest.mark.filterwarnings("ignore")  # the tracer warns of what it cannot follow, and that it is deprecated
def test_a_trace_is_refused():
    objective, inputs = small(), batch()
    image, text = inputs["image_tokens"], inputs["text_tokens"]
    features, rest = (inputs["image_features"], inputs["text_features"]), (image, text, inputs["pids"])
    with pytest.raises(RuntimeError, match=r"trace.* FMFALoss.*use torch.compile"):
        torch.jit.trace(lambda i, t: objective(i, t, *rest).loss, features)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot follow a mask"):
        torch.jit.trace(lambda i, t: efa_loss(i, t, text_mask=inputs["text_mask"]), (image, text))


class Total(nn.Module):
    """FMFALoss as torch.export takes it: a module with tensors as arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.objective = small()

    def forward(self, image, text, pids, text_mask, masked_text, labels):
        features = image.mean(1), text.mean(1)
        masked = {"masked_text_tokens": masked_text, "masked_labels": labels}
        return self.objective(*features, image, text, pids, text_mask=text_mask, **masked).loss


@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals, by version
@pytest.mark.parametrize("strict", [True, False])
def test_export_with_a_dynamic_batch(strict):
    names = ("image_tokens", "text_tokens", "pids", "text_mask", "masked_text_tokens", "masked_labels")
    args, other = (tuple(inputs[name] for name in names) for inputs in changing(12)[:2])
    other = tuple(x[:, :7] if x.ndim > 1 and x.shape[1] == 9 else x for x in other)  # the length of captions is fixed
    total, b = Total(), torch.export.Dim("b", min=2, max=64)
    exported = torch.export.export(total, args, dynamic_shapes=[{0: b} for _ in args], strict=strict)
    torch.testing.assert_close(exported.module()(*other), total(*other))
