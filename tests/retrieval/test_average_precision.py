"""Both rules of average precision: a loop over the sorted gallery, by every function and in blocks; edges."""

import pytest
import torch
from helpers.errors import explains
from torch import nn

from fmfa_losses.retrieval import Evaluator, fused_metrics, ranking_metrics, retrieval_metrics, similarity_metrics

RULES = ("step", "trapezoidal")


def by_loop(similarity, query_pids, gallery_pids, rule):
    """mAP in percent: precision over recall is added up, item by item, down each sorted gallery."""
    areas = []
    for scores, pid in zip(similarity.tolist(), query_pids.tolist(), strict=True):
        order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
        relevant = [int(gallery_pids[j]) == pid for j in order]
        if not any(relevant):
            continue
        area, found, before = 0.0, 0, 1.0
        for seen, hit in enumerate(relevant, 1):
            found += hit
            precision = found / seen
            if hit:
                area += precision if rule == "step" else (before + precision) / 2
            before = precision
        areas.append(area / found)
    return 100 * sum(areas) / len(areas)


def scores(queries=23, gallery=41, persons=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randint(9, (queries, gallery), generator=generator).float()  # with ties
    pids = [torch.randint(persons, (size,), generator=generator) for size in (queries, gallery)]
    pids[0][3] = persons  # without a match
    return similarity, *pids


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_area_under_precision_over_recall(rule, seed, monkeypatch):
    inputs = scores(seed=seed)
    expected = pytest.approx(by_loop(*inputs, rule), rel=1e-12)
    assert similarity_metrics(*inputs, average_precision=rule).mAP == expected
    assert similarity_metrics(*inputs, average_precision=rule, block_size=4).mAP == expected
    monkeypatch.setattr("fmfa_losses.retrieval.metrics.block_sizes", lambda q, g, b, most_matches=0: (5, 13))
    assert similarity_metrics(*inputs, average_precision=rule).mAP == expected


def test_the_other_metrics_do_not_depend_on_it():
    inputs = scores()
    step, trapezoidal = (similarity_metrics(*inputs, average_precision=rule) for rule in RULES)
    assert similarity_metrics(*inputs).mAP == step.mAP > trapezoidal.mAP  # precision falls until the next match
    assert (step.cmc, step.mINP) == (trapezoidal.cmc, trapezoidal.mINP)


@pytest.mark.parametrize(
    ("ranks", "expected"), [([1], 100.0), ([2], 25.0), ([1, 2], 100.0), ([1, 3], (1 + (2 / 3 + 1 / 2) / 2) * 50)]
)
def test_known_ranks(ranks, expected):
    similarity = torch.arange(5.0, 0, -1)[None]
    gallery_pids = torch.tensor([int(rank in ranks) for rank in range(1, 6)])
    metrics = similarity_metrics(similarity, torch.tensor([1]), gallery_pids, average_precision="trapezoidal")
    assert metrics.mAP == pytest.approx(expected)


def test_nan_comes_out_as_nan():
    similarity, *pids = scores()
    similarity[0, 0] = torch.nan
    assert torch.tensor(similarity_metrics(similarity, *pids, average_precision="trapezoidal").mAP).isnan()


def test_every_function_takes_it():
    generator = torch.Generator().manual_seed(0)
    text, image, text_tse, image_tse = (torch.randn(size, 6, generator=generator) for size in (19, 17, 19, 17))
    text_pids, image_pids = torch.arange(19) % 5, torch.arange(17) % 5
    cosine, tse = (
        nn.functional.normalize(a, dim=1) @ nn.functional.normalize(b, dim=1).T
        for a, b in ((text, image), (text_tse, image_tse))
    )
    rule = {"average_precision": "trapezoidal"}
    t2i, i2t, mean = (
        pytest.approx(by_loop(*inputs, "trapezoidal"))
        for inputs in (
            (cosine, text_pids, image_pids),
            (cosine.T, image_pids, text_pids),
            ((cosine + tse) / 2, text_pids, image_pids),
        )
    )
    both = retrieval_metrics(text, image, text_pids, image_pids, **rule)
    assert (both.t2i.mAP, both.i2t.mAP) == (t2i, i2t)
    assert ranking_metrics(text, image, text_pids, image_pids, **rule).mAP == t2i
    assert fused_metrics(text, image, text_tse, image_tse, text_pids, image_pids, **rule).fused.t2i.mAP == mean

    class Identity:
        encode_image = encode_text = staticmethod(lambda batch: batch)

    loaders = [(image_pids, image)], [(text_pids, text)]
    evaluator = Evaluator(*loaders, progress=False, **rule)
    assert evaluator.metrics(Identity()).i2t.mAP == i2t
    assert f"{by_loop(cosine, text_pids, image_pids, 'trapezoidal'):.2f}" in str(evaluator.metrics(Identity()))


def test_another_word_is_refused():
    with explains(ValueError, ("average_precision", "'step'", "'trapezoidal'"), "'interpolated'"):
        similarity_metrics(*scores(), average_precision="interpolated")
    with explains(ValueError, ("average_precision", "'step'", "'trapezoidal'"), "None"):
        Evaluator([], [], average_precision=None)
