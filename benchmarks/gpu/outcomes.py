"""A pytest plugin: each outcome, and each file that cannot be collected, at once as a line of JSON.

    FMFA_OUTCOMES=FD python -m pytest -p benchmarks.gpu.outcomes ...      # FD: number of an open file descriptor

A line says {"test": id, "outcome": passed | failed | error | skipped | xfailed | xpassed, "why": what went wrong}.
Lines are written when the outcome is known, so that a run that is stopped has kept those before.
"""

import json
import os
from typing import Any

__all__ = ["pytest_configure"]

VARIABLE = "FMFA_OUTCOMES"


def pytest_configure(config: Any) -> None:
    # pytest-xdist: its workers report to the process that started them, which writes.
    if VARIABLE in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Outcomes(int(os.environ[VARIABLE])))


class _Outcomes:
    def __init__(self, descriptor: int) -> None:
        self.file = os.fdopen(descriptor, "w")

    def pytest_runtest_logreport(self, report: Any) -> None:
        outcome = outcome_of(report)
        if outcome is not None:
            self.write(report, outcome)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.write(report, "error")

    def write(self, report: Any, outcome: str) -> None:
        line = {"test": report.nodeid, "outcome": outcome}
        if outcome in ("failed", "error"):
            line["why"] = why(report)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def outcome_of(report: Any) -> str | None:
    """Of a test, from the report of one of its three parts; None where another part says it."""
    if report.when != "call":
        return {"failed": "error", "skipped": "skipped", "passed": None}[report.outcome]
    if hasattr(report, "wasxfail"):
        return {"skipped": "xfailed", "passed": "xpassed"}.get(report.outcome, "failed")
    return str(report.outcome)


def why(report: Any) -> str:
    """The error itself, out of what pytest would print: its lines that begin with E; else its last line."""
    lines = [line.rstrip() for line in report.longreprtext.splitlines() if line.strip()]
    errors = [line[1:].strip() for line in lines if line.startswith("E  ")]
    return (errors[-1] if report.when == "collect" and errors else (errors or lines[-1:] or [""])[0])[:300]
