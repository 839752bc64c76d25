"""IDHead and id_loss against the golden values, and at their edges."""

import copy
import math

import pytest
import torch
from helpers import processes
from helpers.errors import explains
from helpers.golden import golden
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from fmfa_losses.heads.identity import IDHead, IDOutput, id_loss

B, D, C = 4, 6, 5


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(dtype: torch.dtype = torch.float64, weights: torch.dtype | None = None, b: int = B):
    head = IDHead(D, C).to(weights or dtype)
    torch.nn.init.normal_(head.classifier.weight)
    image, text = (torch.randn(b, D).to(dtype).requires_grad_() for _ in range(2))
    return head, image, text, torch.randint(C, (b,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_golden_value_and_gradients(dtype, tolerance):
    case = golden("id")
    inputs = case.leaf_inputs(dtype)
    loss = id_loss(inputs["image_logits"], inputs["text_logits"], inputs["labels"])
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), case.value.double(), rtol=tolerance, atol=0)
    loss.backward()
    for name in ("image_logits", "text_logits"):
        scale = case.grads[name].abs().max().item()
        torch.testing.assert_close(inputs[name].grad.double(), case.grads[name], rtol=0, atol=tolerance * scale)


def test_head_is_the_equation():
    head, image, text, pids = make()
    weight, bias = head.classifier.weight, head.classifier.bias
    expected = 0.0
    for features in (image, text):
        logits = features @ weight.T + bias
        expected += -(logits.log_softmax(1)[torch.arange(B), pids]).mean() / 2
    out = head(image, text, pids)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    leaves = (image, text, weight, bias)
    for got, want in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_accuracies_are_fractions_by_modality_and_detached():
    head, *_ = make()
    with torch.no_grad():
        head.classifier.weight.copy_(torch.eye(C, D))
        head.classifier.bias.zero_()
    features = torch.eye(C, D, dtype=torch.float64, requires_grad=True)
    pids = torch.tensor([0, 1, 2, 3, 0])
    out = head(features, features.roll(1, 0), pids)
    assert out.image_accuracy.item() == pytest.approx(0.8)
    assert out.text_accuracy.item() == 0
    assert isinstance(out, IDOutput)
    assert not out.image_accuracy.requires_grad
    assert not out.text_accuracy.requires_grad


# --- the classifier is called -----------------------------------------------------------------------------------------


