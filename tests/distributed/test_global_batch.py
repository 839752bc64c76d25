"""The global batch: real processes against one process on the concatenated batch."""

import itertools
import math
import warnings
from unittest.mock import patch

import torch
import torch.distributed as dist
from helpers import processes
from helpers.global_batch import (
    ASDM,
    EFA,
    EQUAL,
    GROUPS,
    TOLERANCE,
    UNEQUAL,
    Towers,
    Trainee,
    batch,
    call,
    differentiate,
    error,
    mean_over,
    own,
)
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fmfa_losses.distributed import peers as exchanges
from fmfa_losses.distributed.handshake import handshake
from fmfa_losses.distributed.peers import Peers
from fmfa_losses.fmfa import FMFAOutput
from fmfa_losses.heads import irr as irr_head
from fmfa_losses.losses.asdm import ASDMLoss
from fmfa_losses.losses.efa import EFALoss


def compare_all_cases() -> dict[str, float]:
    """Error of every case on this rank, by its name."""
    errors: dict[str, float] = {}
    towers = Towers()
    for ranks in GROUPS:
        group = dist.new_group(list(ranks))
        if dist.get_rank() not in ranks:
            continue
        for all_sizes in (EQUAL, UNEQUAL):
            sizes = tuple(all_sizes[r] for r in ranks)
            data, rank = batch(sum(sizes)), dist.get_rank(group)
            for name, arguments in [("asdm", a) for a in ASDM] + [("efa", a) for a in EFA]:
                expected = differentiate(call(name, arguments, towers, data), towers)
                for gather in (True, "ring"):
                    options = {"gather": gather, "process_group": group, "equal_batches": all_sizes == EQUAL}
                    value = call(name, arguments, towers, own(data, sizes, rank), **options)
                    got = mean_over(differentiate(value, towers), group)
                    errors[f"{name} {arguments} {gather} on {ranks} with {sizes}"] = error(got, expected)
    return errors


def test_mean_over_ranks_is_the_loss_and_gradient_of_the_whole_batch():
    results = processes.run(4, compare_all_cases)
    for errors in results:
        assert isinstance(errors, dict), errors
    cases = {case for errors in results for case in errors}
    assert len(cases) == len(GROUPS) * 2 * (len(ASDM) + len(EFA)) * 2
    worst = {case: max(errors.get(case, 0.0) for errors in results) for case in cases}
    wrong = {case: value for case, value in worst.items() if not value <= TOLERANCE}
    assert not wrong, f"{len(wrong)} of {len(cases)}: {wrong}"


def test_shares_of_the_mean():
    """Ranks with 2 and 1 pairs that cost 1, 2 and 6: their values average to 3, as the whole batch does."""
    shares = [Peers((2, 1), rank, group="theirs").mean(x) for rank, x in enumerate(torch.tensor([1.0, 2, 6]).split(2))]
    assert torch.stack(shares).mean() == 3.0


# ------------------------------------------------------------------------------------------------- a training step


class Checkpointed(Trainee):
    def forward(self, data: dict[str, Tensor]) -> FMFAOutput:
        return FMFAOutput(*checkpoint(super().forward, data, use_reentrant=False))


def trained() -> dict[str, float]:
    """Two accumulated batches under DDP against one process that has the whole ones."""
    alone = Trainee()
    halves = [batch(8), {key: x.flip(0) for key, x in batch(8).items()}]
    for data in halves:
        alone(data).loss.backward()
    expected = [p.grad for p in alone.parameters()]

    errors = {}
    for build, gather in ((Trainee, True), (Trainee, "ring"), (Checkpointed, True), (Checkpointed, "ring")):
        trainee = build(gather=gather, equal_batches=gather is True)
        ddp = DistributedDataParallel(trainee)
        with ddp.no_sync():
            ddp(own(halves[0], (4, 4), dist.get_rank())).loss.backward()
        ddp(own(halves[1], (4, 4), dist.get_rank())).loss.backward()
        got = [p.grad for p in trainee.parameters()]
        errors[f"{build.__name__}, accumulated under DDP, {gather}"] = error(got, expected)
    return errors


