"""The host's time of a step is measured of ours and of the reference, whatever it is."""

import pytest
import torch

pytest.importorskip("triton", reason="the stand-in for a GPU is Triton's")

from benchmarks import host, results


@pytest.fixture(autouse=True)
def _fusion(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, triton 3.9 warns


def test_the_command_writes_what_it_measured(tmp_path):
    threads = torch.get_num_threads()
    assert host.main(["--steps", "1", "--out", str(tmp_path / "host.json")]) == 0
    assert torch.get_num_threads() == threads
    result = results.read(tmp_path / "host.json")
    assert {(row["op"], row["provider"]) for row in result["records"]} == {
        (op, provider) for op in ("asdm", "efa") for provider in host.PROVIDERS
    }
    for row in result["records"]:
        assert 0 < row["minimum"] <= row["median"]
        assert row["steps"] >= 1
        # Only ours launches kernels of Triton, and fewer of all kinds.
        assert (row["triton"] > 0) == (row["provider"] == host.TRITON)
        assert row["launches"] >= row["triton"]
    launches = {(row["op"], row["provider"]): row["launches"] for row in result["records"]}
    for op in ("asdm", "efa"):
        assert launches[op, host.TRITON] < launches[op, host.REFERENCE]
