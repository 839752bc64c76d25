"""What a run of `benchmarks gpu` has found, on disk at every moment: records.jsonl, gpu.json, gpu.md, plots, log.txt.

A record is appended to records.jsonl and all other files are replaced as it comes, so that a run that is killed
loses only the job in progress.
"""

import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import results
from ..measure import AGREEMENT, PASSES, disagreement
from ..providers import REFERENCE, RELEASED, TORCH
from . import plots
from .about import gpu_page
from .lines import record_line
from .step import TIMES, difference
from .tables import gpu_report

__all__ = ["Book", "checked", "read_records"]

UNSEEN = "a record that cannot be shown:"
DRAW_SECONDS = 5.0  # between two drawings at least


def checked(record: dict[str, Any], references: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """The figure, without its times where it disagrees with the reference of its case (else the torch path)."""
    if record["status"] != "ok":
        return record
    key = (record["case"], record["dtype"])
    if key not in references and record["provider"] in (REFERENCE, RELEASED, TORCH):
        references[key] = record
        return record | {"checked": False}
    if key not in references:
        return record | {"checked": False}
    compare = difference if record["kind"] == "step" else disagreement
    wrong = compare(record, references[key], AGREEMENT[record["dtype"]])
    if wrong is None:
        return record | {"checked": True}
    kept = {name: value for name, value in record.items() if name not in (*PASSES, *TIMES)}
    return kept | {"status": f"failed: {wrong}"}


def read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Book:
    def __init__(self, out: Path, head: dict[str, Any], *, clock: Callable[[], float] = time.monotonic) -> None:
        """`head` is what gpu.json says besides records: command, machine, versions. A run begins with empty files."""
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.head, self.clock, self.began = out, head, clock, clock()
        self.records: list[dict[str, Any]] = []
        self.references: dict[tuple[str, str], dict[str, Any]] = {}
        self.compared: dict[tuple[str, str, str], dict[str, Any]] = {}  # the reference's figures, by mode, too
        self.ceilings: dict[str, float] | None = None
        self.drawn, self.undrawn = float("-inf"), False
        for stale in (*out.glob("gpu*"), out / "records.jsonl", out / ".partial"):
            stale.unlink(missing_ok=True)
        self.log = (out / "log.txt").open("w", buffering=1)
        self.write()

    def close(self) -> None:
        self.log.close()

    def say(self, text: str, *, aloud: bool = True) -> None:
        """In the log and on the terminal, at once."""
        if aloud:
            print(text, flush=True)
        print(text, file=self.log, flush=True)

    def note(self, record: dict[str, Any]) -> None:
        if record["kind"] in ("figure", "step"):
            record = checked(record, self.references)
            if record["provider"] in (REFERENCE, RELEASED) and record["status"] == "ok":
                self.compared[record["case"], record["dtype"], record.get("mode", "eager")] = record
        record = record | {"at_s": round(self.clock() - self.began, 1)}
        with (self.out / "records.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.records.append(record)
        self.ceilings = record.get("ceilings", self.ceilings)
        self.undrawn |= record["kind"] in ("figure", "ceilings")
        try:
            # Of the tests the terminal sees those that failed: it may keep no more than its last lines.
            quiet = record.get("outcome") in ("passed", "skipped")
            self.say(record_line(record, self.compared, self.ceilings), aloud=not quiet)
            self.write()
        except Exception as error:  # the record is safe, and what is still to come is worth more than how it looks
            self.say(f"{UNSEEN} {type(error).__name__}: {error}, of {record}")

    def result(self) -> dict[str, Any]:
        return self.head | {"records": self.records}

    def write(self) -> None:
        result = self.result()
        results.write(self.out / "gpu.json", result)
        results.replace(self.out / "gpu.md", gpu_page(result, gpu_report(result)))

    def draw(self, *, last: bool = False) -> None:
        """The plots, unless they have just been drawn or nothing is new."""
        if not self.undrawn or (not last and self.clock() - self.drawn < DRAW_SECONDS):
            return
        try:
            for name, figure in plots.gpu_figures(self.result()).items():
                image = io.BytesIO()
                figure.savefig(image, format="png", dpi=120)
                results.replace(self.out / f"gpu_{name}.png", image.getvalue())
        except Exception as error:  # a picture is worth less than the figures that are still to come
            self.say(f"no plots: {type(error).__name__}: {error}")
        self.drawn, self.undrawn = self.clock(), False


def missing(records: Sequence[dict[str, Any]], identities: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The identities that no record has."""
    return [i for i in identities if not any(i.items() <= record.items() for record in records)]
