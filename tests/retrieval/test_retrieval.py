"""Retrieval: published numbers, the definitions, ties, missing matches, memory maps, memory, FAISS."""

import logging
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.errors import explains
from helpers.golden import load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fmfa_losses.retrieval import (
    Evaluator,
    RankingMetrics,
    ranking_metrics,
    retrieval_metrics,
    search,
    similarity_metrics,
)
from fmfa_losses.retrieval import ranks as counting
from fmfa_losses.retrieval.scores import GALLERY_IN_ONE_BLOCK, SCORES_PER_BLOCK

RANKS = (1, 3, 5, 10)


def by_definition(similarity: Tensor, query_pids: Tensor, gallery_pids: Tensor) -> dict[str, float]:
    """The metrics query by query; equal scores by gallery index; queries without a match left out."""
    hits, precisions, penalties = [], [], []
    for scores, pid in zip(similarity.tolist(), query_pids.tolist(), strict=True):
        order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
        found = [rank for rank, j in enumerate(order, 1) if gallery_pids[j] == pid]
        if found:
            hits.append([found[0] <= k for k in RANKS])
            precisions.append(sum(i / rank for i, rank in enumerate(found, 1)) / len(found))
            penalties.append(len(found) / found[-1])
    cmc = (100 * torch.tensor(hits, dtype=torch.float64).mean(0)).tolist()
    mean = {"mAP": 100 * sum(precisions) / len(precisions), "mINP": 100 * sum(penalties) / len(penalties)}
    return {f"R{k}": value for k, value in zip(RANKS, cmc, strict=True)} | mean


def numbers(metrics: RankingMetrics) -> dict[str, float]:
    return {f"R{k}": v for k, v in metrics.cmc.items()} | {"mAP": metrics.mAP, "mINP": metrics.mINP}


