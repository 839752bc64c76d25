"""A record as one line of text, for those who watch a run."""

from typing import Any

from ..measure import DTYPES
from .kernel_work import seconds_at
from .roofline import share_of_roof
from .step_report import largest_line, step_line

__all__ = ["least_ms", "record_line"]

NOISE = 0.03  # two times that differ by less are not told apart


def record_line(
    record: dict[str, Any],
    references: dict[tuple[str, str, str], dict[str, Any]],
    ceilings: dict[str, float] | None,
) -> str:
    """`  12.3 s  d  efa, B 128 ...: what came out`; `references` by case, dtype and mode."""
    head = f"{record['at_s']:7.1f} s  {record['stage']}  "
    subject = ", ".join(str(record[key]) for key in ("case", "dtype", "table") if key in record)
    if record["kind"] == "figure":
        ran = f", here {record['ran']}" if "ran" in record else ""
        subject += f", {record['provider']}{ran}, {record['mode']}"
    if record["kind"] in ("step", "largest"):
        subject += f", {record['provider']}" + (f", here {record['ran']}" if "ran" in record else "")
    if record["kind"] == "tests":
        said = record.get("outcome") or record.get("summary") if record["status"] == "ok" else record["status"]
        return f"{head}{record.get('test', 'tests')}: {said}" + (f": {record['why']}" if "why" in record else "")
    if record["status"] != "ok":
        return f"{head}{subject or record['kind']}: {record['status']}"
    return f"{head}{subject or record['kind']}: " + _SAID[record["kind"]](record, references, ceilings)


def _ceilings(record: dict[str, Any], references: Any, ceilings: Any) -> str:
    rates = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in record["ceilings"].items() if name != "copy")
    return f"copy {record['ceilings']['copy'] / 1e12:.2f} TB/s; large product, TFLOP/s: {rates}"


def _exact(record: dict[str, Any], references: Any, ceilings: Any) -> str:
    parts = [f"{name} {error:.1e} of {record['budgets'][name]:.1e}" for name, error in record["errors"].items()]
    return "right; errors of budgets: " + ", ".join(parts)


def least_ms(record: dict[str, Any], ceilings: dict[str, float] | None) -> float | None:
    """The least time of a kernel: its operations and its bytes at the measured ceilings."""
    if not ceilings or record["status"] != "ok":
        return None
    return 1e3 * seconds_at(record["flops"], record["bytes"], record["dtype"], ceilings)


def _kernels(record: dict[str, Any], references: Any, ceilings: dict[str, float] | None) -> str:
    least, ms = least_ms(record, ceilings), record["ms"]["median"]
    said = f"{record['kernel'].strip('_')} x{record['launches']} {ms:.4g} ms"
    if least is not None:
        said += f", least {least:.2g} ms ({least / ms:.0%} of the roof)"
    if "predicted" in record:
        bounds, before = prediction(record)
        said += f"; predicted {span(bounds)}" + (f" (before the change {span(before)})" if before else "")
    return said + f"  [{record['config']}]"


def prediction(record: dict[str, Any]) -> tuple[Any, Any]:
    """Bounds of the time predicted for a kernel, and of its time before the change, or None each.

    Older records have two predictions in these places: of the code before a change, and after it.
    """
    if record.get("after"):
        return record["after"], record["predicted"]
    before = record.get("before_ms")
    return record.get("predicted"), before and (before, before)


def span(bounds: Any) -> str:
    """0.65-0.80, or 0.005 where both are that."""
    return "-".join(dict.fromkeys(f"{ms:.2f}" if ms >= 0.01 else f"{ms:.3f}" for ms in bounds))


def _alternative(record: dict[str, Any], references: Any, ceilings: Any) -> str:
    ratio = record["other_ms"] / record["entry_ms"]
    better = "the entry is faster" if ratio > 1 else "THE OTHER IS FASTER"
    better = "no difference" if abs(ratio - 1) < NOISE else better
    entry, other = (f"{record[name]} {record[f'{name}_ms']:.4g} ms" for name in ("entry", "other"))
    return f"entry {entry}, other {other}: {ratio:.2f}x its time (predicted {record['predicted']:.2f}x), {better}"


def _figure(
    record: dict[str, Any], references: dict[tuple[str, str, str], dict[str, Any]], ceilings: dict[str, float] | None
) -> str:
    parts = [f"{name} {record[name]['median']:.4g}" for name in ("forward", "backward", "both") if name in record]
    said = " ".join(parts) + " ms"
    reference = references.get((record["case"], record["dtype"], record["mode"]))
    if reference is not None and reference["provider"] != record["provider"]:
        said += f", {reference['both']['median'] / record['both']['median']:.2f}x {reference['provider']}"
    share = share_of_roof(record, "both", ceilings) if ceilings and record["dtype"] in DTYPES else None
    if share is not None:
        said += f", {share:.0%} of the roof"
    if "above_mib" in record:
        said += f", above {record['above_mib']:.0f} MiB"
    return said + f"; first call {record['first_call_s']} s, {record['compiled']} kernels"


_SAID = {
    "ceilings": _ceilings, "exact": _exact, "kernels": _kernels, "alternative": _alternative, "figure": _figure,
    "step": step_line, "largest": largest_line,
}  # fmt: skip