class LoRA(nn.Linear):
    """What adapters put in a linear module's stead: its weights, and a low-rank product beside them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.A, self.B = nn.Parameter(torch.randn(2, base.in_features)), nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.A.T @ self.B.T


def hooked(classifier: nn.Linear) -> nn.Linear:
    classifier.register_forward_hook(lambda module, args, output: 2 * output)
    return classifier


REPLACED = {
    "adapter": LoRA,
    "wrapped": lambda classifier: nn.Sequential(nn.Linear(D, D), classifier),
    "hook": hooked,
    "prune": lambda classifier: prune.l1_unstructured(classifier, "weight", amount=0.5),
    "spectral_norm": nn.utils.spectral_norm,
    "spectral_norm as a parametrisation": nn.utils.parametrizations.spectral_norm,
    "weight_norm as a parametrisation": nn.utils.parametrizations.weight_norm,
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_stands_for_the_classifier_is_called(name):
    head, image, text, pids = make(torch.float32)
    twins = []  # spectral_norm changes at every call
    for classifier in (copy.deepcopy(head.classifier), head.classifier):
        torch.manual_seed(1)
        twins.append(REPLACED[name](classifier))
    head.classifier, twin = twins
    expected = id_loss(twin(image), twin(text), pids)
    out = head(image, text, pids)
    torch.testing.assert_close(out.loss, expected, rtol=0, atol=0)
    got = torch.autograd.grad(out.loss, [image, text, *head.classifier.parameters()])
    want = torch.autograd.grad(expected, [image, text, *twin.parameters()])
    assert all(gradient.abs().max() > 0 for gradient in want)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_hooks_see_the_features_of_both_modalities():
    head, image, text, pids = make(torch.float16, torch.float32)
    seen: list[Tensor] = []
    head.classifier.register_forward_pre_hook(lambda module, args: seen.extend(args))
    head(image, text, pids)
    assert [x is y for x, y in zip(seen, (image, text), strict=True)] == [True, True]


@pytest.mark.parametrize("features", [torch.bfloat16, torch.float32, torch.float64])
def test_another_module_gets_features_in_its_own_dtype(features):
    head, image, text, pids = make(features, torch.float32)
    head.classifier = nn.Linear(D, C).to(torch.bfloat16)
    out = head(image, text, pids)
    assert out.loss.dtype == torch.float32
    classify = head.classifier
    torch.testing.assert_close(out.loss, id_loss(classify(image.bfloat16()), classify(text.bfloat16()), pids))


def test_a_module_without_a_floating_point_weight():
    head, image, text, pids = make(torch.float32)
    head.classifier = nn.Flatten()
    torch.testing.assert_close(head(image, text, pids).loss, id_loss(image, text, pids))


def test_the_logits_say_how_many_identities_there_are():
    head, image, text, _ = make(torch.float32)
    head.classifier = nn.Linear(D, 9)
    assert head(image, text, torch.tensor([0, 8, 8, 3])).loss.isfinite()
    with pytest.raises(ValueError, match=r"num_identities = 9\), got 0 to 9"):
        head(image, text, torch.tensor([0, 9, 8, 3]))


def sharded(kind: str) -> float:
    head, image, text, pids = make(torch.float32)
    plain = copy.deepcopy(head)
    if kind == "DDP":
        head.classifier = DistributedDataParallel(head.classifier)
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(head.classifier)
    loss, expected = head(image, text, pids).loss, plain(image, text, pids).loss
    loss.backward()
    expected.backward()
    (grad,) = (p.grad for name, p in head.named_parameters() if name.endswith("weight"))
    grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    assert loss.item() == expected.item()
    return (grad - plain.classifier.weight.grad).abs().max().item()


# FSDP2 on a CPU came with torch 2.7.
KINDS = ["DDP", "FSDP2"] if torch.__version__ >= "2.7" else ["DDP"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_of_many_processes(kind):
    for difference in processes.run(2, sharded, kind):
        assert isinstance(difference, float) and difference < 1e-7, difference


def test_gradcheck():
    head, image, text, pids = make()
    weight, bias = head.classifier.weight, head.classifier.bias

    def loss(image, text, weight, bias):
        state = {"classifier.weight": weight, "classifier.bias": bias}
        return torch.func.functional_call(head, state, (image, text, pids)).loss

    assert torch.autograd.gradcheck(loss, (image, text, weight, bias))


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("features", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_pair_of_dtypes_loses_nothing_but_the_rounding_of_its_inputs(features, weights):
    head, image, text, pids = make(features, weights)
    out = head(image, text, pids)
    wide = torch.promote_types(torch.promote_types(features, weights), torch.float32)
    assert out.loss.dtype == wide
    out.loss.backward()
    assert image.grad.dtype == features
    assert head.classifier.weight.grad.dtype == weights
    exact = head.double()(image.double(), text.double(), pids).loss
    torch.testing.assert_close(out.loss.double(), exact, rtol=4 * torch.finfo(wide).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_norms_in_half_stay_finite(dtype):
    head, image, text, pids = make(dtype, torch.float32)
    out = head(image * 1e4, text * 1e4, pids)
    out.loss.backward()
    assert out.loss.isfinite()
    assert image.grad.isfinite().all()


def test_autocast():
    head, image, text, pids = make(torch.float32)
    exact = head(image, text, pids).loss
    with torch.autocast("cpu", torch.bfloat16):
        out = head(image, text, pids)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() != exact.item(), "autocast had an effect"
    assert out.loss.item() == pytest.approx(exact.item(), rel=2e-2)


def test_edges():
    head, image, text, pids = make(b=1)
    out = head(image, text, pids)
    assert out.loss.isfinite()
    assert out.image_accuracy.item() in (0, 1)
    assert head(image * 0, text * 0, pids).loss.item() == pytest.approx(math.log(C))
    assert IDHead(D, 1).double()(image, text, torch.zeros(1, dtype=torch.long)).loss.item() == 0
    with torch.no_grad():
        image[0, 0] = math.nan
    assert head(image, text, pids).loss.isnan()


def test_permuting_the_batch_changes_nothing():
    head, image, text, pids = make()
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(head(image, text, pids).loss, head(image[order], text[order], pids[order]).loss)


def test_pids_of_any_integer_width():
    head, image, text, pids = make()
    expected = head(image, text, pids)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert head(image, text, pids.to(dtype)) == expected


def test_initialisation_and_name():
    head = IDHead(256, 500)
    assert sorted(name for name, _ in head.named_parameters()) == ["classifier.bias", "classifier.weight"]
    assert head.classifier.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert abs(head.classifier.weight.mean().item()) < 2e-5
    assert head.classifier.bias.abs().max() == 0


def test_load_irra_state_dict():
    head, *_ = make()
    other = IDHead(D, C)
    checkpoint = {"model": {f"module.{name}": value.half() for name, value in head.state_dict().items()}, "epoch": 3}
    report = other.load_irra_state_dict(checkpoint)
    assert report.loaded == ("classifier.weight", "classifier.bias")
    torch.testing.assert_close(other.classifier.weight.data, head.classifier.weight.data.half().float())
    with explains(
        ValueError, "shapes of the head", ("classifier.weight", "checkpoint [5, 6]", "head [7, 6]"), "num_identities"
    ):
        IDHead(D, 7).load_irra_state_dict(checkpoint)
    assert str(other.load_irra_state_dict({})).startswith("nothing loaded")


def test_nothing_reads_values_of_an_accelerator_unless_asked_to():
    # Meta tensors have no values: whatever would wait for an accelerator raises here.
    _, image, text, pids = make(torch.float32)
    image, text, pids = (x.detach().to("meta") for x in (image, text, pids))
    head = IDHead(D, C).to("meta")
    head(image, text, pids).loss.backward()
    assert head.classifier.weight.grad.shape == (C, D)
    with pytest.raises((RuntimeError, NotImplementedError)):
        IDHead(D, C, check_labels=True).to("meta")(image, text, pids)


@pytest.mark.filterwarnings("ignore")  # the compiler warns about its own internals, by version
@pytest.mark.parametrize("wrong", [-100, -1, C])
def test_a_wrong_pid_under_compile_is_nan_or_an_error(wrong):
    head, image, text, pids = make(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: head(*args).loss, fullgraph=True, backend="aot_eager")
    assert compiled(image, text, pids).item() == pytest.approx(head(image, text, pids).loss.item())
    try:
        loss = compiled(image, text, torch.tensor([0, wrong, 1, 2]))
    except IndexError:
        return
    assert loss.isnan()


def test_no_pid_is_left_out():
    with explains(ValueError, ("pids", "[0, identities = 4)"), "-100 to 1", "classifier"):
        id_loss(torch.zeros(3, 4), torch.zeros(3, 4), torch.tensor([0, -100, 1]))


@pytest.mark.parametrize(("name", "value"), [("embed_dim", 0), ("num_identities", 2.5)])
def test_bad_hyperparameters(name, value):
    with explains(ValueError, (name, "integer >= 1"), str(value)):
        IDHead(**{"embed_dim": 4, "num_identities": 4, name: value})


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        ({"image": lambda x: x[0]}, ValueError, ("image_features must have shape [B D]", "float64", ())),
        ({"text": lambda x: x[:, 1:]}, ValueError, (("text_features", "embed_dim = 6"), "[4, 5]", "embed_dim=5")),
        ({"text": lambda x: x[1:]}, ValueError, ("image_features and text_features must agree in B", "[3, 6]")),
        ({"image": lambda x: x.long()}, TypeError, (("image_features", "floating-point"), "int64", ".float()")),
        (
            {"image": lambda x: x.to("meta")},
            ValueError,
            (("image_features and the classifier", "one device"), "meta", "move"),
        ),
        ({"image": lambda x: x[:0]}, ValueError, ("empty", "[0, 6]")),
        ({"pids": lambda x: x[1:]}, ValueError, ("pids must have shape [4]", "[3]")),
        ({"pids": lambda x: x.float()}, TypeError, ("pids must be an integer", "float32", "pids.long()")),
        ({"pids": lambda x: x.to("meta")}, ValueError, ("pids must be on cpu", "meta")),
        ({"pids": lambda x: x * 0 + 5}, ValueError, (("pids", "[0, num_identities = 5)"), "5 to 5", "number")),
        ({"pids": lambda x: x * 0 - 1}, ValueError, ("pids", "-1 to -1")),
    ],
)
def test_bad_input(change, error, parts):
    head, image, text, pids = make()
    inputs = {"image": image, "text": text, "pids": pids}
    inputs |= {name: function(inputs[name]) for name, function in change.items()}
    with explains(error, *parts):
        head(*inputs.values())


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        (((4, 5), (4, 6), (4,)), ValueError, r"image_logits and text_logits must agree in identities"),
        (((4, 5), (3, 5), (4,)), ValueError, r"image_logits and text_logits must agree in B"),
        (((4, 5), (4, 5), (3,)), ValueError, r"pids must have shape \[4\]"),
        (((4, 5), (5,), (4,)), ValueError, r"text_logits must have shape \[B identities\]"),
    ],
)
def test_bad_logits(shapes, error, message):
    image, text, pids = shapes
    with pytest.raises(error, match=message):
        id_loss(torch.zeros(image), torch.zeros(text), torch.zeros(pids, dtype=torch.long))
