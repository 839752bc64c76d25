"""Other packages of MaxSim in `benchmarks micro`: the same values as the reference, or a row that says why not."""

import importlib.util
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import micro, providers
from benchmarks.cases import Case, inputs, work
from benchmarks.measure import disagreement, measure_cpu
from benchmarks.peers import COMPILED_MAXSIM, CPU_PEERS, FORWARD_ONLY, PRODUCT, prepared
from benchmarks.providers import AUTOTUNED, REFERENCE, TORCH
from benchmarks.tables import micro_table, micro_tables
from benchmarks.targets import micro_targets

PACKAGES = {
    "late-interaction-kernels": """
        import torch
        maxsim = None  # what needs Triton and a device
        class MaxSimScorer(torch.nn.Module):
            def __init__(self, *, normalize=True, backward="auto", mask_pad_token=None):
                super().__init__()
                assert not normalize
            def forward(self, Q, D, q_mask=None, d_mask=None):
                best = torch.einsum("ild,jkd->ijlk", Q, D).amax(-1)
                return (best if q_mask is None else best * q_mask[:, None]).sum(-1)
    """,
    **dict.fromkeys(
        COMPILED_MAXSIM,
        """
        import numpy as np
        def maxsim_scores(query, docs):
            assert query.dtype == docs.dtype == np.float32
            assert query.flags.c_contiguous and docs.flags.c_contiguous
            assert np.allclose(np.linalg.norm(docs, axis=-1), 1, atol=1e-5)
            return (query @ docs.swapaxes(1, 2)).max(axis=2).sum(axis=1)
    """,
    ),
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The peers' interfaces on a CPU, as they publish them, unless they are installed."""
    sources = {name.replace("-", "_"): source for name, source in PACKAGES.items()}
    missing = [module for module in sources if importlib.util.find_spec(module) is None]
    for module in missing:
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(sources[module]))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for module in missing:
        sys.modules.pop(module, None)


@pytest.mark.parametrize("mean_length", [None, 3])
def test_peers_compute_what_the_reference_does(packages, mean_length):
    for case in (
        Case("maxsim", 4, L=5, N=6, D=64, images=3, mean_length=mean_length),
        Case("maxsim", 3, L=5, N=6, D=8),
    ):
        for shape in (case, replace(case, gradients=False)):
            rows = []
            for name in (REFERENCE, *CPU_PEERS):
                if shape.gradients and name in FORWARD_ONLY:
                    continue
                assert providers.why_not(name, "cpu") is None
                arguments = prepared(name, inputs(shape))
                rows.append(measure_cpu(providers.provider(name, "maxsim"), arguments, seconds=0) | {"provider": name})
            assert [disagreement(row, rows[0], 1e-5) for row in rows] == [None] * (2 if shape.gradients else 4)
            assert (rows[0]["gradient_norm"] > 0) == shape.gradients


@pytest.mark.parametrize("op", ["maxsim", "hard_similarity"])
def test_the_product_beside_a_match_is_as_large(op):
    case = Case(op, 4, L=5, N=6, D=8, mean_length=3, gradients=False)
    arguments = prepared(PRODUCT, inputs(case))
    providers.provider(PRODUCT, op)(**arguments)
    rows, columns = arguments["out"].shape
    assert 2 * rows * columns * case.D == work(case, 4)["forward"].flops
    torch.testing.assert_close(arguments["out"], arguments["rows"] @ arguments["columns"].T)


def test_what_is_not_installed_is_a_row(monkeypatch):
    missing = {"status": "not run: maxsim-cpu is not installed"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert micro.measure_in_process(Case("maxsim", 2), "maxsim-cpu", 0.0, 1) == missing
    monkeypatch.setenv("CXX", "no-such-compiler")
    row = micro.measure_in_process(Case("maxsim", 2), AUTOTUNED, 0.0, 1)
    assert row == {"status": "not run: no C++ compiler (no-such-compiler)"}
    assert "not installed" in micro_table([{"case": "maxsim", "provider": "maxsim-cpu"} | missing], 100.0)


def test_shares_of_torch_mm():
    row = {"case": "maxsim, forward alone", "status": "ok", "process_mib": 1, "above_inputs_mib": 1,
           "gflop": {"forward": 50.0}}  # fmt: skip
    times = {REFERENCE: 2000.0, "maxsim-cpu": 1000.0, PRODUCT: 500.0, TORCH: 625.0}
    rows = [row | {"provider": name, "forward": dict.fromkeys(("median", "p20", "p80"), times[name])} for name in times]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in micro_tables(rows, 100.0).splitlines()]
    table, products = lines[2:6], lines[9:]
    assert [line[-1] for line in table] == ["25 % / -", "50 % / -", "100 % / -", "80 % / -"]
    assert [line[3] for line in table] == ["-", "has none", "has none", "-"]
    assert [line[5] for line in table] == ["-", "2.00x", "-", "3.20x"]
    assert [(line[1], line[-1]) for line in products] == [(REFERENCE, "25 %"), ("maxsim-cpu", "50 %"), (TORCH, "80 %")]
    assert "of torch.mm |" not in micro_table(rows)


def test_a_peer_that_is_faster_is_a_miss():
    case = Case("maxsim", 64, mean_length=25)
    rows = [{"case": case.name, "provider": name, "status": "ok", "both": {"median": ms}}
            for name, ms in ((TORCH, 100.0), ("late-interaction-kernels", 90.0))]  # fmt: skip

    def judged():
        return next(entry for entry in micro_targets(rows) if entry["goal"].startswith(f"{case.name}: ahead"))

    assert judged()["met"] is False
    assert judged()["measured"] == "0.90x (late-interaction-kernels)"
    rows[1]["both"]["median"] = 120.0
    assert judged()["met"] is True
    rows[1]["status"] = "not run: late-interaction-kernels is not installed"
    assert (judged()["measured"], judged()["met"]) == ("not measured", None)


def test_a_peer_that_fails_is_no_rival():
    """Nor does it stand in the way of a verdict, as one that was not tried does."""
    case = Case("maxsim", 64, gradients=False)
    rows = [{"case": case.name, "provider": name, "status": "ok", "forward": {"median": ms}}
            for name, ms in ((TORCH, 100.0), ("late-interaction-kernels", 120.0), ("maxsim-fast", 110.0))]  # fmt: skip

    def judged():
        entry = next(entry for entry in micro_targets(rows) if entry["goal"].startswith(f"{case.name}: ahead"))
        return entry["measured"], entry["met"]

    both = "1.10x (maxsim-fast), 1.20x (late-interaction-kernels)"
    assert judged() == (both, None)
    rows.append({"case": case.name, "provider": "maxsim-cpu", "status": "failed: value inf, where reference has 1"})
    assert judged() == (f"{both}, maxsim-cpu failed", True)


def test_a_crash_has_its_name(monkeypatch):
    monkeypatch.setattr(
        micro.subprocess, "run", lambda *args, **options: SimpleNamespace(returncode=-11, stderr="Uptime")
    )
    assert micro.in_process({"threads": 1}) == {"status": "failed: SIGSEGV"}
