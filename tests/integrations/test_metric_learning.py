"""docs/integrations/pytorch_metric_learning.md: values and gradients of each call, and what cannot work."""

import copy

import pytest
import torch
from helpers.errors import explains
from helpers.pages import run_blocks
from torch import Tensor

from fmfa_losses import ASDMLoss, CITCLoss, EFALoss, IDHead, ITCLoss, TALLoss
from fmfa_losses.integrations.metric_learning import PairLoss

theirs = pytest.importorskip("pytorch_metric_learning.losses")
PAGE = "integrations/pytorch_metric_learning.md"
B, D = 8, 6


def features() -> tuple[Tensor, Tensor, Tensor]:
    image, text = torch.randn(2, B, D).requires_grad_().unbind(0)
    return image, text, torch.arange(B) // 2


def named(image: Tensor, text: Tensor, pids: Tensor) -> dict[str, Tensor]:
    return {"image_features": image, "text_features": text, "pids": pids}


def assert_same(got: Tensor, expected: Tensor, image: Tensor, text: Tensor) -> None:
    torch.testing.assert_close(got, expected)
    pairs = zip(*(torch.autograd.grad(x, (image, text), retain_graph=True) for x in (got, expected)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


def test_beside_theirs():
    image, text, pids = features()
    got = run_blocks(PAGE, 0, 1, **named(image, text, pids)).loss
    # A copy of the labels: given the same tensor twice, it removes the pair itself from the positives.
    contrast = theirs.NTXentLoss(temperature=0.07)(image, pids, ref_emb=text, ref_labels=pids.clone())
    assert_same(got, ASDMLoss()(image, text, pids) + 0.5 * contrast, image, text)


def test_in_their_call():
    image, text, pids = features()
    done = run_blocks(PAGE, 1, 2, **named(image, text, pids))
    expected = ASDMLoss()(image, text, pids)
    assert_same(done.loss, expected, image, text)
    for ref_labels in (pids, pids.clone()):
        assert torch.equal(copy.deepcopy(done.loss_func)(image, pids, None, text, ref_labels), expected)
    paired = ITCLoss(targets="paired")
    assert torch.equal(PairLoss(paired)(image, ref_emb=text), paired(image, text))
    assert PairLoss(TALLoss(reduction="none"))(image, pids, ref_emb=text).shape == (B,)


def test_in_one_tensor():
    image, text, pids = features()
    done = run_blocks(PAGE, 1, 3, **named(image, text, pids))
    both, twice = torch.cat([image, text]), pids.repeat(2)
    assert_same(done.loss, ASDMLoss()(image, text, pids) + 0.5 * theirs.NTXentLoss()(both, twice), image, text)


def test_what_cannot_work():
    image, text, pids = features()
    loss = PairLoss(ASDMLoss())
    triplets = torch.zeros(3, 2).long().unbind(0)
    with explains(ValueError, "indices_tuple must be None", (), "miner"):
        loss(image, pids, triplets, text)
    with explains(ValueError, "ref_emb must be the text features", "None", "stacked=True"):
        loss(image, pids)
    with explains(ValueError, "labels of image i and text i must be equal", (), "NegativesQueue"):
        loss(image, pids, None, text, pids.flip(0))
    for labels, ref_labels in ((pids, pids.tolist()), (pids.tolist(), pids)):
        with explains(TypeError, "labels must be an integer tensor", "list", "torch.as_tensor"):
            loss(image, labels, None, text, ref_labels)
    stacked = PairLoss(ASDMLoss(), stacked=True)
    with explains(ValueError, "embeddings must hold the images and then their texts", (), "without stacked"):
        stacked(image, pids, None, text)
    with explains(ValueError, "labels of image i and text i must be equal"):
        stacked(torch.cat([image, text]), torch.arange(2 * B))
    for other in (EFALoss(), CITCLoss(), IDHead(D, B), theirs.NTXentLoss(), None):
        with explains(TypeError, "loss must take image_features, text_features and pids", (), "add the values"):
            PairLoss(other)
    with pytest.raises(Exception, match="not supported for PairLoss"):
        theirs.CrossBatchMemory(loss, D)
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    with pytest.raises(TypeError, match="must extend BaseMetricLossFunction"):
        DistributedLossWrapper(loss)
