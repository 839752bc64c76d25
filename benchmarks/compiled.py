"""What the kernels needed when they were last recorded, and whether they need more now.

    python -m benchmarks compile-check --chip sm_90 --record benchmarks/results/compiled_sm_90.json
    python -m benchmarks compile-check --chip sm_90 --against benchmarks/results/compiled_sm_90.json

The table holds registers, shared memory and the instructions of each innermost loop, a line for each kernel and set of
blocks. `--against` fails where a loop got `MORE_INSTRUCTIONS` longer, a thread needs `MORE_REGISTERS` more, or a kernel
of the table is not compiled any more. What got better, or is new, is named: record the table again with the change that
made it so. Another version of Triton makes other code, so the table is compared with its own version alone.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from . import results

__all__ = ["check", "compare", "read", "rows", "write"]

MORE_INSTRUCTIONS = 1.03  # a loop may get 3 % longer
MORE_REGISTERS = 8  # or more of them, for each thread, are too many
KIND = "compiled"

Key = tuple[str, str, str, str]
Table = dict[Key, dict[str, Any]]
NAMES = ("chip", "kind", "kernel", "config")


class Needs(Protocol):
    """As much of `compile_check.Report` as is compared."""

    chip: str
    kind: str
    kernel: str
    config: str
    registers: int
    shared: int
    instructions: int
    loops: tuple[int, ...]
    error: str


def rows(reports: Iterable[Needs]) -> Table:
    """What each kernel needs. The second of two kernels that differ in their arguments alone is called `CONFIG #2`."""
    table: Table = {}
    for report in reports:
        if report.error:
            continue
        number, config = 1, report.config.strip()
        while (key := (report.chip, report.kind, report.kernel, config)) in table:
            number += 1
            config = f"{report.config.strip()} #{number}"
        table[key] = {
            "registers": report.registers,
            "shared": report.shared,
            "instructions": report.instructions,
            "loops": list(report.loops),
        }
    return table


def write(path: Path, table: Table, triton: str) -> None:
    chips = " ".join(dict.fromkeys(chip for chip, *_ in table))
    head = results.head(KIND, f"python -m benchmarks compile-check --chip {chips} --record {path}")
    records = [dict(zip(NAMES, key, strict=True)) | needs for key, needs in table.items()]
    results.write(path, head | {"triton": triton, "records": records})


def read(path: Path, triton: str) -> Table:
    """The table of a file; ValueError where another Triton wrote it."""
    result = results.read(path)
    if result["triton"] != triton:
        raise ValueError(f"{path} is of Triton {result['triton']}, this is {triton}: compare with the same, or record")
    return {tuple(row[name] for name in NAMES): row for row in result["records"]}


def check(reports: Iterable[Needs], path: Path, triton: str) -> int:
    """Prints what changed since the table of a file; how many lines of it are worse."""
    try:
        before = read(path, triton)
    except (OSError, ValueError) as error:
        print(error)
        return 1
    worse, notes = compare(before, rows(reports))
    print(*notes, *(f"worse: {line}" for line in worse), sep="\n")
    print(f"{len(worse)} worse than in {path}")
    return len(worse)


def compare(before: Table, after: Table) -> tuple[list[str], list[str]]:
    """Lines on what got worse, which fails; and on what got better, or is new, which does not.

    Only chips and kinds that were compiled now are compared.
    """
    worse, notes = [], []
    compiled = {key[:2] for key in after}
    for key, old in before.items():
        if key[:2] not in compiled:
            continue
        name = named(key)
        if key not in after:
            worse.append(f"{name}: not compiled any more; record the table again where that is meant")
            continue
        new = after[key]
        changes, better = difference(old, new)
        worse += [f"{name}: {change}" for change in changes]
        notes += [f"{name}: better, record it: {change}" for change in better]
    notes += [f"{named(key)}: new, record it" for key in after if key not in before]
    return worse, notes


def difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What costs more in one kernel, and what less."""
    more, less = [], []
    loops = f"instructions of inner loops {figures(old['loops'])} -> {figures(new['loops'])}"
    if len(old["loops"]) == len(new["loops"]):
        longer = any(b > MORE_INSTRUCTIONS * a for a, b in zip(old["loops"], new["loops"], strict=True))
    else:  # which loop is which is not known: unrolled, split or merged
        longer = sum(new["loops"]) > MORE_INSTRUCTIONS * sum(old["loops"]) or not new["loops"]
    if longer:
        more.append(loops)
    elif sum(new["loops"]) < sum(old["loops"]):
        less.append(loops)
    registers = f"registers {old['registers']} -> {new['registers']}"
    if new["registers"] >= old["registers"] + MORE_REGISTERS:
        more.append(registers)
    elif new["registers"] <= old["registers"] - MORE_REGISTERS:
        less.append(registers)
    if new["shared"] < old["shared"]:
        less.append(f"bytes of shared memory {old['shared']} -> {new['shared']}")
    return more, less


def figures(numbers: list[int]) -> str:
    return ",".join(map(str, numbers)) or "none"


def named(key: Key) -> str:
    chip, kind, kernel, config = key
    return f"{kernel.strip('_')} {config} {kind} {chip}"
