"""tests/gpu with one outcome a test, as each comes. They gate nothing: outcomes stand beside the figures."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["FILES", "outcome_of", "run_tests"]

ROOT = Path(__file__).parents[1]
# Which file of tests/gpu speaks for which operations.
FILES = {
    "test_gpu_efa.py": ("efa", "hard_similarity", "maxsim", "sparse_aggregate"),
    "test_gpu_asdm.py": ("asdm",),
}
WORDS = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
ID = r"(?P<test>tests/gpu/\S+\.py(?:::.+?)?)"
# `tests/gpu/f.py::test PASSED [ 1%]`, and from xdist `[gw0] [ 1%] PASSED tests/gpu/f.py::test`.
LINES = (re.compile(rf"^{ID} (?P<outcome>{WORDS})\b"), re.compile(rf"^\[gw\d+\].*? (?P<outcome>{WORDS}) {ID}\s*$"))


def outcome_of(line: str) -> dict[str, str] | None:
    """{"test": id, "outcome": passed | failed | ...} where a line of pytest says one."""
    for pattern in LINES:
        found = pattern.match(line)
        if found:
            return {"test": found["test"], "outcome": found["outcome"].lower()}
    return None


def run_tests(workers: int) -> Iterator[dict[str, Any]]:
    """An outcome for each test; then one record of how it ended. What pytest says goes to standard error."""
    parallel = ["-n", str(workers)] if workers and importlib.util.find_spec("xdist") else []
    # Since torch 2.9 reading the older TF32 switches warns, and warnings are errors in the tests.
    allowed = ["-W", "ignore:Please use the new API:UserWarning"]
    command = [sys.executable, "-u", "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    with subprocess.Popen(
        [*command, *parallel, *allowed, "tests/gpu"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            outcome = outcome_of(line.rstrip())
            if outcome is not None:
                yield outcome | {"status": "ok"}
            last = line.strip("= \n") or last
    yield {"summary": last, "status": "ok" if process.returncode == 0 else f"failed: exit code {process.returncode}"}
