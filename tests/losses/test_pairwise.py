"""The pairwise losses: golden values, the equations written naively, scores, weights, edges, bad input."""

import math

import pytest
import torch
from helpers.compare import assert_close, assert_finite, relative_error, value_and_grads
from helpers.errors import explains
from helpers.golden import golden
from torch import nn

from fmfa_losses.losses.asdm import ASDMLoss
from fmfa_losses.losses.cmpm import CMPMLoss, cmpm_loss, cmpm_loss_from_scores
from fmfa_losses.losses.itc import ITCLoss, itc_loss, itc_loss_from_scores
from fmfa_losses.losses.sdm import SDMLoss, sdm_loss, sdm_loss_from_scores
from fmfa_losses.losses.sigmoid import SigmoidLoss, sigmoid_loss, sigmoid_loss_from_scores
from fmfa_losses.losses.tal import TALLoss, TRLLoss, tal_loss, tal_loss_from_scores, trl_loss, trl_loss_from_scores
from fmfa_losses.losses.triplet import TripletLoss, triplet_loss, triplet_loss_from_scores

pytestmark = pytest.mark.filterwarnings("ignore:.* got pids")  # every loss is called alike here


# name -> module, functional, functional on scores, keyword arguments of all three
LOSSES = {
    "sdm": (SDMLoss, sdm_loss, sdm_loss_from_scores, {}),
    "itc": (ITCLoss, itc_loss, itc_loss_from_scores, {}),
    "itc_identity": (ITCLoss, itc_loss, itc_loss_from_scores, {"targets": "identity"}),
    "cmpm": (CMPMLoss, cmpm_loss, None, {}),
    "cmpm_released": (CMPMLoss, cmpm_loss, None, {"normalize": "released"}),
    "tal": (TALLoss, tal_loss, tal_loss_from_scores, {"temperature": 0.05, "margin": 0.3}),
    "trl": (TRLLoss, trl_loss, trl_loss_from_scores, {"temperature": 0.05, "margin": 0.3}),
    "trl_released": (TRLLoss, trl_loss, trl_loss_from_scores, {"negatives": "released"}),
    "triplet": (TripletLoss, triplet_loss, triplet_loss_from_scores, {"margin": 0.3}),
    "triplet_all": (TripletLoss, triplet_loss, triplet_loss_from_scores, {"negatives": "all"}),
    "sigmoid": (SigmoidLoss, sigmoid_loss, sigmoid_loss_from_scores, {}),
    "sigmoid_paired": (SigmoidLoss, sigmoid_loss, sigmoid_loss_from_scores, {"positives": "paired", "bias": -2.0}),
}
EVERY = pytest.mark.parametrize("name", LOSSES)


def draw(B, D=12, dtype=torch.float64, ids=3):
    return torch.randn(B, D, dtype=dtype), torch.randn(B, D, dtype=dtype), torch.randint(ids, (B,))


