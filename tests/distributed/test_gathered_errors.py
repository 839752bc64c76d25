"""One rank of three with another input, option or loss: all ranks raise the same error, whatever the loss."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from helpers import processes
from helpers.every_loss import PUBLIC, VARIANTS, another, arguments, build, hyperparameters, inputs_of
from helpers.global_batch import batch, own, raised
from torch import Tensor

from fmfa_losses.distributed import handshake as agreement
from fmfa_losses.losses.loss import Loss

WORLD, WRONG = 3, 2
PAIRS = 3  # a rank
OPTIONS = [{"gather": gather, "equal_batches": equal} for gather in (True, "ring") for equal in (False, True)]
# Of each loss a variant that compares identities, so that pids belong to the call.
NAMES = [
    next(name for name, (of, _) in VARIANTS.items() if of is loss and "pids" in arguments(build(name), INPUTS))
    for loss in PUBLIC
    for INPUTS in [inputs_of(torch.ones(1, 1, 1), torch.ones(1, 1, 1), *torch.ones(2), batch(1))]
]
Case = tuple[str, Callable[[], Tensor], tuple[str, ...]]  # name, the wrong call, words of the message


def inputs(rank: int) -> dict[str, Any]:
    data = own(batch(WORLD * PAIRS), (PAIRS,) * WORLD, rank)
    scale, bias = torch.tensor([4.0, -2.0], dtype=torch.float64)
    return inputs_of(data["image"], data["text"], scale, bias, data)


def wrong_inputs(taken: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """Name, what changes, words of the message."""
    samples = {name: x for name, x in taken.items() if x.ndim >= 1}
    features = {name: x for name, x in samples.items() if x.is_floating_point() and x.ndim >= 2}
    image = next(name for name in features if name.startswith("image"))
    ids = {name: x for name, x in samples.items() if x.dtype == torch.int64}
    agree = ("must agree on all ranks", "on rank 0", "on rank 2")
    yield "empty batch", {name: x[:0] for name, x in samples.items()}, ("must not be empty", "rank 2 of 3")
    yield "width", {name: x[..., :-1] for name, x in features.items()}, (*agree, ", 6] on rank 0", ", 5] on rank 2")
    yield "dtype", {name: x.float() for name, x in features.items()}, ("float64", "float32", "on rank 0", "on rank 2")
    yield f"dtype of {image}", {image: taken[image].float()}, ("float64", "float32", "on rank 0", "on rank 2")
    for name, x in samples.items():
        yield f"short {name}", {name: x[:-1]}, ("rank 2 of 3", f"[{PAIRS - 1}")
        yield f"{name} as a list", {name: x.tolist()}, (name, "rank 2 of 3", "must be a", "list")
        yield f"{name} without dimensions", {name: x.sum()}, (name, "rank 2 of 3", "must ")
        if name != "image_mask":  # patches do not travel: a rank may mask its own, or not
            yield f"no {name}", {name: None}, (name, "rank 2")
    for name, x in ids.items():
        yield f"float {name}", {name: x.double()}, (name, "integer", "float64 [3]", "rank 2 of 3")
    for name in taken.keys() & {"sample_weight"}:
        yield f"negative {name}", {name: -taken[name]}, (name, "must not be negative, got -", "rank 2 of 3")
    for name in taken.keys() - samples.keys():
        yield f"{name} as a number", {name: 2.5}, (f"{name} must be the same", "a tensor on rank 0", "2.5 on rank 2")
        yield f"no {name}", {name: None}, (f"{name} must be the same", "a tensor on rank 0", "None on rank 2")
        yield f"two of {name}", {name: taken[name].repeat(2)}, (name, "float64 [2]", "rank 2 of 3")


def cases(name: str, options: dict[str, Any]) -> Iterator[Case]:
    given, right = inputs(WRONG), build(name, **options)
    taken = arguments(right, given)

    def called(loss: Loss) -> Tensor:
        value: Tensor = loss(**arguments(loss, given))
        return value

    for case, changed, words in wrong_inputs(taken):
        yield case, partial(right, **{**taken, **changed}), words
    for option in hyperparameters(type(right)):
        value = another(right, option)
        words = (f"{option} must be the same on all ranks", "on rank 0", f"{text(value)} on rank 2")
        yield option, partial(called, build(name, **{**options, option: value})), words
    others = {"reduction": "sum", "gather": "ring" if options["gather"] is True else True}
    for option, value in {**others, "equal_batches": not options["equal_batches"]}.items():
        words = (f"{option} must be the same on all ranks", f"{getattr(right, option)!r} on rank 0", f"{value!r} on rank 2")
        yield option, partial(called, build(name, **{**options, option: value})), words
    after = NAMES[(NAMES.index(name) + 1) % len(NAMES)]
    words = ("the same loss", f"{type(right).__name__} on rank 0", f"{VARIANTS[after][0].__name__} on rank 2")
    yield "another loss", partial(called, build(after, **options)), words


def text(value: object) -> str:
    return repr(value).removesuffix(".0")


def errors_on_this_rank() -> dict[str, tuple[str, tuple[str, ...]]]:
    found, rank = {}, dist.get_rank()
    for name, options in itertools.product(NAMES, OPTIONS):
        agreement.agreed.clear()
        loss, where = build(name, **options), f"{name}, {options}"
        taken = arguments(loss, inputs(rank))
        right = partial(loss, **taken)
        for case, wrong, words in cases(name, options):
            found[f"{case}; {where}"] = raised(wrong if rank == WRONG else right), words
        found[f"right again; {where}"] = raised(right), ("nothing was raised",)
        option = next(iter(hyperparameters(type(loss))))
        renewed = build(name, **{**options, option: another(loss, option)})
        taken["pids"] = taken["pids"].double() if rank == WRONG else taken["pids"]
        found[f"after an agreement; {where}"] = raised(partial(renewed, **taken)), ("pids must be an integer", "rank 2 of 3")
    return found


def test_one_wrong_rank_gives_the_same_error_on_all():
    first, *others = processes.run(WORLD, errors_on_this_rank, timeout=20)
    assert isinstance(first, dict), first
    assert len(first) > 20 * len(PUBLIC) * len(OPTIONS)
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
