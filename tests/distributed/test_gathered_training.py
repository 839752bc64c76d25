"""A training step of every loss over two processes: accumulated, checkpointed, compiled."""

import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import processes
from helpers.every_loss import PUBLIC, VARIANTS, Model, build, evaluate, gradients, inputs
from helpers.global_batch import TOLERANCE, batch, error, mean_over, own, raised
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fmfa_losses.losses.loss import Loss

GATHER = (True, "ring")
EQUAL, UNEQUAL = (4, 4), (3, 5)


class Trainee(nn.Module):
    """Model and loss in one module; with `checkpointed` the towers are computed again in the backward."""

    def __init__(self, name: str, checkpointed: bool = False, **options: object) -> None:
        super().__init__()
        self.model, self.loss = Model(), build(name, **options)
        if checkpointed:
            self.model.image, self.model.text = Checkpointed(self.model.image), Checkpointed(self.model.text)

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        return evaluate(self.loss, self.model, data)


class Checkpointed(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = nn.Sequential(tower, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.tower, x, use_reentrant=False)


def gradients_kept(module: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]


def accumulated() -> dict[str, float]:
    """Two micro batches under DDP, with one exchange of gradients, against one process that has the whole ones."""
    found, rank, total = {}, dist.get_rank(), sum(UNEQUAL)
    halves = [batch(total), {key: x.flip(0) for key, x in batch(total).items()}]
    for name in VARIANTS:
        alone = Trainee(name)
        for data in halves:
            alone(data).backward()
        expected = gradients_kept(alone)
        for gather, checkpointed in itertools.product(GATHER, (False, True)):
            trainee = Trainee(name, checkpointed, gather=gather)
            ddp = DistributedDataParallel(trainee, find_unused_parameters=True)
            with ddp.no_sync():
                ddp(own(halves[0], UNEQUAL, rank)).backward()
            ddp(own(halves[1], UNEQUAL[::-1], rank)).backward()
            found[f"{name}, {gather}, checkpointed {checkpointed}"] = error(gradients_kept(trainee), expected)
    return found


# The ring breaks the graph in the middle, and compiling the pieces is slow: one loss of each base below `Loss`.
BASES = {loss.__mro__[loss.__mro__.index(Loss) - 1]: loss for loss in reversed(PUBLIC)}.values()
COMPILED = [(loss.__name__, True, EQUAL) for loss in PUBLIC]
COMPILED += [(loss.__name__, "ring", EQUAL if n else UNEQUAL) for n, loss in enumerate(BASES)]


def compiled() -> dict[str, float]:
    """One graph with gather=True and equal batches; else the graph breaks where sizes or blocks are exchanged."""
    warnings.simplefilter("ignore")  # the compiler warns about its own internals, by version
    found, model, rank = {}, Model(), dist.get_rank()
    torch._dynamo.reset()
    for name, gather, sizes in COMPILED:
        loss, data = build(name, gather=gather, equal_batches=sizes is EQUAL), batch(sum(sizes))
        given = inputs(loss, model, own(data, sizes, rank))
        if sizes is EQUAL:
            loss(**given)  # the first call exchanges the layout
        value = torch.compile(loss, backend="aot_eager", fullgraph=gather is True)(**given)
        got = mean_over([value.detach(), gradients(value, model)], None)
        whole = evaluate(build(name), model, data)
        found[f"{name}, {gather}, {sizes}"] = error(got, [whole.detach(), gradients(whole, model)])
    return found | compiled_anew()


def compiled_anew() -> dict[str, float]:
    """A hyperparameter that changes becomes a symbol of the compiler; the ranks still compare its values."""
    found, mine = {}, own(batch(sum(EQUAL)), EQUAL, dist.get_rank())
    torch._dynamo.reset()
    loss = build("TripletLoss", gather=True, equal_batches=True)
    given, step = inputs(loss, Model(), mine), torch.compile(loss, backend="aot_eager", fullgraph=True)
    for margin in (0.1, 0.3):
        loss.margin = margin
        expected = loss(**given)
        found[f"compiled with margin {margin}"] = (step(**given) - expected).abs().item()
    loss.margin = 0.7 + dist.get_rank()
    message = raised(lambda: torch.compile(loss, backend="aot_eager")(**given))  # with a handshake
    said = "margin must be the same on all ranks, got 0.7 on rank 0, 1.7 on rank 1" in message
    return {**found, f"compiled with other margins: {message}": 0.0 if said else 1.0}


STEPS = [(accumulated, 2 * len(GATHER) * len(VARIANTS)), (compiled, len(COMPILED) + 3)]


@pytest.mark.parametrize(("step", "cases"), STEPS)
def test_the_gradient_of_a_step_is_that_of_the_whole_batch(step, cases):
    for found in processes.run(2, step):
        assert isinstance(found, dict), found
        wrong = {case: value for case, value in found.items() if not value <= TOLERANCE}
        assert len(found) == cases and not wrong, wrong