def features(texts=57, images=40, width=16, persons=12, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(persons, width, generator=generator)
    text_pids = torch.randint(persons, (texts,), generator=generator)
    image_pids = torch.randint(persons, (images,), generator=generator)
    image_pids[:persons] = torch.arange(persons)
    text_pids[:persons] = torch.arange(persons)
    text = centres[text_pids] + 1.5 * torch.randn(texts, width, generator=generator)
    image = centres[image_pids] + 1.5 * torch.randn(images, width, generator=generator)
    return text.to(dtype), image.to(dtype), text_pids, image_pids


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.normalize(a, dim=1) @ nn.functional.normalize(b, dim=1).T


@pytest.fixture
def small_blocks(monkeypatch):
    """Galleries of 40 come in several blocks, and several tiles a block."""
    monkeypatch.setattr("fmfa_losses.retrieval.scores.GALLERY_IN_ONE_BLOCK", 8)
    monkeypatch.setattr(counting, "SCORES_IN_CACHE", 64)
    for user in ("metrics", "search"):
        sizes = lambda q, g, b, most_matches=0: (b or 10, 13)  # noqa: E731
        monkeypatch.setattr(sys.modules[f"fmfa_losses.retrieval.{user}"], "block_sizes", sizes)


# --- the numbers


def test_golden_numbers_of_irra():
    case = {k.removeprefix("retrieval_metrics/"): v for k, v in load("small").items() if "retrieval_metrics/" in k}
    metrics = similarity_metrics(case["similarity"], case["query_pids"], case["gallery_pids"], ranks=range(1, 11))
    np.testing.assert_allclose(list(metrics.cmc.values()), case["cmc"], atol=1e-5, rtol=0)
    # Stored in float32 from values of about 15.
    assert metrics.mAP == pytest.approx(float(case["mAP"]), abs=1e-5)
    assert metrics.mINP == pytest.approx(float(case["mINP"]), abs=1e-5)


@pytest.mark.parametrize("compared", [0, 64])
def test_both_directions_match_the_definition(monkeypatch, compared):
    monkeypatch.setattr(counting, "COMPARED_MATCHES", compared)  # either way of counting
    text, image, text_pids, image_pids = features(dtype=torch.float64)
    metrics = retrieval_metrics(text, image, text_pids, image_pids, ranks=RANKS)
    sim = cosine(text, image)
    assert numbers(metrics.t2i) == pytest.approx(by_definition(sim, text_pids, image_pids), rel=1e-12)
    assert numbers(metrics.i2t) == pytest.approx(by_definition(sim.T, image_pids, text_pids), rel=1e-12)


@pytest.mark.parametrize("block_size", [1, 7, 57, 1000])
def test_query_blocks_change_nothing(block_size):
    inputs = features()
    whole = ranking_metrics(*inputs, ranks=RANKS)
    blocks = ranking_metrics(*inputs, ranks=RANKS, block_size=block_size)
    assert numbers(blocks) == pytest.approx(numbers(whole), rel=1e-12)


@pytest.mark.parametrize("compared", [0, 64])
def test_gallery_blocks_change_nothing(monkeypatch, small_blocks, compared):
    monkeypatch.setattr(counting, "COMPARED_MATCHES", compared)
    text, image, text_pids, image_pids = features(dtype=torch.float64)
    # Rounded scores tie within and across the blocks.
    similarity = (4 * cosine(text, image)).round()
    expected = by_definition(similarity, text_pids, image_pids)
    assert numbers(similarity_metrics(similarity, text_pids, image_pids, ranks=RANKS)) == pytest.approx(expected)
    exact = by_definition(cosine(text, image), text_pids, image_pids)
    assert numbers(ranking_metrics(text, image, text_pids, image_pids, ranks=RANKS)) == pytest.approx(exact)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_scores_ties_and_infinities(data):
    queries, gallery = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    score = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 1e-45, 0.5, 0.5000001, 1.0, math.inf])
    row = st.lists(score, min_size=gallery, max_size=gallery)
    similarity = torch.tensor(data.draw(st.lists(row, min_size=queries, max_size=queries)))
    gallery_pids = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=gallery, max_size=gallery)))
    query_pids = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=queries, max_size=queries)))
    query_pids[0] = gallery_pids[0]
    expected = by_definition(similarity, query_pids, gallery_pids)
    before = counting.COMPARED_MATCHES
    for compared in (0, 64):
        counting.COMPARED_MATCHES = compared
        try:
            metrics = similarity_metrics(similarity, query_pids, gallery_pids, ranks=RANKS)
        finally:
            counting.COMPARED_MATCHES = before
        assert numbers(metrics) == pytest.approx(expected, rel=1e-12)


def test_equal_scores_rank_by_gallery_index():
    similarity, pids = torch.zeros(1, 5), torch.tensor([0, 0, 1, 0, 1])
    metrics = similarity_metrics(similarity, torch.tensor([1]), pids, ranks=(2, 3))
    assert metrics.cmc == {2: 0.0, 3: 100.0}
    assert metrics.mAP == pytest.approx(100 * (1 / 3 + 2 / 5) / 2)
    assert metrics.mINP == pytest.approx(100 * 2 / 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_every_dtype(dtype):
    text, image, text_pids, image_pids = features(dtype=dtype)
    # The features are rounded, the arithmetic is not.
    expected = by_definition(cosine(text.double(), image.double()), text_pids, image_pids)
    assert numbers(ranking_metrics(text, image, text_pids, image_pids, ranks=RANKS)) == pytest.approx(expected)


def test_inner_products_when_not_normalised():
    text, image, text_pids, image_pids = features(dtype=torch.float64)
    image = image * torch.linspace(0.1, 10, len(image), dtype=torch.float64)[:, None]
    metrics = ranking_metrics(text, image, text_pids, image_pids, ranks=RANKS, normalize=False)
    assert numbers(metrics) == pytest.approx(by_definition(text @ image.T, text_pids, image_pids))
    assert metrics.mAP != ranking_metrics(text, image, text_pids, image_pids).mAP


# --- degenerate input


def test_queries_without_a_match_are_named_and_left_out():
    similarity = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.7, 0.3]])
    metrics = similarity_metrics(similarity, torch.tensor([5, 1, 9]), torch.tensor([0, 1]), ranks=(1,))
    assert metrics.unmatched_queries.tolist() == [0, 2]
    assert (metrics.cmc, metrics.mAP, metrics.mINP) == ({1: 100.0}, 100.0, 100.0)
    both = retrieval_metrics(torch.eye(3), torch.eye(3)[:2], torch.tensor([0, 1, 9]), torch.tensor([0, 1]))
    assert both.t2i.unmatched_queries.tolist() == [2]
    assert both.i2t.unmatched_queries.tolist() == []
    assert "1 texts without a match left out" in str(both)


