"""Which pairs a batch holds, by seed and epoch, on one process or several."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

__all__ = ["Batches", "IdentitySampler", "RandomSampler"]


class RandomSampler(Sampler[int]):
    """Every pair once, in an order that follows from (seed, epoch)."""

    def __init__(self, count: int, *, seed: int = 0) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100003 + self.epoch)
        return iter(torch.randperm(self.count, generator=generator).tolist())


class IdentitySampler(Sampler[int]):
    """Runs of `per_identity` captions of each identity, so that a batch has several captions of each person.

    Draws by (seed, epoch).
    """

    def __init__(self, pids: Tensor, *, per_identity: int = 4, seed: int = 0) -> None:
        if per_identity < 1:
            raise ValueError(f"per_identity must be at least 1, got {per_identity}")
        self.pids, self.per_identity, self.seed, self.epoch = pids, per_identity, seed, 0

    def __len__(self) -> int:
        counts = torch.bincount(self.pids)
        return int((counts // self.per_identity).sum()) * self.per_identity

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100003 + self.epoch)
        shuffled = torch.randperm(len(self.pids), generator=generator)
        by_pid = shuffled[self.pids[shuffled].argsort(stable=True)]
        groups = [
            group[: len(group) // self.per_identity * self.per_identity].view(-1, self.per_identity)
            for group in by_pid.split(torch.bincount(self.pids).tolist())
        ]
        dealt = torch.cat(groups)
        return iter(dealt[torch.randperm(len(dealt), generator=generator)].flatten().tolist())


class Batches(Sampler[list[int]]):
    """Slice `rank` of every batch of all processes.

    W processes with batches of b read, in rank order, the batches of one process with W b. What is left over at the end
    of an epoch is dropped; fewer pairs than W b are one batch, cut as evenly as they go.
    """

    def __init__(
        self, sampler: RandomSampler | IdentitySampler, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        self.sampler, self.rank, self.world_size = sampler, rank, world_size
        self.whole = min(batch_size * world_size, len(sampler))  # the batch of all processes
        if self.whole < world_size:
            raise ValueError(
                f"every process must get a pair of every batch, got {len(sampler)} pairs for {world_size} processes; "
                "start fewer"
            )

    def set_epoch(self, epoch: int) -> None:
        self.sampler.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler) // self.whole

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        start, stop = (self.whole * rank // self.world_size for rank in (self.rank, self.rank + 1))
        for first in range(0, len(self) * self.whole, self.whole):
            yield order[first + start : first + stop]
