"""tests/gpu with one outcome per test, as each comes. Measurements do not depend on them; outcomes are listed."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import ROOT
from .outcomes import VARIABLE

__all__ = ["FILES", "run_tests"]

# Which file of tests/gpu speaks for which operations.
FILES = {
    "test_gpu_efa.py": ("efa", "hard_similarity", "maxsim", "sparse_aggregate"),
    "test_gpu_asdm.py": ("asdm",),
    "test_gpu_irr.py": ("irr",),
}


def run_tests(workers: int, folder: Path = ROOT / "tests" / "gpu") -> Iterator[dict[str, Any]]:
    """An outcome for each test; then one record of how it ended. What pytest says goes to standard error.

    A file that cannot be collected is one "error", and the others are run.
    """
    if importlib.util.find_spec("pytest") is None:
        yield {"status": "not run: pytest is not installed"}
        return
    parallel = ["-n", str(workers)] if workers and importlib.util.find_spec("xdist") else []
    # Since torch 2.9 reading the older TF32 switches warns, and warnings are errors in the tests.
    allowed = ["-W", "ignore:Please use the new API:UserWarning"]
    command = [sys.executable, "-u", "-m", "pytest", "-q", "-rfE", "--tb=short", "--continue-on-collection-errors"]
    # pytest-benchmark, where it is installed, warns of pytest-xdist; and warnings are errors.
    plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "benchmarks.gpu.outcomes"]
    reading, writing = os.pipe()
    with subprocess.Popen(
        [*command, *plugins, *parallel, *allowed, str(folder)],
        cwd=ROOT,
        env=os.environ | {VARIABLE: str(writing)},
        pass_fds=(writing,),
        stdout=2,
    ) as process:
        os.close(writing)
        found: list[dict[str, str]] = []
        with os.fdopen(reading) as lines:
            for line in lines:
                record = json.loads(line)
                if record not in found:  # every process of pytest-xdist collects, and says what it could not
                    found.append(record)
                    yield record | {"status": "ok"}
    outcomes = [record["outcome"] for record in found]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in sorted(set(outcomes)))
    code = process.returncode
    how = f"in {workers} processes" if parallel else "one after the other: pytest-xdist is not installed"
    summary = f"{counts or 'no test ran'} ({how if workers else 'in one process'})"
    yield {"summary": summary, "status": "ok" if code == 0 else f"failed: {summary}; exit code {code} of pytest"}
