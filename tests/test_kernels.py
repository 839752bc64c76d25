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
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env=environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, run.stdout
    assert int(passed[1]) >= 10
    assert "skipped" not in run.stdout