def naive(name, image, text, pids):
    """The equations with Python loops over pairs; [B], differentiable."""
    B = len(pids)
    cos = [[text[i] @ image[j] / text[i].norm() / image[j].norm() for j in range(B)] for i in range(B)]
    same = [[bool(pids[i] == pids[j]) for j in range(B)] for i in range(B)]
    transposed = [list(column) for column in zip(*cos, strict=True)]

    def kl(z, target, eps=1e-8):
        p = [zj.exp() for zj in z]
        p = [pj / sum(p) for pj in p]
        return sum(pj * (pj.log() - math.log(tj + eps)) for pj, tj in zip(p, target, strict=True))

    def row(i, s):
        positives, negatives = ([s[i][j] for j in range(B) if same[i][j] is is_same] for is_same in (True, False))
        others = [s[i][j] for j in range(B) if j != i]
        n = len(positives)

        def soft_positive(tau):
            weight = torch.stack([x.detach() for x in positives]).div(tau).softmax(0)
            return (weight * torch.stack(positives)).sum()

        zero = torch.zeros((), dtype=torch.float64)
        match name:
            case "sdm":
                return kl([50 * x for x in s[i]], [y / n for y in same[i]])
            case "itc":
                return -((50 * s[i][i]).exp() / sum((50 * x).exp() for x in s[i])).log() / 2
            case "itc_identity":
                total = sum((50 * x).exp() for x in s[i])
                return -sum(((50 * x).exp() / total).log() for x in positives) / n / 2
            case "cmpm" | "cmpm_released":
                a, b = (text, image) if s is cos else (image, text)
                z = [a[i] @ b[j] / b[j].norm() for j in range(B)]
                return kl(z, [y / (n if name == "cmpm" else math.sqrt(n)) for y in same[i]])
            case "tal":
                if not negatives:
                    return zero
                hardness = 0.05 * sum((x / 0.05).exp() for x in negatives).log()
                return max(0.3 - soft_positive(0.05) + hardness, zero)
            case "trl":
                return max(0.3 - soft_positive(0.05) + max(negatives), zero) if negatives else zero
            case "trl_released":
                return max(0.2 - soft_positive(0.02) + max([*negatives, zero]), zero)
            case "triplet":
                return max(0.3 - s[i][i] + max(negatives), zero) if negatives else zero
            case "triplet_all":
                return max(0.2 - s[i][i] + max(others), zero) if others else zero
            case "sigmoid":
                return sum(_softplus((-1 if same[i][j] else 1) * (10 * s[i][j] - 10)) for j in range(B)) / 2
            case "sigmoid_paired":
                return sum(_softplus((-1 if i == j else 1) * (10 * s[i][j] - 2)) for j in range(B)) / 2

    return torch.stack([row(i, cos) + row(i, transposed) for i in range(B)])


def _softplus(x):
    return (1 + x.exp()).log()


@pytest.mark.parametrize("ids", [2, 100])
@EVERY
def test_matches_the_naive_formula(name, ids):
    module, functional, _, kwargs = LOSSES[name]
    image, text, pids = draw(7, ids=ids)
    loss = module(**kwargs, reduction="none")
    expected = value_and_grads(lambda i, t: naive(name, i, t, pids), [image, text])
    assert_close(value_and_grads(lambda i, t: loss(i, t, pids), [image, text]), expected, 1e-9)
    for reduction, value in (("sum", expected[0].sum()), ("mean", expected[0].mean())):
        torch.testing.assert_close(functional(image, text, pids, **kwargs, reduction=reduction), value)
        torch.testing.assert_close(module(**kwargs, reduction=reduction)(image, text, pids), value)


@pytest.mark.parametrize("file", ["small", "odd"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    ("case", "loss"),
    [
        ("sdm", SDMLoss()),
        ("itc", ITCLoss()),
        ("cmpm_released", CMPMLoss(normalize="released")),
    ],
)
def test_golden(case, loss, file, dtype, tolerance):
    case = golden(case, file)
    inputs = case.leaf_inputs(dtype)
    features = [inputs["image_features"], inputs["text_features"]]
    image_ids = {"image_ids": inputs["image_ids"]} if "image_ids" in inputs else {}
    value = loss(*features, inputs["pids"], **image_ids)
    value.backward()
    expected = [case.value, case.grads["image_features"], case.grads["text_features"]]
    assert_close([value.detach(), *(f.grad for f in features)], expected, tolerance)


@pytest.mark.parametrize("file", ["small", "odd"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    ("case", "loss", "kwargs"),
    [
        ("tal_per_sample", tal_loss_from_scores, {"temperature": 0.02, "margin": 0.1}),
        ("trl_per_sample", trl_loss_from_scores, {"temperature": 0.02, "margin": 0.2, "negatives": "released"}),
    ],
)
def test_golden_per_sample(case, loss, kwargs, file, dtype, tolerance):
    case = golden(case, file)
    inputs = case.leaf_inputs(dtype)
    value = loss(inputs["scores"], inputs["pids"], reduction="none", **kwargs)
    value.sum().backward()
    assert_close([value.detach(), inputs["scores"].grad], [case.value, case.grads["scores"]], tolerance)


@EVERY
def test_scores_give_what_features_give(name):
    _, functional, from_scores, kwargs = LOSSES[name]
    image, text, pids = draw(9)
    if from_scores is None:  # projections: one matrix a direction

        def from_features(i, t):
            return cmpm_loss_from_scores(
                t @ (i / i.norm(dim=1, keepdim=True)).T, i @ (t / t.norm(dim=1, keepdim=True)).T, pids, **kwargs
            )
    else:

        def from_features(i, t):
            scores = (t / t.norm(dim=1, keepdim=True)) @ (i / i.norm(dim=1, keepdim=True)).T
            return from_scores(scores, pids, **kwargs)

    expected = value_and_grads(lambda i, t: functional(i, t, pids, **kwargs), [image, text])
    assert_close(value_and_grads(from_features, [image, text]), expected, 1e-9)


def test_soft_labels_from_scores():
    image, text, pids = draw(9)
    image_ids = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 8])
    scores = torch.nn.functional.normalize(text, dim=1) @ torch.nn.functional.normalize(image, dim=1).T
    kwargs = {"image_ids": image_ids, "image_id_factor": 0.4}
    torch.testing.assert_close(sdm_loss_from_scores(scores, pids, **kwargs), sdm_loss(image, text, pids, **kwargs))


