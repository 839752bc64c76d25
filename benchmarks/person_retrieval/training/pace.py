"""How long a step takes here, and how many epochs that affords: asked before training, so that a schedule is fixed."""

import copy
import statistics
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from .trainer import Trainer

__all__ = ["affordable_epochs", "measure_pace"]


def measure_pace(trainer: "Trainer", steps: int = 6) -> float:
    """Seconds of a step, reading included: the median over `steps`, of the slowest process.

    It trains, and puts everything back: weights, running statistics, optimizer, random numbers.
    """
    kept = {name: value.detach().clone() for name, value in trainer.trainee.state_dict().items()}
    optimizer, scaler = (copy.deepcopy(part.state_dict()) for part in (trainer.optimizer, trainer.scaler))
    devices = [trainer.world.device] if trainer.world.device.type == "cuda" else []
    seconds: list[float] = []
    with torch.random.fork_rng(devices):
        while len(seconds) <= steps:  # the first is not counted: it fills caches
            start = time.perf_counter()
            for _ in trainer.steps(0):
                if devices:
                    torch.cuda.synchronize(trainer.world.device)
                seconds.append(time.perf_counter() - start)
                if len(seconds) > steps:
                    break
                start = time.perf_counter()
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.trainee.load_state_dict(kept)
    trainer.optimizer.load_state_dict(optimizer)
    trainer.scaler.load_state_dict(scaler)
    pace = torch.tensor(statistics.median(seconds[1:]), dtype=torch.float64, device=trainer.world.device)
    if trainer.world.size > 1:
        dist.all_reduce(pace, op=dist.ReduceOp.MAX)
    return float(pace)


def affordable_epochs(pace: float, steps_per_epoch: int, minutes: float, epochs: int, *, besides: float = 0.0) -> int:
    """How many of `epochs` fit into `minutes`: at least one.

    Args:
        pace: seconds of a step.
        besides: seconds of an epoch beside its steps: of validation.
    """
    return max(1, min(epochs, int(minutes * 60 / (pace * steps_per_epoch + besides))))
