"""The prepared run on a CUDA device: first correctness, then speed, against the code that users have today.

    python -m benchmarks gpu --out DIR [--minutes 9.5] [--stage a b ...] [--wheels DIR] [--prebuilt DIR] [--dry-run]
    python -m benchmarks gpu --preflight [--triton-wheel FILE] [--wheels DIR] [--prebuilt DIR]

Every line is printed and every record written as it comes: DIR/records.jsonl, gpu.json, gpu.md, log.txt and three plots
are complete at every moment, whenever the run is killed. A job that takes twice its guess is killed, the next goes on.
The run ends in time; what did not fit is listed as "not run: out of time". Copy gpu.json to benchmarks/results/ and run
`python -m benchmarks report` to have the figures in the documentation. docs/kernels.md says how to read the lines.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from .. import ROOT, results
from . import preflight, stand_in_cuda, triton_cache, wheels
from .book import Book
from .plan import STAGES, Job, gpu_jobs
from .supervisor import Worker, run_jobs
from .targets import gpu_targets

DRY = "dry run: kernels are interpreted in stages a to c, replaced by the torch path in d to f and i; nothing is timed"
REPORT_SECONDS = 5.0  # kept for the last plots


def options_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {s.letter}  {s.name:13} {s.seconds:4.0f} s  {s.proves}" for s in STAGES),
    )
    letters = [stage.letter for stage in STAGES]
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default: %(default)s)")
    parser.add_argument("--stage", nargs="+", choices=letters, metavar="LETTER", help="these alone (default: all)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of the peers (default: wheels/ or .whl/)")
    parser.add_argument("--prebuilt", type=Path, metavar="DIR", help="a Triton cache (default: prebuilt/)")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, to see that everything runs")
    parser.add_argument(
        "--preflight", action="store_true", help="measure nothing: is everything there that a run needs?"
    )
    parser.add_argument("--triton-wheel", type=Path, metavar="FILE", help="of --preflight: Triton as it will be there")
    options = parser.parse_args(argv)
    if options.out is None and not options.preflight:
        parser.error("--out DIR says where the files go")
    return options


def environment(options: argparse.Namespace) -> tuple[dict[str, str], list[str], bool]:
    """Of the worker, what to say about it, and whether kernels are there and need no compiler."""
    env, said = dict(os.environ), [f"sha256 of triton_key: {triton_cache.triton_key_sha256()}"]
    said += preflight.missing()
    folder = wheels.folder(options.wheels)
    if folder is not None:
        site, sentence = wheels.unpack(folder)
        said.append(sentence)
        if site is not None:
            env = wheels.on_path(env, site)
            sys.path.insert(0, str(site))  # for the versions
    if options.dry_run:
        return env | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, [*said, DRY], True
    env.pop("TRITON_INTERPRET", None)
    cache, sentence = triton_cache.prepare(triton_cache.folder(options.prebuilt))
    if cache is not None:
        env["TRITON_CACHE_DIR"] = str(cache)
    return env, [*said, sentence], cache is not None


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    options = options_of(argv)
    if options.preflight:
        return preflight.main(options)
    if options.dry_run:
        stand_in_cuda.install()
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip or "no accelerator"
        print(f"needs a CUDA device, and torch {torch.__version__} (built for {built}) sees none; nothing was measured")
        return 2
    env, said, prebuilt = environment(options)
    command = "python -m benchmarks gpu" + (f" --stage {' '.join(options.stage)}" if options.stage else "")
    head = results.head("gpu", command) | {"minutes": options.minutes, "setup": said}
    if options.dry_run:
        head["dry_run"] = True
    with closing(Book(options.out, head)) as book:
        versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
        gpu = [head["machine"][key] for key in ("gpu", "gpu_driver") if key in head["machine"]]
        for line in (versions, ", ".join(gpu), f"commit {head['commit']}, {head['date']}", *said):
            book.say(line)
        jobs = gpu_jobs(options.stage, dry=options.dry_run)
        run(book, jobs, options, env, began + 60 * options.minutes - REPORT_SECONDS, prebuilt)
        for entry in gpu_targets(results.of_kind(book.result(), "figure"), book.ceilings):
            verdict = {True: "met", False: "MISSED", None: "not measured"}[entry["met"]]
            book.say(f"target {verdict:12} {entry['goal']}: {entry['measured']}")
        book.say(f"{time.monotonic() - began:.0f} s; written to {options.out}")
        return int(any(str(record["status"]).startswith("failed") for record in book.records))


def run(
    book: Book,
    jobs: Sequence[Job],
    options: argparse.Namespace,
    env: dict[str, str],
    deadline: float,
    prebuilt: bool,
) -> None:
    flags = (["--dry-run"] if options.dry_run else []) + (["--stage", *options.stage] if options.stage else [])
    command = [sys.executable, "-m", "benchmarks.gpu.worker", *flags]
    current: list[str] = []

    def note(job: Job, record: dict[str, Any]) -> None:
        if [job.stage] != current:
            current[:] = [job.stage]
            stage = next(stage for stage in STAGES if stage.letter == job.stage)
            book.say(f"-- stage {stage.letter}, {stage.name}: {stage.proves} ({stage.seconds:.0f} s)")
        book.note(record)

    run_jobs(
        jobs,
        lambda: Worker(command, env, book.log, ROOT),
        note,
        deadline=deadline,
        prebuilt=prebuilt,
        stage_done=lambda _: book.draw(),
    )
    book.draw(last=True)
