"""The Triton kernels where there is no GPU: through the interpreter, and ahead of time through the compiler."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
triton = pytest.importorskip("triton", reason="the kernels need triton, which has no wheel for this platform")


@pytest.mark.parametrize("file", sorted((HERE / "interpreter").glob("test_*.py")), ids=lambda file: file.stem)
def test_kernels_through_the_interpreter(file):
    """Whether a kernel is interpreted is decided when it is imported: this takes a process of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)],
        env=environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, run.stdout
    assert int(passed[1]) >= 1
    assert "skipped" not in run.stdout


def test_the_compile_gate_refuses_what_does_not_fit(monkeypatch):
    from fmfa_losses.kernels import _launch, match

    from benchmarks import compile_check

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, triton 3.9 warns

    def match_of(*block):
        monkeypatch.setitem(match.MATCH, (_launch.SMALL, "half"), block)
        launches = compile_check.record("sm_86", "float16")
        return next(launch for launch in launches if launch.kernel.__name__ == "_match_kernel")

    fits = compile_check.compile_launch("sm_86", "float16", match_of(64, 64, 32, 8, 2))
    assert fits.failures == []
    assert fits.registers > 0
    assert fits.instructions > 100
    assert 0 < fits.shared <= fits.limit == 99 * 1024
    too_big = compile_check.compile_launch("sm_86", "float16", match_of(128, 256, 64, 8, 4))
    assert ["shared memory" in failure for failure in too_big.failures].count(True) == 1
    spills = compile_check.compile_launch("sm_86", "float16", match_of(128, 256, 32, 4, 2))
    assert any("spilled" in failure for failure in spills.failures)
    threads = compile_check.Report("sm_90", "float16", "_match_kernel", "", registers=218, threads=512, wgmma=True)
    assert ["218 registers for each of 512 threads" in failure for failure in threads.failures] == [True]
