"""One EFA step as a picture: every launch in its order, and the bytes that it moves, before and after.

    python -m benchmarks step-picture                       # counts the step, and draws it beside step_before.json
    python -m benchmarks step-picture --record FILE         # counts it into a file, and draws nothing

The paper's sizes, bfloat16, no mask, forward and backward, on the stand-in of `benchmarks/stand_in`. A launch of Triton
moves its tensors at least once, so that is what is counted; an operator of torch moves what it reads and writes.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fmfa_losses.kernels import _launch

from fmfa_losses.functional import efa_loss

from . import ROOT, results, stand_in
from .products import call_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLORS", "count", "draw", "family", "main", "totals"]

B, L, N, D = 128, 77, 192, 512
BEFORE, AFTER = ROOT / "benchmarks/results/step_before.json", ROOT / "benchmarks/results/step.json"
PICTURE = ROOT / "docs/kernels/step.png"
TORCH = "torch operators"
# Of Okabe and Ito: told apart without red and green.
COLORS = {
    TORCH: "#999999",
    "normalisation": "#56B4E9",
    "aggregation": "#E69F00",
    "match and pooling": "#0072B2",
    "gradient of the match": "#D55E00",
    "ranking": "#009E73",
    "other kernels": "#000000",
}
# The first that fits a kernel's file and name.
FAMILIES = (
    ("aggregation", "aggregation"),
    ("ranking", "ranking"),
    ("unit_rows", "normalisation"),
    ("_prepare_", "normalisation"),
    ("gradient", "gradient of the match"),
    ("winner", "gradient of the match"),
    ("_dx_", "gradient of the match"),
    ("_de_", "gradient of the match"),
    ("match", "match and pooling"),
    ("pool", "match and pooling"),
    ("hard_similarity", "match and pooling"),
)


class _Noting(list[Any]):
    """A list that says what it gets, and when."""

    def __init__(self, note: Callable[[Any], None]) -> None:
        super().__init__()
        self.note = note

    def append(self, item: Any) -> None:
        super().append(item)
        self.note(item)


def count() -> list[dict[str, Any]]:
    """One record for each launch of Triton and each operator of torch, in order."""
    records: list[dict[str, Any]] = []
    part = "forward"

    def triton(launch: Any) -> None:
        kernel = call_of(launch)
        tensors = {a.data_ptr(): a.numel() * a.element_size() for a in kernel.arguments.values()
                   if isinstance(a, torch.Tensor)}  # fmt: skip
        where = launch.kernel.__module__.rpartition(".")[2]
        moved = sum(tensors.values())
        records.append({"part": part, "kernel": kernel.name, "file": where, "launches": 1, "bytes": moved})

    def operator(found: stand_in.Operator) -> None:
        if found.kernels:
            row = {"kernel": found.name, "file": "torch", "launches": found.kernels, "bytes": found.moved}
            records.append({"part": part, **row})

    leaves = [torch.ones(shape, dtype=torch.bfloat16).requires_grad_() for shape in ((B, N, D), (B, L, D))]
    with stand_in.gpu() as device, device.step() as step, _launch.recording("sm_90"):
        _launch._Recorder.launches, step.operators = _Noting(triton), _Noting(operator)
        loss = efa_loss(*leaves, backend="triton")
        part = "backward"
        torch.autograd.grad(loss, leaves)
    return records


def family(record: dict[str, Any]) -> str:
    if record["file"] == "torch":
        return TORCH
    name = f"{record['file']}.{record['kernel']}"
    return next((family for word, family in FAMILIES if word in name), "other kernels")


def totals(records: list[dict[str, Any]]) -> tuple[int, float, float]:
    """Launches; gigabytes of all, and of torch alone."""
    moved = sum(record["bytes"] for record in records) / 1e9
    by_torch = sum(record["bytes"] for record in records if record["file"] == "torch") / 1e9
    return sum(record["launches"] for record in records), moved, by_torch


def draw(steps: dict[str, list[dict[str, Any]]]) -> "Figure":
    """A panel for each step: a bar for each launch, as high as the megabytes that it moves."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(10, 1.1 + 2.5 * len(steps)), layout="constrained")
    panels = figure.subplots(len(steps), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    most = max(record["bytes"] / record["launches"] for records in steps.values() for record in records) / 1e6
    for axes, (name, records) in zip(panels, steps.items(), strict=True):
        _panel(axes, name, records, most / 25)
    panels[0].set_ylim(0, 1.6 * most)  # room for the names
    panels[0].set_xlim(0, max(totals(records)[0] for records in steps.values()) + 1)
    panels[-1].set_xlabel("launches, in their order")
    shown = {family(record) for records in steps.values() for record in records}
    handles = [Patch(color=color, label=name) for name, color in COLORS.items() if name in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"One EFA step: B {B}, {L} tokens, {N} patches, width {D}, bfloat16", fontsize=11)
    return figure


def _panel(axes: "Axes", name: str, records: list[dict[str, Any]], least: float) -> None:
    """`least` megabytes high is every bar: what moves next to nothing is still a launch."""
    launches, moved, by_torch = totals(records)
    title = f"{name}: {launches} launches, {moved:.2f} GB moved, {by_torch:.2f} GB of it by torch between the kernels"
    axes.set_title(title, fontsize=10, loc="left")
    at = 0
    for record in records:
        height = max(record["bytes"] / record["launches"] / 1e6, least)
        axes.bar(at, height, width=record["launches"], align="edge", color=COLORS[family(record)],
                 edgecolor="white", linewidth=0.4)  # fmt: skip
        if record["file"] != "torch":
            label = record["kernel"].strip("_").removesuffix("_kernel").replace("_", " ")
            axes.annotate(label, (at + record["launches"] / 2, height), xytext=(0, 3), textcoords="offset points",
                          rotation=90, ha="center", va="bottom", fontsize=8)  # fmt: skip
        at += record["launches"]
    middle = sum(record["launches"] for record in records if record["part"] == "forward")
    axes.axvline(middle, color="black", linewidth=1, linestyle="--")
    for word, x, side in (("forward ", middle, "right"), (" backward", middle, "left")):
        axes.text(x, 0.98, word, transform=axes.get_xaxis_transform(), ha=side, va="top", fontsize=9, style="italic")
    axes.set_ylabel("MB moved")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks step-picture", description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, metavar="FILE", help="count into this file, and draw nothing")
    parser.add_argument("--before", type=Path, default=BEFORE, metavar="FILE")
    parser.add_argument("--after", type=Path, default=AFTER, metavar="FILE", help="where the count of now goes")
    parser.add_argument("--out", type=Path, default=PICTURE, metavar="FILE")
    options = parser.parse_args(argv)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what triton does where nothing is set, without its warning
    records, path = count(), options.record or options.after
    command = "python -m benchmarks step-picture" + (f" --record {path}" if options.record else "")
    results.write(path, results.head("step", command) | {"records": records})
    print("{}: {} launches, {:.2f} GB moved, {:.2f} of it by torch".format(path, *totals(records)))
    if not options.record:
        figure = draw({"Before": results.read(options.before)["records"], "After": records})
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.out, dpi=120)
        print(f"written to {options.out}")
    return 0
