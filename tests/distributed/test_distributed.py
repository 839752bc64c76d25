"""The global batch: errors on all ranks, handshakes, and groups that come and go."""

import copy
import inspect
import itertools
import os
import pickle
import time
import warnings
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import processes
from helpers.global_batch import (
    ASDM,
    EFA,
    TOLERANCE,
    Towers,
    Trainee,
    batch,
    call,
    differentiate,
    error,
    mean_over,
    own,
    raised,
)
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.optim.swa_utils import AveragedModel

from fmfa_losses.distributed import handshake as agreement
from fmfa_losses.distributed.handshake import handshake
from fmfa_losses.fmfa import FMFALoss
from fmfa_losses.losses.asdm import ASDMLoss
from fmfa_losses.losses.efa import EFALoss


def errors_on_every_rank() -> dict[str, object]:
    rank, pids = dist.get_rank(), torch.arange(3)
    x, wide = torch.randn(3, 4), torch.randn(3, 4 + rank)
    tokens, masks = torch.randn(3, 2, 4), torch.ones(3, 2, dtype=torch.bool)
    found: dict[str, object] = {
        "width": raised(lambda: ASDMLoss(gather=True)(wide, wide, pids)),
        "promise": raised(
            lambda: ASDMLoss(gather=True, equal_batches=True)(x[: 3 - rank], x[: 3 - rank], pids[: 3 - rank])
        ),
        "mode": raised(lambda: ASDMLoss(gather=(True, "ring")[rank])(x, x, pids)),
        "mask": raised(lambda: EFALoss(gather=True)(tokens, tokens, text_mask=(None, masks)[rank])),
        "dtype": raised(lambda: ASDMLoss(gather="ring")(*[x.to((torch.float32, torch.float64)[rank])] * 2, pids)),
    }
    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])
    found["dtensor"] = raised(lambda: ASDMLoss(gather=True)(sharded, sharded, pids))
    groups = [dist.new_group([r]) for r in (0, 1)]
    found["stranger"] = raised(lambda: ASDMLoss(gather=True, process_group=groups[1 - rank])(x, x, pids))
    if rank == 0:
        found["absent"] = raised(lambda: ASDMLoss(gather=True)(x, x, pids))
    else:
        ASDMLoss(gather=False)(x, x, pids)
        time.sleep(5)  # stays away for longer than the time-out
    return found


def test_errors_name_the_mend_on_every_rank():
    results = processes.run(2, errors_on_every_rank, timeout=3)
    for found in results:
        assert isinstance(found, dict), found
        assert found["width"].startswith("ValueError: image_features must agree on all ranks"), found["width"]
        assert "float32 [b, 4] on rank 0, float32 [b, 5] on rank 1" in found["width"]
        assert "equal_batches=True promises" in found["promise"] and "3 on rank 0, 2 on rank 1" in found["promise"]
        assert "gather must be the same on all ranks, got True on rank 0, 'ring' on rank 1" in found["mode"]
        assert "text_mask must agree on all ranks" in found["mask"]
        assert "None on rank 0, bool [b, 2] on rank 1" in found["mask"]
        assert "float32 [b, 4] on rank 0, float64 [b, 4] on rank 1" in found["dtype"]
        assert found["dtensor"].startswith("TypeError: image_features must be a plain tensor")
        assert ".to_local()" in found["dtensor"]
        assert found["stranger"].startswith("ValueError: process_group must contain the calling rank")
    assert results[0]["absent"].startswith(
        "RuntimeError: gather failed on rank 0 of 2 (gloo, cpu tensors, time-out 3 s)"
    )
    assert "skipped this call, or came with gather=False, another loss" in results[0]["absent"]


