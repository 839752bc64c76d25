"""The training step in lines and tables."""

from collections.abc import Sequence
from typing import Any

from ..providers import RELEASED
from ..results import of_kind
from ..tables import markdown, milliseconds

__all__ = ["largest_line", "step_line", "step_tables"]

ABOUT = """CLIP ViT-B/16 with random weights, images of 384 x 128, captions of 77 tokens, ID + IRR + A-SDM + EFA, Adam;
bfloat16 autocast, float32 weights; no data loading, no masks. *losses*: forward and backward of heads and losses, part
of both passes. *released formulation*: the same equations and heads in the way released code computes them.
*(unchecked)*: there was nothing to compare values and gradients with. *peak*, *reserved*: GiB of tensors with weights
and optimizer, and what PyTorch's allocator took for them."""
CARDS = """The largest batch of which two steps fit, in steps of 16 pairs, where PyTorch's allocator gets no more than
*limit* GiB: what the driver of such a card shows, less one GiB for the CUDA context."""


def step_line(record: dict[str, Any], references: dict[tuple[str, str, str], dict[str, Any]], ceilings: Any) -> str:
    parts = ", ".join(f"{name} {record[name]['median']:.4g}" for name in ("forward", "backward", "optimizer"))
    said = f"{record['step']['median']:.4g} ms a step ({parts}), {record['losses']['median']:.4g} of it losses"
    baseline = references.get((record["case"], record["dtype"], "eager"))
    if baseline is not None and baseline["provider"] != record["provider"]:
        said += (
            f"; {_times(baseline, record, 'step')} {baseline['provider']}, losses {_times(baseline, record, 'losses')}"
        )
    said += f"; peak {record['peak_gib']} GiB, reserved {record['reserved_gib']}"
    return said + f"; first step {record['first_call_s']} s, {record['compiled']} kernels"


def largest_line(record: dict[str, Any], references: Any, ceilings: Any) -> str:
    said = f"{_pairs(record)} pairs a batch"
    if "peak_gib" in record:
        said += f", peak {record['peak_gib']} GiB, reserved {record['reserved_gib']} of {record['limit_gib']:.0f}"
    return said + f"; {record['tried']} sizes tried"


def step_tables(result: dict[str, Any]) -> str:
    steps, batches = of_kind(result, "step"), of_kind(result, "largest")
    parts = [ABOUT, _step_table(steps)] if steps else []
    return "\n\n".join(parts + ([CARDS, _batch_table(batches)] if batches else []))


def _step_table(steps: Sequence[dict[str, Any]]) -> str:
    head = (
        "step", "losses", "step ms", "speed-up", "forward", "backward", "optimizer", "losses ms", "speed-up", "peak",
        "reserved",
    )  # fmt: skip
    baselines = {row["case"]: row for row in steps if row["status"] == "ok" and row["provider"] == RELEASED}
    rows = []
    for row in steps:
        if row["status"] != "ok":
            rows.append((row["case"], row["provider"], row["status"], *["-"] * (len(head) - 3)))
            continue
        baseline = baselines.get(row["case"])
        gains = ["-" if baseline in (None, row) else _times(baseline, row, name) for name in ("step", "losses")]
        unchecked = "" if row.get("checked") or row["provider"] == RELEASED else " (unchecked)"
        times = {name: milliseconds(row, name) for name in ("step", "forward", "backward", "optimizer", "losses")}
        rows.append(
            (row["case"], row["provider"] + unchecked, times["step"], gains[0], times["forward"], times["backward"],
             times["optimizer"], times["losses"], gains[1], f"{row['peak_gib']:.2f}", f"{row['reserved_gib']:.2f}")
        )  # fmt: skip
    return markdown(head, rows)


def _batch_table(batches: Sequence[dict[str, Any]]) -> str:
    head = ("card", "losses", "largest batch", "peak", "reserved", "limit")
    rows = []
    for row in batches:
        card = f"{row['card_gb']} GB"
        if row["status"] != "ok":
            rows.append((card, row["provider"], row["status"], "-", "-", "-"))
            continue
        memory = [f"{row[name]:.2f}" if name in row else "-" for name in ("peak_gib", "reserved_gib", "limit_gib")]
        rows.append((card, row["provider"], _pairs(row), *memory))
    return markdown(head, rows)


def _pairs(record: dict[str, Any]) -> str:
    """144; or what is known of a batch that was not looked for any further."""
    if record["at_least"]:
        return f"{record['largest']} or more"
    return str(record["largest"]) if record["largest"] else f"fewer than {record['unit']}"


def _times(baseline: Any, row: dict[str, Any], name: str) -> str:
    """1.50x as fast; below 1x is a loss."""
    return f"{baseline[name]['median'] / row[name]['median']:.2f}x"
