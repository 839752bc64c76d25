"""Stage g of the GPU run: every outcome with its reason, whatever else is broken, on a machine with few packages."""

import os
import subprocess
import sys

import pytest

from benchmarks import ROOT
from benchmarks.gpu import device_tests

TESTS = {
    "test_broken.py": "import no_such_package\ndef test_never(): pass\n",
    "test_mixed.py": """
import pytest
def test_passes(): pass
@pytest.mark.parametrize("x", ["a b"])
def test_fails(x): assert 1 == 2, "seen"
@pytest.fixture
def broken(): raise ValueError("in the fixture")
def test_errs(broken): pass
@pytest.mark.skip(reason="why not")
def test_skipped(): pass
@pytest.mark.xfail
def test_expected(): assert False
""",
}
OUTCOMES = {"test_broken.py": "error", "test_mixed.py::test_passes": "passed",
            "test_mixed.py::test_fails[a b]": "failed", "test_mixed.py::test_errs": "error",
            "test_mixed.py::test_skipped": "skipped", "test_mixed.py::test_expected": "xfailed"}  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_takes_no_other_along(workers, tmp_path):
    for name, source in TESTS.items():
        (tmp_path / name).write_text(source)
    *tests, last = device_tests.run_tests(workers, tmp_path)
    assert len(tests) == len(OUTCOMES)
    assert {test["test"]: test["outcome"] for test in tests} == OUTCOMES
    why = {test["test"]: test["why"] for test in tests if "why" in test}
    assert set(why) == {name for name, outcome in OUTCOMES.items() if outcome in ("failed", "error")}
    assert "No module named 'no_such_package'" in why["test_broken.py"]
    assert "seen" in why["test_mixed.py::test_fails[a b]"]
    assert "ValueError: in the fixture" in why["test_mixed.py::test_errs"]
    assert last["status"].startswith("failed: ")
    assert "1 passed" in last["summary"]


def test_outcomes_come_one_by_one(tmp_path):
    """What is stopped has kept what it had: the second test waits until the first outcome was read."""
    gate = tmp_path / "gate"
    (tmp_path / "test_two.py").write_text(f"""
import pathlib, time
def test_first(): pass
def test_second():
    end = time.monotonic() + 600
    while not pathlib.Path({str(gate)!r}).exists():
        assert time.monotonic() < end
        time.sleep(0.05)
""")
    outcomes = device_tests.run_tests(0, tmp_path)
    assert next(outcomes)["test"] == "test_two.py::test_first"
    gate.touch()
    assert [record.get("outcome") for record in outcomes] == ["passed", None]


BLOCK = """
import sys
for name in ("hypothesis", "xdist", "tqdm", "transformers", "faiss", "mypy", "ruff"):
    sys.modules[name] = None
"""


def test_gpu_tests_need_few_packages(tmp_path):
    """docs/kernels.md lists what must be there: none of those that are missing here."""
    (tmp_path / "without.py").write_text(BLOCK)
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-p", "without", "-p", "no:cacheprovider", "--collect-only", "-q"]
    done = subprocess.run([*command, "tests/gpu"], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    modules = "benchmarks.gpu.run, benchmarks.gpu.worker, benchmarks.gpu.tune"
    subprocess.run([sys.executable, "-c", f"import without, {modules}"], cwd=ROOT, env=env, check=True)
