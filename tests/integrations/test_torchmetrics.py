"""docs/integrations/torchmetrics.md: the metric against retrieval_metrics, in one process and in two."""

import copy
import pickle
import sys

import pytest
import torch
from helpers.errors import explains
from helpers.pages import run_blocks
from torch import Tensor, nn

from fmfa_losses.retrieval import RetrievalMetrics, retrieval_metrics

pytest.importorskip("torchmetrics")

from fmfa_losses.integrations.torchmetrics import TextToImageRetrieval

D, IMAGES, TEXTS = 5, 9, 14


def gallery() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and texts of five persons, who are not equally often in both."""
    generator = torch.Generator().manual_seed(2)
    image, text = torch.randn(IMAGES, D, generator=generator), torch.randn(TEXTS, D, generator=generator)
    return image, text, torch.arange(IMAGES) % 5, torch.arange(TEXTS) % 4


def flat(metrics: RetrievalMetrics) -> dict[str, Tensor]:
    found = {}
    for name, one in (("t2i", metrics.t2i), ("i2t", metrics.i2t)):
        found |= {f"{name}_R{k}": value for k, value in one.cmc.items()}
        found |= {f"{name}_mAP": one.mAP, f"{name}_mINP": one.mINP}
    return {name: torch.tensor(value) for name, value in found.items()}


def expected(**options: object) -> dict[str, Tensor]:
    image, text, image_pids, text_pids = gallery()
    return flat(retrieval_metrics(text, image, text_pids, image_pids, **options))


def test_the_page(capsys):
    image, text, image_pids, text_pids = gallery()

    class Model(nn.Module):
        encode_image = encode_text = staticmethod(torch.nn.Identity())

    done = run_blocks(
        "integrations/torchmetrics.md",
        model=Model(),
        image_loader=list(zip(image_pids.split(4), image.split(4), strict=True)),
        text_loader=list(zip(text_pids.split(4), text.split(4), strict=True)),
    )
    assert done.values == expected()
    assert "mINP" in capsys.readouterr().out
    parts = [[x for batch in done.own_part(range(10), rank, 3, batch_size=2) for x in batch] for rank in range(3)]
    assert sorted(x.item() for part in parts for x in part) == list(range(10))


def test_pairs_options_copies_and_reset():
    image, text, image_pids, _ = gallery()
    metric = TextToImageRetrieval(ranks=(2,), normalize=False, block_size=2)
    for i in range(0, IMAGES, 4):
        rows = slice(i, min(i + 4, IMAGES))
        metric.update(image[rows], text[rows], image_pids[rows])
    want = flat(retrieval_metrics(text[:IMAGES], image, image_pids, image_pids, ranks=(2,), normalize=False))
    assert metric.compute() == want == metric.compute()
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert other.compute() == want
    metric.reset()
    metric.update(image[:, :3], text[:IMAGES, :3], image_pids)  # another width
    assert metric.compute() != want
    one = TextToImageRetrieval(ranks=(2,), normalize=False)
    assert one(image[:4], text[:4], image_pids[:4])["t2i_R2"] >= 0  # forward: of the batch, and added
    one.update(image[4:], text[4:IMAGES], image_pids[4:])
    assert one.compute() == want


def test_features_are_kept_in_the_dtype_of_the_metric():
    image, text, image_pids, text_pids = (x.bfloat16() if x.is_floating_point() else x for x in gallery())
    metric = TextToImageRetrieval()
    metric.update(image.requires_grad_(), pids=image_pids.int())
    metric.update(text_features=text, pids=text_pids)
    assert metric.compute() == flat(retrieval_metrics(text, image, text_pids, image_pids))
    double = TextToImageRetrieval().set_dtype(torch.float64)
    double.update(torch.ones(1, D, dtype=torch.float64) + 1e-12, torch.ones(1, D), torch.zeros(1).long())
    assert double.image_features[0].dtype == torch.float64 and double.image_features[0][0] > 1


def test_errors():
    image, text, pids, _ = gallery()
    metric = TextToImageRetrieval()
    with explains(TypeError, "image_features, text_features or both", "None", "pass"):
        metric.update(pids=pids)
    with explains(TypeError, "pids must be an integer tensor", "None"):
        metric.update(image)
    with explains(ValueError, "pids must have shape"):
        metric.update(image, text, pids)
    assert not metric.image_features  # nothing of a batch that raised
    metric.update(image, pids=pids)
    with explains(ValueError, "as wide as those before", "float32 [9, 3]", "joint space"):
        metric.update(text_features=text[:IMAGES, :3], pids=pids)
    with explains(ValueError, "text_features must have been added", "none", "call update"):
        metric.compute()
    with explains(TypeError, "normalize must be True or False"):
        TextToImageRetrieval(normalize=1)


def test_without_torchmetrics(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "fmfa_losses.integrations.torchmetrics")
    with pytest.raises(ImportError, match="needs torchmetrics; pip install torchmetrics"):
        __import__("fmfa_losses.integrations.torchmetrics")
