"""docs/how_it_works.md and docs/faq.md: the numbers are what the library computes, and the examples run."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from benchmarks import ROOT
from benchmarks.pictures.how_it_works import COSINES, IMAGE, TEXT, WORDS, Alignment, Statistics, packed
from fmfa_losses import FMFALoss, IRRHead, functional, mask_tokens
from fmfa_losses.cached import cached_backward
from fmfa_losses.functional import (
    asdm_loss,
    efa_loss,
    hard_similarity,
    itc_loss,
    sdm_loss,
    sparse_aggregate,
    tal_loss,
)
from fmfa_losses.ops.similarity_distribution import statistics
from fmfa_losses.ops.similarity_distribution.reference import RowLoss, similarity_distribution_loss_reference
from fmfa_losses.retrieval import similarity_metrics

PAGE, FAQ = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("how_it_works.md", "faq.md"))
TINY, ROW = Alignment(), Statistics()


def tables(page: str = PAGE) -> dict[str, dict[str, list[str]]]:
    """First cell of the head -> first cell of each row -> its other cells."""
    found = {}
    for block in re.findall(r"(?:^\|.*\|\n)+", page, re.M):
        rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in block.splitlines()]
        found[rows[0][0]] = {row[0]: row[1:] for row in rows[2:]}
    return found


def printed(name: str, values: dict[str, list[float]] | dict[str, torch.Tensor]) -> None:
    """The rows of a table are these numbers, in as many digits as it shows."""
    table = tables()[name]
    for row, numbers in values.items():
        cells = [cell for cell in table[row] if cell]
        numbers = numbers.tolist() if isinstance(numbers, torch.Tensor) else numbers
        assert len(cells) == len(numbers)
        for cell, number in zip(cells, numbers, strict=True):
            digits = len(cell.partition(".")[2])
            assert abs(float(cell) - number) <= 0.5 * 10**-digits + 1e-9, (name, row, cell, number)


def rows_of(values: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(WORDS[0], values, strict=True))


def of_scores(scores: torch.Tensor) -> torch.Tensor:
    """Weights of given similarities: those of one-hot patches, of which the scores are the texts."""
    return sparse_aggregate(torch.eye(6, dtype=torch.float64).expand(len(scores), -1, -1), scores)


def test_the_aggregation_of_the_page_is_that_of_the_library():
    s = torch.einsum("bld,bnd->bln", TEXT, IMAGE)
    weights, joint = of_scores(s), sparse_aggregate(IMAGE, TEXT)
    printed("s of pair 0", rows_of(s[0]))
    printed("a of pair 0", rows_of(weights[0]))
    printed("e of pair 0", rows_of(joint[0]))
    torch.testing.assert_close((TINY.s, TINY.a, TINY.joint), (s, weights, joint))


def test_the_gradient_of_a_weight_is_that_of_autograd():
    de = torch.tensor([0.0, 1, 0, 0], dtype=torch.float64)
    scores = TINY.s[:1].clone().requires_grad_()
    (of_scores(scores)[0, 1] @ IMAGE[0] @ de).backward()
    da, ds = TINY.ds(de)
    printed('"red", de = (0, 1, 0, 0)', {"da": IMAGE[0] @ de, "ds": scores.grad[0, 1]})
    torch.testing.assert_close((da, ds), (IMAGE[0] @ de, scores.grad[0, 1]))


def test_matches_pools_and_loss_are_those_of_the_library():
    joint = sparse_aggregate(IMAGE, TEXT)
    cosines = torch.einsum("ild,jkd->ijlk", F.normalize(TEXT, dim=2), F.normalize(joint, dim=2))
    # A sample of one word has the best match of this word as its sum.
    best = hard_similarity(TEXT[0].unsqueeze(1), joint, pool="sum").T
    printed("cosines of text 0 with e of pair 0", rows_of(cosines[0, 0]))
    printed("best match", {"text 0, pair 0": best[0], "text 0, pair 1": best[1]})
    sims = [hard_similarity(x, joint) for x in (TEXT, IMAGE)]
    names = [f"{name} {i}" for name in ("text", "image") for i in range(2)]
    printed("S", dict(zip(names, torch.cat(sims), strict=True)))
    loss = efa_loss(IMAGE, TEXT)
    printed("loss", {"EFA": [loss.item()]})
    torch.testing.assert_close((TINY.text_sim, TINY.image_sim, TINY.terms().sum(0).mean()), (*sims, loss))


def test_a_match_in_one_integer():
    best = TINY.text_cos[0, 0].max(dim=1)
    for word, value, winner in zip(WORDS[0], best.values.tolist(), best.indices.tolist(), strict=True):
        cells = tables()["match of text 0 with pair 0"][word]
        assert cells == [f"{value:.4f}", str(winner), *packed(value, winner)]
        number = torch.tensor([int(cells[2].replace(" ", ""), 16)])  # what the kernels load
        assert (number & 0xFFFFFFFF).item() == winner
        assert (number >> 32).int().view(torch.float32).item() == pytest.approx(value, rel=1e-7)


def test_weights_and_lists_are_the_gradient_of_the_loss():
    joint = sparse_aggregate(IMAGE, TEXT).requires_grad_()
    text_sim, image_sim = (hard_similarity(x, joint) for x in (TEXT, IMAGE))
    sims = [text_sim, text_sim.T, image_sim, image_sim.T]
    loss = torch.stack([s.flip(1).diagonal() - s.diagonal() + 0.1 for s in sims]).sum(0).mean()
    torch.testing.assert_close(loss, efa_loss(IMAGE, TEXT))
    (through_texts,) = torch.autograd.grad(loss, text_sim, retain_graph=True)
    torch.testing.assert_close(through_texts, 1 - 2 * torch.eye(2, dtype=torch.float64))

    winners, starts, lists = TINY.lists(0)
    weights = TINY.weights()[:, 0].flatten()
    words = [word for caption in WORDS for word in caption]
    for row, cells in enumerate(tables()["w with pair 0"].values()):
        assert cells == [words[row], str(winners[row]), f"{weights[row]:.3f}"]
    table = tables()["lists of pair 0"]
    assert table["starts"] == [" ".join(map(str, starts))]
    for word, rows in zip(WORDS[0], lists, strict=True):
        assert table[word] == [" ".join(map(str, rows))]

    # The sums of the lists are the gradient of the unit joint embeddings of pair 0, through the texts.
    unit = F.normalize(joint.detach(), dim=2).requires_grad_()
    (hard_similarity(TEXT, unit) * through_texts).sum().backward()
    texts = F.normalize(TEXT, dim=2).flatten(0, 1)
    for k, rows in enumerate(lists):
        along = sum(weights[r] * texts[r] for r in rows)
        own = unit[0, k].detach()
        torch.testing.assert_close(unit.grad[0, k], along - own * (own @ along))


def test_the_order_of_a_sum_changes_its_bits():
    rows = dict(zip((2, 5, 6), TINY.parts(0, 2, 2), strict=True))
    table = tables()['"jeans" of pair 0, its number "blue"']
    for row, part in rows.items():
        assert table[f"row {row}"] == [f"{part.item():.8f}"]
    for order in ("2 + 5 + 6", "5 + 6 + 2"):
        first, second, third = (rows[int(row)] for row in order.split(" + "))
        total = (first + second) + third
        assert table[order] == [f"{total.item():.8f}", f"{total.view(torch.int32).item():08X}"]


def test_the_row_of_a_sdm_is_that_of_the_library():
    spec = RowLoss(alpha=10.0, both=False, reduction="none")
    z = (50 * COSINES[:1]).requires_grad_()
    same = torch.eye(4, dtype=torch.bool)[:1]
    total = torch.ones(1, 1, dtype=torch.float64)
    blocks = [
        statistics.of(z[:, c], statistics.Labels(same[:, c], None, 0.3, 1e-8), total, spec, first=c.start)
        for c in (slice(0, 2), slice(2, 4))
    ]
    merged = statistics.merge(*blocks, spec)
    loss, final = statistics.finalize(merged, spec)
    index = (merged.top_index, merged.positive_index)
    dz = statistics.dlogits(
        z, statistics.Labels(same, None, 0.3, 1e-8), total, final, index, torch.ones_like(loss), spec
    )
    numbers = {
        name: [x.top.item(), x.sum_e.item(), x.excess.item()]
        for name, x in zip(("block 0", "block 1", "merged"), (*blocks, merged), strict=True)
    }
    printed("statistics", numbers)
    printed("row of text 0", {"p": z.softmax(1)[0].detach(), "dz": dz[0].detach()})
    gap = final.gap.item()
    printed("result", {"KL": [final.third.item()], "gap": [gap], "weight": [1 + 10 * gap], "loss": [loss.item()]})
    assert ROW.loss == pytest.approx(loss.item()) and ROW.p.tolist() == pytest.approx(z.softmax(1)[0].tolist())

    # The same row from features whose cosines are these, by the specification.
    images = torch.eye(4, 5, dtype=torch.float64)
    texts = torch.cat([COSINES, (1 - COSINES.square().sum(1, keepdim=True)).sqrt()], dim=1)
    rows = similarity_distribution_loss_reference(
        texts, images, torch.arange(4), logit_scale=50.0, alpha=10.0, both=False, reduction="none"
    )
    assert rows[0].item() == pytest.approx(loss.item())


def test_every_figure_is_there_and_named():
    figures = {file.name for file in (ROOT / "docs/pictures").glob("how_*.png")}
    assert figures == set(re.findall(r"\(pictures/(how_\w+\.png)\)", PAGE))


def examples(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)


def a_batch(pairs: int = 4, width: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    """Features, tokens and persons under the names of the pages."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"image": (), "text": (), "image_tokens": (6,), "text_tokens": (5,)}
    batch = {name: torch.randn(pairs, *size, width, generator=generator) for name, size in sizes.items()}
    return {**batch, "pids": torch.arange(pairs)}


