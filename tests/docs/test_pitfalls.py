"""docs/pitfalls.md: every number of the page is measured here, and check_batch says what the page quotes."""

import inspect
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.pitfall_batch import BATCH, END, VOCABULARY, B, Batch, D, L, N, make

from fmfa_losses import ASDMLoss, CMPMLoss, EFALoss, FMFALoss, SDMLoss
from fmfa_losses.doctor.diagnosis import check_batch
from fmfa_losses.ops.aggregation import sparse_aggregate
from fmfa_losses.retrieval import retrieval_metrics

PAGE = (Path(__file__).parents[2] / "docs" / "pitfalls.md").read_text(encoding="utf-8")


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
        "mean probability of the right image": (p, p_log, p_tau),
    }, [
        BATCH.arguments(logit_scale=torch.tensor(50.0).log()),
        BATCH.arguments(logit_scale=torch.tensor(0.02)),
        BATCH.arguments(loss=ASDMLoss(temperature=50), logit_scale=None),
    ]


def inverted_mask():
    wrong = ~BATCH.text_mask
    return {
        "tokens kept, %": tuple(100 * m.double().mean().item() for m in (BATCH.text_mask, wrong)),
        "captions whose first token is kept, %": tuple(
            100 * m[:, 0].double().mean().item() for m in (BATCH.text_mask, wrong)
        ),
        "EFA": (efa(BATCH), efa(BATCH, text_mask=wrong)),
        "EFA of an untrained model, 4 (log(B - 1) + margin)": (4 * (math.log(B - 1) + 0.1),) * 2,
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
        "mean probability of the right image": (own_probability(raw, 1), own_probability(unit[1] @ unit[0].T, 1)),
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pids that are not used, once a process
        wrong = EFALoss()(b.image_tokens, b.text_tokens, **inputs).item()
    assert wrong == efa(b)
    return {"EFA with pids": (right, wrong), "EFA without pids": (efa(b), efa(b))}, [
        b.arguments(loss=EFALoss()),
        b.arguments(loss=FMFALoss(D, 8, irr={"depth": 1})),
    ]


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


def test_the_example_passes_all_that_the_page_needs():
    passed = set(re.findall(r"^        (\w+)=", sections()["check_batch"], flags=re.MULTILINE))
    assert passed == inspect.signature(check_batch).parameters.keys() - {"image_mask"}


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
    assert ("`check_batch` says one of these" in text) == (len(wrong_batches) > 1)
    assert bool(quoted) != ("`check_batch` cannot see this in one batch" in " ".join(text.split()))
