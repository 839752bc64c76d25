"""Scores and metrics of a model, pictures of what it finds, and published figures to set beside."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.person_retrieval.data import Pairs, Split
from benchmarks.person_retrieval.errors import RunError
from benchmarks.person_retrieval.evaluation import as_dict, chance, encode, evaluate, find
from benchmarks.person_retrieval.models import TwoStream, WordTokenizer
from benchmarks.person_retrieval.paper import RESULTS, SIZES, ZERO_SHOT, beside, table_6, table_7, table_8
from benchmarks.person_retrieval.pictures import draw_comparison
from benchmarks.person_retrieval.scoring import Captions, encode_captions, fused_scores, metrics_by, reranked_scores

CPU = torch.device("cpu")


# -------------------------------------------------------------------------------------------------------- scores


def some_features(captions: int = 7, images: int = 5) -> tuple[Captions, Tensor, Tensor]:
    """Float64 features; captions of 2 to 6 words, images of 4 patches, of which two images are the same."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    lengths = torch.randint(2, 7, (captions,), generator=generator)
    lengths[0] = 6
    mask = torch.arange(6) < lengths[:, None]
    features, patches = draw(images, 8), draw(images, 4, 8)
    features[3], patches[3] = features[1], patches[1]
    return Captions(draw(captions, 8), draw(captions, 6, 8), mask), features, patches


def cosines(a: Tensor, b: Tensor) -> np.ndarray:
    """Of every row with every row, in float64."""
    x, y = (v.double().numpy() / np.linalg.norm(v.double().numpy(), axis=1, keepdims=True) for v in (a, b))
    return x @ y.T


def plain_fused(captions: Captions, images: Tensor, patches: Tensor) -> np.ndarray:
    """The definition, pair by pair."""
    scores = cosines(captions.features, images)
    for q, g in product(*map(range, scores.shape)):
        words = captions.words[q][captions.mask[q]]
        scores[q, g] = (scores[q, g] + cosines(words, patches[g]).max(axis=1).mean()) / 2
    return scores


def plain_order(first: np.ndarray, again: np.ndarray, k: int) -> list[list[int]]:
    """Gallery indices of every query: the first k by `first`, ordered by `again`, then the others."""
    orders = []
    for one, other in zip(first.round(9), again.round(9), strict=True):  # equal features have equal scores
        order = sorted(range(len(one)), key=lambda g: (-one[g], g))
        orders.append(sorted(order[:k], key=lambda g: (-other[g], g)) + order[k:])
    return orders


def order_of(scores: Tensor) -> list[list[int]]:
    return torch.tensor(scores.numpy().round(9)).sort(dim=1, descending=True, stable=True).indices.tolist()


@pytest.mark.parametrize(("patch_block", "block_size"), [(1, 1), (2, 3), (5, 256)])
def test_fused_scores_are_their_definition_whatever_the_blocks(patch_block: int, block_size: int) -> None:
    captions, images, patches = some_features()
    scores = fused_scores(captions, images, patches.split(patch_block), block_size=block_size)
    np.testing.assert_allclose(scores.numpy(), plain_fused(captions, images, patches), rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 50])
@pytest.mark.parametrize(("patch_block", "block_size"), [(1, 1), (2, 3), (5, 256)])
def test_the_first_k_are_ordered_anew_and_the_others_stay_below(k: int, patch_block: int, block_size: int) -> None:
    captions, images, patches = some_features()
    t2i, i2t = reranked_scores(captions, images, patches.split(patch_block), top_k=k, block_size=block_size)
    first = cosines(captions.features, images)
    fused = plain_fused(captions, images, patches)
    assert order_of(t2i) == plain_order(first, fused, k)
    assert order_of(i2t) == plain_order(first.T, fused.T, k)
    if k == 1:
        assert order_of(t2i) == order_of(torch.tensor(first))
    if k == 50:
        assert order_of(t2i) == order_of(torch.tensor(fused)) and order_of(i2t) == order_of(torch.tensor(fused.T))


def test_equal_scores_among_the_first_rank_by_index() -> None:
    """Cosine 0 and token similarity 1, or the other way round: a half each, whichever was first before."""
    one, other = torch.eye(2, dtype=torch.float64)
    captions = Captions(one[None], one[None, None], torch.ones(1, 1, dtype=torch.bool))
    images, patches = torch.stack([other, one, other]), torch.stack([one, other, other])[:, None]
    t2i, _ = reranked_scores(captions, images, patches.split(2), top_k=3)
    assert t2i.tolist() == [[4.0, 3.0, 2.0]]


# -------------------------------------------------------------------------------------------------------- models