class TwoTowers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(64, 16, dtype=torch.float64)

    def forward(self, images: torch.Tensor, captions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encoder(images), self.encoder(captions)


def test_the_examples_run():
    batch = a_batch()
    for name in ("image", "text"):
        batch[name].requires_grad_()
    objective = FMFALoss(embed_dim=64, num_identities=4, vocab_size=100, irr={"depth": 1})
    names = ("image", "text", "image_tokens", "text_tokens", "pids")
    namespace = {
        "torch": torch, "FMFALoss": FMFALoss, "mask_tokens": mask_tokens, "cached_backward": cached_backward,
        **{name: getattr(functional, name) for name in functional.__all__}, **batch,
        "images": batch["image"].detach().double(), "captions": batch["text"].detach().double(),
        "caption_ids": torch.tensor([[49406, 320, 786, 49407, 0]]), "model": TwoTowers(), "objective": objective,
        "out": objective(*(batch[name] for name in names)),
    }  # fmt: skip
    outside = asdm_loss(batch["image"], batch["text"], batch["pids"])
    for block in examples(PAGE) + examples(FAQ):
        exec(block, namespace)
        if "autocast" in block:
            assert torch.equal(namespace["loss"], outside)
    assert namespace["joint"].shape == (4, 5, 64)
    assert namespace["objective"].gather is False and namespace["objective"].irr.vocab_size == 32000
    assert not any(term.requires_grad for term in namespace["log"].values())
    assert (namespace["high"] - namespace["low"]).item() == pytest.approx(1, rel=1e-4)
    assert namespace["log_scale"].grad.isfinite() and abs(namespace["difference"].item()) < 1e-4
    assert len(namespace["optimizer"].param_groups[0]["params"]) > 2 + len(list(objective.identity.parameters()))
    assert namespace["masked_ids"].shape == (1, 5) and namespace["caption_ids"][0, 1] == 320


def test_values_at_the_start():
    batch = a_batch(64, 512)
    image, text, pids = batch["image"], batch["text"], batch["pids"]
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(64, count, 512, generator=generator) for count in (192, 77)]
    expected = {
        "ITC": itc_loss(image, text),
        "SDM": sdm_loss(image, text, pids),
        "A-SDM": asdm_loss(image, text, pids),
        "EFA": efa_loss(*tokens),
        "ID, 11003 persons": math.log(11003),
        "IRR": math.log(49408),
    }
    table = tables(FAQ)["at the start"]
    for name, value in expected.items():
        assert float(table[name][0]) == pytest.approx(float(value), rel=0.05), name


