"""The algebra of row statistics: any split, order and grouping of columns gives the reference's loss and gradients."""

from collections.abc import Callable
from functools import reduce

import pytest
import torch
from helpers.distribution import features, ties
from torch import Tensor

from fmfa_losses.ops.precision import unit_rows
from fmfa_losses.ops.similarity_distribution.reference import RowLoss, similarity_distribution_loss_reference
from fmfa_losses.ops.similarity_distribution.statistics import (
    LOWEST,
    Labels,
    Running,
    dlogits,
    finalize,
    merge,
    nothing,
    of,
)

merging = merge  # what the test below breaks
Merge = Callable[[Running, Running], Running]
OPTIONS = [
    {"alpha": 3.0},
    {"alpha": 3.0, "positive": "any"},
    {"alpha": 3.0, "positive": "any", "detach_weight": True},
    {"alpha": 0.0},
    {"objective": "cross_entropy"},
]


def left(parts: list[Running], merge: Merge) -> Running:
    return reduce(merge, parts)


def right(parts: list[Running], merge: Merge) -> Running:
    return reduce(lambda a, b: merge(b, a), parts[::-1])


def tree(parts: list[Running], merge: Merge) -> Running:
    half = len(parts) // 2
    return parts[0] if not half else merge(tree(parts[half:], merge), tree(parts[:half], merge))


def in_blocks(
    inputs: dict[str, Tensor], spec: RowLoss, cuts: list[int], order: list[int], shape: Callable[..., Running], dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the queries as rows, gradient in the logits, and both indices, from blocks of columns."""
    pids, images = inputs["pids"], inputs.get("image_ids")
    R, C = len(inputs["queries"]), len(pids)
    z = inputs["logit_scale"] * unit_rows(inputs["queries"]) @ unit_rows(inputs["keys"]).T
    rows, f = slice(spec.offset, spec.offset + R), spec.image_id_factor

    def same(ids: Tensor, columns: slice) -> Tensor:
        found = ids[rows, None] == ids[columns]
        return found if dim == 1 else found.T

    whole, every = same(pids, slice(None)).double(), slice(None)
    y = whole if images is None else f * whole + (1 - f) * same(images, every).double()
    total = y.sum(dim, keepdim=dim == 1)
    blocks = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, C], strict=True)]
    arguments = {}
    for i, columns in enumerate(blocks):
        labels = Labels(same(pids, columns), None if images is None else same(images, columns), f, spec.eps)
        block = z[:, columns] if dim == 1 else z[:, columns].T
        arguments[i] = (block, labels, total), {"dim": dim, "first": columns.start}
    parts = [of(*arguments[i][0], spec, **arguments[i][1], pair=spec.offset) for i in order]
    running = shape([nothing(R, z), *parts, nothing(R, z)], lambda a, b: merging(a, b, spec))
    loss, final = finalize(running, spec)
    g = torch.linspace(0.5, 1.5, R, dtype=z.dtype)
    dz = [dlogits(*arguments[i][0], final, running[5:], g, spec, **arguments[i][1]) for i in range(len(blocks))]
    return loss, torch.cat(dz, dim), torch.stack(running[5:])


def expected(inputs: dict[str, Tensor], spec: RowLoss) -> tuple[Tensor, Tensor]:
    """The same of the reference, as a function of the logits."""
    z = (inputs["logit_scale"] * unit_rows(inputs["queries"]) @ unit_rows(inputs["keys"]).T).requires_grad_()
    C = z.shape[1]
    # Keys are an orthonormal basis, and a last component brings every query to the norm 200: its cosines are z / 200.
    padded = torch.cat([z, (4e4 - z.square().sum(1, keepdim=True)).sqrt()], dim=1)
    basis = torch.eye(C + 1, dtype=z.dtype)[:C]
    ids = {name: inputs[name] for name in ("pids", "image_ids") if name in inputs}
    loss = similarity_distribution_loss_reference(
        padded, basis, **ids, logit_scale=200.0, **spec._asdict() | {"both": False, "reduction": "none"}
    )
    return loss.detach(), torch.autograd.grad(loss, z, torch.linspace(0.5, 1.5, len(z), dtype=z.dtype))[0]


def cases() -> list[tuple[dict[str, Tensor], int, list[list[int]]]]:
    """Inputs, offset, and cuts: none, uneven ones, and one column a block."""
    ragged, tied = features(9, 17, 5, offset=4, dtype=torch.float64), ties(torch.float64)
    one = features(1, 1, 4, dtype=torch.float64)
    return [(ragged, 4, [[], [3, 4, 11], [*range(1, 17)]]), (tied, 0, [[5], [*range(1, 12)]]), (one, 0, [[]])]


@pytest.mark.parametrize("shape", [left, right, tree])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("options", OPTIONS)
def test_splits_orders_and_groupings_do_not_show(options: dict[str, object], dim: int, shape: Callable[..., Running]):
    generator = torch.Generator().manual_seed(0)
    for inputs, offset, splits in cases():
        spec = RowLoss(**options, offset=offset, both=False, reduction="none")
        value, gradient = expected(inputs, spec)
        indices = in_blocks(inputs, spec, [], [0], left, dim)[2]
        for cuts in splits:
            orders = [torch.randperm(len(cuts) + 1, generator=generator).tolist() for _ in range(2)]
            for order in ([*range(len(cuts) + 1)], *orders):
                loss, dz, found = in_blocks(inputs, spec, cuts, order, shape, dim)
                torch.testing.assert_close(loss, value, rtol=1e-13, atol=1e-13 * value.abs().max().item())
                if dim == 0:
                    dz = dz.T
                error = (dz - gradient).norm() / gradient.norm().clamp(min=1e-30)
                assert error <= 1e-12 or len(inputs["pids"]) == 1, error
                if spec.weighted:
                    assert torch.equal(found, indices)


def test_nothing_is_neutral_and_merge_commutes():
    inputs = features(6, 11, 5, offset=2, dtype=torch.float64)
    z = 12 * unit_rows(inputs["queries"]) @ unit_rows(inputs["keys"]).T
    same = inputs["pids"][2:8, None] == inputs["pids"]
    for options in OPTIONS:
        spec = RowLoss(**options, offset=2, both=False)
        a, b = (
            of(z[:, cut], Labels(same[:, cut], None, 0.3, 1e-8), same.sum(1, True).double(), spec, first=start, pair=2)
            for cut, start in ((slice(0, 4), 0), (slice(4, 11), 4))
        )
        for same_statistics in zip(merge(a, b, spec), merge(b, a, spec), strict=True):
            assert torch.equal(*same_statistics)
        for x, y in zip(merge(a, nothing(6, z), spec), a, strict=True):
            assert torch.equal(x, y)
    assert nothing(2, z).top.tolist() == [LOWEST, LOWEST]


@pytest.mark.parametrize("broken", ["shrink", "ties", "positive"])
def test_a_broken_merge_is_seen(broken: str, monkeypatch: pytest.MonkeyPatch):
    def wrong(a: Running, b: Running, spec: RowLoss) -> Running:
        right = merge(a, b, spec)
        if broken == "shrink":
            return right._replace(sum_e=a.sum_e + b.sum_e)
        if broken == "ties":  # the later block wins
            return right._replace(top_index=torch.where(b.top >= a.top, b.top_index, a.top_index))
        return right._replace(positive=b.positive)

    monkeypatch.setattr(f"{__name__}.merging", wrong)
    with pytest.raises(AssertionError):
        test_splits_orders_and_groupings_do_not_show({"alpha": 3.0, "positive": "any"}, 1, left)
