"""Gradient norms of SDM and A-SDM from random weights, step by step, under Adam with eps 1e-3.

    python -m benchmarks gradient-norms [--out benchmarks/results/gradient_norms_cpu.json]

The two-stream model of the rendered pedestrians and one batch of 64 people; the same batch at every step. *Moved* is
how far the first step moves the weights, as a norm over the learning rate: Adam's eps is added to the root of the
squared gradient, so where a gradient is far below eps the step is proportional to it.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmfa_losses import ASDMLoss

from . import ROOT, results
from .person_retrieval.data import Pairs, rendered_splits
from .person_retrieval.models import TwoStream, WordTokenizer
from .tables import markdown, number

EPS, LR = 1e-3, 3e-4  # Adam's eps of IRRA, RDE and FMFA; the learning rate of docs/experiments.md
# What A-SDM is trained with: alpha at each step of how many, and the norm that gradients are clipped to.
WAYS: dict[str, tuple[Callable[[int, int], float], float | None]] = {
    "SDM (alpha 0)": (lambda step, steps: 0.0, None),
    "alpha 0.1": (lambda step, steps: 0.1, None),
    "alpha 1": (lambda step, steps: 1.0, None),
    "alpha 10": (lambda step, steps: 10.0, None),
    "alpha 10, detach_weight": (lambda step, steps: 10.0, None),
    "alpha from 0 to 10": (lambda step, steps: 10.0 * step / (steps - 1), None),
    "alpha 10, clipped to 100": (lambda step, steps: 10.0, 100.0),
}


def batch(people: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pixels, token ids and identities of one pair a person, and the size of the vocabulary."""
    split = rendered_splits({"train": people}, seed=0)["train"]
    tokenizer = WordTokenizer(split.captions, context_length=40)
    pairs = Pairs(split, tokenizer(split.captions), size=(96, 32), seed=0)
    of_each = range(0, len(pairs), len(pairs) // people)
    columns = zip(*((pairs[i]["pixels"], pairs[i]["token_ids"], pairs[i]["pids"]) for i in of_each), strict=True)
    pixels, token_ids, pids = (torch.stack([torch.as_tensor(x) for x in column]) for column in columns)
    return pixels, token_ids, pids, tokenizer.vocab_size


def train(way: str, seed: int, steps: int, inputs: tuple[Tensor, Tensor, Tensor, int]) -> dict[str, Any]:
    alpha, clip = WAYS[way]
    pixels, token_ids, pids, vocab_size = inputs
    torch.manual_seed(seed)
    model = TwoStream(vocab_size, context_length=token_ids.shape[1])
    parameters = [*model.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=LR, eps=EPS)
    norms, values, moved = [], [], 0.0
    for step in range(steps):
        image, text = model.encode_image(pixels)[0], model.encode_text(token_ids)[0]
        loss = ASDMLoss(alpha=alpha(step, steps), detach_weight="detach" in way)(image, text, pids)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip or float("inf"))  # the norm before it is clipped
        before = [p.detach().clone() for p in parameters] if step == 0 else []
        optimizer.step()
        for parameter, old in zip(parameters, before, strict=step == 0):
            moved += float((parameter.detach() - old).square().sum())
        norms.append(round(float(norm), 2))
        values.append(round(float(loss.detach()), 2))
    return {"way": way, "seed": seed, "moved": round(moved**0.5 / LR, 1), "norms": norms, "values": values}


def table(records: list[dict[str, Any]]) -> str:
    """A line each way: means over the seeds."""

    def mean(way: str, figure: Callable[[dict[str, Any]], float]) -> float:
        of_way = [figure(row) for row in records if row["way"] == way]
        return sum(of_way) / len(of_way)

    first = mean("SDM (alpha 0)", lambda row: row["norms"][0])
    rows = []
    for way in dict.fromkeys(row["way"] for row in records):
        norm = mean(way, lambda row: row["norms"][0])
        figures = [mean(way, lambda row: max(row["norms"])), mean(way, lambda row: row["norms"][-1])]
        figures.append(mean(way, lambda row: row["moved"]))
        rows.append([way, number(norm), f"{norm / first:.1f}x", *map(number, figures)])
    return markdown(["", "norm at the first step", "of SDM's", "largest", "at the last step", "moved"], rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gradient-norms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--people", type=int, default=64, metavar="B")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gradient_norms_cpu.json", metavar="FILE")
    options = parser.parse_args(argv)
    note = f"{options.people} pairs, {options.steps} steps, lr {LR:g}, eps {EPS:g}, tau 0.02"
    head, inputs = (
        results.head("gradient-norms", "python -m benchmarks gradient-norms", note=note),
        batch(options.people),
    )
    records = [train(way, seed, options.steps, inputs) for way in WAYS for seed in range(options.seeds)]
    results.write(options.out, head | {"records": records})
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