def plain_sdm(image: torch.Tensor, text: torch.Tensor, pids: torch.Tensor) -> torch.Tensor:
    """IRRA's formula in the dtype of its inputs."""
    labels = (pids[:, None] == pids).to(image.dtype)
    q = (labels / labels.sum(1, keepdim=True) + 1e-8).log()
    z = 50 * F.normalize(text, dim=1) @ F.normalize(image, dim=1).T
    return sum((z.softmax(1) * (z.log_softmax(1) - q)).sum(1).mean() for z in (z, z.T))


def test_what_the_faq_says_of_nan_and_rounding():
    batch = a_batch(64, 512)
    image, text, pids = batch["image"], batch["text"], batch["pids"]
    exact = plain_sdm(image.double(), text.double(), pids)
    assert sdm_loss(image.double(), text.double(), pids).item() == pytest.approx(exact.item(), rel=1e-12)
    for value in (plain_sdm(image, text, pids), sdm_loss(image, text, pids)):
        assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    assert not plain_sdm(image.half(), text.half(), pids).isfinite()
    assert sdm_loss(image.half(), text.half(), pids).item() == pytest.approx(exact.item(), rel=1e-3)

    assert torch.tensor(1e-8).half() == 0 and torch.tensor(1e-3).half() > 0  # Adam's eps
    assert torch.tensor(100.0).exp() == torch.inf
    assert tal_loss(torch.eye(4), torch.eye(4).roll(1, 0), pids[:4], temperature=0.01).item() == pytest.approx(2.2)
    worst = asdm_loss(torch.eye(64), torch.eye(64).roll(1, 0), pids)
    assert worst.item() == pytest.approx(405, abs=1) and 22 * -math.log(1e-8) == pytest.approx(405, abs=1)

    tokens = torch.randn(2, 3, 64)
    with pytest.raises(ValueError, match="ignore_index"):
        IRRHead(64, 100, depth=1)(tokens, tokens, torch.full((2, 3), -100))
    assert IRRHead(64, 100, depth=1)(tokens, tokens, torch.zeros(2, 3, dtype=torch.long)).loss == 0


