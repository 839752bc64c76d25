"""Every parameter-free loss over real processes: the mean over ranks is the loss of the concatenated batch."""

import itertools
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import processes
from helpers.budget import assert_within_budget
from helpers.errors import explains
from helpers.every_loss import VARIANTS, Model, arguments, build, evaluate, gradients, inputs_of
from helpers.global_batch import EQUAL, TOLERANCE, UNEQUAL, batch, own
from torch import Tensor

from benchmarks.distributed import LOSSES, counted, received
from fmfa_losses.ops import rows_in_blocks

GATHER = (True, "ring")
# By group, batch sizes and whether the loss is given nothing that it can do without.
COMBINATIONS = {
    (1,): ((EQUAL, False), (UNEQUAL, False)),
    (0, 1): ((EQUAL, True), (EQUAL, False), (UNEQUAL, False)),
    (1, 2, 3): ((UNEQUAL, False),),
    (0, 1, 2, 3): ((EQUAL, True), (UNEQUAL, False)),
}


def largest_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def value_and_gradients(name: str, data: dict[str, Tensor], bare: bool, **options: object) -> Tensor:
    model = Model()
    value = evaluate(build(name, **options), model, data, bare=bare)
    return torch.cat([value.detach()[None], gradients(value, model)])


def errors_of_means() -> dict[str, float]:
    found, groups = {}, {ranks: dist.new_group(list(ranks)) for ranks in COMBINATIONS}
    for ranks, all_sizes, bare in [(ranks, *each) for ranks, every in COMBINATIONS.items() for each in every]:
        if dist.get_rank() not in ranks:
            continue
        group = groups[ranks]
        sizes, rank = tuple(all_sizes[r] for r in ranks), dist.get_rank(group)
        data, options = batch(sum(sizes)), {"process_group": group, "equal_batches": all_sizes is EQUAL}
        for name in VARIANTS:
            expected = value_and_gradients(name, data, bare)
            for gather in GATHER:
                got = value_and_gradients(name, own(data, sizes, rank), bare, gather=gather, **options)
                dist.all_reduce(got, group=group)
                case = f"{name}, {gather}, {'bare' if bare else 'all inputs'}, {sizes}"
                found[case] = largest_error(got / len(ranks), expected)
    return found


def test_the_mean_over_ranks_is_the_loss_and_gradient_of_the_whole_batch():
    results = processes.run(4, errors_of_means)
    for found in results:
        assert isinstance(found, dict), found
    worst: dict[str, float] = {}
    for case, value in itertools.chain.from_iterable(found.items() for found in results):
        worst[case] = max(value, worst.get(case, 0.0))
    assert len(worst) == len(VARIANTS) * len(GATHER) * sum(map(len, COMBINATIONS.values()))
    wrong = {case: value for case, value in worst.items() if not value <= TOLERANCE}
    assert not wrong, f"{len(wrong)} of {len(worst)}: {wrong}"


# ---------------------------------------------------------------- reductions, blocks of rows, float32 and half, bytes


LOWER = (torch.float32, torch.float16)
PARTS = (3, 5)


def errors_of_sums() -> dict[str, float]:
    """ "none" is the own part of the whole, and "sum" its sum, here in blocks of two rows; gradients are not scaled."""
    found, rank, model, data = {}, dist.get_rank(), Model(), batch(sum(PARTS))
    for name, gather in itertools.product(VARIANTS, GATHER):
        each = evaluate(build(name, reduction="none"), model, data)
        expected, mine = gradients(each.sum(), model), own({"each": each.detach()}, PARTS, rank)["each"]
        for reduction, most in (("none", 1000), ("sum", 0)):
            loss = build(name, gather=gather, reduction=reduction)
            with patch.multiple(rows_in_blocks, MOST_SCORES=most, BLOCK_SCORES=2 * sum(PARTS)):
                value = evaluate(loss, model, own(data, PARTS, rank))
                got = gradients(value.sum(), model)
            dist.all_reduce(got)
            error = largest_error(value.detach(), mine if reduction == "none" else mine.sum())
            found[f"{name}, {gather}, {reduction}"] = max(error, largest_error(got, expected))
    return found


def of_leaves(name: str, dtype: torch.dtype, part: slice, exact: bool = False, **options: object) -> list[Tensor]:
    """The loss of some pairs whose tokens are rounded to `dtype`, and its gradient in tokens, scale and bias."""
    data = {key: x[part] for key, x in batch(sum(PARTS)).items()}
    kept = torch.float64 if exact else dtype
    leaves = [data[key].to(dtype).to(kept).requires_grad_() for key in ("image", "text")]
    scalar = torch.float64 if exact else torch.float32
    scalars = [torch.tensor(x, dtype=scalar, requires_grad=True) for x in (4.5, -2.0)]
    loss = build(name, **options)
    value = loss(**arguments(loss, inputs_of(*leaves, *scalars, data)))
    grads = torch.autograd.grad(value, leaves + scalars, materialize_grads=True)
    return [value.detach(), *grads]


def lowered() -> dict[str, list[Tensor]]:
    part = slice(PARTS[0]) if dist.get_rank() == 0 else slice(PARTS[0], None)
    cases = itertools.product(VARIANTS, LOWER, GATHER)
    return {f"{name} {dtype} {gather}": of_leaves(name, dtype, part, gather=gather) for name, dtype, gather in cases}


def bytes_received() -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Of a forward and a backward with weighted pairs of float16 features, counted and as the benchmark's formulas."""
    found, generator = {}, torch.Generator().manual_seed(0)
    b, N, L, D = 4, 5, 3, 6
    image, text = (torch.randn(b, T, D, generator=generator).half().requires_grad_() for T in (N, L))
    data = {key: x[:b] for key, x in batch(2 * b).items()}
    for (term, loss_class), gather in itertools.product(LOSSES.items(), GATHER):
        loss = loss_class(gather=gather, equal_batches=True)
        given = inputs_of(image, text, *torch.ones(2), data)
        taken = arguments(loss, given, bare=True) | {"sample_weight": given["sample_weight"]}
        loss(**taken)  # exchanges the layout
        with counted() as count:
            value = loss(**taken)
            forward = count["bytes"]
            value.backward()
        formula = received(term, gather, 2, b=b, L=L, D=D, size=2, weighted=True)
        found[f"{term}, {gather}"] = (forward, count["bytes"] - forward), formula
    return found


def two_processes() -> tuple[dict, ...]:
    return errors_of_sums(), bytes_received(), lowered()


def test_sums_bytes_and_lower_precision():
    results = processes.run(2, two_processes)
    for found in results:
        assert isinstance(found, tuple), found
        sums, counts, _ = found
        wrong = {case: value for case, value in sums.items() if not value <= TOLERANCE}
        assert len(sums) == 2 * len(GATHER) * len(VARIANTS) and not wrong, wrong
        wrong = {case: numbers for case, numbers in counts.items() if numbers[0] != numbers[1]}
        assert len(counts) == len(GATHER) * len(LOSSES) and not wrong, wrong
    assert_in_budget([lower for _, _, lower in results])


def assert_in_budget(results: list[dict[str, list[Tensor]]]) -> None:
    """Within a quarter of it and a few roundings: of float32, in which a rank adds up the same terms in another order,
    and of the features' dtype for their gradients, which come from the own rows and from the columns of all ranks."""
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


@pytest.mark.parametrize("name", ["CMPMLoss", "SigmoidLoss", "TALLoss", "TRLLoss", "TripletLoss"])
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
