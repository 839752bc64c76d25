"""docs/pitfalls.md: every number of the page is measured here, and check_batch says what the page quotes.

One batch as a trained model gives it: a word of a caption lies near a patch of its image. Everything is
float64, so that a rounded number is the same on every processor.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fmfa_losses import ASDMLoss, CMPMLoss, EFALoss, FMFALoss, SDMLoss, mask_tokens
from fmfa_losses.doctor import check_batch
from fmfa_losses.ops.aggregation import sparse_aggregate
from fmfa_losses.retrieval import retrieval_metrics

PAGE = (Path(__file__).parents[1] / "docs" / "pitfalls.md").read_text(encoding="utf-8")
B, ROWS, COLUMNS, L, D, VOCABULARY = 32, 12, 6, 24, 64, 40
N = ROWS * COLUMNS
START, END, PAD, MASK = 49406, 49407, 0, 49405


@dataclass
class Batch:
    """What a step has: features and tokens of a model, and what the loader gave."""

    image_features: torch.Tensor
    text_features: torch.Tensor
    cls_and_patches: torch.Tensor
    text_tokens: torch.Tensor
    token_ids: torch.Tensor
    text_mask: torch.Tensor
    pids: torch.Tensor
    masked_text_tokens: torch.Tensor
    masked_labels: torch.Tensor

    @property
    def image_tokens(self):
        return self.cls_and_patches[:, 1:]

    def arguments(self, **changed):
        """Everything that check_batch takes, with some of it changed; None leaves one out."""
        names = ("image_features", "text_features", "image_tokens", "text_tokens", "masked_text_tokens")
        names += ("masked_labels", "text_mask", "token_ids", "pids")
        return {**{name: getattr(self, name) for name in names}, "logit_scale": 50.0, **changed}


def make(persons: int = 28, *, seed: int = 0, pad: int = PAD, images_a_person: int = 0) -> Batch:
    """B pairs; words are chosen patches of the own image with noise, the end token is the caption's feature."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    which = torch.arange(B) // images_a_person if images_a_person else torch.arange(B) % persons
    person = noise(B, D)[which]
    image = person + 0.5 * noise(B, D)
    text = image + 0.7 * noise(B, D)
    patches = image[:, None] + 2 * noise(B, N, D)
    lengths = torch.randint(8, L - 4, (B,), generator=generator)
    ids = torch.randint(1, VOCABULARY, (B, L), generator=generator)
    column = torch.arange(L)
    ids[:, 0] = START
    ids = torch.where(column == lengths[:, None] - 1, END, ids)
    ids = torch.where(column >= lengths[:, None], pad, ids)
    seen = torch.randint(N, (B, L), generator=generator)
    words = patches[torch.arange(B)[:, None], seen] + 0.5 * noise(B, L, D)
    words[torch.arange(B), lengths - 1] = text
    words = torch.where(
        (column < lengths[:, None])[..., None], words, 2 * noise(L, D)
    )  # padding knows its position alone
    masked_ids, labels = mask_tokens(ids, mask_id=MASK, special_ids=(START, END), generator=generator)
    masked = torch.where((masked_ids != ids)[..., None], noise(D), words)
    return Batch(
        image_features=9 / 8 * image,
        text_features=text,
        cls_and_patches=torch.cat([9 / 8 * image[:, None], patches], dim=1),
        text_tokens=words,
        token_ids=ids,
        text_mask=column < lengths[:, None],
        pids=which * 37 + 11,
        masked_text_tokens=masked,
        masked_labels=labels,
    )


BATCH = make()


def own_probability(scores: torch.Tensor, scale: float) -> float:
    return (scale * scores).softmax(1).diagonal().mean().item()


def cosines(b: Batch) -> torch.Tensor:
    return F.normalize(b.text_features, dim=1) @ F.normalize(b.image_features, dim=1).T


def efa(b: Batch, **changed) -> float:
    inputs = {"image_tokens": b.image_tokens, "text_tokens": b.text_tokens, "text_mask": b.text_mask, **changed}
    return EFALoss()(inputs.pop("image_tokens"), inputs.pop("text_tokens"), **inputs).item()


def log_scale():
    def measure(scale):
        loss = ASDMLoss()(BATCH.image_features, BATCH.text_features, BATCH.pids, logit_scale=scale)
        return loss.item(), own_probability(cosines(BATCH), scale)

    (loss, p), (loss_log, p_log), (loss_tau, p_tau) = (measure(s) for s in (50.0, math.log(50), 0.02))
    return {
        "scale": (50, math.log(50), 0.02),
        "A-SDM": (loss, loss_log, loss_tau),
        "mean probability of the own pair": (p, p_log, p_tau),
    }, [BATCH.arguments(logit_scale=torch.tensor(50.0).log()), BATCH.arguments(logit_scale=torch.tensor(0.02))]


