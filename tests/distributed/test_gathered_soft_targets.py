"""Soft targets over real processes: the mean over ranks is the loss of all pairs, and errors are shared."""

import itertools

import torch
import torch.distributed as dist
from helpers import processes
from torch import Tensor

from fmfa_losses import ITCLoss, NegativesQueue, RITCLoss, SDMLoss

B, D = 9, 6
SIZES = ((5, 4), (2, 7))
TOLERANCE = 1e-9
PIDS, IMAGE_IDS = torch.tensor([0, 1, 0, 2, 2, 3, 1, 4, 0]), torch.tensor([0, 1, 0, 2, 3, 4, 5, 6, 7])
g = torch.Generator().manual_seed(0)
IMAGE, TEXT, TEACHER_IMAGE, TEACHER_TEXT = torch.randn(4, B, D, generator=g, dtype=torch.float64)
GIVEN, TRANSPOSED = torch.rand(2, B, B, generator=g, dtype=torch.float64)
QUEUE = NegativesQueue(1, gather=True)  # filled by all ranks
WEIGHT = torch.rand(B, generator=g, dtype=torch.float64)


def sharpened(scores, positive):
    return (3 * scores).exp() + 2 * positive


LOSSES = {
    "itc": lambda **k: ITCLoss(targets="identity", **k),
    "itc paired": ITCLoss,
    "sdm": SDMLoss,
    "ritc": RITCLoss,
}
# name: (constructor, call of some pairs)
HOW = {
    "own": ({"softlabel_ratio": 0.4}, lambda part: {}),
    "teacher": ({"softlabel_ratio": 0.4, "mutual_neighbors": 3}, lambda part: teacher(part)),
    "neighbors": ({"mutual_neighbors": 2}, lambda part: {}),
    "matrix": ({}, lambda part: {"soft_targets": GIVEN[part]}),
    "pair": ({}, lambda part: {"soft_targets": (GIVEN[part], TRANSPOSED[part])}),
    "queue": ({"softlabel_ratio": 0.4}, lambda part: {"queue": QUEUE, **teacher(part)}),
    "function": ({}, lambda part: {"soft_targets": sharpened, **teacher(part)}),
}


def teacher(part: slice) -> dict[str, tuple[Tensor, Tensor]]:
    return {"momentum_features": (TEACHER_IMAGE[part], TEACHER_TEXT[part])}


def value_and_gradients(name: str, how: str, part: slice, weighted: bool, **options) -> list[Tensor]:
    """The loss of some pairs, and its gradient in weights and a scale that all ranks share."""
    tower = torch.eye(D, dtype=torch.float64).requires_grad_()
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    constructor, call = HOW[how]
    given = {"sample_weight": WEIGHT[part]} if weighted else {}
    if name == "sdm" and constructor:
        given["image_ids"] = IMAGE_IDS[part]
    loss = LOSSES[name](**constructor, **options)
    pids = None if name == "itc paired" else PIDS[part]
    value = loss(IMAGE[part] @ tower, TEXT[part] @ tower.T, pids, logit_scale=scale, **call(part), **given)
    return [value.detach(), *torch.autograd.grad(value, [tower, scale])]


