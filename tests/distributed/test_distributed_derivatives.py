"""Derivatives across processes: the exchanges are linear maps, the ring is differentiable once."""

import contextlib
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import processes
from torch.autograd import forward_ad
from torch.func import grad, jvp

from fmfa_losses.distributed.peers import Peers
from fmfa_losses.functional import asdm_loss, efa_loss, tal_loss

D, IDS = 6, torch.arange(3)


def draw():
    """(name, loss, x) on this rank; every rank draws its own."""
    torch.manual_seed(dist.get_rank())
    image, text = torch.randn(3, 4, D, dtype=torch.float64), torch.randn(3, 2, D, dtype=torch.float64)
    return (
        ("asdm", lambda x, **k: asdm_loss(x, text[:, 0].to(x.dtype), IDS, temperature=0.5, **k), image[:, 0]),
        ("efa", lambda x, **k: efa_loss(x, text.to(x.dtype), **k), image),
        ("tal", lambda x, **k: tal_loss(x, text[:, 0].to(x.dtype), IDS, temperature=0.5, **k), image[:, 0]),
    )


def error_of(function) -> str:
    try:
        return f"a number: {function()}"
    except RuntimeError as error:
        return str(error)


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent


SECOND, TANGENT = "is differentiable once, got a second derivative of it", "in reverse mode, got a tangent"
INSIDE = 'gather="ring" cannot run inside of torch.func'


def asked() -> dict[str, object]:
    """Whether each case is right, or the error that it should be."""
    warnings.simplefilter("ignore")  # PyTorch's forward mode loads what it deprecates itself
    found: dict[str, object] = {}
    for name, loss, x in draw():
        for gather in (True, "ring"):
            f = lambda x, loss=loss, gather=gather: loss(x, gather=gather)  # noqa: E731
            leaf = x.clone().requires_grad_()
            (expected,) = torch.autograd.grad(f(leaf), leaf)
            (gradient,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
            case = f"{name}, {gather}"
            found[f"create_graph of {case}"] = torch.equal(gradient, expected)
            often = name == "tal" and gather is True  # plain operations, around exchanges that are linear
            second = error_of(gradient.square().sum().backward)
            found[f"second derivative of {case}"] = second == "a number: None" if often else SECOND in second
            error = error_of(lambda f=f, x=x: dual(f, x))
            found[f"tangent of {case}"] = error.startswith("a number: ") if often else TANGENT in error
            error = error_of(lambda f=f, x=x: jvp(f, (x,), (x,)))
            is_refused = TANGENT in error or (gather == "ring" and INSIDE in error)
            found[f"jvp of {case}"] = error.startswith("a number: ") if often else is_refused
            if gather is True:
                found[f"grad of {case}"] = torch.allclose(grad(f)(x), expected, rtol=1e-12)
            else:
                found[f"grad of {case}"] = INSIDE in error_of(lambda f=f, x=x: grad(f)(x))
    return found


def test_losses():
    for found in processes.run(2, asked):
        assert isinstance(found, dict), found
        assert len(found) == 3 * 2 * 5 and all(found.values()), found


def linear_maps() -> list[float]:
    """f = sum of cubes of what was exchanged: every derivative is known, on each rank that of the sum over ranks."""
    warnings.simplefilter("ignore")
    rank = dist.get_rank()
    peers = Peers((2, 3), rank, dist.group.WORLD)
    torch.manual_seed(rank)
    errors = []
    for exchange, x, copies in (
        (peers.gather, torch.randn(peers.sizes[rank], 4, dtype=torch.float64), 2),
        (peers.transpose, torch.randn(peers.sizes[rank], 5, dtype=torch.float64), 1),
    ):
        f = lambda x, exchange=exchange: exchange(x).pow(3).sum()  # noqa: E731
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), leaf)
        errors.append((gradient - copies * 3 * x.square()).abs().max().item())
        errors.append((second - copies * 6 * x).abs().max().item())
        tangent = jvp(exchange, (x,), (x,))[1]
        errors.append((tangent - exchange(x)).abs().max().item())
        errors.append((grad(f)(x) - gradient.detach()).abs().max().item())
    return errors


def test_the_exchanges_are_linear_in_every_mode():
    for errors in processes.run(2, linear_maps):
        assert isinstance(errors, list), errors
        assert len(errors) == 8 and max(errors) < 1e-12, errors


def under_autocast() -> dict[str, float]:
    errors = {}
    for name, loss, x in draw():
        exact = x.clone().requires_grad_()
        loss(exact, gather="ring").backward()
        for inside in (False, True):
            leaf = x.float().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(leaf, gather="ring")
            with torch.autocast("cpu", torch.bfloat16) if inside else contextlib.nullcontext():
                value.backward()
            errors[f"{name}, {inside}"] = ((leaf.grad - exact.grad).norm() / exact.grad.norm()).item()
    return errors


@pytest.mark.parametrize("world", [1, 2])
def test_the_ring_keeps_its_precision_under_autocast(world):
    for errors in processes.run(world, under_autocast):
        assert isinstance(errors, dict), errors
        assert max(errors.values()) < 2**-8 / 64, errors  # a 64th of a rounding to bfloat16