def totals() -> dict[str, float]:
    """Every term, metric and gradient of FMFALoss; ranks differ in pairs and masked words, the first may have none."""
    errors: dict[str, float] = {}
    weights = {"id": 0.5, "irr": 3.0}
    groups = [(ranks, dist.new_group(list(ranks))) for ranks in ((0, 1), (1, 2, 3), (0, 1, 2, 3))]
    for (ranks, group), all_sizes in itertools.product(groups, (EQUAL, UNEQUAL)):
        if dist.get_rank() not in ranks:
            continue
        sizes = tuple(all_sizes[r] for r in ranks)
        data, rank = batch(sum(sizes)), dist.get_rank(group)
        unmasked = {**data, "labels": torch.zeros_like(data["labels"])}
        for words, inputs in (("some", data), ("no", unmasked)):
            alone = Trainee(weights=weights)
            whole = alone(inputs)
            expected = [*differentiate(whole.loss, alone), *whole.terms.values()]
            for gather in (True, "ring"):
                equal = all_sizes == EQUAL
                trainee = Trainee(weights=weights, gather=gather, process_group=group, equal_batches=equal)
                out = trainee(own(inputs, sizes, rank))
                got = mean_over(differentiate(out.loss, trainee) + [x.detach() for x in out.terms.values()], group)
                case = f"{words} words masked, {gather} on {ranks} with {sizes}"
                errors[f"loss, terms, gradients; {case}"] = error(got, expected)
                accuracies = mean_over(list(out.metrics.values()), group)
                # Accuracies are float32, and 1e-6 is a few of its roundings.
                errors[f"metrics; {case}"] = error(accuracies, list(whole.metrics.values())) / 1e-6 * TOLERANCE
    return errors


def test_every_term_and_metric_of_the_total_is_that_of_the_whole_batch():
    results = processes.run(4, totals)
    for errors in results:
        assert isinstance(errors, dict), errors
        wrong = {case: value for case, value in errors.items() if not value <= TOLERANCE}
        assert not wrong, f"{len(wrong)} of {len(errors)}: {wrong}"
    assert len({case for errors in results for case in errors}) == 3 * 2 * 2 * 2 * 2
    counts = [int(x.count_nonzero()) for x in batch(12)["labels"].split(UNEQUAL)]
    assert counts[0] == 0 and len(set(counts)) > 2  # a rank without masked words, and others that differ


def overflowing() -> tuple[float, float]:
    """The IRR term, and the ID term, where rank 0 alone has more masked words than max_masked allows."""
    trainee = Trainee(gather=True)
    irr = trainee.objective.irr
    irr.max_masked = 4
    data = {key: x.flip(0) for key, x in batch(8).items()}
    # As with labels on an accelerator, where the host does not know how many are masked.
    with patch.object(irr_head, "on_host", lambda labels: False):
        out = trainee(own(data, (6, 2), dist.get_rank()))
    mean_irr, mean_id = mean_over([out.terms["irr"].detach(), out.terms["id"].detach()], None)
    return mean_irr.item(), mean_id.item()


def test_too_many_masked_words_on_one_rank_are_nan_on_all():
    for irr, identity in processes.run(2, overflowing):
        assert math.isnan(irr) and math.isfinite(identity)


def reduced() -> dict[str, float]:
    """ "none" is the own part of the whole, "sum" its sum."""
    errors, sizes, rank, towers = {}, (3, 5), dist.get_rank(), Towers()
    for name, arguments in (("asdm", ASDM[1]), ("efa", EFA[2])):
        whole = call(name, {**arguments, "reduction": "none"}, towers, batch(8))
        mine = whole[slice(0, 3) if rank == 0 else slice(3, 8)]
        for gather in (True, "ring"):
            each, total = (
                call(name, {**arguments, "reduction": reduction}, towers, own(batch(8), sizes, rank), gather=gather)
                for reduction in ("none", "sum")
            )
            errors[f"reduction of {name}, {gather}"] = error([each, total], [mine, mine.sum()])
    return errors


