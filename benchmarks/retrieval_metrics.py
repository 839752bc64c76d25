"""`retrieval_metrics` against the argsort evaluator: seconds, CPU seconds, peak memory of the process.

    python -m benchmarks retrieval-metrics [--out benchmarks/results/retrieval_metrics_cpu.json]

Every case runs in a process of its own, so that one case's memory does not count for the next. Features are
drawn around one centre per identity, 946 identities as in the test split of ICFG-PEDES.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fmfa_losses.retrieval import retrieval_metrics

from . import ROOT, results
from .measure import peak_process_bytes

IDENTITIES, WIDTH, NOISE = 946, 512, 4.0
# (evaluator, texts = images); 19848 is ICFG-PEDES, where the argsort evaluator needs about 13 GB.
CASES = [("argsort", 3000), ("ours", 3000), ("argsort", 6000), ("ours", 6000), ("ours", 19848)]


def argsort_metrics(
    text_features: Tensor, image_features: Tensor, text_pids: Tensor, image_pids: Tensor
) -> dict[str, dict[str, float]]:
    """What published evaluators compute: sort the gallery of every query, then look for the matches."""
    sim = F.normalize(text_features, dim=1) @ F.normalize(image_features, dim=1).T

    def direction(sim: Tensor, query_pids: Tensor, gallery_pids: Tensor) -> dict[str, float]:
        order = sim.argsort(dim=1, descending=True)
        matches = gallery_pids[order] == query_pids[:, None]
        found = matches.cumsum(1)
        position = torch.arange(1, sim.shape[1] + 1)
        relevant = matches.sum(1)
        last = (position * matches).amax(1)
        precision = (found / position * matches).sum(1) / relevant
        cmc = {f"R{k}": 100 * (found[:, k - 1] > 0).double().mean().item() for k in (1, 5, 10)}
        return cmc | {
            "mAP": 100 * precision.double().mean().item(),
            "mINP": 100 * (relevant / last).double().mean().item(),
        }

    return {"t2i": direction(sim, text_pids, image_pids), "i2t": direction(sim.T, image_pids, text_pids)}


def our_metrics(*inputs: Tensor) -> dict[str, dict[str, float]]:
    metrics = retrieval_metrics(*inputs)
    return {
        name: {f"R{k}": v for k, v in one.cmc.items()} | {"mAP": one.mAP, "mINP": one.mINP}
        for name, one in (("t2i", metrics.t2i), ("i2t", metrics.i2t))
    }


def inputs(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(IDENTITIES, WIDTH, generator=generator)
    pids = torch.arange(size) % IDENTITIES
    texts, images = (centres[pids] + NOISE * torch.randn(size, WIDTH, generator=generator) for _ in range(2))
    return texts, images, pids, pids


def run(evaluator: str, size: int, repeats: int) -> dict[str, object]:
    arguments = inputs(size)
    evaluate = {"ours": our_metrics, "argsort": argsort_metrics}[evaluator]
    evaluate(*inputs(200))  # threads and libraries are up
    before, seconds, cpu_seconds = peak_process_bytes(), [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        metrics = evaluate(*arguments)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "evaluator": evaluator,
        "texts": size,
        "images": size,
        "width": WIDTH,
        "identities": IDENTITIES,
        "dtype": "float32",
        "seconds": [round(s, 3) for s in seconds],
        "cpu_seconds": [round(s, 3) for s in cpu_seconds],
        "peak_process_mib": round(peak_process_bytes() / 2**20),
        "process_before_mib": round(before / 2**20),
        "metrics": metrics,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks retrieval-metrics", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/retrieval_metrics_cpu.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", nargs=2, metavar=("EVALUATOR", "SIZE"), help="one case, as JSON")
    options = parser.parse_args(argv)
    if options.case:
        print(json.dumps(run(options.case[0], int(options.case[1]), options.repeats)))
        return

    head, cases = results.head("retrieval-metrics", "python -m benchmarks retrieval-metrics"), []
    for evaluator, size in CASES:
        command = [sys.executable, "-m", "benchmarks", "retrieval-metrics", "--case", evaluator, str(size)]
        command += ["--repeats", str(options.repeats)]
        case = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
        cases.append(case)
        print(f"{evaluator:8} {size:6}  {min(case['seconds']):7.2f} s  {case['peak_process_mib']:6} MiB")

    def speedup(clock: str) -> dict[str, float]:
        best = {(case["evaluator"], case["texts"]): min(case[clock]) for case in cases}
        return {str(n): round(best["argsort", n] / best["ours", n], 2) for n in (3000, 6000)}

    faster = {"speedup": speedup("seconds"), "cpu_speedup": speedup("cpu_seconds")}
    results.write(options.out, head | faster | {"records": cases})
    print("speedup", faster["speedup"], "in CPU time", faster["cpu_speedup"])
