"""Soft targets of ITC, SDM and R-ITC against the equations written out; blocks, limits, degenerate and bad input."""

from functools import partial

import pytest
import torch
from helpers import soft_targets as plain
from helpers.budget import assert_function_within_budget
from helpers.compare import assert_close, assert_finite, value_and_grads
from helpers.errors import explains

from fmfa_losses import ITCLoss, NegativesQueue, RITCLoss, SDMLoss
from fmfa_losses.functional import itc_loss, itc_loss_from_scores, sdm_loss
from fmfa_losses.ops import rows_in_blocks

B, D, SCALE = 9, 6, 5.0
PIDS, IMAGE_IDS = torch.tensor([0, 1, 0, 2, 2, 3, 1, 4, 0]), torch.tensor([0, 1, 0, 2, 3, 4, 5, 6, 7])
g = torch.Generator().manual_seed(0)
IMAGE, TEXT, TEACHER_IMAGE, TEACHER_TEXT = torch.randn(4, B, D, generator=g, dtype=torch.float64)
GIVEN, TRANSPOSED = torch.rand(2, B, B, generator=g, dtype=torch.float64)

# name: (loss, its labels, eps, factor of the sum of both directions)
LOSSES = {
    "itc paired": (ITCLoss, (None, None), 0.0, 0.5),
    "itc": (partial(ITCLoss, targets="identity"), (PIDS, None), 0.0, 0.5),
    "sdm": (partial(SDMLoss, eps=1e-3), (PIDS, None), 1e-3, 1.0),
    "sdm images": (partial(SDMLoss, eps=1e-3), (PIDS, IMAGE_IDS), 1e-3, 1.0),
    "ritc": (RITCLoss, (PIDS, None), 1e-2, 0.5),
}


def sharpened(scores, positive):
    return (3 * scores).exp() + 2 * positive


# name: (constructor, call)
MOMENTUM = {"momentum_features": (TEACHER_IMAGE, TEACHER_TEXT)}
LABELLED = {
    "hard": ({}, {}),
    "own": ({"softlabel_ratio": 0.4}, {}),
    "teacher": ({"softlabel_ratio": 0.4}, MOMENTUM),
    "soft alone": ({"softlabel_ratio": 1.0}, MOMENTUM),
    "neighbors": ({"mutual_neighbors": 3}, {}),
    "neighbors of teacher": ({"mutual_neighbors": 2}, MOMENTUM),
    "both": ({"mutual_neighbors": 3, "softlabel_ratio": 0.3}, MOMENTUM),
    "all neighbors": ({"mutual_neighbors": 20}, {}),
}
GIVEN_BY_CALLER = {
    "matrix": {"soft_targets": GIVEN},
    "pair": {"soft_targets": (GIVEN, TRANSPOSED)},
    "function": {"soft_targets": sharpened},
    "function of teacher": {"soft_targets": sharpened, **MOMENTUM},
}
CASES = [(loss, how) for loss in LOSSES for how in (*LABELLED, *GIVEN_BY_CALLER)]
CASES = [(loss, how) for loss, how in CASES if loss != "sdm images" or how in LABELLED]


def inputs():
    return IMAGE, TEXT, torch.tensor(SCALE, dtype=torch.float64)


def ours(loss, how, image, text, scale, **options):
    build, (pids, image_ids), _, _ = LOSSES[loss]
    constructor, call = LABELLED[how] if how in LABELLED else ({}, GIVEN_BY_CALLER[how])
    if image_ids is not None:
        call = call | {"image_ids": image_ids}
    return build(**constructor, **options)(image, text, pids, logit_scale=scale, **call)


