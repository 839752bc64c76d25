"""Pairs on several ranks, and the same pairs in one process."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fmfa_losses.fmfa import FMFALoss, FMFAOutput
from fmfa_losses.losses.asdm import ASDMLoss
from fmfa_losses.losses.efa import EFALoss
from fmfa_losses.losses.itc import ITCLoss

N, L, D, V = 5, 4, 6, 9
TOLERANCE = 1e-9

EQUAL, UNEQUAL = (3, 3, 3, 3), (2, 5, 1, 4)
ASDM = [
    {},
    {"alpha": 0.0, "image_ids": True},
    {"positive": "any"},
    {"positive": "any", "detach_weight": True, "image_ids": True},
]
EFA = [
    {},
    {"margin_text": 0.2, "margin_image": 0.8, "masks": True},
    {"negatives": "different_identity", "masks": True, "pool_scale": 3.0},
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
    """`total` pairs with identities and images that repeat across ranks, and one fully masked text.

    Some of the labels of masked words stand in the padding, and the first two captions have none.
    """
    generator = torch.Generator().manual_seed(7)
    image, text = (torch.randn(total, T, D, generator=generator, dtype=torch.float64) for T in (N, L))
    image_mask, text_mask = (torch.rand(total, T, generator=generator) < 0.7 for T in (N, L))
    image_mask[:, 0], text_mask[:, 0], text_mask[-1] = True, True, False
    image_ids = torch.arange(total) // 2 % 5
    pids = image_ids // 2
    labels = torch.randint(1, V, (total, L), generator=generator)
    labels[torch.rand(total, L, generator=generator) < 0.5] = 0
    labels[:2] = 0
    weight = torch.rand(total, generator=generator, dtype=torch.float64)
    tensors = {"image": image, "text": text, "image_mask": image_mask, "text_mask": text_mask}
    return {**tensors, "image_ids": image_ids, "pids": pids, "labels": labels, "weight": weight}


def call(name: str, arguments: dict, towers: nn.Module, data: dict[str, Tensor], **gathering) -> Tensor:
    arguments = dict(arguments)
    image_ids = data["image_ids"] if arguments.pop("image_ids", False) else None
    masks = {k: data[k] for k in ("image_mask", "text_mask")} if arguments.pop("masks", False) else {}
    image, text, scale = towers(data["image"], data["text"])
    if name == "asdm":
        loss = ASDMLoss(**arguments, **gathering)
        return loss(image.mean(1), text.mean(1), data["pids"], image_ids=image_ids, logit_scale=scale)
    if name == "itc":
        pids = data["pids"] if arguments.get("targets") == "identity" else None
        return ITCLoss(**arguments, **gathering)(image.mean(1), text.mean(1), pids, logit_scale=scale)
    pids = data["pids"] if arguments.get("negatives") == "different_identity" else None
    return EFALoss(**arguments, **gathering)(image, text, pids=pids, **masks)


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


class Trainee(nn.Module):
    """Towers and FMFALoss as one module, the way DistributedDataParallel wants them."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.towers = Towers()
        torch.manual_seed(2)
        self.objective = FMFALoss(D, 4, vocab_size=V, irr={"depth": 1, "num_heads": 1}, **options).double()

    def forward(self, data: dict[str, Tensor]) -> FMFAOutput:
        image, text, scale = self.towers(data["image"], data["text"])
        masks = {key: data[key] for key in ("image_mask", "text_mask")}
        masked = {"masked_text_tokens": text.flip(1), "masked_labels": data["labels"]}
        inputs = (image.mean(1), text.mean(1), image, text, data["pids"])
        return self.objective(*inputs, logit_scale=scale, **masks, **masked)


def raised(function) -> str:
    try:
        function()
    except Exception as exception:
        return f"{type(exception).__name__}: {exception}"
    return "nothing was raised"
