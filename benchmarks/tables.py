"""Measurements as Markdown tables."""

from collections.abc import Sequence
from typing import Any

from .peers import FORWARD_ONLY, PRODUCT

__all__ = ["markdown", "micro_table", "micro_tables", "milliseconds", "number", "speedup", "target_table"]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up in plain text too; all but the first two are numbers."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    return "\n".join([line(head), line(rule), *map(line, rows)])


def milliseconds(row: dict[str, Any], key: str) -> str:
    """`12.3 (12.1-13.0)`: median, 20th to 80th percentile."""
    if key not in row:
        return "-"
    return "{} ({}-{})".format(*(number(row[key][q]) for q in ("median", "p20", "p80")))


def number(value: float) -> str:
    """Three figures, no exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def speedup(row: dict[str, Any], baseline: dict[str, Any] | None) -> str:
    """How many times faster than the first provider of the same case; below 1 where it lost."""
    if baseline is None or baseline is row or row["provider"] == PRODUCT:
        return "-"
    key = "both" if "both" in row else "forward"
    return f"{baseline[key]['median'] / row[key]['median']:.2f}x"


def micro_tables(measurements: Sequence[dict[str, Any]], rate: float | None = None) -> str:
    """All measurements, and the match beside one plain product; `rate` of torch.mm in 10^9 operations a second."""
    return "\n\n".join(part for part in (micro_table(measurements, rate), product_table(measurements)) if part)


def micro_table(measurements: Sequence[dict[str, Any]], rate: float | None = None) -> str:
    head = ["case", "provider", "forward ms", "backward ms", "both ms", "speed-up", "process MiB", "above inputs MiB"]
    head += ["of torch.mm"] if rate else []
    rows, baseline = [], None
    for row in measurements:
        if row["status"] != "ok":
            rows.append([row["case"], row["provider"], row["status"], *["-"] * (len(head) - 3)])
            continue
        if baseline is None or baseline["case"] != row["case"]:
            baseline = row
        times = [milliseconds(row, key) for key in ("forward", "backward", "both")]
        if row["provider"] in FORWARD_ONLY:
            times[1:] = ["has none", "-"]
        memory = [str(row["process_mib"]), str(row["above_inputs_mib"])]
        rows.append([row["case"], row["provider"], *times, speedup(row, baseline), *memory])
        if rate:
            shares = [share_of_rate(row, key, rate) for key in ("forward", "both")]
            rows[-1].append(" / ".join(shares if shares != ["-", "-"] else ["-"]))
    return markdown(head, rows)


def share_of_rate(row: dict[str, Any], key: str, rate: float) -> str:
    """`62 %`: the time in which torch.mm would do the operations that a pass needs, over its time."""
    if key not in row or "gflop" not in row:
        return "-"
    return f"{100 * row['gflop'][key] / rate / (row[key]['median'] / 1e3):.0f} %"


def product_table(measurements: Sequence[dict[str, Any]]) -> str:
    """Forward passes over the time of one product of the same size; nothing where none was measured."""
    products = {row["case"]: row for row in measurements if row["status"] == "ok" and row["provider"] == PRODUCT}
    rows = []
    for row in measurements:
        product = products.get(row["case"])
        if product is None or product is row or row["status"] != "ok":
            continue
        times = [row["forward"]["median"], product["forward"]["median"]]
        rows.append([row["case"], row["provider"], *map(number, times), f"{100 * times[1] / times[0]:.0f} %"])
    return markdown(("case", "provider", "forward ms", f"{PRODUCT} ms", "its share"), rows) if rows else ""


def target_table(targets: Sequence[dict[str, Any]]) -> str:
    verdict = {True: "met", False: "missed", None: "not measured"}
    rows = [(entry["goal"], verdict[entry["met"]], entry["measured"]) for entry in targets]
    if not any("predicted" in entry for entry in targets):
        return markdown(("target", "verdict", "measured"), rows)
    rows = [(*row, entry.get("predicted", "-")) for row, entry in zip(rows, targets, strict=True)]
    return markdown(("target: a goal", "verdict", "measured", "predicted"), rows)