@EVERY
def test_sample_weights(name):
    module, _, _, kwargs = LOSSES[name]
    image, text, pids = draw(6)
    weight = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.0])
    per_sample = module(**kwargs, reduction="none")(image, text, pids)
    weighted = {
        r: module(**kwargs, reduction=r)(image, text, pids, sample_weight=weight) for r in ("none", "sum", "mean")
    }
    torch.testing.assert_close(weighted["none"], weight * per_sample)
    torch.testing.assert_close(weighted["sum"], (weight * per_sample).sum())
    torch.testing.assert_close(weighted["mean"], (weight * per_sample).sum() / weight.sum())
    ones = module(**kwargs)(image, text, pids, sample_weight=torch.ones(6, dtype=torch.bool))
    torch.testing.assert_close(ones, module(**kwargs)(image, text, pids))
    assert module(**kwargs)(image, text, pids, sample_weight=torch.zeros(6)) == 0


@EVERY
def test_gradcheck(name):
    _, functional, _, kwargs = LOSSES[name]
    image, text, pids = draw(5, 4)
    if name.startswith(("tal", "trl")):
        pids = torch.arange(5)  # the weights of several positives carry no gradient; of one they are constant
    inputs = image.requires_grad_(), text.requires_grad_()
    assert torch.autograd.gradcheck(lambda i, t: functional(i, t, pids, **kwargs), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@EVERY
def test_degenerate_inputs_are_finite(name, dtype):
    module, _, _, kwargs = LOSSES[name]
    loss = module(**kwargs, reduction="none")
    zero = torch.randn(4, 8, dtype=dtype)
    zero[1] = 0
    cases = {
        "one pair": (*draw(1, 8, dtype)[:2], torch.tensor([3])),
        "one identity": (*draw(5, 8, dtype)[:2], torch.zeros(5, dtype=torch.int32)),
        "zero vectors": (zero, zero.roll(1, 0), torch.arange(4)),
        "collapsed": (torch.ones(4, 8, dtype=dtype), torch.ones(4, 8, dtype=dtype), torch.arange(4)),
        "opposed": (torch.eye(4, 8, dtype=dtype), -torch.eye(4, 8, dtype=dtype), torch.arange(4)),
    }
    for what, (image, text, pids) in cases.items():
        image, text = image.clone().requires_grad_(), text.clone().requires_grad_()
        with torch.autograd.set_detect_anomaly(True):  # not even between the operations
            value = loss(image, text, pids)
            value.sum().backward()
        assert value.dtype == torch.float32 and value.shape == pids.shape
        assert_finite([value.detach(), image.grad, text.grad])
        if what in ("one pair", "one identity") and name in ("tal", "trl", "triplet"):
            assert not value.any() and not image.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [0.01, 0.001])
