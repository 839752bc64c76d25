"""check_batch: no alarm on a batch that is right, and one on each mistake that a batch gives away."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.pitfall_batch import BATCH, END, START, VOCABULARY, B, Batch, D, L, N, make

from fmfa_losses import (
    ASDMLoss,
    CMPMLoss,
    EFALoss,
    FMFALoss,
    ITCLoss,
    SDMLoss,
    SigmoidLoss,
    TALLoss,
    TripletLoss,
    TRLLoss,
)
from fmfa_losses.doctor.diagnosis import check_batch

RIGHT = {
    "everything": lambda: BATCH.arguments(),
    "another batch": lambda: make(seed=1).arguments(),
    "four images a person": lambda: make(images_a_person=4).arguments(),
    "an untrained model": lambda: BATCH.arguments(image_features=torch.randn(B, D), text_features=torch.randn(B, D)),
    "normalised features": lambda: BATCH.arguments(
        loss=ASDMLoss(),
        image_features=F.normalize(BATCH.image_features, dim=1),
        text_features=F.normalize(BATCH.text_features, dim=1),
    ),
    "features of CMPM": lambda: BATCH.arguments(loss=CMPMLoss()),
    "bfloat16": lambda: {
        k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in BATCH.arguments().items()
    },
    "end token as padding, kept once": lambda: make(pad=END).arguments(),
    "end token as padding, dropped": lambda: make(pad=END).arguments(text_mask=make(pad=END).token_ids != END),
    "padded in front": lambda: padded_in_front(BATCH),
    "no start and end in the mask": lambda: BATCH.arguments(
        text_mask=BATCH.text_mask & (BATCH.token_ids != START) & (BATCH.token_ids != END)
    ),
    "no start and end, no ids": lambda: BATCH.arguments(
        text_mask=BATCH.text_mask & (BATCH.token_ids != START), token_ids=None
    ),
    "nothing is padding": lambda: full(BATCH),
    "nothing is padding, no ids": lambda: {**full(BATCH), "token_ids": None},
    "an empty caption": lambda: BATCH.arguments(
        text_mask=BATCH.text_mask & (torch.arange(B) != 3)[:, None], masked_labels=None, masked_text_tokens=None
    ),
    "a repeated last word": lambda: {**full(BATCH), "token_ids": repeated_last_word(BATCH)},
    "labels of Hugging Face": lambda: BATCH.arguments(
        masked_labels=BATCH.masked_labels.masked_fill(BATCH.masked_labels == 0, -100)
    ),
    "few labels": lambda: BATCH.arguments(
        masked_labels=torch.where(torch.arange(B)[:, None] < 2, BATCH.masked_labels, 0),
        masked_text_tokens=BATCH.text_tokens,
    ),
    "one image twice": lambda: one_image_twice(BATCH),
    "one pair": lambda: {k: v[:1] if torch.is_tensor(v) else v for k, v in BATCH.arguments().items()},
    "two pairs": lambda: {k: v[:2] if torch.is_tensor(v) else v for k, v in BATCH.arguments().items()},
    "[CLS] is masked": lambda: BATCH.arguments(
        image_tokens=BATCH.cls_and_patches, image_mask=(torch.arange(N + 1) > 0).expand(B, -1)
    ),
    "triplet by identity": lambda: BATCH.arguments(loss=TripletLoss()),
    "sigmoid by identity": lambda: BATCH.arguments(loss=SigmoidLoss(positives="identity")),
    "EFA by identity": lambda: BATCH.arguments(loss=EFALoss(negatives="different_identity")),
    "FMFA": lambda: make(persons=B).arguments(loss=fmfa()),
    "FMFA by identity": lambda: BATCH.arguments(loss=fmfa(efa={"negatives": "different_identity"})),
    "FMFA without EFA": lambda: BATCH.arguments(loss=fmfa(weights={"efa": 0})),
    "a temperature that logit_scale replaces": lambda: BATCH.arguments(loss=ASDMLoss(temperature=50.0)),
    "as many patches as pairs": lambda: BATCH.arguments(image_tokens=BATCH.image_tokens[:, :B]),
    "tokens alone": lambda: {"image_tokens": BATCH.image_tokens, "text_tokens": BATCH.text_tokens},
    "a mask alone": lambda: {"text_mask": BATCH.text_mask},
}


def fmfa(**arguments):
    return FMFALoss(D, B, irr={"depth": 1}, **arguments)


def padded_in_front(b: Batch):
    order = (~b.text_mask).long().argsort(dim=1, descending=True, stable=True)
    index = order[..., None].expand(-1, -1, D)
    changed = {name: getattr(b, name).gather(1, order) for name in ("text_mask", "token_ids", "masked_labels")}
    return b.arguments(
        **changed, text_tokens=b.text_tokens.gather(1, index), masked_text_tokens=b.masked_text_tokens.gather(1, index)
    )


def full(b: Batch):
    """Captions that fill the length."""
    ids = torch.randint(1, VOCABULARY, (B, L), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = START, END
    return {
        "text_tokens": b.text_tokens,
        "token_ids": ids,
        "text_mask": torch.ones(B, L, dtype=torch.bool),
        "image_tokens": b.image_tokens,
        "pids": b.pids,
    }


def repeated_last_word(b: Batch):
    ids = full(b)["token_ids"]
    ids[:, -1] = ids[:, -2].roll(1)
    ids[5, -2:] = 7
    return ids


def one_image_twice(b: Batch):
    image, pids = b.image_features.clone(), b.pids.clone()
    image[4], pids[4] = image[9], pids[9]
    return b.arguments(image_features=image, pids=pids)


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_batch_raises_no_alarm(name):
    report = check_batch(**RIGHT[name]())
    assert report.findings == ()
    assert str(report) == "\n".join([*report.statistics, "nothing looks wrong"])


def test_nothing_was_given():
    assert str(check_batch()) == "nothing was given"
    assert str(check_batch(loss=ASDMLoss())) == "loss          ASDMLoss\nnothing looks wrong"


@pytest.mark.parametrize("scale", [10, 1 / 0.07, 1 / 0.015, 100.0, torch.tensor([100.0]), torch.tensor(50.0).half()])
def test_scales_in_use_raise_no_alarm(scale):
    assert check_batch(logit_scale=scale).findings == ()


def test_a_small_scale_is_legal_where_nothing_says_that_it_is_a_logarithm():
    assert check_batch(logit_scale=1.0).findings == check_batch(logit_scale=4.9).findings == ()
    for scale in (0.5, 4.0, torch.tensor(0.5), torch.tensor(4.0)):
        assert check_batch(loss=SigmoidLoss(), logit_scale=scale).findings == ()
    for scale in (0.5, torch.tensor(0.5), torch.tensor(4.0)):
        (finding,) = check_batch(logit_scale=scale).findings
        assert "if this is" in finding


@pytest.mark.parametrize("count", [1, 2, 15, 49, 64, 128, 192, 196, 210, 256, 576])
def test_grids_in_use_raise_no_alarm(count):
    assert check_batch(image_tokens=torch.randn(2, count, 8)).findings == ()


def changed(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


WRONG = {
    "NaN": (lambda: {"text_features": changed(torch.randn(4, 8), (0, 0), math.nan)}, "text_features holds 1 of 32"),
    "a row of zeros": (
        lambda: {"image_features": changed(torch.randn(4, 8), 2, 0)},
        "image_features has 1 rows of zeros",
    ),
    "one vector": (lambda: {"image_features": torch.ones(4, 8) * torch.arange(1, 5)[:, None]}, "are one vector"),
    "texts in another order": (
        lambda: BATCH.arguments(text_features=BATCH.text_features.flip(0), text_tokens=None),
        "nearest",
    ),
    "a mask that keeps nothing": (lambda: {"text_mask": torch.zeros(4, 8, dtype=torch.bool)}, "keeps no token"),
    "labels that are ids": (lambda: BATCH.arguments(masked_labels=BATCH.token_ids), "a label at 418 of"),
    "labels of another batch": (
        lambda: BATCH.arguments(masked_labels=BATCH.masked_labels.roll(1, 0) * 2),
        "differ from token_ids",
    ),
    "no label": (lambda: {"masked_labels": torch.zeros(4, 8, dtype=torch.long)}, "no label"),
    "captions of CLIP as patches": (
        lambda: {"image_tokens": torch.randn(2, 77, 8), "text_tokens": torch.randn(2, 192, 8)},
        "the length of CLIP's captions",
    ),
    "patches as text by an image mask": (
        lambda: {**tokens(5, 9), "image_mask": torch.ones(2, 9, dtype=torch.bool)},
        "image_mask has the 9 columns of text_tokens",
    ),
    "features swapped": (
        lambda: BATCH.arguments(image_features=BATCH.text_features, text_features=BATCH.image_features),
        "image_features are among text_tokens",
    ),
    "one image, two pids": (
        lambda: BATCH.arguments(image_features=changed(BATCH.image_features, 4, BATCH.image_features[9])),
        "images 4 and 9 are the same",
    ),
    "another batch size": (
        lambda: {"pids": torch.arange(3), "image_tokens": torch.randn(4, 5, 8)},
        "does not fit a batch of 3",
    ),
    "two batch sizes": (lambda: {"pids": torch.arange(3), "image_features": torch.randn(4, 8)}, "the same in all"),
    "sequence first, tokens alone": (
        lambda: {name: tensor.transpose(0, 1) for name, tensor in tokens(5, 9).items()},
        "image_tokens [5, 2, 8] has the batch of 2 second",
    ),
    "sequence first, a mask": (
        lambda: {"text_tokens": torch.randn(9, 2, 8), "text_mask": torch.ones(2, 9, dtype=torch.bool)},
        "text_tokens [9, 2, 8] has the batch of 2 second",
    ),
    "sequence first, as many as pairs": (
        lambda: {
            "image_features": BATCH.image_features[:L],
            "image_tokens": BATCH.cls_and_patches[:L, :L].transpose(0, 1),
        },
        "image_tokens [24, 24, 64] has the batch of 24 second",
    ),
    **{
        f"a scale of {s}": (lambda s=s: {"logit_scale": s}, "logit_scale")
        for s in (0, -1.0, 0.07, torch.tensor(2.66), torch.tensor([4.6]), 1e20)
    },
    **{
        f"{cls.__name__} of the inverse": (
            lambda cls=cls: {"loss": cls(temperature=50.0)},
            f"{cls.__name__}(temperature=50): if this is the scale 1 / tau, pass temperature=0.02",
        )
        for cls in (ASDMLoss, SDMLoss, ITCLoss, TALLoss, TRLLoss, SigmoidLoss)
    },
    "TAL takes no scale": (lambda: {"loss": TALLoss(temperature=50.0), "logit_scale": 50.0}, "TALLoss(temperature=50)"),
    "FMFA of the inverse": (
        lambda: {"loss": fmfa(asdm={"temperature": 50.0})},
        "FMFALoss's ASDMLoss(temperature=50): if this is",
    ),
    "triplet with repeated persons": (
        lambda: BATCH.arguments(loss=TripletLoss(negatives="all")),
        'TripletLoss(negatives="all") does not use pids, 4 of 32 repeat: pairs of one person are negatives of each '
        'other; TripletLoss(negatives="different_identity") leaves them out',
    ),
    "sigmoid with repeated persons": (
        lambda: BATCH.arguments(loss=SigmoidLoss(positives="paired")),
        'SigmoidLoss(positives="paired") does not use pids, 4 of 32 repeat: pairs of one person are negatives of each '
        'other; SigmoidLoss(positives="identity") makes them positives',
    ),
    "FMFA with repeated persons": (
        lambda: BATCH.arguments(loss=fmfa()),
        'FMFALoss\'s EFALoss(negatives="all") does not use pids, 4 of 32 repeat',
    ),
    **{
        f"a grid of {n}": (lambda n=n: {"image_tokens": torch.randn(2, n, 8)}, f"{n} = {n - 1} + 1 tokens")
        for n in (129, 193, 197, 257, 577)
    },
}


def tokens(n, length):
    return {"image_tokens": torch.randn(2, n, 8), "text_tokens": torch.randn(2, length, 8)}


@pytest.mark.parametrize("name", WRONG)
def test_what_one_batch_gives_away(name):
    batch, message = WRONG[name]
    report = check_batch(**batch())
    assert message in report.findings[0], report.findings
    assert len(report.findings) == 1 + name.endswith("tokens alone"), report.findings
    assert str(report).endswith(f"! {report.findings[-1]}")


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"image_features": [1.0]}, TypeError, "image_features must be a tensor"),
        ({"image_tokens": torch.randn(2, 3)}, ValueError, "image_tokens must have shape"),
        ({"text_mask": torch.ones(2, 3)}, TypeError, "text_mask must be a boolean tensor"),
        ({"token_ids": torch.ones(2, 3, dtype=torch.bool)}, TypeError, "token_ids must be an integer tensor"),
        ({"pids": torch.ones(2, 3, dtype=torch.long)}, ValueError, "pids must have shape"),
        ({"logit_scale": torch.ones(2)}, ValueError, "logit_scale must hold one number"),
    ],
)
def test_what_no_loss_takes_raises(batch, error, message):
    with pytest.raises(error, match=message):
        check_batch(**batch)


def test_the_batch_is_left_as_it_was():
    arguments = BATCH.arguments(image_features=BATCH.image_features.clone().requires_grad_())
    before = {name: value.clone() if torch.is_tensor(value) else value for name, value in arguments.items()}
    check_batch(**arguments)
    assert all(torch.equal(value, before[name]) for name, value in arguments.items() if torch.is_tensor(value))
