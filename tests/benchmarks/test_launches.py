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


@pytest.fixture(scope="module")
def run():
    """The command, once, in a process that has not interpreted a kernel."""
    command = [sys.executable, "-m", "benchmarks", "launches", "--json"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def rows(run):
    assert run.stdout, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_step_is_counted(rows):
    steps = {(row["loss"], row["masks"], row["dtype"], row["B"], row["L"]) for row in rows}
    assert len(steps) == len(rows)
    for loss, choices in launches.MASKS.items():
        for masks in choices:
            for dtype in launches.DTYPES:
                assert {(loss, masks, dtype, B, launches.L) for B in (64, 128, 37, 1)} <= steps
    for masks in launches.MASKS["efa"]:
        assert {row["L"] for row in rows if row["loss"] == "efa" and row["masks"] == masks} == {77, 64, 50, 33, 16, 12}
    assert all(row["triton"] >= 3 and row["launches"] == row["triton"] + row["torch"] for row in rows)
    assert all(row["kernels"] >= 3 for row in rows if row["first"] and row["L"] == 77)


def test_no_figure_exceeds_its_limit(run, rows):
    exceeded = {f"{row['loss']}, {row['masks']}, {row['dtype']}, B {row['B']}, L {row['L']}": row["exceeded"]
                for row in rows if row["exceeded"]}  # fmt: skip
    assert exceeded == {}
    assert run.returncode == 0


def test_a_figure_over_its_limit_is_named_and_bold():
    limit = launches.LIMITS["efa", launches.TEXT, "bf16"]
    fits = launches.Row(
        "efa", launches.TEXT, "bf16", 128, 77, first=True, triton=10, torch=limit.launches - 10, kernels=limit.kernels,
        moved=limit.moved, buffers=limit.buffers, allocated=limit.allocated, peak=limit.peak, waits=0,
    )  # fmt: skip
    assert fits.exceeded == []
    assert "**" not in launches.table([fits])
    assert replace(fits, first=False).exceeded == [f"kernels {limit.kernels} > 0"]
    assert replace(fits, L=12).exceeded == [f"kernels {limit.kernels} > 0"]  # a text mask has compiled both classes
    assert (
        replace(
            fits, masks=launches.NO_MASK, L=12, torch=0, moved=0, buffers=0, allocated=0, peak=0, kernels=2
        ).exceeded
        == []
    )
    for change in ({"torch": limit.launches}, {"moved": 1e6}, {"buffers": 10**4}, {"allocated": 1e6}, {"peak": 1e6}):
        row = replace(fits, **change)
        assert len(row.exceeded) == 1
        assert launches.table([row]).count("**") == 2
    half = replace(fits, B=64)  # half of the batch has half of the bytes
    assert [why.split()[0] for why in half.exceeded] == ["moved", "allocated", "peak"]
    assert replace(fits, waits=1).exceeded == ["waits 1 > 0"]


def test_limits_that_the_losses_promise():
    """120 launches a step of EFA, 150 with masks, 6 of A-SDM; a short batch compiles nothing under a text mask."""
    most = {}
    for (loss, masks, _), limit in launches.LIMITS.items():
        most[loss, masks] = max(limit.launches, most.get((loss, masks), 0))
    assert most["asdm", launches.NO_MASK] <= 6
    assert most["efa", launches.NO_MASK] <= 120
    assert max(most["efa", masks] for masks in (launches.TEXT, launches.IMAGE, launches.BOTH)) <= 150
    assert all(
        limit.short == 0 for (_, masks, _), limit in launches.LIMITS.items() if masks in (launches.TEXT, launches.BOTH)
    )


def test_the_page_is_what_the_command_writes(tmp_path):
    page = tmp_path / "launches.md"
    command = [sys.executable, "-m", "benchmarks", "launches", "--out", str(page)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert page.read_text() == (ROOT / "docs" / "launches.md").read_text()