@pytest.mark.parametrize("from_scores", [tal_loss_from_scores, trl_loss_from_scores])
def test_cold_temperatures_are_finite(from_scores, temperature, dtype):
    """Where exp(scores / tau) on its own overflows, the values are those of float64."""
    scores = torch.linspace(-1, 1, 36, dtype=dtype).reshape(6, 6).requires_grad_()
    pids = torch.tensor([0, 1, 0, 2, 3, 1])
    assert torch.isinf((scores / temperature).exp()).any()
    value = from_scores(scores, pids, temperature=temperature, reduction="none")
    value.sum().backward()
    exact = scores.detach().double().requires_grad_()
    expected = from_scores(exact, pids, temperature=temperature, reduction="none")
    expected.sum().backward()
    assert_finite([value.detach(), scores.grad])
    assert relative_error(value.detach(), expected.detach()) < 1e-5
    assert relative_error(scores.grad, exact.grad) < (1e-3 if dtype == torch.float16 else 1e-5)


@EVERY
def test_nan_comes_out_as_nan(name):
    module, _, _, kwargs = LOSSES[name]
    for ids in (1, 100):
        image, text, pids = draw(4, ids=ids)
        image[2] = torch.nan
        assert module(**kwargs)(image, text, pids).isnan()


@EVERY
def test_autocast_and_noncontiguous(name):
    module, _, _, kwargs = LOSSES[name]
    image, text, pids = draw(6, dtype=torch.float32)
    expected = module(**kwargs)(image, text, pids)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(**kwargs)(image, text, pids), expected)
    strided = [f.T.contiguous().T for f in (image, text)]
    torch.testing.assert_close(module(**kwargs)(*strided, pids), expected)


@pytest.mark.parametrize("name", ["sdm", "itc", "itc_identity", "sigmoid"])
def test_logit_scale(name):
    module, _, from_scores, kwargs = LOSSES[name]
    image, text, pids = draw(6)
    at_7 = module(temperature=1 / 7, **kwargs)(image, text, pids)
    scale = torch.tensor(7.0, requires_grad=True)
    value = module(**kwargs)(image, text, pids, logit_scale=scale)
    torch.testing.assert_close(value, at_7)
    torch.testing.assert_close(module(**kwargs)(image, text, pids, logit_scale=7.0), at_7)
    value.backward()
    step = 1e-5
    up, down = (module(temperature=1 / (7 + s), **kwargs)(image, text, pids) for s in (step, -step))
    torch.testing.assert_close(scale.grad.double(), (up - down) / (2 * step), rtol=1e-4, atol=1e-7)
    scores = torch.nn.functional.normalize(text, dim=1) @ torch.nn.functional.normalize(image, dim=1).T
    torch.testing.assert_close(from_scores(scores, pids, logit_scale=scale.detach(), **kwargs), at_7)
    with pytest.raises(ValueError, match="one element"):
        module(**kwargs)(image, text, pids, logit_scale=torch.ones(2))
    with pytest.raises(ValueError, match="logit_scale must be"):
        module(**kwargs)(image, text, pids, logit_scale=0.0)


SCALED = pytest.mark.parametrize("name", ["asdm", "sdm", "itc", "itc_identity", "sigmoid"])


@pytest.mark.parametrize("scale", [0.0, -0.0, -7.0])
@SCALED
def test_a_scale_on_the_cpu_is_positive(name, scale):
    module, _, from_scores, kwargs = LOSSES[name] if name != "asdm" else (ASDMLoss, None, None, {})
    image, text, pids = draw(6)
    for tensor in (torch.tensor(scale), torch.tensor([scale], requires_grad=True), nn.Parameter(torch.tensor(scale))):
        with explains(ValueError, "logit_scale must be > 0", "tensor", "temperature"):
            module(**kwargs)(image, text, pids, logit_scale=tensor)
        if from_scores is not None:
            with explains(ValueError, "logit_scale must be > 0", "tensor", "temperature"):
                from_scores(text @ image.T, pids, logit_scale=tensor, **kwargs)
    assert module(**kwargs)(image, text, pids, logit_scale=torch.tensor(torch.nan)).isnan()


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
@pytest.mark.parametrize("scale", [0.0, -7.0])
@SCALED
def test_compiled_any_scale_has_the_value_of_its_equation(name, scale):
    """Nobody looks at the scale there; features and scores agree, and they differentiate by different ways."""
    module, _, from_scores, kwargs = LOSSES[name] if name != "asdm" else (ASDMLoss, None, None, {"alpha": 0.0})
    from_scores = from_scores or sdm_loss_from_scores
    image, text, pids = draw(6)
    scores_kwargs = {} if name == "asdm" else kwargs

    def of_features(i, t, s):
        return module(**kwargs)(i, t, pids, logit_scale=s)

    def of_scores(i, t, s):
        scores = nn.functional.normalize(t, dim=1) @ nn.functional.normalize(i, dim=1).T
        return from_scores(scores, pids, logit_scale=s, **scores_kwargs)

    inputs = [image, text, torch.tensor(scale, dtype=torch.float64)]
    compiled = [torch.compile(f, fullgraph=True, backend="aot_eager") for f in (of_features, of_scores)]
    got, want = (value_and_grads(f, inputs) for f in compiled)
    assert_close(got, want, 1e-9)
    assert_finite(got)


