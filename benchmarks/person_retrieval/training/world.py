"""The processes of a run."""

import gc
import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

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
        """Joins the process group that torchrun announced, or stays alone."""
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if "RANK" not in os.environ:
            return cls(device=torch.device(kind))
        if kind.startswith("cuda"):
            kind = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(kind)
        dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), torch.device(kind))

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def gather(self, recipe: Recipe) -> bool | str:
        """What the objectives are given; one process has nobody to gather from."""
        return recipe.gather if self.size > 1 else False

    def leave(self) -> None:
        """Leaves together: whoever tears the group down while another process still talks may be aborted."""
        if self.size > 1:
            gc.collect()  # trainers stand in reference cycles, and hold on to the group
            dist.barrier()
            dist.destroy_process_group()
