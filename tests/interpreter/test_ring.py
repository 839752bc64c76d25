"""The ring in real processes, whose blocks the kernels read, against one process in float64."""

import warnings

import torch.distributed as dist
from helpers import processes
from helpers.global_batch import ASDM, Towers, batch, call, differentiate, error, mean_over, own

import benchmarks  # noqa: F401, a checkout that is not installed finds its kernels

TOLERANCE = 2e-5  # float32
SIZES = (3, 5)
CASES = [("asdm", {}), ("asdm", ASDM[3]), ("asdm", ASDM[1]), ("itc", {}), ("itc", {"targets": "identity"})]


def by_the_kernels() -> dict[str, float]:
    """Error of value and gradients on this rank, by case."""
    warnings.simplefilter("ignore")  # of the interpreter
    from fmfa_losses.kernels import asdm_blocks

    updates, update = [], asdm_blocks.update

    def counted(*arguments, **keywords) -> None:
        updates.append(arguments[1])
        update(*arguments, **keywords)

    asdm_blocks.update = counted
    errors, data = {}, batch(sum(SIZES))
    mine = own({key: x.float() if x.is_floating_point() else x for key, x in data.items()}, SIZES, dist.get_rank())
    for name, arguments in CASES:
        expected = differentiate(call(name, arguments, exact := Towers(), data), exact)
        value = call(name, arguments, towers := Towers().float(), mine, gather="ring", backend="triton")
        errors[f"{name} {arguments}"] = error(mean_over(differentiate(value, towers), None), expected)
    assert len(updates) == len(CASES) * len(SIZES) * 2, "two directions of every rank's block"
    return errors


def test_the_ring_by_the_kernels() -> None:
    for errors in processes.run(len(SIZES), by_the_kernels):
        assert isinstance(errors, dict), errors
        wrong = {case: value for case, value in errors.items() if not value <= TOLERANCE}
        assert len(errors) == len(CASES) and not wrong, wrong