LENGTHS = [
    (torch.float32, 2.0**66),
    (torch.float32, 2.0**-83),
    (torch.float32, 2.0**125),
    (torch.float32, 2.0**-120),
    (torch.bfloat16, 2.0**66),
    (torch.bfloat16, 2.0**-83),
    (torch.float64, 2.0**660),
    (torch.float64, 2.0**-660),
    (torch.float64, 2.0**1019),
]


@pytest.mark.parametrize(("dtype", "power"), LENGTHS)
@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("cmpm")])  # whose lengths count
def test_features_of_any_length(name, dtype, power):
    """A power of two changes no cosine: the loss stays, and the gradient is divided by it."""
    functional, kwargs = LOSSES[name][1], LOSSES[name][3]
    image, text, _ = draw(5, dtype=dtype)
    pids = torch.tensor([0, 0, 1, 2, 1])
    value, dimage, dtext = value_and_grads(lambda i, t: functional(i, t, pids, **kwargs), [image, text])
    far, dfar, dtext_far = value_and_grads(lambda i, t: functional(i, t, pids, **kwargs), [image * power, text])
    torch.testing.assert_close(far, value, rtol=1e-5, atol=0)
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    assert_close([dfar.double() * power, dtext_far], [dimage.double(), dtext], tolerance)
    assert dimage.any()


def test_cmpm_of_any_length():
    """Of the features that only give a direction; the others multiply, and may overflow."""
    image, text, pids = draw(5, dtype=torch.float32)
    got = cmpm_loss(image * 2.0**66, text * 2.0**-66, pids)
    expected = cmpm_loss(image.double() * 2.0**66, text.double() * 2.0**-66, pids)
    assert_close([got], [expected], 1e-5)


@EVERY
def test_what_overflows_shows(name):
    """One feature that is infinite, or a projection that leaves float32: never a finite loss."""
    module, _, _, kwargs = LOSSES[name]
    for ids in (1, 100):
        image, text, pids = draw(4, dtype=torch.float32, ids=ids)
        image[2, 3] = torch.inf
        assert not module(**kwargs)(image, text, pids).isfinite()
    if name.startswith("cmpm"):
        image, text = torch.full((4, 12), 3e38), torch.ones(4, 12)
        assert not module(**kwargs)(image, text, pids).isfinite()


@pytest.mark.parametrize("name", ["sdm", "itc", "itc_identity"])
def test_backend_is_the_callers_choice(name):
    module, _, _, kwargs = LOSSES[name]
    image, text, pids = draw(4)
    with pytest.raises(RuntimeError, match='backend="triton" cannot run'):  # float64
        module(**kwargs, backend="triton")(image, text, pids)
    chosen = module(**kwargs, backend="torch")(image, text, pids)
    torch.testing.assert_close(chosen, module(**kwargs)(image, text, pids))


