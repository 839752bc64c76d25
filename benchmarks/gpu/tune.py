"""Candidates for the block tables: compiled anywhere, timed on a CUDA device.

    python -m benchmarks tune --compile [--chip sm_90] [--table PRODUCTS DX ...] [--out candidates.json]
    python -m benchmarks tune --time candidates.json [--minutes 5] [--out tuned.json]

The first needs no GPU: it compiles every candidate as that chip would get it, and drops those that do not fit or spill.
The second times the survivors, first those nearest to the present entry, each table in turn. Both print and write
each outcome as it comes. Neither changes anything: a table is edited by hand, with the outcome in docs/kernels.md.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch

from .. import results
from ..measure import AGREEMENT, disagreement, fingerprint, matmul_precision
from . import alone, device, stand_in_cuda, triton_cache
from .alternatives import swapped, value
from .candidates import TABLES, Table, survivors, tables
from .plan import Job, toy
from .worker import step_of

KIND = "bfloat16"  # of the launches that are compiled; the entries are those of 16 bits
SHARED_TOTAL = {"sm_80": 164 * 1024, "sm_86": 100 * 1024, "sm_89": 100 * 1024, "sm_90": 228 * 1024}
RESERVED = 1024  # bytes of shared memory that the driver takes for each program


def compile_candidate(chip: str, table: str, candidate: tuple[int, ...]) -> dict[str, Any]:
    """What the compiler says of every launch that the candidate changes; `dropped` says why it is not worth a GPU."""
    from ..compile_check import compile_kernel

    row = table_of(table).entry
    before = {_key(kernel) for _, kernel in _kernels(chip, row.kernels)}
    with swapped(row, candidate):
        changed = [(launch, kernel) for launch, kernel in _kernels(chip, row.kernels) if _key(kernel) not in before]
        reports = [compile_kernel(chip, KIND, launch, kernel) for launch, kernel in changed]
    found = {"table": table, "candidate": list(candidate)}
    if not reports:
        return found | {"dropped": "the entry as it stands"}
    failures = [f"{report.kernel.strip('_')}: {failure}" for report in reports for failure in report.failures]
    if failures:
        return found | {"dropped": "; ".join(failures)[:300]}
    worst = {name: max(getattr(report, name) for report in reports) for name in ("registers", "shared", "threads")}
    instructions = max(report.instructions for report in reports)
    return found | worst | {"programs": _programs(chip, **worst), "instructions": instructions}


def _kernels(chip: str, names: Sequence[str]) -> list[tuple[Any, Any]]:
    """The launches of these kernels whose code differs, and each kernel as that chip's JIT specialises it."""
    from ..compile_check import record, specialised

    return specialised(chip, [launch for launch in record(chip, KIND) if launch.kernel.__name__ in names])


def _key(kernel: Any) -> str:
    return f"{kernel.source.hash()} {sorted(vars(kernel.options).items())}"


