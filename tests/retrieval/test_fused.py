"""Two branches and their mean: RDE's three numbers, from one pass over the loaders and in blocks."""

import logging
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.errors import explains
from torch import Tensor, nn

from fmfa_losses.retrieval import Evaluator, FusedMetrics, fused_metrics, similarity_metrics
from fmfa_losses.retrieval.scores import SCORES_PER_BLOCK

RANKS = (1, 5, 10)


def features(texts=57, images=40, width=16, persons=12, seed=0, dtype=torch.float64):
    """Text and image features of both branches, whose lengths differ, and pids."""
    generator = torch.Generator().manual_seed(seed)
    text_pids = torch.arange(texts) % persons
    image_pids = torch.arange(images) % persons
    branches = []
    for size, noise, length in ((width, 1.5, 3.0), (2 * width + 1, 2.5, 0.1)):
        centres = torch.randn(persons, size, generator=generator)
        for pids in (text_pids, image_pids):
            branches.append(length * (centres[pids] + noise * torch.randn(len(pids), size, generator=generator)))
    return *(branch.to(dtype) for branch in branches), text_pids, image_pids


def numbers(metrics):
    return [*metrics.cmc.values(), metrics.mAP, metrics.mINP]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.normalize(a, dim=1) @ nn.functional.normalize(b, dim=1).T


def assert_is_rde(got: FusedMetrics, text, image, text_tse, image_tse, text_pids, image_pids):
    """By whole matrices of scores, as RDE's evaluator has them."""
    bge, tse = cosine(text, image), cosine(text_tse, image_tse)
    for metrics, scores in ((got.bge, bge), (got.tse, tse), (got.fused, (bge + tse) / 2)):
        assert numbers(metrics.t2i) == pytest.approx(numbers(similarity_metrics(scores, text_pids, image_pids)))
        assert numbers(metrics.i2t) == pytest.approx(numbers(similarity_metrics(scores.T, image_pids, text_pids)))


def test_three_scores():
    inputs = features()
    got = fused_metrics(*inputs)
    assert_is_rde(got, *inputs)
    assert len({got.bge.t2i.mAP, got.tse.t2i.mAP, got.fused.t2i.mAP}) == 3
    assert [line for line in str(got).splitlines() if "R1" not in line and "2" not in line] == ["BGE", "TSE", "BGE+TSE"]


@pytest.mark.parametrize("block_size", [1, 7, 1000])
def test_blocks_change_nothing(monkeypatch, block_size):
    inputs = features()
    monkeypatch.setattr(
        sys.modules["fmfa_losses.retrieval.metrics"], "block_sizes", lambda q, g, b, most_matches=0: (b or 9, 13)
    )
    assert_is_rde(fused_metrics(*inputs, block_size=block_size), *inputs)


@pytest.mark.parametrize(("first", "second"), [(torch.float16, torch.float16), (torch.float32, torch.float64)])
def test_every_dtype_and_arrays(first, second):
    text, image, text_tse, image_tse, *pids = features()
    inputs = text.to(first), image.to(first), text_tse.to(second), image_tse.to(second), *pids
    exact = [x.double() for x in inputs[:4]]
    assert_is_rde(fused_metrics(*inputs), *exact, *pids)
    arrays = [x.numpy() for x in inputs]
    assert numbers(fused_metrics(*arrays).fused.t2i) == numbers(fused_metrics(*inputs).fused.t2i)


def test_a_memory_map(tmp_path):
    inputs = features(dtype=torch.float32)
    for index, each in enumerate(inputs[:4]):
        np.save(tmp_path / f"{index}.npy", each.numpy())
    mapped = [np.load(tmp_path / f"{index}.npy", mmap_mode="r") for index in range(4)]
    assert numbers(fused_metrics(*mapped, *inputs[4:]).fused.i2t) == numbers(fused_metrics(*inputs).fused.i2t)


def test_a_zero_feature_scores_zero_in_its_branch():
    text, image, text_tse, image_tse, *pids = features()
    text_tse[3], image[5] = 0, 0
    assert_is_rde(fused_metrics(text, image, text_tse, image_tse, *pids), text, image, text_tse, image_tse, *pids)


def test_nan_of_either_branch():
    inputs = features()
    inputs[3][2, 0] = math.nan
    got = fused_metrics(*inputs)
    assert math.isnan(got.tse.t2i.mAP) and math.isnan(got.fused.t2i.mAP)
    assert not math.isnan(got.bge.t2i.mAP)