def inverted_mask():
    wrong = ~BATCH.text_mask
    return {
        "tokens kept, %": tuple(100 * m.double().mean().item() for m in (BATCH.text_mask, wrong)),
        "captions whose first token is kept, %": tuple(
            100 * m[:, 0].double().mean().item() for m in (BATCH.text_mask, wrong)
        ),
        "EFA": (efa(BATCH), efa(BATCH, text_mask=wrong)),
        "EFA of a model that knows nothing, 4 (log(B - 1) + margin)": (4 * (math.log(B - 1) + 0.1),) * 2,
    }, [
        BATCH.arguments(text_mask=wrong, masked_labels=None),
        BATCH.arguments(text_mask=wrong, token_ids=None),
        BATCH.arguments(text_mask=wrong, masked_labels=None, token_ids=None),
    ]


def end_token_as_padding():
    b = make(pad=END)
    assert torch.equal(b.text_mask, BATCH.text_mask)
    wrong = b.token_ids != 0
    right = b.token_ids.eq(END).cumsum(1).sub(b.token_ids.eq(END).long()) == 0
    assert torch.equal(right, b.text_mask)
    return {
        "tokens kept, %": tuple(100 * m.double().mean().item() for m in (right, wrong)),
        "EFA": (efa(b), efa(b, text_mask=wrong)),
    }, [b.arguments(text_mask=wrong)]


def cls_among_patches():
    wrong = BATCH.cls_and_patches

    def weight_of_first(tokens):
        similarity = torch.einsum("bld,bnd->bln", BATCH.text_tokens, tokens)
        positions = torch.eye(tokens.shape[1], dtype=tokens.dtype).expand(B, -1, -1)
        weights = sparse_aggregate_weights(positions, similarity)
        return tokens.shape[1] * weights[..., 0][BATCH.text_mask].mean().item()

    return {
        "image tokens": (N, N + 1),
        "weight of the first one × their number": (weight_of_first(BATCH.image_tokens), weight_of_first(wrong)),
        "EFA": (efa(BATCH), efa(BATCH, image_tokens=wrong)),
    }, [BATCH.arguments(image_tokens=wrong)]


def sparse_aggregate_weights(positions: torch.Tensor, similarity: torch.Tensor) -> torch.Tensor:
    """Aggregating one-hot patches gives the weights themselves."""
    return sparse_aggregate(positions, similarity, backend="torch")


def swapped_tokens():
    wrong = efa(BATCH, image_tokens=BATCH.text_tokens, text_tokens=BATCH.image_tokens, text_mask=None)
    batch = BATCH.arguments(image_tokens=BATCH.text_tokens, text_tokens=BATCH.image_tokens)
    alone = {name: batch[name] for name in ("image_tokens", "text_tokens", "text_features")}
    sizes = BATCH.image_tokens.shape[1], BATCH.text_tokens.shape[1]
    return {"image tokens": sizes, "EFA, no mask": (efa(BATCH, text_mask=None), wrong)}, [
        {**alone, "token_ids": BATCH.token_ids},
        alone,
    ]


def sequence_first():
    image, text = BATCH.image_tokens[:, :L], BATCH.text_tokens

    def measure(image, text):
        losses = EFALoss(reduction="none")(image, text)
        return len(losses), losses.mean().item()

    (count, loss), (count_wrong, loss_wrong) = (
        measure(image, text),
        measure(image.transpose(0, 1), text.transpose(0, 1)),
    )
    wrong = {"image_tokens": image.transpose(0, 1), "text_tokens": text.transpose(0, 1), "pids": BATCH.pids}
    return {
        'losses with reduction="none"': (count, count_wrong),
        "EFA": (loss, loss_wrong),
    }, [wrong]


def indices_as_pids():
    b = make(images_a_person=4)
    indices = torch.arange(B)
    rows = (b.pids, indices)
    return {
        "positives a row": tuple((p[:, None] == p).sum(1).double().mean().item() for p in rows),
        "SDM": tuple(SDMLoss()(b.image_features, b.text_features, p).item() for p in rows),
    }, [b.arguments(pids=indices)]


def unmasked_words():
    labelled = BATCH.masked_labels != 0
    text = BATCH.text_tokens[labelled]

    def difference(tokens):
        return ((tokens[labelled] - text).norm(dim=1) / text.norm(dim=1)).mean().item()

    wrong = BATCH.arguments(masked_text_tokens=BATCH.text_tokens)
    values = (difference(BATCH.masked_text_tokens), difference(BATCH.text_tokens))
    return {"difference from text_tokens where a label is": values}, [wrong]


def forgotten_masked_inputs():
    objective = FMFALoss(D, 28, vocab_size=VOCABULARY, irr={"depth": 1}).double()
    b, pids = BATCH, torch.arange(B) % 28
    features = (b.image_features, b.text_features, b.image_tokens, b.text_tokens, pids)
    masked = {"masked_text_tokens": b.masked_text_tokens, "masked_labels": b.masked_labels}
    right, wrong = (objective(*features, text_mask=b.text_mask, **m) for m in (masked, {}))
    return {"terms": (len(right.terms), len(wrong.terms))}, []


