"""The picture of a step has every launch that `launches` counts, in order, and the bytes of both."""

import pytest

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel for this platform")
pytest.importorskip("matplotlib", reason="the picture needs matplotlib")

from benchmarks import launches, results, step_picture

RECORDS = [
    {"part": "forward", "kernel": "mul", "file": "torch", "launches": 2, "bytes": 3 * 10**9},
    {"part": "forward", "kernel": "_match_kernel", "file": "match", "launches": 1, "bytes": 10**9},
    {"part": "backward", "kernel": "_de_kernel", "file": "hard_similarity", "launches": 1, "bytes": 0},
]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, triton 3.9 warns
        yield


def test_a_step_is_counted_as_launches_counts_it():
    records, row = step_picture.count(), launches.wide_step("efa", launches.NO_MASK, "bf16")
    number, moved, by_torch = step_picture.totals(records)
    assert number == row.launches
    assert 1e3 * by_torch == pytest.approx(row.moved, abs=0.01)
    assert moved > by_torch
    parts = [record["part"] for record in records]
    assert parts == sorted(parts, reverse=True)
    names = [record["kernel"] for record in records if record["file"] != "torch"]
    assert len(names) == row.triton
    assert names.index("_match_kernel") > names.index("_forward_kernel")


def test_totals_and_families():
    assert step_picture.totals(RECORDS) == (4, 4.0, 3.0)
    assert [step_picture.family(record) for record in RECORDS] == [
        step_picture.TORCH, "match and pooling", "gradient of the match",
    ]  # fmt: skip
    assert step_picture.family({"file": "new", "kernel": "_new_kernel"}) == "other kernels"
    assert {family for _, family in step_picture.FAMILIES} < step_picture.COLORS.keys()


def test_every_launch_has_a_bar():
    figure = step_picture.draw({"Before": RECORDS, "After": RECORDS[1:]})
    before, after = figure.axes
    assert (
        before.get_title(loc="left") == "Before: 4 launches, 4.00 GB moved, 3.00 GB of it by torch between the kernels"
    )
    assert [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in before.patches] == [
        (0, 2, 1500), (2, 1, 1000), (3, 1, 60),
    ]  # fmt: skip
    assert [text.get_text() for text in after.texts][:2] == ["match", "de"]


def test_the_command_writes_what_it_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_picture, "count", lambda: RECORDS)
    assert step_picture.main(["--record", str(tmp_path / "before.json")]) == 0
    assert results.read(tmp_path / "before.json")["records"] == RECORDS
    assert results.read(step_picture.BEFORE)["kind"] == "step"
    assert step_picture.main(["--after", str(tmp_path / "after.json"), "--out", str(tmp_path / "p" / "step.png")]) == 0
    assert (tmp_path / "p" / "step.png").stat().st_size > 10_000
    assert "4 launches, 4.00 GB moved, 3.00 of it by torch" in capsys.readouterr().out