def different_settings() -> dict[str, str]:
    warnings.simplefilter("ignore")  # of pids that negatives="all" does not use
    rank, pids = dist.get_rank(), torch.arange(3)
    x, tokens = torch.randn(3, 4), torch.randn(3, 2, 4)

    def asdm(scale: object = None, image_ids: Tensor | None = None, gather: object = True, **options: object) -> None:
        ASDMLoss(gather=gather, **options)(x, x, pids, logit_scale=scale, image_ids=image_ids)

    def efa(**options: object) -> None:
        EFALoss(gather=True, **options)(tokens, tokens, pids=pids)

    def fmfa(identities: int = 3, irr: dict[str, int] | None = None, **options: object) -> None:
        head = {"num_heads": 1, "depth": 1, **(irr or {})}
        objective = FMFALoss(4, identities, vocab_size=5, irr=head, **{"gather": True, **options})
        objective(x, x, tokens, tokens, pids)

    pairs = {
        "alpha": (asdm, {"alpha": (10.0, 1)}),
        "temperature": (asdm, {"temperature": (0.02, 0.05)}),
        "positive": (asdm, {"positive": ("any", "paired")}),
        "detach_weight": (asdm, {"detach_weight": (False, True)}),
        "eps": (asdm, {"eps": (1e-8, 1e-6)}),
        "image_id_factor": (asdm, {"image_id_factor": (0.3, 0.5)}),
        "reduction": (asdm, {"reduction": ("mean", "none")}),
        "gather": (asdm, {"gather": (True, "ring")}),
        "equal_batches": (asdm, {"equal_batches": (False, True)}),
        "logit_scale": (asdm, {"scale": (50.0, torch.tensor(50.0))}),
        "image_ids": (asdm, {"image_ids": (None, pids)}),
        "margin_text": (efa, {"margin_text": (0.1, 0.2)}),
        "margin_image": (efa, {"margin_image": (0.1, 0.9)}),
        "pool_scale": (efa, {"pool_scale": (1.0, 10.0)}),
        "sparsity": (efa, {"sparsity": (None, 0.5)}),
        "negatives": (efa, {"negatives": ("all", "different_identity")}),
        "efa, temperature": (efa, {"temperature": (1.0, 2)}),
        "efa, reduction": (efa, {"reduction": ("sum", "none")}),
        "weights['efa']": (fmfa, {"weights": ({}, {"efa": 0})}),
        "weights['irr']": (fmfa, {"weights": ({}, {"irr": 2})}),
        "asdm.alpha": (fmfa, {"asdm": ({"alpha": 10}, {"alpha": 1.0})}),
        "efa.sparsity": (fmfa, {"efa": ({}, {"sparsity": 0.5})}),
        "num_identities": (fmfa, {"identities": (3, 4)}),
        "irr.ignore_index": (fmfa, {"irr": ({}, {"ignore_index": -100})}),
        "irr.depth": (fmfa, {"irr": ({}, {"depth": 2})}),
    }
    found = {}
    for equal in (False, True):
        for name, (call_, options) in pairs.items():
            mine = {option: values[rank] for option, values in options.items()}
            promise = {} if name == "equal_batches" else {"equal_batches": equal}
            found[f"{name}, {equal}"] = raised(lambda c=call_, o={**promise, **mine}: c(**o))
    found["own weights"] = raised(
        lambda: fmfa(gather=False, asdm={"gather": True}, weights={"id": 1 + rank, "efa": 0, "irr": 0})
    )
    found["loss"] = raised((asdm, efa)[rank])
    found["equal numbers"] = raised(lambda: asdm(alpha=(10, 10.0)[rank], scale=(50.0, torch.tensor(50.0).item())[rank]))
    found["numbers of numpy"] = raised(lambda: asdm(alpha=(10.0, np.array(10.0))[rank], equal_batches=True))
    found["equal tensors"] = raised(lambda: asdm(scale=torch.tensor(10.0 + rank)))
    return found


@pytest.mark.parametrize("loss", [ASDMLoss, EFALoss])
def test_the_total_compares_every_hyperparameter(loss):
    own = {"gather", "process_group", "equal_batches", "backend"}  # the first three are compared by every handshake
    assert loss().settings().keys() == inspect.signature(loss).parameters.keys() - own


