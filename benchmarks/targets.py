"""The targets of the library on a CPU, next to what was measured."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .cases import RETRIEVAL, Case
from .peers import CPU_PEERS, LATE_INTERACTION
from .providers import AUTOTUNED, REFERENCE, RELEASED, TORCH, UNMASKED

__all__ = ["at_least", "at_most", "below", "find", "micro_targets", "ratio", "target"]


def find(measurements: Sequence[dict[str, Any]], case: Case, provider: str, **fields: Any) -> dict[str, Any] | None:
    """The successful measurement of a provider on a case, if there is one."""
    wanted = {"case": case.name, "provider": provider, "status": "ok"} | fields
    return next((row for row in measurements if all(row.get(key) == value for key, value in wanted.items())), None)


def target(goal: str, measured: str | None, met: bool | None) -> dict[str, Any]:
    return {"goal": goal, "measured": measured or "not measured", "met": met}


def ratio(a: dict[str, Any] | None, b: dict[str, Any] | None, key: str = "both") -> float | None:
    """How many times a's figure is b's."""
    if a is None or b is None:
        return None
    first, second = (row[key]["median"] if isinstance(row[key], dict) else row[key] for row in (a, b))
    return float(first / max(second, 1e-12))


def at_least(goal: str, value: float | None, bound: float) -> dict[str, Any]:
    return target(goal, value and f"{value:.1f}x", None if value is None else value >= bound)


def at_most(goal: str, row: dict[str, Any] | None, bound: float, key: str = "both") -> dict[str, Any]:
    """The median milliseconds of a pass."""
    value = row and row[key]["median"]
    return target(goal, value and f"{value:.3g} ms", None if value is None else value <= bound)


def below(goal: str, row: dict[str, Any] | None, gb: float, key: str = "process_mib") -> dict[str, Any]:
    used = row and row[key] * 2**20 / 1e9
    return target(goal, used and f"{used:.2f} GB", None if used is None else used < gb)


def ahead(rows: Sequence[dict[str, Any]], case: Case, names: Sequence[str]) -> dict[str, Any]:
    """Ours against each of the others on a case of MaxSim, the fastest first; met when all were tried."""
    mine, key = find(rows, case, TORCH), "both" if case.gradients else "forward"
    found = [(ratio(find(rows, case, name), mine, key), name) for name in names]
    times = sorted((value, name) for value, name in found if value is not None)
    failed = {row["provider"] for row in rows if row["case"] == case.name and row["status"].startswith("failed")}
    tried = bool(times) and all(value is not None or name in failed for value, name in found)
    met = False if times and times[0][0] < 1 else True if tried else None
    listed = [f"{value:.2f}x ({name})" for value, name in times] + [
        f"{name} failed" for name in names if name in failed
    ]
    return target(f"{case.name}: ahead of all others", ", ".join(listed) or None, met)


def maxsim_targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where torch.compile takes part, and who has a gradient, is as in the plan of `benchmarks micro`."""
    shape, captions = Case("maxsim", 64), Case("maxsim", 64, mean_length=25)
    return [
        ahead(rows, RETRIEVAL, (AUTOTUNED, LATE_INTERACTION)),
        ahead(rows, replace(RETRIEVAL, gradients=False), tuple(CPU_PEERS)),
        ahead(rows, shape, (AUTOTUNED, LATE_INTERACTION)),
        ahead(rows, replace(shape, gradients=False), tuple(CPU_PEERS)),
        ahead(rows, captions, (LATE_INTERACTION,)),
        ahead(rows, replace(captions, gradients=False), tuple(CPU_PEERS)),
    ]


def micro_targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    efa, irr, captions = Case("efa", 64), Case("irr", 16, N=193), Case("irr", 16, N=193, mean_length=25)
    released, reference, ours = (find(rows, efa, name) for name in (RELEASED, REFERENCE, TORCH))
    speed = "EFA, B 64, forward and backward: 8x faster than the "
    short = Case("efa", 64, mean_length=25)
    ours_short = find(rows, short, TORCH)
    return [
        at_least(speed + RELEASED, ratio(released, ours), 8),
        at_least(speed + REFERENCE, ratio(reference, ours), 8),
        at_least(f"EFA, B 64: 1/12 of the process memory of the {RELEASED}", ratio(released, ours, "process_mib"), 12),
        at_least(
            f"EFA, B 64: 1/12 of the memory above inputs of the {RELEASED}",
            ratio(released, ours, "above_inputs_mib"),
            12,
        ),
        at_least(
            f"EFA, B 64, captions of 25: 15x faster than the {UNMASKED}",
            ratio(find(rows, short, UNMASKED), ours_short),
            15,
        ),
        at_least("EFA, B 64, captions of 25: 3x faster than the same call without a mask", ratio(ours, ours_short), 3),
        below("EFA, B 64, captions of 25: under 300 MB above inputs", ours_short, 0.3, "above_inputs_mib"),
        below("EFA, B 256: a process under 2 GB", find(rows, Case("efa", 256), TORCH), 2),
        at_least(
            "IRRHead, B 16, 5 % masked: 3x faster than the dense head",
            ratio(find(rows, irr, REFERENCE), find(rows, irr, TORCH)),
            3,
        ),
        at_least(
            "IRRHead, the same with captions of 25 tokens and a text mask: 3x",
            ratio(find(rows, captions, REFERENCE), find(rows, captions, TORCH)),
            3,
        ),
        below("A-SDM, B 16384: a process under 1.5 GB", find(rows, Case("asdm", 16384), TORCH), 1.5),
        below("A-SDM, B 32768: a process under 2 GB", find(rows, Case("asdm", 32768), TORCH), 2),
        *maxsim_targets(rows),
    ]