def test_sigmoid_bias():
    image, text, pids = draw(5)
    bias = torch.tensor([-3.0], requires_grad=True)
    value = SigmoidLoss()(image, text, pids, logit_bias=bias)
    torch.testing.assert_close(value, SigmoidLoss(bias=-3.0)(image, text, pids))
    value.backward()
    assert bias.grad.shape == (1,) and bias.grad.item() != 0
    with pytest.raises(ValueError, match=r"logit_bias must be .* one element"):
        SigmoidLoss()(image, text, pids, logit_bias=torch.zeros(3))
    with pytest.raises(ValueError, match="bias must be a finite number"):
        SigmoidLoss(bias=float("inf"))


@EVERY
def test_bad_input_is_named(name):
    module, _, from_scores, kwargs = LOSSES[name]
    loss = module(**kwargs)
    image, text, pids = draw(4)
    for error, match, args in [
        (ValueError, r"image_features must have shape \[B D\]", (image[0], text, pids)),
        (ValueError, r"agree in B \(dimension 0\)", (image, text[:3], pids)),
        (ValueError, r"agree in D \(dimension 1\)", (image, text[:, :5], pids)),
        (TypeError, "text_features must be a floating-point", (image, text.long(), pids)),
        (ValueError, "must not be empty", (image[:0], text[:0], pids[:0])),
    ]:
        with pytest.raises(error, match=match):
            loss(*args)
    with pytest.raises(ValueError, match=r"sample_weight must have shape \[4\]"):
        loss(image, text, pids, sample_weight=torch.ones(3))
    with pytest.raises(TypeError, match="sample_weight must be a tensor"):
        loss(image, text, pids, sample_weight=[1, 1, 1, 1])
    with pytest.raises(ValueError, match="reduction must be one of"):
        module(**kwargs, reduction="avg")
    if name not in ("itc", "triplet_all", "sigmoid_paired"):
        with pytest.raises(TypeError, match="pids must be an integer tensor"):
            loss(image, text, pids.double())
        with pytest.raises(ValueError, match=r"pids must have shape \[4\]"):
            loss(image, text, pids[:3])
    if name in ("itc_identity", "triplet", "sigmoid"):
        with pytest.raises(ValueError, match=r"pass pids \[B\]"):
            loss(image, text)
    if from_scores is not None:
        with pytest.raises(ValueError, match="scores must be square"):
            from_scores(torch.zeros(4, 3), pids, **kwargs)
        with pytest.raises(TypeError, match="scores must be a floating-point"):
            from_scores(torch.zeros(4, 4, dtype=torch.int64), pids, **kwargs)


def test_bad_hyperparameters_are_named():
    for make, match in [
        (lambda: SDMLoss(temperature=0), "temperature must be"),
        (lambda: SDMLoss(eps=0.0), "eps must be"),
        (lambda: SDMLoss(image_id_factor=2), "image_id_factor must lie in"),
        (lambda: ITCLoss(targets="pid"), "targets must be one of"),
        (lambda: CMPMLoss(normalize="l2"), "normalize must be one of"),
        (lambda: CMPMLoss(eps=-1.0), "eps must be"),
        (lambda: TALLoss(margin=-0.1), "margin must be"),
        (lambda: TRLLoss(negatives="all"), "negatives must be one of"),
        (lambda: TripletLoss(margin=float("nan")), "margin must be"),
        (lambda: TripletLoss(negatives="hard"), "negatives must be one of"),
        (lambda: SigmoidLoss(positives="all"), "positives must be one of"),
    ]:
        with pytest.raises(ValueError, match=match):
            make()


@EVERY
def test_modules_hold_no_parameters_and_show_themselves(name):
    module, _, _, kwargs = LOSSES[name]
    loss = module(**kwargs)
    assert not loss.state_dict()
    for key, value in kwargs.items():
        assert f"{key}={value!r}" in repr(loss)


def test_captions_of_one_person_are_no_negatives():
    """By identity, a caption that fits another image of the same person best costs nothing."""
    image = torch.eye(3)
    text = image[[1, 0, 2]]  # the first two captions point at each other's image
    pids = torch.tensor([5, 5, 6])
    assert TripletLoss()(image, text, pids) > 0  # the pair itself is not together
    assert TRLLoss()(image, text, pids) == 0  # but the identity is
    assert TALLoss()(image, text, pids) == 0
    assert ITCLoss(targets="identity")(image, text, pids) < ITCLoss()(image, text, pids)