def test_no_match_at_all_is_an_error():
    with pytest.raises(ValueError, match="at least one query must share its pid"):
        similarity_metrics(torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([2, 3]))


@pytest.mark.parametrize("where", ["match", "other"])
def test_nan_comes_out_as_nan(where):
    similarity = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    similarity[0, 0 if where == "match" else 1] = math.nan
    metrics = similarity_metrics(similarity, torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert all(math.isnan(value) for value in numbers(metrics).values())


@pytest.mark.parametrize("row", [0, 20, 39])
def test_nan_features_come_out_as_nan(small_blocks, row):
    text, image, text_pids, image_pids = features()
    image[row, 2] = math.nan  # in the first, a middle, the last block
    assert math.isnan(ranking_metrics(text, image, text_pids, image_pids).mAP)


def test_zero_features_score_zero():
    metrics = ranking_metrics(torch.zeros(1, 2), torch.eye(2), torch.tensor([1]), torch.tensor([0, 1]))
    assert metrics.mAP == 50.0  # all scores 0: the match stands second by its index


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        ({"query_features": torch.zeros(3)}, ValueError, ("query_features must have shape [Q D]", "[3]", ())),
        (
            {"query_features": torch.zeros(3, 2).long()},
            TypeError,
            (("query_features", "floating-point"), "int64", ".float()"),
        ),
        (
            {"gallery_features": np.zeros((4, 2), int)},
            TypeError,
            (("gallery_features", "floating-point"), "int64", ".astype('f4')"),
        ),
        ({"gallery_features": np.zeros((0, 2))}, ValueError, (("gallery_features", "empty"), "[0, 2]")),
        ({"gallery_features": [[1.0]]}, TypeError, ("gallery_features must be a tensor", "list", ())),
        ({"gallery_features": torch.zeros(4, 5)}, ValueError, ("agree in D", "[4, 5]")),
        ({"query_pids": torch.zeros(2).long()}, ValueError, ("query_pids must have shape [3]", "[2]")),
        ({"query_pids": torch.zeros(3)}, TypeError, ("query_pids must be an integer", "float32", ".long()")),
        ({"gallery_pids": [0, 1, 2, 3]}, TypeError, ("gallery_pids must be an integer", "list", "torch.as_tensor")),
        ({"query_pids": list(range(4000))}, TypeError, ("query_pids must be an integer", "list of length 4000", ())),
        ({"query_features": (0.5,) * 99}, TypeError, ("query_features", "tuple of length 99", ())),
        ({"ranks": ()}, ValueError, ("ranks must hold at least one k", "none", "pass")),
        ({"ranks": 7}, TypeError, ("ranks must be a sequence", "int 7", "(7,)")),
        ({"ranks": (0,)}, ValueError, ("ranks must be an integer >= 1", "0")),
        ({"block_size": 0}, ValueError, ("block_size must be an integer", "0")),
    ],
)
def test_bad_input_says_what_to_change(change, error, parts):
    arguments = {
        "query_features": torch.ones(3, 2),
        "gallery_features": torch.ones(4, 2),
        "query_pids": torch.tensor([0, 1, 2]),
        "gallery_pids": torch.tensor([0, 1, 2, 3]),
    }
    with explains(error, *parts):
        ranking_metrics(**(arguments | change))


