"""The global batch: real processes against one process on the concatenated batch."""

import os
import sys
import time

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fmfa_losses.asdm import ASDMLoss
from fmfa_losses.distributed import Peers, meet
from fmfa_losses.efa import EFALoss
from fmfa_losses.objective import FMFALoss

N, L, D = 5, 4, 6
TOLERANCE = 1e-9

# Ranks of each group, pairs that each rank holds, the loss, and whether masks and image ids are given.
EQUAL, UNEQUAL = (3, 3, 3, 3), (2, 5, 1, 4)
ASDM = [
    {},
    {"alpha": 0.0, "image_ids": True},
    {"positive": "any", "gap": "cosine"},
    {"positive": "first", "gap": "cosine", "target": "column", "image_ids": True},
    {"positive": "any", "detach_weight": True, "image_ids": True},
]
EFA = [
    {},
    {"margin_text": 0.2, "margin_image": 0.8, "masks": True},
    {"negatives": "different_identity", "masks": True, "pool_scale": 3.0},
    {"ranking": "released", "pool_scale": 10.0},
]
GROUPS = ((0,), (0, 1), (1, 3), (0, 1, 2), (0, 1, 2, 3))


class Towers(nn.Module):
    """Two linear towers and a learnable logit scale, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(D, D).double(), nn.Linear(D, D).double()
        self.log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(image), self.text(text), self.log_scale.exp()


def batch(total: int) -> dict[str, Tensor]:
    """`total` pairs with identities and images that repeat across ranks, and one fully masked text."""
    generator = torch.Generator().manual_seed(7)
    image, text = (torch.randn(total, T, D, generator=generator, dtype=torch.float64) for T in (N, L))
    image_mask, text_mask = (torch.rand(total, T, generator=generator) < 0.7 for T in (N, L))
    image_mask[:, 0], text_mask[:, 0], text_mask[-1] = True, True, False
    image_ids = torch.arange(total) // 2 % 5
    pids = image_ids // 2
    return dict(image=image, text=text, image_mask=image_mask, text_mask=text_mask, image_ids=image_ids, pids=pids)


def call(name: str, arguments: dict, towers: nn.Module, data: dict[str, Tensor], **gathering) -> Tensor:
    arguments = dict(arguments)
    image_ids = data["image_ids"] if arguments.pop("image_ids", False) else None
    masks = {k: data[k] for k in ("image_mask", "text_mask")} if arguments.pop("masks", False) else {}
    image, text, scale = towers(data["image"], data["text"])
    if name == "asdm":
        loss = ASDMLoss(**arguments, **gathering)
        return loss(image.mean(1), text.mean(1), data["pids"], image_ids=image_ids, logit_scale=scale)
    return EFALoss(**arguments, **gathering)(image, text, pids=data["pids"], **masks)


def differentiate(value: Tensor, module: nn.Module) -> list[Tensor]:
    """[value, gradient of every parameter]"""
    grads = torch.autograd.grad(value, list(module.parameters()), allow_unused=True)
    return [value.detach(), *(torch.zeros(()).double() if g is None else g for g in grads)]


def mean_over(tensors: list[Tensor], group) -> list[Tensor]:
    for tensor in tensors:
        dist.all_reduce(tensor, group=group)
    return [tensor / dist.get_world_size(group) for tensor in tensors]


def error(got: list[Tensor], expected: list[Tensor]) -> float:
    return max((a - b).abs().max().item() / max(1.0, b.abs().max().item()) for a, b in zip(got, expected, strict=True))


def own(data: dict[str, Tensor], sizes: tuple[int, ...], rank: int) -> dict[str, Tensor]:
    start = sum(sizes[:rank])
    return {key: x[start : start + sizes[rank]] for key, x in data.items()}


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
