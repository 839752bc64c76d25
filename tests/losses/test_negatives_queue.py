"""The queue of earlier batches: exact values and gradients of the batch against more columns, and its contents."""

import copy
import inspect
import pickle

import pytest
import torch
from helpers import processes
from helpers.compare import assert_close, value_and_grads
from helpers.errors import explains

import fmfa_losses as fl
from fmfa_losses.losses.loss import Loss
from fmfa_losses.ops import rows_in_blocks

D = 6
PUBLIC = [x for x in map(vars(fl).get, fl.__all__) if isinstance(x, type) and issubclass(x, Loss)]
TAKING = [loss for loss in PUBLIC if "queue" in inspect.signature(loss.forward).parameters]
LOSSES = {loss.__name__: loss for loss in TAKING} | {
    "ITCLoss identity": lambda **k: fl.ITCLoss(targets="identity", **k),
    "TripletLoss all": lambda **k: fl.TripletLoss(negatives="all", **k),
    "SigmoidLoss paired": lambda **k: fl.SigmoidLoss(positives="paired", **k),
    "TRLLoss released": lambda **k: fl.TRLLoss(negatives="released", **k),
}
WITHOUT_PIDS = {"ITCLoss", "TripletLoss all", "SigmoidLoss paired"}
EVERY = pytest.mark.parametrize("name", LOSSES)