def normalised_features_in_cmpm():
    b = make(persons=B)
    image, text = b.image_features, b.text_features
    unit = [F.normalize(x, dim=1) for x in (image, text)]
    raw = text @ unit[0].T
    wrong = b.arguments(image_features=unit[0], text_features=unit[1], loss=CMPMLoss())
    return {
        "length of a text feature": (text.norm(dim=1).mean().item(), 1),
        "mean probability of the own pair": (own_probability(raw, 1), own_probability(unit[1] @ unit[0].T, 1)),
        "CMPM": (CMPMLoss()(image, text, b.pids).item(), CMPMLoss()(*unit, b.pids).item()),
    }, [wrong]


def swapped_retrieval():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(100, D, generator=generator, dtype=torch.float64)
    text = image.repeat_interleave(2, 0) + 2.5 * torch.randn(200, D, generator=generator, dtype=torch.float64)
    persons = torch.arange(100)
    right = retrieval_metrics(text, image, persons.repeat_interleave(2), persons)
    wrong = retrieval_metrics(image, text, persons, persons.repeat_interleave(2))
    return {
        "R1 of t2i": (right.t2i.cmc[1], wrong.t2i.cmc[1]),
        "R1 of i2t": (right.i2t.cmc[1], wrong.i2t.cmc[1]),
    }, []


def pids_without_negatives():
    b = make(images_a_person=4)
    inputs = {"text_mask": b.text_mask, "pids": b.pids}
    right = EFALoss(negatives="different_identity")(b.image_tokens, b.text_tokens, **inputs).item()
    wrong = EFALoss()(b.image_tokens, b.text_tokens, **inputs).item()
    assert wrong == efa(b)
    return {"EFA with pids": (right, wrong), "EFA without pids": (efa(b), efa(b))}, [b.arguments(loss=EFALoss())]


PITFALLS = {
    "The logarithm or the inverse of the scale": log_scale,
    "An inverted text mask": inverted_mask,
    "`ids != 0` where padding is the end token": end_token_as_padding,
    "[CLS] among the patches": cls_among_patches,
    "EFA's tokens swapped": swapped_tokens,
    "Tokens with the sequence first": sequence_first,
    "Indices as pids": indices_as_pids,
    "Unmasked tokens as masked ones": unmasked_words,
    "Masked inputs forgotten": forgotten_masked_inputs,
    "CMPM on normalised features": normalised_features_in_cmpm,
    "Image and text swapped in retrieval": swapped_retrieval,
    'pids without `negatives="different_identity"`': pids_without_negatives,
}


def sections():
    parts = re.split(r"^## (.+)\n", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_page_has_every_pitfall_and_no_other():
    assert [name for name in sections() if name != "check_batch"] == list(PITFALLS)


@pytest.mark.parametrize("name", PITFALLS)
def test_numbers_and_findings_of_the_page(name):
    text = sections()[name]
    measured, wrong_batches = PITFALLS[name]()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    rows = rows[2:]
    assert [row[0] for row in rows] == list(measured)
    for row in rows:
        printed, values = row[1:], measured[row[0]]
        assert len(printed) == len(values), row
        for cell, value in zip(printed, values, strict=True):
            number = cell.strip("* ")
            unit = 10.0 ** -len(number.partition(".")[2]) if "." in number else 0  # an integer is exact
            assert abs(float(number) - value) <= 0.5 * unit + 1e-6 * abs(value), (row[0], cell, value)
    quoted = [line.removeprefix("> ") for line in text.splitlines() if line.startswith("> ")]
    assert quoted == [finding for batch in wrong_batches for finding in check_batch(**batch).findings]
    assert bool(quoted) != ("One batch does not tell" in " ".join(text.split()))


# --- check_batch on batches that are right


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
    "EFA by identity": lambda: BATCH.arguments(loss=EFALoss(negatives="different_identity")),
    "FMFA with repeated persons": lambda: BATCH.arguments(loss=FMFALoss(D, 28, irr={"depth": 1})),
    "nothing": dict,
    "as many patches as pairs": lambda: BATCH.arguments(image_tokens=BATCH.image_tokens[:, :B]),
    "tokens alone": lambda: {"image_tokens": BATCH.image_tokens, "text_tokens": BATCH.text_tokens},
    "a mask alone": lambda: {"text_mask": BATCH.text_mask},
}


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
    assert str(report).endswith("! nothing that looks wrong")


@pytest.mark.parametrize("scale", [10, 1 / 0.07, 1 / 0.015, 100.0, torch.tensor([100.0]), torch.tensor(50.0).half()])
def test_scales_in_use_raise_no_alarm(scale):
    assert check_batch(logit_scale=scale).findings == ()


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
    **{f"a scale of {s}": (lambda s=s: {"logit_scale": s}, "logit_scale") for s in (0, -1.0, 0.07, 2.66, 4.6, 1e20)},
    **{
        f"a grid of {n}": (lambda n=n: {"image_tokens": torch.randn(2, n, 8)}, "[CLS] may be")
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
