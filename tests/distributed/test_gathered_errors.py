"""The last rank comes with another input, option or loss: all ranks raise the same error, whatever the loss."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import processes
from helpers.every_loss import PUBLIC, VARIANTS, another, arguments, build, hyperparameters, inputs_of
from helpers.global_batch import batch, own, raised
from torch import Tensor

from fmfa_losses.distributed import handshake as agreement
from fmfa_losses.losses.loss import Loss

PAIRS = 3  # a rank
OPTIONS = [{"gather": gather, "equal_batches": equal} for gather in (True, "ring") for equal in (False, True)]
ANY = inputs_of(torch.ones(1, 1, 1), torch.ones(1, 1, 1), *torch.ones(2), batch(1))
# Of each loss the variant whose call takes most, such as pids.
NAMES = [
    max((name for name, (of, _) in VARIANTS.items() if of is loss), key=lambda name: len(arguments(build(name), ANY)))
    for loss in PUBLIC
]
Case = tuple[str, Callable[[], Tensor], tuple[str, ...]]  # name, the wrong call, words of the message


def inputs(rank: int) -> dict[str, Any]:
    sizes = (PAIRS,) * dist.get_world_size()
    data = own(batch(sum(sizes)), sizes, rank)
    scale, bias = torch.tensor([4.0, -2.0], dtype=torch.float64)
    return inputs_of(data["image"], data["text"], scale, bias, data)


def words_of_ranks() -> tuple[str, str]:
    """Where a rank alone is wrong, and where ranks differ."""
    world = dist.get_world_size()
    return f"rank {world - 1} of {world} cannot take part", f"on rank {world - 1}"


def wrong_inputs(taken: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """Name, what changes, words of the message."""
    alone, last = words_of_ranks()
    samples = {name: x for name, x in taken.items() if x.ndim >= 1}
    features = {name: x for name, x in samples.items() if x.is_floating_point() and x.ndim >= 2}
    first = next(iter(features))
    ids = {name: x for name, x in samples.items() if x.dtype == torch.int64}
    agree = ("must agree on all ranks", "on rank 0", last)
    yield "empty batch", {name: x[:0] for name, x in samples.items()}, ("must not be empty", alone)
    yield "width", {name: x[..., :-1] for name, x in features.items()}, (*agree, ", 6] on rank 0", f", 5] {last}")
    yield "dtype", {name: x.float() for name, x in features.items()}, ("float64", "float32", "on rank 0", last)
    yield f"dtype of {first}", {first: taken[first].float()}, ("float64", "float32", "on rank 0", last)
    for name, x in samples.items():
        yield f"short {name}", {name: x[:-1]}, (alone, f"[{PAIRS - 1}")
        yield f"{name} as a list", {name: x.tolist()}, (name, alone, "must be a", "list")
        yield f"{name} without dimensions", {name: x.sum()}, (name, alone, "must ")
        if name != "image_mask":  # patches do not travel: a rank may mask its own, or not
            yield f"no {name}", {name: None}, (name, last.removeprefix("on "))
    for name, x in ids.items():
        yield f"float {name}", {name: x.double()}, (name, "integer", "float64 [3]", alone)
    for name in taken.keys() & {"sample_weight"}:
        yield f"negative {name}", {name: -taken[name]}, (name, "must not be negative, got -", alone)
    for name in taken.keys() - samples.keys():
        yield f"{name} as a number", {name: 2.5}, (f"{name} must be the same", "a tensor on rank 0", f"2.5 {last}")
        yield f"no {name}", {name: None}, (f"{name} must be the same", "a tensor on rank 0", f"None {last}")
        yield f"two of {name}", {name: taken[name].repeat(2)}, (name, "float64 [2]", alone)


def cases(name: str, options: dict[str, Any]) -> Iterator[Case]:
    given, right = inputs(dist.get_world_size() - 1), build(name, **options)
    taken, (_, last) = arguments(right, given), words_of_ranks()

    def called(loss: Loss) -> Tensor:
        value: Tensor = loss(**arguments(loss, given))
        return value

    for case, changed, words in wrong_inputs(taken):
        yield case, partial(right, **{**taken, **changed}), words
    for option in hyperparameters(type(right)):
        value = another(right, option)
        words = (f"{option} must be the same on all ranks", "on rank 0", f"{text(value)} {last}")
        yield option, partial(called, build(name, **{**options, option: value})), words
    others = {"reduction": "sum", "gather": "ring" if options["gather"] is True else True}
    for option, value in {**others, "equal_batches": not options["equal_batches"]}.items():
        words = (
            f"{option} must be the same on all ranks",
            f"{getattr(right, option)!r} on rank 0",
            f"{value!r} {last}",
        )
        yield option, partial(called, build(name, **{**options, option: value})), words
    after = NAMES[(NAMES.index(name) + 1) % len(NAMES)]
    words = ("the same loss", f"{type(right).__name__} on rank 0", f"{VARIANTS[after][0].__name__} {last}")
    yield "another loss", partial(called, build(after, **options)), words


def text(value: object) -> str:
    return repr(value).removesuffix(".0")


def errors_on_this_rank(names: list[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
    found, rank = {}, dist.get_rank()
    is_wrong = rank == dist.get_world_size() - 1
    for name, options in itertools.product(names, OPTIONS):
        agreement.agreed.clear()
        loss, where = build(name, **options), f"{name}, {options}"
        taken = arguments(loss, inputs(rank))
        right = partial(loss, **taken)
        for case, wrong, words in cases(name, options):
            found[f"{case}; {where}"] = raised(wrong if is_wrong else right), words
        found[f"right again; {where}"] = raised(right), ("nothing was raised",)
        option = next(iter(hyperparameters(type(loss))))
        renewed = build(name, **{**options, option: another(loss, option)})
        wrong = partial(renewed, **{name: x.tolist() for name, x in taken.items()})
        message = raised(wrong if is_wrong else partial(renewed, **taken))
        found[f"after an agreement; {where}"] = message, ("must be a tensor", words_of_ranks()[0])
    return found


@pytest.mark.parametrize(("world", "names"), [(2, NAMES), (4, NAMES[:1])])
def test_one_wrong_rank_gives_the_same_error_on_all(world, names):
    first, *others = processes.run(world, errors_on_this_rank, names, timeout=20)
    assert isinstance(first, dict), first
    assert len(first) > 20 * len(names) * len(OPTIONS)
    for found in others:
        assert isinstance(found, dict), found
        different = {case: (first[case][0], found[case][0]) for case in first if first[case] != found[case]}
        assert not different, different
    kinds = ("TypeError: ", "ValueError: ", "nothing was raised")
    wrong = {
        case: (message, words)
        for case, (message, words) in first.items()
        if not message.startswith(kinds) or not all(word in message for word in words)
    }
    assert not wrong, f"{len(wrong)} of {len(first)}: " + "\n".join(f"{case}: {what}" for case, what in wrong.items())