def written_out(loss, how, image, text, scale):
    """[B], both directions."""
    _, (pids, image_ids), eps, factor = LOSSES[loss]
    constructor, call = LABELLED[how] if how in LABELLED else ({}, GIVEN_BY_CALLER[how])
    cos = plain.cosines(text, image)
    teacher = plain.cosines(TEACHER_TEXT, TEACHER_IMAGE) if "momentum_features" in call else cos.detach()
    y, total = plain.labels(pids, image_ids, len(image)), 0
    for way, (z, c) in enumerate([(scale * cos, teacher), (scale * cos.T, teacher.T)]):
        if how in LABELLED:
            ratio, k = constructor.get("softlabel_ratio", 0.0), constructor.get("mutual_neighbors", 0)
            q = plain.targets(y, c, scale.item(), ratio, k)
        elif "function" in how:
            q = plain.divided(sharpened(c, torch.tensor(y, dtype=torch.float64)))
        else:
            q = plain.divided([GIVEN, TRANSPOSED if how == "pair" else GIVEN.T][way])
        total = total + plain.row_loss(loss[:3], z, q.to(z.dtype), eps)
    return factor * total


@pytest.mark.parametrize(("loss", "how"), CASES)
def test_value_and_gradients_are_those_of_the_equation(loss, how, monkeypatch):
    expected = value_and_grads(partial(written_out, loss, how), inputs())
    assert_close(value_and_grads(partial(ours, loss, how, reduction="none"), inputs()), expected, 1e-9)
    monkeypatch.setattr(rows_in_blocks, "MOST_SCORES", 0)
    monkeypatch.setattr(rows_in_blocks, "BLOCK_SCORES", 4 * B)
    assert_close(value_and_grads(partial(ours, loss, how, reduction="none"), inputs()), expected, 1e-9)
    mean = value_and_grads(lambda *x: written_out(loss, how, *x).mean(), inputs())
    assert_close(value_and_grads(partial(ours, loss, how), inputs()), mean, 1e-9)