def errors() -> dict[str, float]:
    found, rank = {}, dist.get_rank()
    part = slice(0, 2) if rank == 0 else slice(2, 5)
    QUEUE.push(TEACHER_IMAGE[part], TEACHER_TEXT[part], PIDS[part], image_ids=IMAGE_IDS[part])
    for name, how, (sizes, weighted) in itertools.product(LOSSES, HOW, zip(SIZES, (False, True), strict=True)):
        expected = value_and_gradients(name, how, slice(None), weighted)
        for gather in (True, "ring"):
            start = sum(sizes[:rank])
            got = value_and_gradients(name, how, slice(start, start + sizes[rank]), weighted, gather=gather)
            for tensor in got:
                dist.all_reduce(tensor)
            pairs = zip(got, expected, strict=True)
            largest = max(((a / 2 - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs)
            found[f"{name}, {how}, {gather}, {sizes}, weighted {weighted}"] = largest
    return found


def raised(function) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def messages() -> dict[str, str]:
    first, part = dist.get_rank() == 0, slice(0, 5) if dist.get_rank() == 0 else slice(5, None)

    def call(options=None, **given):
        ITCLoss(gather=True, **(options or {}))(IMAGE[part], TEXT[part], **given)

    narrow = GIVEN[part, :7]
    negative = -GIVEN[part] if first else GIVEN[part]
    return {
        "one alone": raised(lambda: call(soft_targets=GIVEN[part] if first else None)),
        "the other alone": raised(lambda: call(soft_targets=None if first else GIVEN[part])),
        "function and tensor": raised(lambda: call(soft_targets=GIVEN[part] if first else sharpened)),
        "columns of one": raised(lambda: call(soft_targets=GIVEN[part, : 5 if first else 4])),
        "too few columns": raised(lambda: call(soft_targets=narrow)),
        "negative": raised(lambda: call(soft_targets=negative)),
        "a column of zeros": raised(lambda: call(soft_targets=GIVEN[part] * (torch.arange(B) != 7))),
        "ratio": raised(lambda: call({"softlabel_ratio": 0.5 if first else 0.25})),
        "neighbors": raised(lambda: call({"mutual_neighbors": 2 if first else 3})),
        "teacher": raised(lambda: call({"softlabel_ratio": 0.5}, **(teacher(part) if first else {}))),
    }


def repeated_images() -> dict[str, float]:
    """Whether the nearest are the same ones where an image is there twice, in products of other shapes."""
    found = {}
    for seed, gather in itertools.product(range(12), (True, "ring")):
        g = torch.Generator().manual_seed(seed)
        text, image = torch.randn(2, 43, 64, generator=g, dtype=torch.float64)
        image = image[torch.randint(43, (43,), generator=g)]
        part = slice(0, 12 + seed) if dist.get_rank() == 0 else slice(12 + seed, None)
        value = ITCLoss(mutual_neighbors=3, gather=gather)(image[part], text[part])
        dist.all_reduce(value)
        expected = ITCLoss(mutual_neighbors=3)(image, text)
        found[f"repeated images, {seed}, {gather}"] = abs(value.item() / 2 - expected.item())
    return found


def work() -> tuple[dict[str, float], dict[str, str]]:
    return errors() | repeated_images(), messages()


WORDS = {
    "one alone": ("soft_targets", "rank 1"),
    "the other alone": ("soft_targets", "rank 1"),
    "function and tensor": ("soft_targets", "'a function' on rank 1"),
    "columns of one": ("soft_targets", "[b, 5] on rank 0", "[b, 4] on rank 1"),
    "too few columns": ("soft_targets", "each pair of all processes, 9", "7]"),
    "negative": ("soft_targets", "negative", "rank 0"),
    "a column of zeros": ("soft_targets", "sum > 0", "none in column 7 of the rows of all ranks", "own pair"),
    "ratio": ("softlabel_ratio", "0.5 on rank 0, 0.25 on rank 1"),
    "neighbors": ("mutual_neighbors", "2 on rank 0, 3 on rank 1"),
    "teacher": ("momentum_features", "None on rank 1"),
}


def test_two_processes():
    results = processes.run(2, work)
    for result in results:
        assert isinstance(result, tuple), result
        found, said = result
        assert len(found) == len(LOSSES) * len(HOW) * len(SIZES) * 2 + 24
        wrong = {case: value for case, value in found.items() if not value <= TOLERANCE}
        assert not wrong, wrong
        assert said.keys() == WORDS.keys()
        for case, words in WORDS.items():
            assert said[case].startswith("ValueError") and all(word in said[case] for word in words), (case, said[case])