def test_pids_that_are_swapped_are_named():
    text, image, text_pids, image_pids = features(texts=57, images=40)
    with explains(ValueError, ("text_pids", "[57]"), "int64 [40]", "swap text_pids and image_pids"):
        retrieval_metrics(text, image, image_pids, text_pids)
    with explains(ValueError, "query_pids", (), "swap query_pids and gallery_pids"):
        similarity_metrics(text @ image.T, image_pids, text_pids)
    with explains(ValueError, ("image_pids", "[40]"), "[57]", "person of each"):
        retrieval_metrics(text, image, text_pids, text_pids)


def test_features_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="must be on one device"):
        search(torch.ones(2, 2), torch.ones(2, 2, device="meta"), 1)


# --- search


def first_k(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ordered = similarity.sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :k], ordered.indices[:, :k]


@pytest.mark.parametrize("k", [1, 5, 20, 40])
def test_search_is_exact_across_blocks(small_blocks, k):
    text, image, *_ = features(dtype=torch.float64)
    scores, indices = search(text, image, k, block_size=9)
    expected_scores, expected_indices = first_k(cosine(text, image), k)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-12, atol=1e-12)
    assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("blocks", ["one", "several"])
@pytest.mark.parametrize("k", [1, 4, 11, 40])
def test_search_orders_ties_by_index(request, blocks, k):
    if blocks == "several":
        request.getfixturevalue("small_blocks")
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(-1, 2, (30, 3), generator=generator).double()
    image = torch.randint(-1, 2, (40, 3), generator=generator).double()
    scores, indices = search(text, image, k, normalize=False)
    expected_scores, expected_indices = first_k(text @ image.T, k)
    assert torch.equal(scores, expected_scores)
    assert torch.equal(indices, expected_indices)


def test_search_puts_nan_first():
    image = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [0.0, 1.0]])
    scores, indices = search(torch.tensor([[1.0, 0.0]]), image, 2)
    assert scores[0, 0].isnan() and indices.tolist() == [[1, 0]]


@pytest.mark.parametrize("k", [0, 3, 1.0, True])
def test_search_refuses_a_k_that_the_gallery_cannot_give(k):
    with pytest.raises(TypeError if k is True else ValueError, match="k must be an integer from 1 to 2, got"):
        search(torch.eye(2), torch.eye(2), k)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_memory_mapped_gallery(tmp_path, small_blocks, dtype):
    text, image, text_pids, image_pids = features()
    path = tmp_path / "gallery.npy"
    np.save(path, image.numpy().astype(dtype))
    mapped = np.load(path, mmap_mode="r")
    in_memory = torch.from_numpy(np.load(path))
    on_disk = ranking_metrics(text, mapped, text_pids, image_pids.numpy(), ranks=RANKS)
    assert isinstance(mapped, np.memmap)
    assert numbers(on_disk) == numbers(ranking_metrics(text, in_memory, text_pids, image_pids, ranks=RANKS))
    for found, expected in zip(search(text, mapped, 7), search(text, in_memory, 7), strict=True):
        assert torch.equal(found, expected)
    assert numbers(ranking_metrics(mapped, mapped, image_pids, image_pids)) == pytest.approx(
        numbers(ranking_metrics(in_memory, in_memory, image_pids, image_pids))
    )


def test_a_large_gallery_is_read_in_blocks():
    """Never more rows at once than a block holds, and twice in all for the metrics."""
    reads: list[tuple[int, int]] = []

    class Counted(np.ndarray):
        def __getitem__(self, key):
            if isinstance(key, tuple):
                reads.append((key[0].start, key[0].stop))
            return super().__getitem__(key)

    size = GALLERY_IN_ONE_BLOCK + 5000
    gallery = np.random.default_rng(0).standard_normal((size, 2), dtype=np.float32).view(Counted)
    pids = torch.arange(size)
    ranking_metrics(torch.randn(8, 2), gallery, torch.arange(8), pids, block_size=1024)
    covered = [row for start, stop in reads if stop - start > 1 for row in (start, stop)]
    assert max(stop - start for start, stop in reads) == GALLERY_IN_ONE_BLOCK
    assert covered.count(0) == covered.count(size) == 2