def test_ranks_with_different_hyperparameters_raise_the_same():
    first, second = processes.run(2, different_settings)
    assert isinstance(first, dict), first
    assert first == second
    for alike in ("equal numbers", "equal tensors", "numbers of numpy"):
        assert first.pop(alike) == "nothing was raised"
    assert "all ranks must call the same loss, got ASDMLoss on rank 0, EFALoss on rank 1" in first.pop("loss")
    assert "weights['id'] must be the same on all ranks, got 1 on rank 0, 2 on rank 1" in first.pop("own weights")
    for case, text in first.items():
        name = case.removeprefix("efa, ").rpartition(", ")[0]
        rule = "must agree on all ranks in everything but" if name == "image_ids" else "must be the same on all ranks"
        assert text.startswith(f"ValueError: {name} {rule}"), (case, text)
    assert "alpha must be the same on all ranks, got 10 on rank 0, 1 on rank 1" in first["alpha, False"]
    assert "got 50 on rank 0, a tensor on rank 1" in first["logit_scale, True"]
    assert "got 1 on rank 0, 0 on rank 1" in first["weights['efa'], True"]
    assert "got None on rank 0, int64 [b] on rank 1" in first["image_ids, False"]


def wrong_on_one_rank() -> dict[str, str]:
    """What every rank raises where rank 1 of 2 alone is wrong."""
    wrong, pids = dist.get_rank() == 1, torch.arange(3)
    x, tokens = torch.randn(3, 4), torch.randn(3, 2, 4)
    objective = partial(FMFALoss, 4, 3, vocab_size=5, irr={"num_heads": 1, "depth": 1})
    labels = torch.ones(3, 2, dtype=torch.long)
    found = {}
    for gather, equal in ((True, False), ("ring", True)):
        agreement.agreed.clear()
        asdm, efa, fmfa = (c(gather=gather, equal_batches=equal) for c in (ASDMLoss, EFALoss, objective))
        cases = {
            "float pids": lambda loss=asdm: loss(x, x, pids.float() if wrong else pids),
            "empty batch": lambda loss=asdm: loss(*[x[:0] if wrong else x] * 2, pids[:0] if wrong else pids),
            "width": lambda loss=asdm: loss(x[:, :3] if wrong else x, x, pids),
            "length of pids": lambda loss=asdm: loss(x, x, pids[:2] if wrong else pids),
            "no tensor": lambda loss=asdm: loss(x.tolist() if wrong else x, x, pids),
            "triton": lambda g=gather, e=equal: ASDMLoss(
                gather=g, equal_batches=e, backend="triton" if wrong else "torch"
            )(x.double(), x.double(), pids),
            "empty tokens": lambda loss=efa: loss(*[tokens[:0] if wrong else tokens] * 2),
            "mask": lambda loss=efa: loss(tokens, tokens, text_mask=torch.ones(3, 2 + wrong, dtype=torch.bool)),
            "tokens": lambda loss=efa: loss(tokens, x if wrong else tokens),
            "identity": lambda loss=fmfa: loss(x, x, tokens, tokens, pids + wrong),
            "labels": lambda loss=fmfa: loss(
                *(x, x, tokens, tokens, pids), masked_text_tokens=tokens, masked_labels=9 * labels if wrong else labels
            ),
            "one of two": lambda loss=fmfa: loss(
                *(x, x, tokens, tokens, pids), masked_labels=labels if wrong else None
            ),
            "mask of the total": lambda loss=fmfa: loss(
                *(x, x, tokens, tokens, pids), image_mask=torch.ones(3, 2 + wrong, dtype=torch.bool)
            ),
            "scale": lambda loss=fmfa: loss(*(x, x, tokens, tokens, pids), logit_scale=torch.tensor(float(not wrong))),
            "kind of the scale": lambda loss=fmfa: loss(
                *(x, x, tokens, tokens, pids), logit_scale=torch.tensor(1) if wrong else torch.tensor(1.0)
            ),
            "mask of a term that stays": lambda g=gather, e=equal: objective(
                gather=g, equal_batches=e, efa={"gather": False}
            )(x, x, tokens, tokens, pids, text_mask=torch.ones(3, 2) if wrong else None),
            "mask of the total that stays": lambda g=gather, e=equal: objective(equal_batches=e, asdm={"gather": g})(
                x, x, tokens, tokens, pids, text_mask=torch.ones(3, 2) if wrong else None
            ),
            "images of a term that stays": lambda g=gather, e=equal: objective(
                gather=g, equal_batches=e, asdm={"gather": False}
            )(x, x, tokens, tokens, pids, image_ids=pids.float() if wrong else pids),
            "kernels of a term that stays": lambda g=gather, e=equal: objective(
                gather=g, equal_batches=e, asdm={"gather": False, "backend": "triton" if wrong else "torch"}
            )(x.double(), x.double(), tokens, tokens, pids),
        }
        found.update({f"{name}, {gather}": raised(case) for name, case in cases.items()})
        found[f"right again, {gather}"] = raised(lambda loss=fmfa: loss(x, x, tokens, tokens, pids))
    found["everybody"] = raised(lambda: ASDMLoss(gather=True)(x, x, pids.float()))
    return found


