"""What a step launches, compiles, moves and allocates stays within its limits; and the table says where it does not."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel for this platform")

from benchmarks import launches

ROOT = Path(__file__).parents[2]


def test_the_command(tmp_path):
    """Once, in a process that has interpreted no kernel. One test: pytest-xdist would run a fixture on each worker."""
    page = tmp_path / "launches.md"
    command = [sys.executable, "-m", "benchmarks", "launches", "--json", "--out", str(page)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stdout, run.stderr[-4000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    every_step_is_counted(rows)
    exceeded = {tuple(row[what] for what in ("loss", "masks", "dtype", "B", "L", "D")): row["exceeded"]
                for row in rows if row["exceeded"]}  # fmt: skip
    assert exceeded == {}
    assert run.returncode == 0
    assert page.read_text() == (ROOT / "docs" / "launches.md").read_text(), run.stderr[-4000:]


def every_step_is_counted(rows):
    wide = {(row["loss"], row["masks"], row["dtype"]) for row in rows if row["D"] == launches.WIDE}
    assert wide == launches.GATES.keys()
    rows = [row for row in rows if row["D"] == launches.D]
    steps = {(row["loss"], row["masks"], row["dtype"], row["B"], row["L"]) for row in rows}
    assert len(steps) == len(rows)
    for loss, choices in launches.MASKS.items():
        for masks in choices:
            for dtype in launches.DTYPES:
                assert {(loss, masks, dtype, B, launches.L) for B in (64, 128, 37, 1)} <= steps
    for masks in launches.MASKS["efa"]:
        assert {row["L"] for row in rows if row["loss"] == "efa" and row["masks"] == masks} == {77, 64, 50, 33, 16, 12}
    assert all(row["triton"] >= 2 and row["launches"] == row["triton"] + row["torch"] for row in rows)
    assert all(row["kernels"] >= 2 for row in rows if row["first"] and row["L"] == 77)


def test_a_figure_over_its_limit_is_named_and_bold():
    limit = launches.LIMITS["efa", launches.TEXT, "bf16"]
    fits = launches.Row(
        "efa", launches.TEXT, "bf16", 128, 77, launches.D, first=True, triton=10, torch=limit.launches - 10,
        kernels=limit.kernels, moved=limit.moved, buffers=limit.buffers, allocated=limit.allocated, peak=limit.peak,
        waits=0,
    )  # fmt: skip
    assert fits.exceeded == []
    assert "**" not in launches.table([fits])
    assert replace(fits, first=False).exceeded == [f"kernels {limit.kernels} > 0"]
    assert replace(fits, L=12).exceeded == [f"kernels {limit.kernels} > 0"]  # a text mask has compiled both classes
    short = launches.LIMITS["efa", launches.NO_MASK, "bf16"].other
    unmasked = replace(fits, masks=launches.NO_MASK, L=12, torch=0, moved=0, buffers=0, allocated=0, peak=0)
    assert replace(unmasked, kernels=short).exceeded == []
    assert replace(unmasked, kernels=short + 1).exceeded == [f"kernels {short + 1} > {short}"]
    for change in ({"torch": limit.launches}, {"moved": 1e6}, {"buffers": 10**4}, {"allocated": 1e6}, {"peak": 1e6}):
        row = replace(fits, **change)
        assert len(row.exceeded) == 1
        assert launches.table([row]).count("**") == 2
    half = replace(fits, B=64, moved=limit.moved + 0.01)  # half of the batch has half of the bytes
    assert [why.split()[0] for why in half.exceeded] == ["moved", "allocated", "peak"]
    assert replace(fits, waits=1).exceeded == ["waits 1 > 0"]


def test_a_short_batch_compiles_nothing_under_a_text_mask():
    assert all(
        limit.other == 0 for (_, masks, _), limit in launches.LIMITS.items() if masks in (launches.TEXT, launches.BOTH)
    )


def test_a_step_at_the_papers_width_is_held_to_the_targets():
    """40 launches, 60 with masks, 4 of A-SDM; 0.3 GB moved by torch; 60 MiB of memory in bfloat16."""
    row = launches.Row(
        "efa", launches.NO_MASK, "bf16", 128, 77, launches.WIDE, first=True, triton=15, torch=25, kernels=99, moved=300,
        buffers=10**6, allocated=1e6, peak=62.9, waits=0,
    )  # fmt: skip
    assert row.exceeded == []
    assert replace(row, torch=26).exceeded == ["launches 41 > 40"]
    assert replace(row, moved=301).exceeded == ["moved 301 > 300.0"]
    assert replace(row, peak=63).exceeded == ["peak 63 > 62.91"]
    assert replace(row, waits=1).exceeded == ["waits 1 > 0"]
    assert launches.table([replace(row, moved=301)]).count("**") == 2
    masked = replace(row, masks=launches.BOTH, torch=45, peak=1e6)  # memory is held without masks alone
    assert masked.exceeded == []
    assert replace(masked, triton=16).exceeded == ["launches 61 > 60"]
    assert replace(row, loss="asdm", torch=0, triton=5, moved=1e6).exceeded == ["launches 5 > 4"]