@pytest.mark.parametrize(("size", "persons"), [(6000, 300), (4000, 2)])
def test_memory_is_two_blocks(size, persons):
    """6000 x 6000 scores are 137 MiB in float32, and an argsort of them takes 275 MiB more. With 2 persons every query
    has 2000 matches, of which the ranks and counts of all queries would be 600 MiB."""
    code = f"""
import torch
from benchmarks.measure import peak_process_bytes
from fmfa_losses.retrieval import retrieval_metrics
def metrics(n):
    pids = torch.arange(n) % {persons}
    return retrieval_metrics(torch.randn(n, 8), torch.randn(n, 8), pids, pids)
metrics(300)
before = peak_process_bytes()
metrics({size})
print((peak_process_bytes() - before) / 2**20)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert grown < 2 * SCORES_PER_BLOCK * 4 / 2**20 + 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_matches_with_denormals_flushed(dtype):
    """65 matches at every other index of equal scores have the ranks 1, 3, ..., 129, denormals flushed or not."""
    scores = torch.zeros(1, 130, dtype=dtype)
    scores[0, 1::2] = -0.0  # equal to 0
    for flush in (False, True):
        torch.set_flush_denormal(flush)  # has no effect on some processors
        try:
            metrics = similarity_metrics(scores, torch.zeros(1).long(), torch.arange(130) % 2)
        finally:
            torch.set_flush_denormal(False)
        assert metrics.mAP == pytest.approx(100 * sum((i + 1) / (2 * i + 1) for i in range(65)) / 65)
        assert metrics.mINP == pytest.approx(100 * 65 / 129)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_matches_among_the_smallest_and_largest_numbers(dtype, monkeypatch):
    """Neighbours of 0, of infinity and of 1: counted in bins as by comparing."""
    tiny, one, inf = torch.tensor(0.0, dtype=dtype), torch.tensor(1.0, dtype=dtype), torch.tensor(math.inf, dtype=dtype)
    numbers = [tiny, one, inf, -inf, -one]
    numbers += [torch.nextafter(a, b) for a in (tiny, one) for b in (inf, -inf)]
    numbers += [torch.nextafter(inf, tiny), torch.nextafter(-inf, tiny)]
    generator = torch.Generator().manual_seed(0)
    scores = torch.stack(numbers)[torch.randint(len(numbers), (5, 300), generator=generator)]
    thresholds = scores[:, :200]
    counts = []
    for most_compared in (0, thresholds.shape[1]):
        monkeypatch.setattr(counting, "COMPARED_MATCHES", most_compared)
        counts.append(counting.count_above(scores, thresholds))
    binned, compared = counts
    assert all(torch.equal(a, b) for a, b in zip(binned, compared, strict=True))


@pytest.mark.parametrize("length", [2.0**-90, 2.0**66])
def test_features_whose_squares_leave_float32(length):
    """Cosines do not know how long a feature is: the same ranks, and no score that overflowed into a zero."""
    text, image, text_pids, image_pids = features()
    expected = numbers(ranking_metrics(text, image, text_pids, image_pids, ranks=RANKS))
    long = text * length
    assert numbers(ranking_metrics(long, image, text_pids, image_pids, ranks=RANKS)) == expected
    scores, indices = search(image, long, 3)
    expected_scores, expected_indices = search(image, text, 3)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_search_among_many_nan_gives_the_lowest_indices(k, small_blocks):
    query, gallery = torch.randn(3, 4), torch.randn(40, 4)
    gallery[5:30:2] = math.nan
    values, indices = search(query, gallery, k)
    assert values.isnan().all()
    assert indices.tolist() == [list(range(5, 30, 2))[:k]] * 3


# --- the documentation's code runs


BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/retrieval.md").read_text(), re.S)


def document(tmp_path, monkeypatch, containing: str) -> dict[str, object]:
    """Runs the one block of docs/retrieval.md that contains a text; returns what it defined."""
    text, image, text_pids, image_pids = features()
    np.save(tmp_path / "gallery.npy", image.numpy())
    monkeypatch.chdir(tmp_path)
    image_loader, text_loader, _ = loaders()
    model = Towers(text.shape[1])
    model.get_image_features, model.get_text_features = model.encode_image, model.encode_text
    model.encode_image_tse, model.encode_text_tse = model.image, model.text
    scope = {
        "text_features": text,
        "image_features": image,
        "text_pids": text_pids,
        "image_pids": image_pids,
        "image_loader": image_loader,
        "text_loader": text_loader,
        "model": model,
        "Evaluator": Evaluator,
    }
    (block,) = [block for block in BLOCKS if containing in block]
    exec(block, scope)
    return scope


def test_document_metrics(tmp_path, monkeypatch):
    scope = document(tmp_path, monkeypatch, "import retrieval_metrics")
    assert numbers(scope["metrics"].t2i) == numbers(
        ranking_metrics(*(scope[name] for name in ("text_features", "image_features", "text_pids", "image_pids")))
    )


def test_document_evaluators(tmp_path, monkeypatch):
    first = document(tmp_path, monkeypatch, "import Evaluator")
    assert first["rank_1"] == first["metrics"].t2i.cmc[1]
    second = document(tmp_path, monkeypatch, "get_image_features")
    assert numbers(second["evaluator"].metrics(first["model"]).t2i) == numbers(first["metrics"].t2i)


def test_document_fused(tmp_path, monkeypatch):
    scope = document(tmp_path, monkeypatch, "fused=True")
    assert scope["rank_1"] == scope["metrics"].fused.t2i.cmc[1]


def test_document_memory_map(tmp_path, monkeypatch):
    scope = document(tmp_path, monkeypatch, "mmap_mode")
    text, image, *_ = features()
    assert torch.equal(scope["indices"], search(text, image, 10)[1])


def test_document_faiss(tmp_path, monkeypatch):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    scope = document(tmp_path, monkeypatch, "import faiss")
    text, image, *_ = features()
    ours_scores, ours_indices = search(text, image, 10)
    np.testing.assert_allclose(ours_scores, scope["scores"], atol=1e-6)
    np.testing.assert_array_equal(ours_indices, scope["indices"])


def test_every_block_of_the_document_is_run():
    assert len(BLOCKS) == 6


# --- Evaluator


class Towers(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.image = nn.Linear(width, 8, bias=False)
        self.text = nn.Linear(width, 8, bias=False)
        self.frozen = nn.Dropout(0.5).eval()
        self.dropout = nn.Dropout(0.5)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.dropout(self.image(images))

    def encode_text(self, captions: Tensor) -> Tensor:
        return self.dropout(self.text(captions))


def loaders():
    text, image, text_pids, image_pids = features()
    return (
        list(zip(image_pids.split(9), image.split(9), strict=True)),
        list(zip(text_pids.split(10), text.split(10), strict=True)),
        (text, image, text_pids, image_pids),
    )


def test_evaluator_returns_rank_one_and_logs_the_table(caplog):
    torch.manual_seed(0)
    image_loader, text_loader, (text, image, text_pids, image_pids) = loaders()
    model = Towers(text.shape[1]).train()
    model.frozen.eval()
    with torch.no_grad():
        expected = retrieval_metrics(model.text(text), model.image(image), text_pids, image_pids)
    evaluator = Evaluator(image_loader, text_loader, progress=False)
    with caplog.at_level(logging.INFO, logger="fmfa_losses.retrieval"):
        assert evaluator.eval(model) == expected.t2i.cmc[1]  # dropout is off
        without_images = str(expected).rsplit("\n", 1)[0]
        assert without_images in caplog.text and "i2t" not in caplog.text
        caplog.clear()
        assert evaluator.eval(model, i2t_metric=True) == expected.t2i.cmc[1]
        assert str(expected) in caplog.text
    with explains(TypeError, "i2t_metric must be True or False", "1"):
        evaluator.eval(model, 1)
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    assert numbers(evaluator.metrics(model).i2t) == numbers(expected.i2t)


def test_evaluator_takes_other_encoders():
    image_loader, text_loader, (text, image, text_pids, image_pids) = loaders()
    evaluator = Evaluator(
        image_loader,
        text_loader,
        encode_image=lambda model, images: model(images),
        encode_text=lambda model, captions: model(captions),
        ranks=(5,),
        progress=False,
    )
    metrics = evaluator.metrics(torch.tanh)
    expected = retrieval_metrics(text.tanh(), image.tanh(), text_pids, image_pids, ranks=(5,))
    assert numbers(metrics.t2i) == numbers(expected.t2i)
    assert evaluator.eval(torch.tanh) == retrieval_metrics(text.tanh(), image.tanh(), text_pids, image_pids).t2i.cmc[1]


def test_evaluator_shows_a_bar_only_where_tqdm_is_installed(monkeypatch, capsys):
    image_loader, text_loader, (text, *_) = loaders()
    model = Towers(text.shape[1])
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    Evaluator(image_loader, text_loader).eval(model)
    assert "encode image" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    Evaluator(image_loader, text_loader).eval(model)
    assert capsys.readouterr().err == ""


def test_evaluator_names_what_is_missing():
    with explains(TypeError, ("model", "encode_text(batch)"), "Linear", "Evaluator("):
        Evaluator([], [], progress=False).eval(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="at least one batch"):
        Evaluator([], [], progress=False).eval(Towers(2))


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(2, 3), torch.tensor([1, 2])),
        (torch.ones(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([1, 2])),
        (["a man", "a woman"], torch.tensor([1, 2])),
        {"pids": torch.tensor([1, 2]), "images": torch.ones(2, 3)},
        (torch.tensor([1, 2]), torch.ones(2, 3), torch.tensor([0, 1])),
    ],
)
def test_evaluator_names_a_loader_whose_batches_are_turned_round(batch):
    good = [(torch.tensor([1, 2]), torch.ones(2, 3))]
    with explains(TypeError, ("image_loader", "pids", "images"), (), ()):
        Evaluator([batch], good, progress=False).eval(Towers(3))
    with explains(TypeError, ("text_loader", "pids", "captions"), (), ()):
        Evaluator(good, [batch], progress=False).eval(Towers(3))


def test_evaluator_takes_pids_as_lists_and_columns():
    columns = [(torch.tensor([[1], [2]]), torch.ones(2, 3)), ([3], torch.ones(1, 3))]
    assert Evaluator(columns, columns, progress=False).metrics(Towers(3)).t2i.unmatched_queries.tolist() == []


def test_evaluator_names_an_encoder_that_gives_no_features():
    batches = [(torch.tensor([1, 2]), torch.ones(2, 3))]
    with explains(ValueError, ("encode_text", "[b, D]", "2 pids"), "[2, 3, 1]", "pool them"):
        Evaluator(batches, batches, encode_text=lambda model, batch: batch[..., None], progress=False).eval(Towers(3))


def test_a_failing_encoder_leaves_the_model_as_it_was():
    model = Towers(2).train()
    with pytest.raises(RuntimeError):
        Evaluator([], [(torch.tensor([1]), torch.ones(1, 3))], progress=False).eval(model)
    assert model.training and model.dropout.training


# --- what it prints


def test_table():
    pids = torch.tensor([0, 1])
    metrics = retrieval_metrics(torch.eye(2), torch.eye(2).flip(0), pids, pids, ranks=(1, 2))
    assert str(metrics).split("\n") == [
        "              R1      R2     mAP    mINP",
        "     t2i    0.00  100.00   50.00   50.00",
        "     i2t    0.00  100.00   50.00   50.00",
    ]