def test_memory_is_three_blocks():
    """6000 x 6000 scores are 137 MiB in float32, and there are three of them in three metrics."""
    code = """
import torch
from benchmarks.measure import peak_process_bytes
from fmfa_losses.retrieval import fused_metrics
def metrics(n):
    pids = torch.arange(n) % 300
    return fused_metrics(*(torch.randn(n, 8) for _ in range(4)), pids, pids)
metrics(300)
before = peak_process_bytes()
metrics(6000)
print((peak_process_bytes() - before) / 2**20)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert grown < 3 * SCORES_PER_BLOCK * 4 / 2**20 + 16


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        ({"text_tse_features": torch.ones(2, 5)}, ValueError, (("text_features", "text_tse_features"), ("3", "2"), ())),
        ({"image_tse_features": torch.ones(3, 5)}, ValueError, ("image_tse_features", ("4", "3"), ())),
        ({"image_tse_features": torch.ones(4, 6)}, ValueError, (("text_tse_features", "agree in D"), "[4, 6]", ())),
        ({"text_tse_features": None}, TypeError, ("text_tse_features", "None", ())),
        ({"text_pids": torch.ones(4).long()}, ValueError, ("text_pids", "[4]", ())),
        ({"ranks": (0,)}, ValueError, ("ranks", "0")),
    ],
)
def test_bad_input_says_what_to_change(change, error, parts):
    arguments = {
        "text_features": torch.ones(3, 2), "image_features": torch.ones(4, 2), "text_tse_features": torch.ones(3, 5),
        "image_tse_features": torch.ones(4, 5), "text_pids": torch.arange(3), "image_pids": torch.arange(4),
    }  # fmt: skip
    with explains(error, *parts):
        fused_metrics(**(arguments | change))
    with explains(ValueError, "one device", ("cpu", "meta"), "device="):
        meta = {name: torch.ones(len(arguments[name]), 5, device="meta") for name in arguments if "tse" in name}
        fused_metrics(**(arguments | meta))


# --- Evaluator


class Towers(nn.Module):
    """Batches are both features side by side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.dropout, self.weight = width, nn.Dropout(0.5), nn.Parameter(torch.ones(1))

    def encode_image(self, batch: Tensor) -> Tensor:
        return self.dropout(batch[:, : self.width])

    def encode_image_tse(self, batch: Tensor) -> Tensor:
        return self.dropout(batch[:, self.width :])

    encode_text, encode_text_tse = encode_image, encode_image_tse


class Loader:
    """Counts how often it is read."""

    def __init__(self, pids: Tensor, *branches: Tensor) -> None:
        self.batches, self.reads = list(zip(pids.split(9), torch.cat(branches, 1).split(9), strict=True)), 0

    def __iter__(self):
        self.reads += 1
        return iter(self.batches)


def loaders():
    inputs = text, image, text_tse, image_tse, text_pids, image_pids = features()
    return Loader(image_pids, image, image_tse), Loader(text_pids, text, text_tse), inputs, Towers(text.shape[1])


def test_evaluator_returns_rank_one_of_the_mean(caplog):
    image_loader, text_loader, inputs, model = loaders()
    evaluator = Evaluator(image_loader, text_loader, fused=True, progress=False)
    with caplog.at_level(logging.INFO, logger="fmfa_losses.retrieval"):
        top1 = evaluator.eval(model.train(), i2t_metric=True)
    assert (image_loader.reads, text_loader.reads) == (1, 1)
    assert model.training and model.dropout.training
    expected = fused_metrics(*inputs)
    assert top1 == expected.fused.t2i.cmc[1] != expected.bge.t2i.cmc[1]
    assert str(expected) in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="fmfa_losses.retrieval"):
        assert evaluator.eval(model) == top1
    assert caplog.messages == ["\n" + "\n".join(line for line in str(expected).split("\n") if "i2t" not in line)]
    assert_is_rde(evaluator.fused_metrics(model), *inputs)
    assert numbers(evaluator.metrics(model, ranks=(2,)).i2t) == numbers(fused_metrics(*inputs, ranks=(2,)).fused.i2t)


def test_evaluator_takes_other_encoders():
    image_loader, text_loader, inputs, model = loaders()
    evaluator = Evaluator(
        image_loader,
        text_loader,
        fused=True,
        encode_image_tse=lambda model, batch: -model.encode_image_tse(batch),
        encode_text_tse=lambda model, batch: -model.encode_text_tse(batch),
        progress=False,
    )
    assert_is_rde(evaluator.fused_metrics(model), *inputs)
    swapped = Evaluator(
        image_loader,
        text_loader,
        fused=True,
        encode_text_tse=lambda model, batch: -model.encode_text_tse(batch),
        progress=False,
    )
    text, image, text_tse, image_tse, *pids = inputs
    assert_is_rde(swapped.fused_metrics(model), text, image, -text_tse, image_tse, *pids)


def test_evaluator_without_fused_is_of_one_branch():
    image_loader, text_loader, inputs, model = loaders()
    evaluator = Evaluator(image_loader, text_loader, progress=False)
    assert evaluator.eval(model) == fused_metrics(*inputs).bge.t2i.cmc[1]
    with explains(ValueError, "fused must be True", "False", "fused=True"):
        evaluator.fused_metrics(model)
    with explains(ValueError, ("fused must be True", "encode_image_tse"), "False", "fused=True"):
        Evaluator(image_loader, text_loader, encode_text_tse=lambda model, batch: batch)
    with explains(TypeError, "fused must be True or False", "1"):
        Evaluator(image_loader, text_loader, fused=1)


def test_evaluator_names_what_is_missing():
    image_loader, text_loader, *_ = loaders()

    class One(nn.Module):
        def encode_image(self, batch):
            return batch

        encode_text = encode_image

    with explains(TypeError, ("model", "encode_text_tse(batch)"), "One", "encode_text_tse=lambda"):
        Evaluator(image_loader, text_loader, fused=True, progress=False).eval(One())
    model = One()
    model.encode_text_tse = model.encode_image_tse = lambda batch: batch[None]
    with explains(ValueError, ("encode_text_tse", "[b, D]"), "[1, 9", "pool"):
        Evaluator(image_loader, text_loader, fused=True, progress=False).eval(model)