def _programs(chip: str, registers: int, shared: int, threads: int) -> int:
    """How many programs a multiprocessor with 65536 registers holds at once; a thread gets them in eights."""
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    by_shared = SHARED_TOTAL.get(chip, 228 * 1024) // (shared + RESERVED)
    return min(by_registers, by_shared, 2048 // threads, 32)


def table_of(name: str) -> Table:
    return tables()[name]


def in_order(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Survivors, first those nearest to the present entry (then more programs at once), each table in turn."""
    queues = []
    for table in TABLES:
        entry = value(table.entry)
        rows = [row for row in found if row["table"] == table.name and "dropped" not in row]
        distance = lambda row, entry=entry: sum(a != b for a, b in zip(row["candidate"], entry, strict=True))  # noqa: E731
        queues.append(sorted(rows, key=lambda row: (distance(row), -row["programs"], row["candidate"])))
    return [row for row in chain.from_iterable(zip_longest(*queues)) if row is not None]


def compile_all(options: argparse.Namespace) -> int:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what triton does where nothing is set, without its warning
    plan = [(name, candidate) for name in options.table for candidate in table_of(name).candidates()[: options.limit]]
    head = results.head("candidates", "python -m benchmarks tune --compile") | {"chip": options.chip}
    began = time.monotonic()
    print(f"{len(plan)} candidates for {options.chip}", flush=True)
    found: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.workers) as pool:
        jobs = [pool.submit(compile_candidate, options.chip, *job) for job in plan]
        for job in as_completed(jobs):
            row = job.result()
            found.append(row)
            said = row.get("dropped") or ", ".join(
                f"{name} {row[name]}" for name in ("registers", "shared", "programs")
            )
            print(f"{row['table']:8} {tuple(row['candidate'])!s:28} {said}", flush=True)
            kept, dropped = in_order(found), [row for row in found if "dropped" in row]
            results.write(options.out, head | {"records": kept + dropped})
    took = time.monotonic() - began
    print(
        f"{len(kept)} survive, {len(dropped)} dropped, in {took:.0f} s: {took / len(plan):.1f} s each in "
        f"{options.workers} processes; written to {options.out}"
    )
    return 0


def timed(rows: Sequence[dict[str, Any]], left: Callable[[], float], *, dry: bool) -> Iterator[dict[str, Any]]:
    """Each survivor's kernels in milliseconds, after those of the entry as it stands; until no time is left."""
    entries: dict[str, dict[str, Any]] = {}
    for row in rows:
        if left() <= 0:
            return
        table = table_of(row["table"])
        if table.name not in entries:
            entries[table.name] = time_candidate(table, None, None, dry)
            yield entries[table.name]
        outcome = time_candidate(table, tuple(row["candidate"]), entries[table.name], dry)
        yield row | outcome
        if outcome.get("lost"):
            return


def time_candidate(
    table: Table, candidate: tuple[int, ...] | None, entry: dict[str, Any] | None, dry: bool
) -> dict[str, Any]:
    row = table.entry
    case = toy(row.case) if dry else row.case
    precision = "fp16" if dry else row.precision
    standing = value(row)
    found: dict[str, Any] = {"table": table.name, "candidate": list(standing if candidate is None else candidate)}
    if candidate is None:
        found["entry"] = True
    if entry is not None and entry["status"] != "ok":
        entry = None  # nothing to compare with
    try:
        matmul_precision(precision)
        step = step_of(Job("c", "kernels", case, precision=precision))
        with swapped(row, standing if candidate is None else candidate):
            kernels, (result, grads) = alone.kernels_of(step)
            found |= fingerprint(result, grads) | {"provider": "entry"}
            wrong = entry and disagreement(found, entry, AGREEMENT[precision])
            if wrong:
                return found | {"status": f"failed: {wrong}"}
            often = 1 if dry else alone.IN_A_GRAPH
            ms = sum(alone.time_kernel(kernels[name], often)["median"] for name in row.kernels)
    except Exception as error:  # a candidate that does not run is an outcome, too
        message = (str(error).splitlines() or [""])[0]
        return found | {
            "status": f"failed: {type(error).__name__}: {message:.150}",
            "lost": not device.usable_after(str(error)),
        }
    return found | {"status": "ok", "ms": float(f"{ms:.4g}")}


def time_all(options: argparse.Namespace) -> int:
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
        stand_in_cuda.install()
    if not torch.cuda.is_available():
        print("needs a CUDA device; nothing was timed")
        return 2
    began = time.monotonic()
    if not options.dry_run:
        cache, sentence = triton_cache.prepare(triton_cache.folder(options.prebuilt))
        if cache is not None:
            os.environ["TRITON_CACHE_DIR"] = str(cache)
        print(f"sha256 of triton_key: {triton_cache.triton_key_sha256()}\n{sentence}", flush=True)
    left = lambda: 60 * options.minutes - (time.monotonic() - began)  # noqa: E731
    rows = [row for row in survivors(options.time) if row["table"] in options.table][: options.limit]
    head = results.head("tuned", "python -m benchmarks tune --time")
    outcomes: list[dict[str, Any]] = []
    for outcome in timed(rows, left, dry=options.dry_run):
        outcomes.append(outcome)
        print(_line(outcome, outcomes), flush=True)
        results.write(options.out, head | {"records": outcomes})
    for table in TABLES:
        best = sorted((o for o in outcomes if o["table"] == table.name and "ms" in o), key=lambda o: o["ms"])[:5]
        for outcome in best:
            print(f"best {_line(outcome, outcomes)}")
    tried = sum("entry" not in outcome for outcome in outcomes)
    print(f"{tried} of {len(rows)} survivors tried in {time.monotonic() - began:.0f} s; written to {options.out}")
    return 0


def _line(outcome: dict[str, Any], outcomes: Sequence[dict[str, Any]]) -> str:
    said = f"{outcome['table']:8} {tuple(outcome['candidate'])!s:28} "
    if "ms" not in outcome:
        return said + str(outcome["status"])
    entry = next((o for o in outcomes if o["table"] == outcome["table"] and o.get("entry") and "ms" in o), None)
    ratio = f", {outcome['ms'] / entry['ms']:.2f}x the entry's time" if entry else ""
    return said + f"{outcome['ms']:.4g} ms" + (", the entry as it stands" if outcome.get("entry") else ratio)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [table.name for table in TABLES]
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--compile", action="store_true", help="compile the candidates; needs no GPU")
    what.add_argument("--time", type=Path, metavar="FILE", help="time the survivors in FILE on a CUDA device")
    parser.add_argument("--table", nargs="+", choices=names, default=names, metavar="TABLE", help=", ".join(names))
    parser.add_argument("--limit", type=int, metavar="N", help="the first N candidates of a table, or N survivors")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: candidates.json, tuned.json")
    parser.add_argument("--chip", default="sm_90", help="of --compile (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="of --compile")
    parser.add_argument("--minutes", type=float, default=5.0, help="of --time (default: %(default)s)")
    parser.add_argument("--prebuilt", type=Path, metavar="DIR", help="of --time: a Triton cache (default: prebuilt/)")
    parser.add_argument("--dry-run", action="store_true", help="of --time: toy sizes on the CPU, interpreted")
    options = parser.parse_args(argv)
    options.out = options.out or Path("candidates.json" if options.compile else "tuned.json")
    return compile_all(options) if options.compile else time_all(options)


if __name__ == "__main__":
    sys.exit(main())