def test_an_error_on_one_rank_is_raised_on_all():
    first, second = processes.run(2, wrong_on_one_rank, timeout=20)
    assert isinstance(first, dict), first
    assert first == second
    assert first.pop("right again, True") == first.pop("right again, ring") == "nothing was raised"
    assert first.pop("everybody").startswith("TypeError: pids must be an integer tensor, got float32")
    for case, text in first.items():
        assert "Error: rank 1 of 2 cannot take part: " in text, (case, text)
    assert first["float pids, True"].startswith("TypeError: rank 1 of 2 cannot take part: pids must be an integer")
    assert "image_features must not be empty, got float32 [0, 4]" in first["empty batch, ring"]
    assert "skip the step on all ranks" in first["empty batch, ring"]
    assert first["triton, True"].startswith("RuntimeError: ")


def integers() -> dict[str, float]:
    """Identities of any integer dtype, another one on each rank."""
    rank, data, towers = dist.get_rank(), batch(8), Towers()
    kinds = (torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    mine, errors = own(data, (3, 5), rank), {}
    for kind, gather in itertools.product(kinds, (True, "ring")):
        for name, arguments in (("asdm", ASDM[1]), ("efa", EFA[2])):
            expected = differentiate(call(name, arguments, towers, data), towers)
            ids = {key: mine[key].to(kind if rank else torch.int64) for key in ("pids", "image_ids")}
            value = call(name, arguments, towers, {**mine, **ids}, gather=gather)
            errors[f"{name} {kind} {gather}"] = error(mean_over(differentiate(value, towers), None), expected)
    return errors


def test_identities_of_every_integer_dtype():
    for errors in processes.run(2, integers):
        assert isinstance(errors, dict), errors
        assert max(errors.values()) <= TOLERANCE, errors


def collectives() -> dict[str, int]:
    """Gathers of one forward, by loss and promise."""
    counts, data = {}, own(batch(8), (4, 4), dist.get_rank())
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    original = getattr(dist, name)
    calls: list[int] = []

    def spy(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options)

    setattr(dist, name, spy)
    for equal in (False, True):
        options = {"gather": True, "equal_batches": equal}
        trainee = Trainee(**options)
        for loss, function in (
            ("asdm", lambda o=options: call("asdm", {}, Towers(), data, **o)),
            ("efa", lambda o=options: call("efa", {"masks": True}, Towers(), data, **o)),
            ("fmfa", lambda t=trainee: t(data)),
        ):
            function()
            calls.clear()
            function()
            counts[f"{loss}, {equal}"] = len(calls)
    setattr(dist, name, original)
    return counts


def test_one_handshake_a_step_and_none_under_the_promise():
    for counts in processes.run(2, collectives):
        # A-SDM: both features and the identities; EFA: joint embeddings and the mask; FMFALoss: masked words besides.
        assert counts == {
            "asdm, True": 3,
            "asdm, False": 3 + 1,
            "efa, True": 2,
            "efa, False": 2 + 1,
            "fmfa, True": 6,
            "fmfa, False": 6 + 1,
        }


def agreement_ends_with_its_group(folder: Path) -> dict[str, object]:
    """The first rank holds on to the old group, the second one has forgotten all of it."""
    x, pids, rank = torch.randn(3, 4), torch.arange(3), dist.get_rank()
    old, found = dist.group.WORLD, {}
    loss = ASDMLoss(gather=True, equal_batches=True)
    loss(x, x, pids)
    for held in (True, False):
        dist.destroy_process_group()
        old = old if held else None
        if rank == 1:
            agreement.agreed.clear()
        store = dist.FileStore(str(Path(folder, str(held))), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        found[f"held {held}"] = raised(lambda: [loss(x, x, pids) for _ in range(2)])
    with patch.object(agreement, "MOST_AGREED", 4):
        for step in range(10):
            ASDMLoss(gather=True, equal_batches=True, alpha=float(step))(x, x, pids)
    found["remembered"] = len(agreement.agreed)
    return found


def test_another_group_agrees_anew_and_old_agreements_are_forgotten(tmp_path):
    for found in processes.run(2, agreement_ends_with_its_group, tmp_path, timeout=20):
        assert isinstance(found, dict), found
        assert found.pop("remembered") <= 5
        assert set(found.values()) == {"nothing was raised"}, found


def copies() -> dict[str, object]:
    group = dist.new_group([0])
    options = {"gather": True, "process_group": group}
    losses = [ASDMLoss(**options), EFALoss(**options), Trainee(**options), nn.Sequential(ASDMLoss(**options))]
    for loss in losses:
        copied = copy.deepcopy(loss), copy.copy(loss), AveragedModel(loss).module
        held = [m.process_group for c in copied for m in c.modules() if hasattr(m, "process_group")]
        assert held and all(one is group for one in held)
        with pytest.raises(TypeError, match=r"cannot be pickled, because the group .* state_dict"):
            pickle.dumps(loss)
    trainee, data = losses[2], batch(4)
    assert torch.equal(copy.deepcopy(trainee)(data).loss, trainee(data).loss)
    losses[0].process_group = None
    assert pickle.loads(pickle.dumps(losses[0])).process_group is None
    return {}


def test_copies_of_a_loss_share_its_group_and_pickle_says_why_not():
    assert processes.run(1, copies) == [{}]


def dead_peer() -> str:
    x, pids = torch.randn(3, 4, requires_grad=True), torch.arange(3)
    loss = ASDMLoss(gather="ring", equal_batches=True)
    loss(x, x, pids).backward()
    if dist.get_rank() == 1:
        os._exit(0)
    return raised(lambda: loss(x, x, pids).backward())


def test_dead_peer():
    survivor, dead = processes.run(2, dead_peer, timeout=5)
    assert dead is None
    assert survivor.startswith("RuntimeError: ") and "time-out 5 s): a peer died" in survivor, survivor


def test_without_processes():
    x, pids = torch.randn(3, 4), torch.arange(3)
    for gather in (True, "ring"):
        with pytest.raises(RuntimeError, match="start with torchrun"):
            ASDMLoss(gather=gather)(x, x, pids)
        only_identity = FMFALoss(4, 3, irr={"num_heads": 1}, weights={"asdm": 0, "efa": 0}, gather=gather)
        with pytest.raises(RuntimeError, match="start with torchrun"):
            only_identity(x, x, x[:, None], x[:, None], pids)
    for build in (ASDMLoss, EFALoss, partial(FMFALoss, 4, 3, irr={"num_heads": 1}, asdm=ASDMLoss(), efa=EFALoss())):
        with pytest.raises(ValueError, match="gather must be one of False, True, 'ring', got 'all'"):
            build(gather="all")


def test_a_world_of_one_exchanges_nothing():
    peers, _ = handshake(False, None, {"x": torch.zeros(3, 2)})
    rows = torch.randn(3, 3)
    assert peers.sizes == (3,) and peers.offset == 0 and peers.gather(rows) is rows
    assert torch.equal(peers.transpose(rows), rows.T) and torch.equal(peers.mean(rows[0]), rows[0].mean())