@pytest.mark.parametrize("how", ["both", "matrix", "function"])
@pytest.mark.parametrize("loss", ["itc", "sdm", "ritc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_strided_and_expanded_inputs(loss, how, dtype):
    def every_second(x):
        wide = torch.stack([x, -x], dim=2).flatten(1)
        return wide[:, ::2]

    scale = torch.tensor(SCALE, dtype=torch.float64)  # neighbours of the rounded teacher are those of the exact one
    assert_function_within_budget(
        lambda i, t: ours(loss, how, every_second(i), every_second(t), scale, reduction="none"),
        lambda i, t: written_out(loss, how, i, t, scale),
        (IMAGE, TEXT),
        dtype,
        amplification=SCALE,
    )
    one = torch.randn(1, D, dtype=torch.float64)
    expanded = value_and_grads(lambda i: ours(loss, "matrix", i.expand(B, D), TEXT, scale), (one,))
    copied = value_and_grads(lambda i: ours(loss, "matrix", i.repeat(B, 1), TEXT, scale), (one,))
    assert_close(expanded, copied, 1e-12)


@pytest.mark.parametrize("loss", ["itc", "itc paired"])
def test_the_gradient_of_own_soft_labels_is_a_part_of_that_of_the_hard_ones(loss):
    """q - p = (1 - ratio) (y - p), also in the logit scale."""
    build, (pids, _), _, _ = LOSSES[loss]
    hard, soft = (
        value_and_grads(lambda i, t, s, r=r: build(softlabel_ratio=r)(i, t, pids, logit_scale=s), inputs())
        for r in (0.0, 0.4)
    )
    assert_close(soft[1:], [0.6 * x for x in hard[1:]], 1e-12)


def test_limits():
    for scores in (False, True):
        call = (
            (lambda *a, **k: itc_loss_from_scores(plain.cosines(TEXT, IMAGE), *a, **k))
            if scores
            else (lambda *a, **k: itc_loss(IMAGE, TEXT, *a, **k))
        )
        torch.testing.assert_close(call(soft_targets=torch.eye(B)), call())
        hard = call(PIDS, targets="identity")
        torch.testing.assert_close(call(soft_targets=(PIDS[:, None] == PIDS).float()), hard)
        torch.testing.assert_close(call(PIDS, targets="identity", soft_targets=lambda s, p: p), hard)
        torch.testing.assert_close(call(PIDS, soft_targets=7 * GIVEN), call(soft_targets=GIVEN))
    assert sdm_loss(IMAGE, TEXT, PIDS, softlabel_ratio=0.0, mutual_neighbors=0) == sdm_loss(IMAGE, TEXT, PIDS)
    everything = SDMLoss(mutual_neighbors=B)(IMAGE, TEXT, PIDS)
    torch.testing.assert_close(everything, sdm_loss(IMAGE, TEXT, torch.zeros(B, dtype=torch.long)))


@pytest.mark.parametrize("how", ["own", "teacher", "function of teacher"])
@pytest.mark.parametrize("loss", ["itc", "itc paired", "sdm images"])
def test_the_columns_of_a_queue_have_soft_labels_too(loss, how, monkeypatch):
    """As pairs of the batch that count 0 as rows, whose teacher is what the queue holds (ALBEF)."""
    if loss == "sdm images" and how not in LABELLED:
        return
    build, (pids, image_ids), _, _ = LOSSES[loss]
    constructor, call = LABELLED[how] if how in LABELLED else ({}, GIVEN_BY_CALLER[how])
    queue, old = NegativesQueue(1), torch.randn(2, 4, D, dtype=torch.float64)
    old_ids, old_images = torch.tensor([0, 7, 2, 9]), torch.tensor([0, 9, 2, 8])
    queue.push(*old, old_ids, image_ids=old_images)
    joined = dict(call)
    if "momentum_features" in call:
        joined["momentum_features"] = tuple(map(torch.cat, zip(call["momentum_features"], old, strict=True)))
    more = {} if image_ids is None else {"image_ids": image_ids}
    joined |= {} if image_ids is None else {"image_ids": torch.cat([image_ids, old_images])}
    every_id = None if pids is None else torch.cat([pids, old_ids])
    weight = torch.cat([torch.ones(B), torch.zeros(4)]).double()

    def in_the_batch(i, t, s):
        features = torch.cat([i, old[0]]), torch.cat([t, old[1]])
        return build(**constructor)(*features, every_id, logit_scale=s, sample_weight=weight, **joined)

    def ours(i, t, s):
        return build(**constructor)(i, t, pids, logit_scale=s, queue=queue, **call, **more)

    expected = value_and_grads(in_the_batch, inputs())
    assert_close(value_and_grads(ours, inputs()), expected, 1e-9)
    monkeypatch.setattr(rows_in_blocks, "MOST_SCORES", 0)
    monkeypatch.setattr(rows_in_blocks, "BLOCK_SCORES", 4 * B)
    assert_close(value_and_grads(ours, inputs()), expected, 1e-9)


def test_what_the_columns_of_a_queue_do_not_have():
    queue = NegativesQueue(1)
    queue.push(IMAGE, TEXT)
    for options, call in (({"mutual_neighbors": 2}, {}), ({}, {"soft_targets": GIVEN})):
        with explains(ValueError, "queue", ("soft_targets", "mutual_neighbors")[not call], "leave one out"):
            ITCLoss(**options)(IMAGE, TEXT, queue=queue, **call)
    with explains(ValueError, ("momentum_features and queue", "D"), "[9, 3]", None):
        narrow = (TEACHER_IMAGE[:, :3], TEACHER_TEXT[:, :3])
        ITCLoss(softlabel_ratio=0.5)(IMAGE, TEXT, queue=queue, momentum_features=narrow)


def test_equal_scores_have_the_lowest_neighbor():
    """Every text resembles all images alike: image 0 is its nearest, and only text 0 is the nearest of image 0."""
    same = torch.ones(4, 3)
    got = ITCLoss(mutual_neighbors=1, temperature=1.0, reduction="none")(same, same)
    torch.testing.assert_close(got, torch.full((4,), 4.0).log())
    image = torch.eye(4)
    text = image[[1, 1, 2, 0]]  # texts 0 and 1 are nearest to image 1, of which text 0 is the nearest
    q = torch.eye(4)
    q[0, 1] = q[2, 2] = q[3, 0] = 1
    found = ITCLoss(mutual_neighbors=1, temperature=0.5)(image, text)
    torch.testing.assert_close(found, ITCLoss(temperature=0.5)(image, text, soft_targets=q))


@pytest.mark.parametrize("loss", [partial(ITCLoss, targets="identity"), SDMLoss, RITCLoss])
def test_degenerate_batches(loss):
    options = {"softlabel_ratio": 0.5, "mutual_neighbors": 2}
    one = value_and_grads(lambda i, t: loss(**options)(i, t, PIDS[:1]), (IMAGE[:1], TEXT[:1]))
    assert_finite(one)
    assert_close(one[1:], [torch.zeros(1, D, dtype=torch.float64)] * 2, 1e-12)
    zeros, same = torch.zeros(B, D), torch.zeros(B, dtype=torch.long)
    for call in ({}, {"momentum_features": (zeros, zeros)}, {"momentum_features": (TEACHER_IMAGE, TEACHER_TEXT)}):
        assert_finite(value_and_grads(lambda i, t, c=call: loss(**options)(i, t, same, **c), (zeros, TEXT)))
        assert_finite(value_and_grads(lambda i, t, c=call: loss(**options)(i, t, PIDS, **c), (zeros, zeros)))
    assert_finite(value_and_grads(lambda i, t: loss()(i, t, soft_targets=torch.eye(1)), (IMAGE[:1], TEXT[:1])))


@pytest.mark.parametrize("most", [0, 2**22])
def test_targets_receive_no_gradient(most, monkeypatch):
    monkeypatch.setattr(rows_in_blocks, "MOST_SCORES", most)
    given, teacher = GIVEN.clone().requires_grad_(), TEACHER_IMAGE.clone().requires_grad_()
    for call in (
        {"soft_targets": given},
        {"soft_targets": (given, given)},
        {"soft_targets": lambda s, p: given * s**2},
    ):
        assert torch.autograd.grad(
            ITCLoss()(IMAGE.clone().requires_grad_(), TEXT, **call), given, allow_unused=True
        ) == (None,)
    image = IMAGE.clone().requires_grad_()
    ITCLoss(softlabel_ratio=0.5)(image, TEXT, momentum_features=(teacher, TEACHER_TEXT)).backward()
    assert teacher.grad is None and image.grad is not None


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_targets_have_no_tangent():
    def tangent(options, call):
        return torch.func.jvp(lambda x: ITCLoss(**options)(IMAGE, TEXT, **call(x)), (GIVEN,), (TRANSPOSED,))[1]

    assert tangent({"softlabel_ratio": 0.5}, lambda x: {"momentum_features": (IMAGE, x[:, :D])}) == 0
    assert tangent({}, lambda x: {"soft_targets": x}) == 0
    soft, scale = ITCLoss(softlabel_ratio=0.5), torch.tensor(SCALE, dtype=torch.float64)
    of_scale = torch.func.jvp(lambda s: soft(IMAGE, TEXT, logit_scale=s), (scale,), (torch.ones_like(scale),))[1]
    torch.testing.assert_close(of_scale, torch.func.grad(lambda s: soft(IMAGE, TEXT, logit_scale=s))(scale))
    assert tangent({}, lambda x: {"soft_targets": lambda scores, positive: x}) == 0


def test_a_function_may_change_what_it_is_given():
    def in_place(scores, positive):
        return scores.exp_().add_(positive)

    torch.testing.assert_close(
        ITCLoss()(IMAGE, TEXT, soft_targets=in_place), ITCLoss()(IMAGE, TEXT, soft_targets=lambda s, p: s.exp() + p)
    )


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("how", ["both", "matrix", "function of teacher"])
@pytest.mark.parametrize("loss", ["itc", "sdm"])
def test_derivatives(loss, how, monkeypatch):
    leaves = tuple(x.clone().requires_grad_() for x in (IMAGE, TEXT))
    fixed = partial(ours, loss, how, scale=SCALE)  # the softmax of a teacher has the scale, and is a constant
    assert torch.autograd.gradcheck(fixed, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fixed, leaves)
    expected = torch.func.grad(partial(ours, loss, how))(*inputs())
    torch.testing.assert_close(expected, value_and_grads(partial(ours, loss, how), inputs(), torch.ones(()))[1])
    several = torch.stack([IMAGE, IMAGE.flip(0)])
    batched = torch.vmap(lambda i: ours(loss, how, i, TEXT, SCALE))(several)
    torch.testing.assert_close(batched, torch.stack([ours(loss, how, i, TEXT, SCALE) for i in several]))


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
@pytest.mark.parametrize("how", ["both", "matrix", "function of teacher"])
def test_compiled(how):
    torch._dynamo.reset()
    compiled = torch.compile(partial(ours, "itc", how), fullgraph=True, backend="aot_eager")
    assert_close(value_and_grads(compiled, inputs()), value_and_grads(partial(ours, "itc", how), inputs()), 1e-12)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not be instantiated")
def test_a_ramp_is_compiled_for_all_ratios():
    """Not once for each: after 8 times the compiler gives up, with fullgraph by an error."""
    torch._dynamo.reset()
    loss = RITCLoss()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ratio in (step / 11 for step in range(12)):
        loss.softlabel_ratio = ratio
        expected = RITCLoss(softlabel_ratio=ratio)(IMAGE, TEXT, PIDS)
        torch.testing.assert_close(compiled(IMAGE, TEXT, PIDS), expected, rtol=1e-9, atol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("factor", [1e-300, 1e300])
def test_targets_may_be_too_small_or_too_large_for_the_features(factor):
    image, text = IMAGE.float(), TEXT.float()
    for given in (factor * GIVEN, (factor * GIVEN, factor * TRANSPOSED)):
        ones = (GIVEN, TRANSPOSED) if isinstance(given, tuple) else GIVEN
        torch.testing.assert_close(
            ITCLoss()(image, text, soft_targets=given), ITCLoss()(image, text, soft_targets=ones)
        )
    got = ITCLoss()(image, text, soft_targets=lambda scores, positive: factor * (3 * scores.double()).exp())
    torch.testing.assert_close(got, ITCLoss()(image, text, soft_targets=lambda scores, positive: (3 * scores).exp()))


def test_features_that_are_nan_give_nan():
    nan = IMAGE * torch.nan
    assert ITCLoss()(nan, TEXT, soft_targets=lambda scores, positive: scores.exp()).isnan()


@pytest.mark.parametrize(
    ("call", "must", "got", "remedy"),
    [
        ({"soft_targets": lambda s, p: s}, ("soft_targets(scores", "negative"), "[9, 9]", "clamp"),
        ({"soft_targets": lambda s, p: s / 0 * 0}, ("soft_targets(scores", "negative"), "nan", "what made it"),
        ({"soft_targets": lambda s, p: p * (torch.arange(B) != 3)}, ("soft_targets(scores", "sum > 0"), "row 3", ()),
        ({"soft_targets": lambda s, p: s + 1j}, ("soft_targets(scores", "real"), "complex128", ()),
        ({"soft_targets": 1e308 + GIVEN}, ("soft_targets", "finite sum"), "inf in row 0", ()),
        ({"soft_targets": -GIVEN}, ("soft_targets", "negative"), "[9, 9]", "clamp"),
        ({"soft_targets": GIVEN * torch.nan}, ("soft_targets", "negative"), "nan", "look"),
        ({"soft_targets": GIVEN * (torch.arange(B) != 3)}, ("soft_targets", "sum > 0"), "column 3", "own pair"),
        ({"soft_targets": GIVEN * (torch.arange(B) != 3)[:, None]}, ("soft_targets", "sum > 0"), "row 3", "own pair"),
        ({"soft_targets": GIVEN[:, :4]}, ("soft_targets", "[B, B]"), "[9, 4]", "a column a pair"),
        ({"soft_targets": GIVEN[:4]}, ("soft_targets", "[B, B]"), "[4, 9]", ()),
        ({"soft_targets": (GIVEN, GIVEN[:4])}, ("soft_targets", "[B, B]"), "[4, 9]", ()),
        ({"momentum_features": (IMAGE, TEXT[:4])}, ("momentum_features", "B"), "[4, 6]", None),
        ({"momentum_features": (IMAGE[:4], TEXT[:4])}, ("momentum_features", "B"), "[4, 6]", None),
        ({"soft_targets": lambda s, p: s.sum(dim=1)}, ("soft_targets", "shape of scores"), "[9]", ()),
        ({"soft_targets": GIVEN, **MOMENTUM}, ("soft_targets", "only source"), "momentum_features", "leave it out"),
    ],
)
def test_values_that_do_not_fit(call, must, got, remedy):
    with explains(ValueError, must, got, remedy):
        ITCLoss()(IMAGE, TEXT, **call)


@pytest.mark.parametrize("loss", [ITCLoss, SDMLoss, RITCLoss])
@pytest.mark.parametrize("most", [0, 2**22])
def test_a_negative_target_of_a_function_raises_or_makes_its_row_nan(loss, most, monkeypatch):
    monkeypatch.setattr(rows_in_blocks, "MOST_SCORES", most)

    def function(scores, positive):
        return torch.where((scores == scores.max()) & (scores > 0), -0.1, torch.ones_like(scores))

    options = {"targets": "identity"} if loss is ITCLoss else {}

    def total(image):
        return loss(**options, reduction="sum")(image, TEXT, PIDS, soft_targets=function)

    with explains(ValueError, ("soft_targets(scores", "negative"), "-0.1", "clamp"):
        total(IMAGE)
    _, value = torch.func.grad_and_value(total)(IMAGE)  # of which the host sees no values
    assert value.isnan()
    assert loss(**options)(IMAGE, TEXT, PIDS, soft_targets=lambda scores, positive: positive).isfinite()


def test_autocast_does_not_reach_inside(monkeypatch):
    pair = tuple(x.float() for x in (IMAGE, TEXT))
    scale = torch.tensor(SCALE)
    for most in (2**22, 0):
        monkeypatch.setattr(rows_in_blocks, "MOST_SCORES", most)
        for how in ("both", "matrix", "function of teacher"):
            expected = value_and_grads(partial(ours, "sdm", how, scale=scale), pair)
            with torch.autocast("cpu", torch.bfloat16):
                assert_close(value_and_grads(partial(ours, "sdm", how, scale=scale), pair), expected, 1e-6)


def test_what_does_not_fit_together():
    for call in ({}, {"soft_targets": GIVEN}):
        with explains(ValueError, ("backend", '"auto"'), "triton", '"auto"'):
            ITCLoss(softlabel_ratio=0.0 if call else 0.5, backend="triton")(IMAGE, TEXT, **call)
    for options in ({"softlabel_ratio": 0.5}, {"mutual_neighbors": 2}):
        with explains(ValueError, ("soft_targets", "only source"), next(iter(options)), "leave it out"):
            ITCLoss(**options)(IMAGE, TEXT, soft_targets=GIVEN)
    with explains(ValueError, ("soft_targets", "only source"), "image_ids", "leave it out"):
        SDMLoss()(IMAGE, TEXT, PIDS, soft_targets=GIVEN, image_ids=IMAGE_IDS)
    for wrong in ("mutual", 3.0, (GIVEN, GIVEN, GIVEN), (GIVEN, None)):
        with explains(TypeError, ("soft_targets", "a tensor [B, B]"), (), "torch.as_tensor"):
            ITCLoss()(IMAGE, TEXT, soft_targets=wrong)
    with explains(TypeError, ("momentum_features", "a pair (image, text)"), "[9, 6]", "of both"):
        ITCLoss(softlabel_ratio=0.5)(IMAGE, TEXT, momentum_features=IMAGE)
    with pytest.raises(TypeError, match="soft_targets must be a floating-point"):
        ITCLoss()(IMAGE, TEXT, soft_targets=torch.ones(B, B, dtype=torch.long))
    with pytest.raises(TypeError, match="pids must be an integer"):
        SDMLoss()(IMAGE, TEXT)
    with pytest.raises(ValueError, match="mutual_neighbors must be an integer >= 0"):
        ITCLoss(mutual_neighbors=-1)
    with pytest.raises(ValueError, match=r"softlabel_ratio must lie in \[0, 1\]"):
        ITCLoss(softlabel_ratio=1.5)
