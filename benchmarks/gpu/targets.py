"""The targets of the library on a GPU, next to what was measured."""

from collections.abc import Sequence
from typing import Any

from ..cases import Case, work
from ..measure import DTYPES
from ..providers import AUTOTUNED, COMPILED, PEERS, REFERENCE, TRITON
from ..targets import at_least, find, ratio, target

__all__ = ["gpu_targets"]

# Of each of the GPU's targets, what was predicted before any run. Targets are goals: some were set before the work of
# the kernels was counted, and stay, so that a miss is seen.
PREDICTED = (*["missed"] * 5, "met", "met", "-", *["missed"] * 3, "met")


def gpu_targets(rows: Sequence[dict[str, Any]], ceilings: dict[str, float] | None) -> list[dict[str, Any]]:
    """Each with its prediction."""
    found = _gpu_targets(rows, ceilings)
    return [entry | {"predicted": prediction} for entry, prediction in zip(found, PREDICTED, strict=True)]


def _gpu_targets(rows: Sequence[dict[str, Any]], ceilings: dict[str, float] | None) -> list[dict[str, Any]]:
    """Eager, unless a target says how; `benchmarks/gpu/plan.py` has a job for every figure that is asked for here."""

    def efa(B: int, provider: str, precision: str, **sizes: Any) -> dict[str, Any] | None:
        return find(rows, Case("efa", B, **sizes), provider, dtype=precision, mode="eager")

    def asdm(B: int, provider: str) -> dict[str, Any] | None:
        return find(rows, Case("asdm", B), provider, dtype="fp32", mode="eager")

    def faster(B: int, provider: str) -> dict[str, Any] | None:
        """The faster of eager and replayed: torch.compile makes CUDA graphs, and so may its rival."""
        both = [find(rows, Case("asdm", B), provider, dtype="fp32", mode=mode) for mode in ("eager", "graph")]
        return min((row for row in both if row), key=lambda row: row["both"]["median"], default=None)

    ours = {precision: efa(128, TRITON, precision) for precision in ("fp32", "tf32", "bf16")}
    plain = {precision: efa(128, REFERENCE, precision) for precision in ("fp32", "tf32")}
    share = ours["bf16"] and ceilings and matmul_share(ours["bf16"], ceilings)
    maxsim = {name: find(rows, Case("maxsim", 128), name, dtype="bf16", mode="eager") for name in (TRITON, *PEERS)}
    best = min((row for name in PEERS if (row := maxsim[name])), key=lambda row: row["both"]["median"], default=None)
    large, small = asdm(65536, TRITON), (64, 256, 1024)
    whole, half = "EFA, B 128, forward and backward: ", "EFA, B 128, bf16 forward: half of the matmul ceiling"
    return [
        at_least(whole + "12x faster than the reference in fp32", ratio(plain["fp32"], ours["fp32"]), 12),
        at_least(whole + "6x faster than the reference in TF32", ratio(plain["tf32"], ours["tf32"]), 6),
        at_least(whole + "4x faster than max-autotune in bf16", ratio(efa(128, AUTOTUNED, "bf16"), ours["bf16"]), 4),
        at_least(
            "EFA, B 128, fp32: 1/100 of the reference's memory", ratio(plain["fp32"], ours["fp32"], "above_mib"), 100
        ),
        target(half, share and f"{share:.0%}", share >= 0.5 if share else None),
        at_least("MaxSim, bf16, forward and backward: no slower than the best peer", ratio(best, maxsim[TRITON]), 1),
        target("EFA, B 1024 runs", *(("ran", True) if efa(1024, TRITON, "bf16") else (None, None))),
        at_least(
            "EFA, B 128, bf16: captions of 25 tokens 2x faster than of 77",
            ratio(ours["bf16"], efa(128, TRITON, "bf16", mean_length=25)),
            2,
        ),
        at_least(
            "A-SDM, B 64 to 1024: 5x faster than the reference",
            smallest([ratio(asdm(B, REFERENCE), asdm(B, TRITON)) for B in small]),
            5,
        ),
        at_least(
            "A-SDM, B 64 to 1024, each eager or as a CUDA graph: 2x faster than torch.compile",
            smallest([ratio(faster(B, COMPILED), faster(B, TRITON)) for B in small]),
            2,
        ),
        at_least(
            "A-SDM, B 16384, likewise: 3x faster than torch.compile",
            ratio(faster(16384, COMPILED), faster(16384, TRITON)),
            3,
        ),
        target(
            "A-SDM, B 65536: under 1 GB above inputs and gradients",
            large and f"{large['above_mib'] * 2**20 / 1e9:.2f} GB",
            large and large["above_mib"] * 2**20 < 1e9,
        ),
    ]


def matmul_share(row: dict[str, Any], ceilings: dict[str, float]) -> float:
    """Counted operations of the forward a second, over those of a large matrix product."""
    least = work(Case(row["op"], row["B"], row["L"], row["N"], row["D"]), DTYPES[row["dtype"]].itemsize)
    assert least is not None
    return least["forward"].flops / (row["forward"]["median"] / 1e3) / ceilings[row["dtype"]]


def smallest(values: Sequence[float | None]) -> float | None:
    """Of all, or None where one was not measured."""
    measured = [value for value in values if value is not None]
    return min(measured) if len(measured) == len(values) else None
