"""The processes of a run."""

import gc
import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ..errors import RunError
from .recipe import Recipe

__all__ = ["World"]


@dataclass(frozen=True)
class World:
    """The processes of this run. Under torchrun: one a device, NCCL on GPUs and Gloo on CPUs."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def join(cls, device: str | None) -> "World":
        """Joins the process group that torchrun announced, or stays alone.

        Raises:
            RunError: a device that torch does not know, or that this machine does not have.
        """
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        if "RANK" in os.environ and kind.startswith("cuda"):
            kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            wanted = torch.device(kind)
            if wanted.type not in ("cpu", "cuda"):
                raise RuntimeError("nothing else is tried")
        except RuntimeError as error:
            raise RunError(
                f"--device must be a CPU or a CUDA device, got {kind!r}; pass cpu, cuda or cuda:1"
            ) from error
        if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
            raise RunError(
                f"--device must be one that is there, got {kind} where torch finds {torch.cuda.device_count()} CUDA "
                "devices; pass --device cpu, start fewer processes, or install a torch and a driver with CUDA"
            )
        if "RANK" not in os.environ:
            return cls(device=wanted)
        if wanted.type == "cuda":
            torch.cuda.set_device(wanted)
        try:
            dist.init_process_group("nccl" if wanted.type == "cuda" else "gloo")
        except ValueError as error:
            raise RunError(
                f"several processes must be started by torchrun, found RANK in the environment but not all it sets: "
                f"{error}; start with torchrun, or unset RANK"
            ) from error
        return cls(dist.get_rank(), dist.get_world_size(), wanted)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def gather(self, recipe: Recipe) -> bool | str:
        """What the objectives are given; one process has nobody to gather from."""
        return recipe.gather if self.size > 1 else False

    def least(self, number: int) -> int:
        """The smallest that any process proposes."""
        if self.size == 1:
            return number
        proposed = torch.tensor(number, device=self.device)
        dist.all_reduce(proposed, op=dist.ReduceOp.MIN)
        return int(proposed)

    def leave(self) -> None:
        """Leaves together: whoever tears the group down while another process still talks may be aborted."""
        if self.size > 1:
            gc.collect()  # trainers stand in reference cycles, and hold on to the group
            dist.barrier()
            dist.destroy_process_group()
