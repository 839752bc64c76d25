"""`time`: Table 9, seconds that the test split takes: features of images and of texts, ranking in both directions.

Features of images include reading and resizing the files, which rendered pedestrians do without.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmfa_losses.retrieval import ranking_metrics, search

from ...measure import peak_process_bytes
from ...tables import markdown
from ..errors import RunError
from ..evaluation import encode_images, encode_texts, image_batches, text_batches
from ..options import command_of, parser_of
from ..outputs import claim, write_result
from ..paper import SECONDS, SECONDS_SOURCE
from ..subject import Subject, add_subject, reading, subject_of
from ..training import World

__all__ = ["main"]

PHASES = ("features of images", "features of texts", "ranking, t2i", "ranking, i2t")


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = parser_of("time", __doc__)
    add_subject(parser)
    parser.add_argument("--repeats", type=int, default=3, help="of everything (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/time"), help="for time.json (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the time.json that is in --out")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise RunError(f"--repeats must be 1 or more, got {args.repeats}")
    args.command = command_of("time", argv)
    return args


def main(argv: list[str]) -> int:
    args = arguments(argv)
    file = args.out / "time.json"
    claim(file, overwrite=args.overwrite)
    world = World.join(args.device)
    device = world.device
    subject = subject_of(args, world)
    subject.model.to(device)
    seconds = measured(subject, device, args)
    records = [record(phase, subject, values) for phase, values in seconds.items()]
    print(f"{subject.dataset} test: {subject.pairs.split}\nweights: {subject.title}")
    print(f"{device}, {args.repeats} repeats\n")
    print(table(records))
    peak = peak_mib(device)
    print("\nPeak memory:", ", ".join(f"{where} {mib} MiB" for where, mib in peak.items()))
    if subject.about["dry_run"]:
        print("A dry run: these are not the seconds of the paper's model.")
    if subject.dataset in SECONDS:
        print(
            f"Published: {SECONDS[subject.dataset]:.0f} s ({SECONDS_SOURCE}). This is other hardware, and may count "
            "other parts: the difference says nothing about the programs."
        )
    about = {**subject.about, "device": str(device), "peak_mib": peak, **reading(args, subject.dataset)}
    write_result(file, "time", args.command, about, records)
    return 0


def measured(subject: Subject, device: torch.device, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds by phase, one a repeat, and of all phases together; after one batch of each that is not counted."""
    model, pairs = subject.model, subject.pairs
    text_pids, image_pids = pairs.split.caption_pids.to(device), pairs.split.image_pids.to(device)
    batches = reading(args, subject.dataset)
    texts = next(text_batches(model, pairs, device, batch_size=batches["batch_size"]))[0].float()
    images = next(image_batches(model, pairs, device, **batches))[0].float()
    search(texts, images, 1)

    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def timed(phase: str, action: Callable[[], Any]) -> Any:
        done = _clock(device)
        result = action()
        seconds[phase].append(done())
        return result

    for _ in range(args.repeats):
        found = timed(PHASES[0], lambda: encode_images(model, pairs, device, **batches))
        images = found.to(device)
        found = timed(PHASES[1], lambda: encode_texts(model, pairs, device, batch_size=batches["batch_size"]))
        texts = found.to(device)
        ranked: tuple[Tensor, ...] = (texts, images, text_pids, image_pids)
        timed(PHASES[2], lambda ranked=ranked: ranking_metrics(*ranked))
        ranked = (images, texts, image_pids, text_pids)
        timed(PHASES[3], lambda ranked=ranked: ranking_metrics(*ranked))
    return seconds | {"together": [sum(values) for values in zip(*seconds.values(), strict=True)]}


def record(phase: str, subject: Subject, seconds: list[float]) -> dict[str, Any]:
    _, images, captions = subject.counts
    queries = {PHASES[0]: images, PHASES[1]: captions, PHASES[2]: captions, PHASES[3]: images}.get(phase)
    rate = {} if queries is None else {"items": queries, "per_second": round(queries / min(seconds), 1)}
    rounded = [round(value, 4) for value in seconds]
    return {"phase": phase, "seconds": rounded, "min": min(rounded), "median": statistics.median(rounded), **rate}


def table(records: list[dict[str, Any]]) -> str:
    rows = [
        (one["phase"], str(one.get("items", "")), f"{one['min']:.2f}", f"{one['median']:.2f}",
         f"{one['per_second']:.0f}" if "per_second" in one else "")
        for one in records
    ]  # fmt: skip
    return markdown(("phase", "items", "s, fastest", "s, median", "items/s, fastest"), rows)


def peak_mib(device: torch.device) -> dict[str, int]:
    peak = {"process": round(peak_process_bytes() / 2**20)}
    if device.type == "cuda":
        peak["GPU"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    return peak


def _clock(device: torch.device) -> Callable[[], float]:
    """Starts now; the result, called, gives the seconds since, when the device has done its work."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    return lambda: now() - start