def some_pairs(people: int = 6, photographs: int = 2, captions: int = 2) -> tuple[Pairs, WordTokenizer]:
    """Plain coloured images, and captions of different lengths."""
    rng = np.random.default_rng(5)
    photos = [Image.fromarray(rng.integers(0, 256, (32, 16, 3), dtype=np.uint8)) for _ in range(people * photographs)]
    pids = 10 + 3 * (torch.arange(len(photos)) // photographs)
    texts = [f"person {p} " + "wears a coat " * (p % 3 + 1) for p in range(len(photos) * captions)]
    split = Split(photos.__getitem__, pids, texts, torch.arange(len(photos)).repeat_interleave(captions))
    tokenizer = WordTokenizer(texts, context_length=20)
    return Pairs(split, tokenizer(texts), size=(32, 16), keep=True), tokenizer


def small_model(tokenizer: WordTokenizer, seed: int = 0) -> TwoStream:
    torch.manual_seed(seed)
    return TwoStream(tokenizer.vocab_size, context_length=20, image_size=(32, 16), width=24).eval()


def test_a_model_is_scored_as_its_features_are() -> None:
    pairs, tokenizer = some_pairs()
    model = small_model(tokenizer)
    pids = pairs.split.caption_pids, pairs.split.image_pids
    texts, images = encode(model, pairs, CPU, batch_size=5)
    assert as_dict(metrics_by("global", model, pairs, CPU)) == as_dict(evaluate(texts, images, pairs))

    captions = encode_captions(model, pairs, CPU, batch_size=5)
    assert captions.words.shape[1] == int(captions.mask.sum(dim=1).max()) < 20
    with torch.no_grad():
        _, patches = model.encode_image(torch.stack([pairs.images()[i] for i in range(len(images))]))
    fused = plain_fused(captions, images, patches)
    # Rank-1 by hand: the captions whose best image shows their person.
    rank_1 = 100 * float((pids[1][torch.tensor(fused).argmax(dim=1)] == pids[0]).double().mean())
    for score, k in (("fused", 1), ("rerank", 100)):
        metrics = metrics_by(score, model, pairs, CPU, top_k=k, batch_size=5)
        assert metrics.t2i.cmc[1] == pytest.approx(rank_1, abs=1e-9)
    once, again = (as_dict(metrics_by("rerank", model, pairs, CPU, top_k=4, batch_size=b)) for b in (3, 64))
    for direction in ("t2i", "i2t"):
        assert once[direction] == pytest.approx(again[direction], abs=1e-9)


def test_the_metrics_leave_the_random_numbers_alone() -> None:
    pairs, tokenizer = some_pairs()
    model = small_model(tokenizer)
    before = torch.get_rng_state()
    metrics_by("rerank", model, pairs, CPU, top_k=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_features_that_are_not_finite_are_an_error() -> None:
    pairs, tokenizer = some_pairs()
    model = small_model(tokenizer)
    model.image_projection.weight.data[0] = math.nan
    with pytest.raises(RunError, match="features must be finite, those of 12 of 12 images"):
        encode(model, pairs, CPU)


def test_chance_is_the_share_of_a_persons_images() -> None:
    pairs, _ = some_pairs(people=6, photographs=2)
    assert chance(pairs) == pytest.approx(100 * 2 / 12)


def test_find_gives_the_first_images_and_the_rank_of_the_first_right_one() -> None:
    pairs, tokenizer = some_pairs()
    texts, images = encode(small_model(tokenizer), pairs, CPU)
    found = find(texts, images, pairs, top=3)
    scores = cosines(texts, images)
    for p, own in enumerate(pairs.split.caption_pids):
        order = np.argsort(-scores[p], kind="stable")
        assert found.images[p].tolist() == order[:3].tolist()
        right = pairs.split.image_pids[torch.tensor(order)] == own
        assert int(found.ranks[p]) == right.tolist().index(True) + 1


# ------------------------------------------------------------------------------------------------------- pictures


def test_a_comparison_has_a_strip_for_each_run_and_says_the_ranks(tmp_path: Path) -> None:
    pairs, tokenizer = some_pairs()
    found = {name: find(*encode(small_model(tokenizer, seed), pairs, CPU), pairs, top=2)
             for name, seed in (("A", 0), ("B", 1))}  # fmt: skip
    file = tmp_path / "compare.png"
    draw_comparison(file, pairs, [0, 9], found, "A: one    B: other")
    strip = 130 * 0.95 * 2  # pixels, of an image twice as high as wide
    assert np.asarray(Image.open(file)).shape[0] > 4 * strip
    with pytest.raises(RunError, match="must be a file that can be written"):
        draw_comparison(tmp_path / "none" / "x.png", pairs, [0], found, "")


# ------------------------------------------------------------------------------------------------ published figures


def test_published_figures_stand_beside_ours() -> None:
    ours = {"R1": 12.0, "R5": 27.128, "R10": 35.445, "mAP": 11.485, "mINP": 5.0}
    text = beside("CUHK-PEDES", ours, ZERO_SHOT)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["direction", "metric, %", "ours", ZERO_SHOT, "difference"]
    assert rows[2] == ["t2i", "R1", "12.00", "12.56", "-0.56"] and rows[6] == ["t2i", "mINP", "5.00", "4.61", "+0.39"]
    assert "OpenAI's ViT-B/16" in text
    assert "mINP" not in beside("RSTPReid", ours)  # FMFA's is not published
    assert beside("rendered", ours).startswith("No figures are published")


def test_published_figures_are_as_the_paper_says_of_itself() -> None:
    for name in SIZES:
        ordered = [RESULTS[row][name]["R1"] for row in ("CLIP, InfoNCE", "SDM (IRRA)", "A-SDM", "FMFA")]
        assert ordered == sorted(ordered)
        for row in RESULTS.values():
            assert row[name]["R1"] < row[name]["R5"] < row[name]["R10"]
    assert RESULTS["FMFA"]["CUHK-PEDES"]["R1"] - RESULTS["SDM (IRRA)"]["CUHK-PEDES"]["R1"] == pytest.approx(0.71)
    assert any("74.16" in line for line in table_6("CUHK-PEDES")) and len(table_6("rendered")) == 2
    assert any("0.09" in line for line in table_7()) and any("26.12" in line for line in table_8())
