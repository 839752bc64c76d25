"""Every parameter-free loss over real processes: the mean over ranks is the loss of the concatenated batch."""

import itertools

import pytest
import torch
import torch.distributed as dist
from helpers import processes
from helpers.budget import assert_within_budget
from helpers.errors import explains
from helpers.every_loss import VARIANTS, Model, arguments, build, evaluate, gradients, inputs_of
from helpers.global_batch import EQUAL, TOLERANCE, UNEQUAL, batch, own
from torch import Tensor

GATHER = (True, "ring")
SMALL, LARGE = ((1,), (0, 1)), ((1, 2, 3), (0, 1, 2, 3))  # the large ones without every second combination


def largest_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def whole(name: str, data: dict[str, Tensor], bare: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of all pairs, their weighted mean, and its gradient, in one process."""
    model = Model()
    mean = evaluate(build(name), model, data, bare=bare)
    return (
        evaluate(build(name, reduction="none"), model, data, bare=bare).detach(),
        mean.detach(),
        gradients(mean, model),
    )


def errors_of_means() -> dict[str, float]:
    found, groups = {}, [(ranks, dist.new_group(list(ranks))) for ranks in SMALL + LARGE]
    for (ranks, group), all_sizes, bare in itertools.product(groups, (EQUAL, UNEQUAL), (True, False)):
        if dist.get_rank() not in ranks or (ranks in LARGE and bare is (all_sizes is UNEQUAL)):
            continue
        sizes, rank, model = tuple(all_sizes[r] for r in ranks), dist.get_rank(group), Model()
        data = batch(sum(sizes))
        for name in VARIANTS:
            _, *expected = whole(name, data, bare)
            for gather in GATHER:
                loss = build(name, gather=gather, process_group=group, equal_batches=all_sizes is EQUAL)
                value = evaluate(loss, model, own(data, sizes, rank), bare=bare)
                got = torch.cat([value.detach()[None], gradients(value, model)])
                dist.all_reduce(got, group=group)
                case = f"{name}, {gather}, {'bare' if bare else 'all inputs'}, {sizes}"
                found[case] = largest_error(got / len(ranks), torch.cat([expected[0][None], expected[1]]))
    return found


def errors_of_sums() -> dict[str, float]:
    """ "none" is the own part of the whole, "sum" its sum, here in blocks of two rows; gradients are not scaled."""
    found, sizes, rank, model = {}, UNEQUAL, dist.get_rank(), Model()
    for name, gather in itertools.product(VARIANTS, GATHER):
        each, _, _ = whole(name, batch(sum(sizes)), False)
        expected = gradients(evaluate(build(name, reduction="sum"), model, batch(sum(sizes))), model)
        mine = own({"each": each}, sizes, rank)["each"]
        for reduction in ("none", "sum"):
            value = evaluate(
                build(name, gather=gather, reduction=reduction), model, own(batch(sum(sizes)), sizes, rank)
            )
            got = gradients(value.sum(), model)
            dist.all_reduce(got)
            error = largest_error(value.detach(), mine if reduction == "none" else mine.sum())
            found[f"{name}, {gather}, {reduction}"] = max(error, largest_error(got, expected))
    return found


def every_error() -> dict[str, float]:
    return errors_of_means() | errors_of_sums()


def test_the_mean_over_ranks_is_the_loss_and_gradient_of_the_whole_batch():
    results = processes.run(4, every_error)
    for found in results:
        assert isinstance(found, dict), found
    worst: dict[str, float] = {}
    for case, value in itertools.chain.from_iterable(found.items() for found in results):
        worst[case] = max(value, worst.get(case, 0.0))
    assert len(worst) == len(VARIANTS) * len(GATHER) * (4 * len(SMALL) + 2 * len(LARGE) + 2)
    wrong = {case: value for case, value in worst.items() if not value <= TOLERANCE}
    assert not wrong, f"{len(wrong)} of {len(worst)}: {wrong}"


# ---------------------------------------------------------------------------------------------- float32 and half


LOWER = (torch.float32, torch.float16)
PARTS = (3, 5)


def of_leaves(name: str, dtype: torch.dtype, part: slice, exact: bool = False, **options: object) -> list[Tensor]:
    """The loss of some pairs whose tokens are rounded to `dtype`, and its gradient in tokens, scale and bias."""
    data = {key: x[part] for key, x in batch(sum(PARTS)).items()}
    kept = torch.float64 if exact else dtype
    leaves = [data[key].to(dtype).to(kept).requires_grad_() for key in ("image", "text")]
    scalars = [
        torch.tensor(x, dtype=torch.float64 if exact else torch.float32, requires_grad=True) for x in (4.5, -2.0)
    ]
    loss = build(name, **options)
    value = loss(**arguments(loss, inputs_of(*leaves, *scalars, data)))
    grads = torch.autograd.grad(value, leaves + scalars, materialize_grads=True)
    return [value.detach(), *grads]


def lowered() -> dict[str, list[Tensor]]:
    part = slice(PARTS[0]) if dist.get_rank() == 0 else slice(PARTS[0], None)
    cases = itertools.product(VARIANTS, LOWER, GATHER)
    return {f"{name} {dtype} {gather}": of_leaves(name, dtype, part, gather=gather) for name, dtype, gather in cases}


def test_in_lower_precision_the_error_is_that_of_one_process():
    """Within a quarter of it and a few roundings: of float32, in which a rank adds up the same terms in another order,
    and of the features' dtype for their gradients, which come from the own rows and from the columns of all ranks."""
    results = processes.run(2, lowered)
    for found in results:
        assert isinstance(found, dict), found
    names = ("value", "dimage", "dtext", "dscale", "dbias")
    for name, dtype in itertools.product(VARIANTS, LOWER):
        exact, plain = of_leaves(name, dtype, slice(None), exact=True), of_leaves(name, dtype, slice(None))
        for gather in GATHER:
            parts = zip(*(found[f"{name} {dtype} {gather}"] for found in results), strict=True)
            got = [torch.cat(part) / 2 if part[0].ndim else sum(part) / 2 for part in parts]
            for what, mine, usual, right in zip(names, got, plain, exact, strict=True):
                where = f"{name}, {dtype}, {gather}, {what}"
                precision = "fp16" if mine.dtype == torch.float16 else "fp32"
                assert_within_budget(mine, usual, right, precision=precision, amplification=10, name=where)


# ------------------------------------------------------------------------------------------------------- options


WITHOUT_KERNEL = [
    name for name, (loss, _) in VARIANTS.items() if loss.__name__ not in ("ASDMLoss", "EFALoss", "ITCLoss", "SDMLoss")
]


@pytest.mark.parametrize("name", WITHOUT_KERNEL)
def test_a_loss_without_kernel_says_so_when_it_is_built(name):
    with explains(ValueError, ("backend", '"auto"', '"torch"'), ("triton", "no kernel"), '"auto"'):
        build(name, backend="triton")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_is_checked_when_a_loss_is_built(name):
    for options in ({"backend": "cuda"}, {"gather": "all"}, {"reduction": "avg"}):
        with pytest.raises(ValueError, match=rf"{next(iter(options))} must be "):
            build(name, **options)
    with pytest.raises(TypeError, match="equal_batches must be True or False"):
        build(name, equal_batches="no")