def compiled_loss_weights() -> float:
    """One graph: what the ranks count is never read by the host."""
    warnings.simplefilter("ignore")  # the compiler warns about its own internals, by version

    def step(x: Tensor, counts: Tensor) -> Tensor:
        peers, _ = handshake(True, None, {"counts": counts[None]}, equal_batches=True)  # a row a rank
        return x.mean() * peers.loss_weights(counts)[0]

    x = batch(8)["image"]
    mine = own({"image": x}, (3, 5), dist.get_rank())["image"]
    counts = torch.tensor([len(mine), 0])
    step(mine, counts)  # the first call agrees on the layout
    value = torch.compile(step, backend="aot_eager", fullgraph=True)(mine, counts)
    return error(mean_over([value], None), [x.mean()])


def in_half() -> dict[str, float]:
    """bfloat16 inputs under autocast: what arrives is what was sent, so only the order of float32 sums differs."""
    errors, data, rank = {}, batch(8), dist.get_rank()
    image, text = (data[key].bfloat16() for key in ("image", "text"))
    part = slice(0, 3) if rank == 0 else slice(3, 8)
    for gather in (True, "ring"):
        leaves = [x[part].clone().requires_grad_() for x in (image, text)]
        whole = [x.clone().requires_grad_() for x in (image, text)]
        with torch.autocast("cpu", torch.bfloat16):
            for tensors, pids, options in ((leaves, data["pids"][part], {"gather": gather}), (whole, data["pids"], {})):
                loss = ASDMLoss(**options)(tensors[0][:, 0], tensors[1][:, 0], pids) + EFALoss(**options)(*tensors)
                loss.backward()
        got = [leaf.grad.float() / 2 for leaf in leaves]
        error_ = error(got, [x.grad[part].float() for x in whole])
        errors[f"bfloat16, {gather}"] = error_ / 2**-7 * TOLERANCE  # one rounding to bfloat16
    return errors


def ring_gathers_no_columns() -> dict[str, float]:
    """What a ring gathers are ids and masks."""
    gathered, gather_op = [], exchanges.gather_op

    def spy(x, *route):
        gathered.append(x.dtype)
        return gather_op(x, *route)

    exchanges.gather_op = spy
    for name, arguments in (("asdm", ASDM[1]), ("efa", EFA[2])):
        call(name, arguments, Towers(), own(batch(8), (3, 5), dist.get_rank()), gather="ring").backward()
    exchanges.gather_op = gather_op
    return {"ring gathers no columns": float(not gathered or any(dtype.is_floating_point for dtype in gathered))}


def rerun() -> dict[str, float]:
    errors, towers = {}, Towers().float()
    data = {key: x.float() if x.is_floating_point() else x for key, x in own(batch(8), (3, 5), dist.get_rank()).items()}
    for name in ("asdm", "efa"):
        for gather in (True, "ring"):
            first, second = (differentiate(call(name, {}, towers, data, gather=gather), towers) for _ in range(2))
            errors[f"bitwise rerun of {name}, {gather}"] = 0.0 if all(map(torch.equal, first, second)) else 1.0
    return errors


def other_cases() -> dict[str, float]:
    found = {**reduced(), **in_half(), **ring_gathers_no_columns(), **rerun(), **trained()}
    return {**found, "compiled loss weights": compiled_loss_weights()}


def test_training_reductions_compilation_autocast_and_reruns():
    for errors in processes.run(2, other_cases):
        assert isinstance(errors, dict), errors
        wrong = {case: value for case, value in errors.items() if not value <= TOLERANCE}
        assert len(errors) == 4 + 2 + 1 + 4 + 4 + 1 and not wrong, wrong
