"""The records of a GPU run as Markdown tables."""

from collections.abc import Sequence
from typing import Any

from ..providers import REFERENCE, TRITON
from ..results import ceilings_of, of_kind
from ..tables import markdown, milliseconds, number, speedup, target_table
from .device_tests import FILES
from .lines import least_ms, prediction, span
from .roofline import share_of_roof
from .step_report import step_tables
from .targets import gpu_targets

__all__ = ["gpu_report", "gpu_tables"]


def gpu_report(result: dict[str, Any]) -> str:
    """All of a GPU run: figures, verdicts, single kernels, alternatives, exactness, tests."""
    figures = of_kind(result, "figure")
    parts = [gpu_tables(result)]
    parts += [target_table(gpu_targets(figures, ceilings_of(result)))] if figures else []
    for title, table in (
        ("The whole training step", step_tables),
        ("Each kernel alone", _kernel_table),
        ("Entries of the block tables", _alternative_table),
        ("Against float64", _exact_table),
        ("tests/gpu", _test_list),
    ):
        text = table(result)
        parts += [f"### {title}", text] if text else []
    return "\n\n".join(part for part in parts if part)


def gpu_tables(result: dict[str, Any]) -> str:
    """Ceilings, one table of what was measured, and a list of what was not."""
    parts, ceilings, figures = [], ceilings_of(result), of_kind(result, "figure")
    if result.get("dry_run"):
        parts.append(
            "**A dry run at toy sizes on the CPU: no time here means anything. Figures of the kernels, fmfa-losses "
            "(triton), are those of the torch path.**"
        )
    if ceilings:
        rates = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in ceilings.items() if name != "copy")
        parts.append(f"Ceilings: copy {ceilings['copy'] / 1e12:.2f} TB/s; large product in TFLOP/s: {rates}.")
    measured = [row for row in figures if row["status"] == "ok"]
    if measured:
        parts.append(_gpu_table(measured, ceilings, outcomes(of_kind(result, "tests"))))
    others = [row for row in figures if row["status"] != "ok"]
    if others:
        parts.append(
            "Without a figure:\n\n"
            + "\n".join(
                f"- {row['case']}, {row['dtype']}, {row['provider']}, {row['mode']}: {row['status']}" for row in others
            )
        )
    return "\n\n".join(parts)


def outcomes(tests: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Of the kernels of each operation, from the tests that speak for it: `34 of 36 passed`, skipped ones aside."""
    found = {}
    for file, ops in FILES.items():
        own = [test["outcome"] for test in tests if file in test.get("test", "") and test["outcome"] != "skipped"]
        if own:
            found |= dict.fromkeys(ops, f"{own.count('passed')} of {len(own)}")
    return found


def _gpu_table(rows: Sequence[dict[str, Any]], ceilings: dict[str, float] | None, tests: dict[str, str]) -> str:
    head = (
        "case", "provider", "mode", "dtype", "forward ms", "backward ms", "both ms", "speed-up", "roof", "above MiB",
        "first call s", "tests",
    )  # fmt: skip
    key = lambda row: (row["case"], row["dtype"], row["mode"])  # noqa: E731
    order = {key(row): i for i, row in reversed(list(enumerate(rows)))}
    table = []
    for row in sorted(rows, key=lambda row: order[key(row)]):
        first = rows[order[key(row)]]
        baseline = first if first["provider"] == REFERENCE else None
        share = share_of_roof(row, "both", ceilings) if ceilings else None
        times = [milliseconds(row, name) for name in ("forward", "backward", "both")]
        roof = "-" if share is None else f"{share:.0%}"
        provider = row["provider"] + ("" if row.get("checked") or row["provider"] == REFERENCE else " (unchecked)")
        memory = f"{row['above_mib']:.0f}" if "above_mib" in row else "-"
        passed = tests.get(row["op"], "-") if row["provider"] == TRITON else "-"
        table.append(
            (row["case"], provider, row["mode"], row["dtype"], *times, speedup(row, baseline), roof, memory,
             f"{row['first_call_s']:.1f}", passed)
        )  # fmt: skip
    return markdown(head, table)


def _kernel_table(result: dict[str, Any]) -> str:
    head = (
        "case", "kernel", "dtype", "launches", "ms", "predicted ms", "before the change", "GFLOP", "MB", "least ms",
        "roof", "blocks",
    )  # fmt: skip
    rows = []
    for row in of_kind(result, "kernels"):
        if row["status"] != "ok":
            rows.append((row["case"], row.get("kernel", "all"), row["dtype"], "-", row["status"], *["-"] * 7))
            continue
        least = least_ms(row, ceilings_of(result))
        spans = [span(bounds) if bounds else "-" for bounds in prediction(row)]
        rows.append(
            (row["case"], row["kernel"].strip("_"), row["dtype"], str(row["launches"]), milliseconds(row, "ms"), *spans,
             f"{row['flops'] / 1e9:.3g}", f"{row['bytes'] / 1e6:.3g}", "-" if least is None else number(least),
             "-" if least is None else f"{least / row['ms']['median']:.0%}", row["config"])
        )  # fmt: skip
    return markdown(head, rows) if rows else ""


def _alternative_table(result: dict[str, Any]) -> str:
    head = ("table", "case", "entry", "ms", "other", "ms", "other / entry", "predicted")
    rows = []
    for row in of_kind(result, "alternative"):
        if row["status"] != "ok":
            rows.append((row["table"], row["case"], row["status"], *["-"] * 5))
            continue
        ratio = row["other_ms"] / row["entry_ms"]
        rows.append(
            (row["table"], row["case"], str(row["entry"]), number(row["entry_ms"]), str(row["other"]),
             number(row["other_ms"]), f"{ratio:.2f}x", f"{row['predicted']:.2f}x")
        )  # fmt: skip
    return markdown(head, rows) if rows else ""


def _exact_table(result: dict[str, Any]) -> str:
    rows = []
    for row in of_kind(result, "exact"):
        errors = [f"{name} {error:.1e} of {row['budgets'][name]:.1e}" for name, error in row.get("errors", {}).items()]
        rows.append((row["case"], row["status"], row["dtype"], "; ".join(errors) or "-"))
    return markdown(("case", "outcome", "dtype", "error of its budget"), rows) if rows else ""


def _test_list(result: dict[str, Any]) -> str:
    rows = of_kind(result, "tests")
    tests, ends = [row for row in rows if "test" in row], [row for row in rows if "test" not in row]
    counts = {outcome: sum(row["outcome"] == outcome for row in tests) for outcome in {row["outcome"] for row in tests}}
    parts = [", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))] if tests else []
    parts += [f"- {row['summary'] if row['status'] == 'ok' else row['status']}" for row in ends]
    wrong = [row for row in tests if row["outcome"] in ("failed", "error")]
    parts += [f"- {row['test']}: {row['outcome']}: {row.get('why', '')}" for row in wrong]
    return "\n".join(parts)
