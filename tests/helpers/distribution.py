"""Inputs, golden cases and the error budget that the tests of the similarity distribution share."""

from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from benchmarks.budget import relative_error
from fmfa_losses.ops.similarity_distribution.api import similarity_distribution_loss
from fmfa_losses.ops.similarity_distribution.blocks import BlockBackend, ring_backward, ring_forward, torch_blocks
from fmfa_losses.ops.similarity_distribution.reference import RowLoss
from helpers.budget import assert_within_budget
from helpers.compare import value_and_grads

# Golden case: hyperparameters of asdm_loss.
GOLDEN = {
    "sdm": {"alpha": 0.0},
    "asdm_paper_alpha1": {"alpha": 1.0},
    "asdm_paper_alpha10": {},
    "asdm_any_positive_alpha10": {"positive": "any"},
}


SCALE = 12.0  # logit scale


def features(
    R: int, C: int, D: int, *, offset: int = 0, dtype: torch.dtype = torch.float32, images: bool = True
) -> dict[str, Tensor]:
    """Queries that resemble keys offset ... offset + R - 1, with repeated pids and some repeated images."""
    generator = torch.Generator().manual_seed(1000 * R + 10 * C + D)
    keys = torch.randn(C, D, generator=generator, dtype=torch.float64)
    queries = keys[offset : offset + R] + 2 * torch.randn(R, D, generator=generator, dtype=torch.float64)
    pids = torch.randint(0, max(1, C // 3), (C,), generator=generator)
    image_ids = 2 * pids + torch.randint(0, 2, (C,), generator=generator)
    scale = torch.tensor(SCALE, dtype=torch.float64)
    inputs = {"queries": queries.to(dtype), "keys": keys.to(dtype), "logit_scale": scale.to(dtype), "pids": pids}
    return inputs | {"image_ids": image_ids} if images else inputs


def ties(dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows whose best keys tie exactly: vectors of +-1, of norm 2, and products without rounding."""
    keys = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, 1, 1], [1, 1, -1, -1]]).repeat(3, 1).to(dtype)
    pids = torch.tensor([0, 1, 2, 3, 4, 1, 0, 3, 2, 5, 4, 5])
    return {"queries": keys.roll(1, 0), "keys": keys, "logit_scale": torch.tensor(2.0, dtype=dtype), "pids": pids}


def powers(n: int) -> Tensor:
    """[n, 1] powers of two, most of which leave float32's range when a row that they multiply is squared."""
    return 2.0 ** torch.tensor([66, -83, 0, 120, -120, 3, -70], dtype=torch.float64).repeat(n // 7 + 1)[:n, None]


def far(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, rows multiplied with powers of two: cosines stay what they are to the last bit."""
    return inputs | {
        name: (inputs[name].double() * powers(len(inputs[name])).roll(shift, 0)).to(inputs[name].dtype)
        for name, shift in (("queries", 0), ("keys", 2))
    }


def back(got: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of `far` inputs as those of the inputs."""
    return got | {
        name: got[name].double() * powers(len(got[name])).roll(shift, 0)
        for name, shift in (("dqueries", 0), ("dkeys", 2))
    }


def value_and_gradients(loss: Callable[..., Tensor], inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """`value_and_grads` by the inputs' names; ids have no gradient."""
    floating = {name: tensor for name, tensor in inputs.items() if tensor.is_floating_point()}
    others = {name: tensor for name, tensor in inputs.items() if name not in floating}
    value, *gradients = value_and_grads(
        lambda *leaves: loss(**dict(zip(floating, leaves, strict=True)), **others, **options), list(floating.values())
    )
    return {"value": value} | {f"d{name}": gradient for name, gradient in zip(floating, gradients, strict=True)}


def rounded_twice(inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Value and gradients in float64, but for one float32 rounding between the cosines of forward and backward.

    The backward makes p = exp(z - top - log sum e) from its own z and the forward's statistics. Where it adds the D
    products of a cosine in another order than the forward did, the two cosines differ by a rounding, p by the logit
    scale times that, and so does the gradient, even where p - t is small.
    """
    generator, plain_dlogits = torch.Generator().manual_seed(0), torch_blocks.dlogits

    def dlogits(cos: Tensor, *arguments: object) -> Tensor:
        sign = 2 * torch.randint(2, cos.shape, generator=generator) - 1
        return plain_dlogits(cos + 2**-24 * sign, *arguments)

    with patch.object(torch_blocks, "dlogits", dlogits):
        return value_and_gradients(similarity_distribution_loss, inputs, backend="torch", **options)


def assert_rows_within_budget(
    got: dict[str, Tensor],
    plain: dict[str, Tensor],
    exact: dict[str, Tensor],
    inputs: dict[str, Tensor],
    rounded: dict[str, Tensor] | None = None,
) -> None:
    """The error budget; a logit scale of 50 makes 50 roundings of one.

    `rounded` is what `rounded_twice` gives, where forward and backward may add products in different orders.
    """
    amplification = inputs["logit_scale"].abs().clamp(SCALE, 100).item()
    for name, want in exact.items():
        size = want.norm().item()
        if name == "dlogit_scale":  # a sum with both signs: measured by the size of its terms
            terms = exact["dqueries"].norm(dim=1) * inputs["queries"].double().norm(dim=1)
            size = max(size, terms.sum().item())
        reordered = 0.0 if rounded is None else relative_error(rounded[name], want, size)
        assert_within_budget(
            got[name], plain[name], want, amplification=amplification, size=size, reordered=reordered, name=name
        )


def assert_differentiable_once(loss: Callable[..., Tensor], backend: str, device: str = "cpu") -> None:
    """create_graph alone changes nothing; a gradient penalty raises, and is no number."""
    inputs = {name: tensor.to(device) for name, tensor in features(6, 6, 16, images=False).items()}
    leaves = [inputs[name].requires_grad_() for name in ("queries", "keys", "logit_scale")]
    value = loss(*leaves[:2], inputs["pids"], logit_scale=leaves[2], backend=backend)
    plain = torch.autograd.grad(value, leaves, retain_graph=True)
    graph = torch.autograd.grad(value, leaves, create_graph=True)
    for a, b in zip(plain, graph, strict=True):
        assert torch.equal(a, b)
    for gradient in graph:
        penalty = value + gradient.square().sum()
        with pytest.raises(RuntimeError, match="similarity_distribution_loss is differentiable once"):
            penalty.backward(retain_graph=True)
    assert all(leaf.grad is None for leaf in leaves)


class RingOfOneProcess:
    """What one rank sees of a ring, from the features of all; gradients of its own that the others sent come home."""

    def __init__(self, features: Tensor, sizes: tuple[int, ...], rank: int, home: Tensor) -> None:
        self.blocks, self.sizes, self.rank = features.split(sizes), sizes, rank
        self.offset, self.home = sum(sizes[:rank]), home
        self.sent: dict[int, Tensor] = {}  # by owner

    def rounds(self, block: Tensor) -> Iterator[tuple[int, Tensor]]:
        for step in range(len(self.sizes)):
            owner = (self.rank - step) % len(self.sizes)
            yield owner, self.blocks[owner]

    def shift(self, x: Tensor, size: int) -> Callable[[], Tensor]:
        owner = (self.rank - len(self.sent)) % len(self.sizes)
        self.sent[owner] = x
        last = len(self.sent) == len(self.sizes)
        return lambda: self.home if last else x.new_zeros(size, *x.shape[1:])


def value_and_gradients_of_a_ring(
    inputs: dict[str, Tensor], sizes: tuple[int, ...], block_backend: BlockBackend, **options: object
) -> dict[str, Tensor]:
    """Row losses, both directions, and gradients of their weighted sum; queries are texts and keys are images."""
    features, ids = torch.stack([inputs["keys"], inputs["queries"]], dim=1), (inputs["pids"], inputs.get("image_ids"))
    weights = torch.linspace(-1, 2, len(features), dtype=torch.float64).to(features.dtype).split(sizes)
    home = [torch.zeros_like(block) for block in features.split(sizes)]
    for _ in range(2):  # the second time with what the first one sent
        value, dfeatures, dscale, sent = [], [], torch.zeros(()), []
        for rank, own in enumerate(features.split(sizes)):
            ring = RingOfOneProcess(features, sizes, rank, home[rank])
            route = *ids, inputs["logit_scale"], RowLoss(**options, offset=ring.offset, both=False), ring, block_backend
            loss, *saved = ring_forward(own, *route)
            gradients = ring_backward(weights[rank], *saved, own, *route)
            value.append(loss)
            dfeatures.append(gradients[0])
            dscale = dscale + gradients[1]
            sent.append(ring.sent)
        home = [sum(of_rank[owner] for of_rank in sent) for owner in range(len(sizes))]
    dkeys, dqueries = torch.cat(dfeatures).unbind(dim=1)
    return {"value": torch.cat(value), "dqueries": dqueries, "dkeys": dkeys, "dlogit_scale": dscale}