def test_what_the_faq_says_of_small_batches():
    batch = {name: x.double() for name, x in a_batch(64).items()}
    images, captions, pids = batch["image"], batch["text"], torch.arange(64)
    model = TwoTowers()

    def gradient(run) -> torch.Tensor:
        model.zero_grad()
        run()
        return model.encoder.weight.grad.clone()

    chunks = list(zip(images.split(8), captions.split(8), strict=True))
    whole = gradient(lambda: sdm_loss(*model(images, captions), pids).backward())
    accumulated = gradient(lambda: [(sdm_loss(*model(*chunk), pids[:8]) / 8).backward() for chunk in chunks])
    cached = gradient(lambda: cached_backward(model, chunks, lambda i, t: sdm_loss(i, t, pids)))
    assert (cached - whole).norm() < 1e-12 * whole.norm()
    assert (accumulated - whole).norm() > whole.norm()


@pytest.mark.parametrize(("patches", "words", "width"), [(256, 77, 768), (196, 64, 768), (576, 248, 1024)])
def test_other_models(patches, words, width):
    image, text = (torch.randn(2, count, width) for count in (patches, words))
    assert efa_loss(image, text).isfinite()
    assert IRRHead(width, 100, depth=1).num_heads == width // 64


def test_a_margin_changes_no_gradient_of_efa():
    def gradient(margin: float) -> torch.Tensor:
        image = IMAGE.clone().requires_grad_()
        efa_loss(image, TEXT, margin_text=margin, margin_image=2 * margin).backward()
        return image.grad

    torch.testing.assert_close(gradient(0.1), gradient(0.7))


def test_average_precision_both_ways():
    ranks, i = torch.tensor([1.0, 2, 4, 7]), torch.arange(1, 5)
    precision = i / ranks
    before = torch.where(ranks > 1, (i - 1) / (ranks - 1).clamp(min=1), 1)
    numbers = f"{precision.mean():.3f} and {((precision + before) / 2).mean():.3f}"
    assert f"1, 2, 4 and 7 give {numbers}" in FAQ
    similarity = -torch.arange(1.0, 9).unsqueeze(0)  # the gallery in its order
    persons = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0])
    metrics = similarity_metrics(similarity, torch.tensor([1]), persons)
    assert metrics.mAP / 100 == pytest.approx(precision.mean().item(), rel=1e-5)