def batch(seed: int, B: int, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(B, D, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    return image, text, torch.randint(5, (B,), generator=g)


def filled(batches: int = 2, **options) -> fl.NegativesQueue:
    queue = fl.NegativesQueue(batches, **options)
    for seed, B in ((11, 4), (12, 3), (13, 5)):
        queue.push(*batch(seed, B))
    return queue


def in_the_batch(loss, image, text, pids, queue):
    """The same loss where the queued samples are pairs of the batch, which count 0 as rows: as `queue` must have it."""
    columns = queue.columns
    weight = torch.cat([torch.ones(len(image)), torch.zeros(len(columns.pids))]).to(image.dtype)
    features = [torch.cat(parts) for parts in ((image, columns.image_features), (text, columns.text_features))]
    ids = None if pids is None else torch.cat([pids, columns.pids])
    return loss(*features, ids, sample_weight=weight)


@EVERY
def test_the_queue_adds_columns_and_nothing_else(name):
    image, text, pids = batch(1, 6)
    pids = None if name in WITHOUT_PIDS else pids
    loss, queue = LOSSES[name](), filled()
    found = value_and_grads(lambda i, t: loss(i, t, pids, queue=queue), [image, text])
    if name == "SigmoidLoss" or name == "SigmoidLoss paired":  # half a row and half a column, which has more rows there
        half = value_and_grads(lambda i, t: _sigmoid(loss, i, t, pids, queue), [image, text])
        return assert_close(found, half, 1e-9)
    expected = value_and_grads(lambda i, t: in_the_batch(loss, i, t, pids, queue), [image, text])
    return assert_close(found, expected, 1e-9)


def _sigmoid(loss, image, text, pids, queue):
    columns = queue.columns
    image, text = (torch.nn.functional.normalize(x) for x in (image, text))
    total = 0
    for rows, own, others in ((text, image, columns.image_features), (image, text, columns.text_features)):
        scores = rows @ torch.cat([own, torch.nn.functional.normalize(others)]).T
        if pids is None:
            y = torch.eye(len(rows), scores.shape[1], dtype=torch.bool)
        else:
            y = pids[:, None] == torch.cat([pids, columns.pids])
        total = total - torch.nn.functional.logsigmoid(torch.where(y, 1, -1) * (10 * scores - 10)).sum() / 2
    return total / len(rows)


@EVERY
def test_blocks_of_rows_give_the_same(name, monkeypatch):
    image, text, pids = batch(1, 6)
    pids = None if name in WITHOUT_PIDS else pids
    loss, queue = LOSSES[name](reduction="none"), filled()
    weight = torch.rand(6, dtype=torch.float64)
    expected = value_and_grads(lambda i, t: (weight * loss(i, t, pids, queue=queue)).sum(), [image, text])
    monkeypatch.setattr(rows_in_blocks, "MOST_SCORES", 0)
    monkeypatch.setattr(rows_in_blocks, "BLOCK_SCORES", 2 * (6 + len(queue)))
    found = value_and_grads(lambda i, t: (weight * loss(i, t, pids, queue=queue)).sum(), [image, text])
    assert_close(found, expected, 1e-12)


def gathered() -> dict[str, float]:
    """Two ranks, unequal batches in queue and loss, against one process with everything."""
    rank, errors = torch.distributed.get_rank(), {}
    everything, parts = filled(), {0: slice(0, 2), 1: slice(2, None)}
    queue = fl.NegativesQueue(2, gather=True)
    for seed, B in ((11, 4), (12, 3), (13, 5)):
        queue.push(*(x[parts[rank]] for x in batch(seed, B)))
    for a, b in zip(queue.columns[:3], everything.columns[:3], strict=True):
        errors["columns"] = max(errors.get("columns", 0.0), (a - b).abs().max().item())
    image, text, pids = batch(1, 6)
    for name, gather in ((name, gather) for name in LOSSES for gather in (True, "ring")):
        given = None if name in WITHOUT_PIDS else pids
        tower = torch.eye(D, dtype=torch.float64).requires_grad_()
        whole = LOSSES[name]()(image @ tower, text @ tower.T, given, queue=everything)
        (expected,) = torch.autograd.grad(whole, [tower])
        own = [x[parts[rank]] for x in (image, text)]
        own_ids = None if given is None else given[parts[rank]]
        value = LOSSES[name](gather=gather)(own[0] @ tower, own[1] @ tower.T, own_ids, queue=queue)
        (found,) = torch.autograd.grad(value, [tower])
        value = value.detach()
        for x in (value, found):
            torch.distributed.all_reduce(x)
        error = max((value / 2 - whole).abs().item(), (found / 2 - expected).abs().max().item())
        errors[f"{name}, {gather}"] = error / max(1.0, expected.abs().max().item())
    return errors


def test_over_ranks_columns_and_losses_are_those_of_one_process():
    for found in processes.run(2, gathered):
        assert isinstance(found, dict), found
        assert len(found) == 1 + 2 * len(LOSSES)
        assert not {case: error for case, error in found.items() if not error <= 1e-9}


def test_it_keeps_the_last_batches_newest_first():
    queue = filled()
    expected = [torch.cat(parts) for parts in zip(batch(13, 5), batch(12, 3), strict=True)]
    assert len(queue) == 8
    assert all(torch.equal(a, b) for a, b in zip(queue.columns[:3], expected, strict=True))
    queue.clear()
    assert queue.columns is None and len(queue) == 0


def test_an_empty_queue_changes_nothing():
    image, text, pids = batch(1, 6)
    for loss in (fl.ASDMLoss(), fl.TALLoss()):
        assert torch.equal(loss(image, text, pids, queue=fl.NegativesQueue(2)), loss(image, text, pids))


def test_queued_features_are_constants_and_copies():
    image, text, pids = batch(1, 6)
    image.requires_grad_()
    queue = fl.NegativesQueue(1)
    queue.push(image * 1, text, pids)
    kept = queue.columns.text_features.clone()
    text.zero_()
    assert torch.equal(queue.columns.text_features, kept)
    assert not queue.columns.image_features.requires_grad


def test_a_push_between_forward_and_backward_does_no_harm():
    image, text, pids = batch(1, 6)
    image.requires_grad_()
    queue = filled()
    loss = fl.TALLoss()(image, text, pids, queue=queue)
    (expected,) = torch.autograd.grad(loss, image, retain_graph=True)
    queue.push(image, text, pids)
    assert torch.equal(torch.autograd.grad(loss, image)[0], expected)


def test_a_run_goes_on_from_its_state():
    queue, other = filled(), fl.NegativesQueue(2)
    other.load_state_dict(queue.state_dict())
    for again in (other, copy.deepcopy(queue), pickle.loads(pickle.dumps(queue))):
        again.push(*batch(14, 2))
        assert len(again) == 7 and len(queue) == 8
    with explains(ValueError, "at most batches = 1", "2", "build it as it was saved"):
        fl.NegativesQueue(1).load_state_dict(queue.state_dict())
    damaged = queue.state_dict()
    damaged["_extra_state"] = {**damaged["_extra_state"], "sizes": (5, 4)}
    with explains(ValueError, "the samples of its batches", ("8", "[5, 4]"), "that was saved"):
        other.load_state_dict(damaged)
    assert queue.float().columns.image_features.dtype == torch.float32
    assert "batches=2" in repr(queue) and "samples=8" in repr(queue)


def test_what_does_not_fit_raises():
    image, text, pids = batch(1, 6)
    queue = filled()
    with explains(TypeError, "queue must be a NegativesQueue", "list", "NegativesQueue(batches=...)"):
        fl.TALLoss()(image, text, pids, queue=[])
    without = fl.NegativesQueue(2)
    without.push(image, text)
    for loss in (fl.TALLoss(), fl.ASDMLoss()):
        with explains(ValueError, "queue must hold pids", "None", "pids=pids"):
            loss(image, text, pids, queue=without)
    with explains(ValueError, "queue must hold image_ids", "None", "image_ids=image_ids"):
        fl.SDMLoss()(image, text, pids, image_ids=pids, queue=queue)
    with explains(ValueError, "every batch of a queue or with none", "None", "clear()"):
        queue.push(image, text)
    with explains(ValueError, "the width of the batch", ("[6, 4]", "[8, 6]"), "push what the loss gets"):
        fl.TALLoss()(image[:, :4], text[:, :4], pids, queue=queue)
    with explains(ValueError, "gather=True", "gather=False", "NegativesQueue(2, gather=True)"):
        fl.TALLoss(gather=True)(image, text, pids, queue=queue)
    with explains(ValueError, ("queue", "softlabel_ratio"), "mutual_neighbors", "leave one out"):
        fl.ITCLoss(mutual_neighbors=2)(image, text, queue=queue)
    with pytest.raises(TypeError, match="queue"):
        fl.EFALoss()(image[:, None], text[:, None], queue=queue)
    for wrong in (0, 1.5, True):
        with pytest.raises((TypeError, ValueError), match="batches"):
            fl.NegativesQueue(wrong)


def test_image_ids_are_compared_too():
    image, text, pids = batch(1, 6)
    image_ids = torch.tensor([0, 0, 1, 2, 3, 3])
    queue = fl.NegativesQueue(1)
    queue.push(*batch(2, 4), image_ids=torch.tensor([3, 0, 7, 7]))
    columns, loss = queue.columns, fl.SDMLoss()
    found = value_and_grads(lambda i, t: loss(i, t, pids, image_ids=image_ids, queue=queue), [image, text])

    def whole(i, t):
        features = [torch.cat(x) for x in ((i, columns.image_features), (t, columns.text_features))]
        ids = [torch.cat(x) for x in ((pids, columns.pids), (image_ids, columns.image_ids))]
        weight = torch.tensor([1.0] * 6 + [0.0] * 4, dtype=torch.float64)
        return loss(*features, ids[0], image_ids=ids[1], sample_weight=weight)

    # Queued rows weigh nothing, and their columns pass no gradient to the batch.
    assert_close(found, value_and_grads(whole, [image, text]), 1e-9)


def test_the_total_gives_its_queue_to_asdm():
    image, text, pids = batch(1, 6)
    queue, objective = filled(), fl.FMFALoss(D, 5, weights={"irr": 0, "id": 0}).double()
    terms = objective(image, text, image[:, None], text[:, None], pids, queue=queue).terms
    torch.testing.assert_close(terms["asdm"], fl.ASDMLoss()(image, text, pids, queue=queue))
