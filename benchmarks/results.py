"""Result files: where the figures come from, then the records.

Every file has the same head (`HEAD`), what belongs to its kind alone, and `records`: a list of dictionaries, one per
line, so that a change of one number is a change of one line. A file is replaced as a whole: a process that is killed
while it writes leaves the file as it was.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from .machine import commit, describe_machine, describe_versions, now

__all__ = ["HEAD", "ceilings_of", "described", "head", "load_all", "of_kind", "read", "replace", "write"]

HEAD = ("kind", "command", "date", "commit", "machine", "versions", "note")


def head(kind: str, command: str, *, note: str = "", threads: int | None = None) -> dict[str, Any]:
    """The head of the file, before the records; `threads` of the measuring processes, unless as here."""
    machine = describe_machine() | ({"threads": threads} if threads else {})
    values = (kind, command, now(), commit(), machine, describe_versions(), note)
    return dict(zip(HEAD, values, strict=True))


def write(path: Path, result: dict[str, Any]) -> None:
    lines = []
    for key, value in result.items():
        if isinstance(value, list):
            rows = ",\n".join("    " + json.dumps(row, ensure_ascii=False) for row in value)
            lines.append(f'  "{key}": [\n{rows}\n  ]' if value else f'  "{key}": []')
        else:
            lines.append(f'  "{key}": {json.dumps(value, ensure_ascii=False)}')
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, "{\n" + ",\n".join(lines) + "\n}\n")


def replace(path: Path, content: str | bytes) -> None:
    """The new content or, after a kill, the old; never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in (*HEAD, "records") if key not in result]
    if missing:
        raise ValueError(f"a result must have {', '.join((*HEAD, 'records'))}; {path} lacks {', '.join(missing)}")
    return result


def load_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Every result in a folder by file name, in the order of the names."""
    return {path.name: read(path) for path in sorted(folder.glob("*.json"))}


def of_kind(result: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The records of one kind of a result that has several."""
    return [record for record in result["records"] if record["kind"] == kind]


def ceilings_of(result: dict[str, Any]) -> dict[str, float] | None:
    """The rates that a GPU run measured, if it came to that."""
    found = [record["ceilings"] for record in of_kind(result, "ceilings") if "ceilings" in record]
    return found[-1] if found else None


def described(result: dict[str, Any], source: str = "") -> str:
    """Lines that name command, time, commit, machine and versions."""
    machine = result["machine"]
    what = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    what += f", {machine['memory_gib']} GiB" if "memory_gib" in machine else ""
    if machine.get("load", 0) >= 1:
        what += f"; {machine['load']:.0f} other processes at work, so that times are noise"
    if "gpu" in machine:
        what = f"{machine['gpu']}, {machine['gpu_memory_gib']} GiB, CUDA {machine['cuda']}; {what}"
    lines = [f"Source: {source}`{result['command']}`, {result['date']}.", f"Commit: {result['commit']}."]
    lines.append(f"Machine: {what}.")
    if "gpu_driver" in machine:
        lines.append(f"GPU, driver, clocks of multiprocessors and memory before the run: {machine['gpu_driver']}.")
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return "\n".join([*lines, f"Versions: {versions}.", *([result["note"]] if result["note"] else [])])
