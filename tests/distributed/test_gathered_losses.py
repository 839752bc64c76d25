"""Every parameter-free loss over real processes: the mean over ranks is the loss of the concatenated batch."""

import inspect
import itertools

import pytest
import torch
import torch.distributed as dist
from helpers import processes
from helpers.errors import explains
from torch import Tensor

import fmfa_losses as fl
from fmfa_losses.losses.loss import Loss

B, D = 8, 6
TOLERANCE = 1e-9
SIZES = ((4, 4), (2, 6), (5, 3))

LOSSES = {
    "asdm": fl.ASDMLoss,
    "sdm": fl.SDMLoss,
    "itc": fl.ITCLoss,
    "itc identity": lambda **k: fl.ITCLoss(targets="identity", **k),
    "cmpm": fl.CMPMLoss,
    "cmpm released": lambda **k: fl.CMPMLoss(normalize="released", **k),
    "tal": fl.TALLoss,
    "trl": fl.TRLLoss,
    "triplet": fl.TripletLoss,
    "triplet all": lambda **k: fl.TripletLoss(negatives="all", **k),
    "sigmoid": fl.SigmoidLoss,
    "sigmoid paired": lambda **k: fl.SigmoidLoss(positives="paired", **k),
    "efa": lambda **k: fl.EFALoss(negatives="different_identity", **k),
}
PUBLIC = [x for x in map(vars(fl).get, fl.__all__) if isinstance(x, type) and issubclass(x, Loss)]
LOSSES |= {loss.__name__: loss for loss in PUBLIC if loss.__name__.removesuffix("Loss").lower() not in LOSSES}
SCALED = {name for name, loss in LOSSES.items() if "logit_scale" in inspect.signature(loss().forward).parameters}
WITH_PIDS = {"itc", "triplet all", "sigmoid paired"}  # that pids are of no use to
WITHOUT_PIDS = {name for name, loss in LOSSES.items() if "pids" not in inspect.signature(loss().forward).parameters}
RING = ("asdm", "sdm", "itc", "itc identity", "efa")


def value_and_gradients(name: str, part: slice, weighted: bool, **options) -> list[Tensor]:
    """The loss of some pairs of one batch, and its gradient in weights that all ranks share."""
    generator = torch.Generator().manual_seed(3)
    image, text = (torch.randn(B, D, generator=generator, dtype=torch.float64)[part] for _ in range(2))
    weight = torch.rand(B, generator=generator, dtype=torch.float64)[part]
    pids = torch.tensor([0, 1, 0, 2, 2, 3, 1, 4])[part]
    tower = torch.eye(D, dtype=torch.float64).requires_grad_()
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    image, text = image @ tower, text @ tower.T
    call = {"sample_weight": weight} if weighted else {}
    if name in SCALED:
        call["logit_scale"] = scale
    loss = LOSSES[name](**options)
    if name == "efa":
        value = loss(image[:, None], text[:, None], pids=pids, **call)
    elif name in WITHOUT_PIDS:
        value = loss(image, text, **call)
    else:
        value = loss(image, text, None if name in WITH_PIDS else pids, **call)
    grads = torch.autograd.grad(value, [tower, scale], allow_unused=True)
    return [value.detach(), *(torch.zeros_like(value) if g is None else g for g in grads)]


def errors() -> dict[str, float]:
    found, rank = {}, dist.get_rank()
    for name, sizes, weighted in itertools.product(LOSSES, SIZES, (False, True)):
        expected = value_and_gradients(name, slice(None), weighted)
        start = sum(sizes[:rank])
        for gather in (True, "ring") if name in RING else (True,):
            options = {"gather": gather, "equal_batches": sizes[0] == sizes[1]}
            got = value_and_gradients(name, slice(start, start + sizes[rank]), weighted, **options)
            for tensor in got:
                dist.all_reduce(tensor)
            pairs = zip(got, expected, strict=True)
            largest = max(((a / 2 - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs)
            found[f"{name}, {gather}, {sizes}, weighted {weighted}"] = largest
    return found


def test_the_mean_over_ranks_is_the_loss_and_gradient_of_the_whole_batch():
    for found in processes.run(2, errors):
        assert isinstance(found, dict), found
        assert len(found) == (len(LOSSES) + len(RING)) * len(SIZES) * 2
        wrong = {case: value for case, value in found.items() if not value <= TOLERANCE}
        assert not wrong, wrong


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in RING])
def test_what_a_loss_does_not_have_raises_when_it_is_built(name):
    with explains(ValueError, ("gather", "False or True"), '"ring"', "gather=True"):
        LOSSES[name](gather="ring")
    with explains(ValueError, ("backend", '"auto"', '"torch"'), ("triton", "no kernel"), '"auto"'):
        LOSSES[name](backend="triton")


@pytest.mark.parametrize("name", LOSSES)
def test_every_option_is_checked_when_a_loss_is_built(name):
    for options in ({"backend": "cuda"}, {"gather": "all"}, {"reduction": "avg"}):
        with pytest.raises(ValueError, match=rf"{next(iter(options))} must be "):
            LOSSES[name](**options)
    with pytest.raises(TypeError, match="equal_batches must be True or False"):
        LOSSES[name](equal_batches="no")
