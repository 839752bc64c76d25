"""The global batch on this machine's processes over Gloo: bytes that a rank receives, seconds, peak memory.

    python -m benchmarks distributed [--out benchmarks/results/distributed_cpu.json]

`received` says on paper what the counters find; docs/distributed.md is made from it, and every run compares the two.
Every case runs in fresh processes, one thread each; with more processes than cores, seconds include waiting for a core.
"""

import argparse
import inspect
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

import fmfa_losses
from fmfa_losses.losses.loss import Loss
from fmfa_losses.ops.options import GATHER

from . import ROOT, results
from .measure import peak_process_bytes
from .tables import markdown

BATCH, N, L, D = 16, 192, 77, 512
WORLDS, REPEATS = (1, 2, 3, 4), 3

# Every public loss without parameters, by its short name.
LOSSES: dict[str, type[Loss]] = {
    name.removesuffix("Loss").lower(): loss
    for name, loss in vars(fmfa_losses).items()
    if isinstance(loss, type) and issubclass(loss, Loss)
}


def takes(term: str, name: str) -> bool:
    return name in inspect.signature(LOSSES[term].forward).parameters


def received(
    term: str, gather: bool | str, world: int, *, b: int, L: int, D: int, size: int, weighted: bool = False
) -> tuple[int, int]:
    """Bytes that reach a rank in one forward and one backward, b pairs a rank, features of `size` bytes a number.

    Two features [b, D] of every rank, or EFA's joint embeddings [b, L, D]. Gradients and joint embeddings travel as
    float32. Identities count 8 bytes per pair, weights 4.
    """
    others, labels = world - 1, 4 * b * weighted
    if takes(term, "image_tokens"):
        block = gradient = b * L * D * 4
        transposed = 2 * others * b * b * 4  # S of texts and of images
    else:
        block, gradient, transposed = 2 * b * D * size, 2 * b * D * 4, 0
        labels += 8 * b * takes(term, "pids")
    forward = others * (block + labels) + transposed
    backward = others * gradient + transposed
    if gather == "ring" and world > 1:
        # The blocks go around again, and every gradient makes one step more than its block, back to its rank.
        backward = others * block + world * gradient + transposed
    return forward, backward


def columns(term: str, gather: bool | str, world: int, *, b: int, L: int, D: int, size: int) -> int:
    """Bytes of columns on a rank at one time in the forward: all, or the block in hand and the one that arrives."""
    block = b * L * D * 4 if takes(term, "image_tokens") else 2 * b * D * size
    return block * (min(world, 2) if gather == "ring" else world)


def inputs_of(loss: Loss, rank: int) -> dict[str, torch.Tensor]:
    """Features or tokens that want a gradient, and identities where the loss compares them."""
    torch.manual_seed(rank)
    shapes = {"image_tokens": (BATCH, N, D), "text_tokens": (BATCH, L, D)}
    image, text, *others = inspect.signature(loss.forward).parameters
    inputs = {name: torch.randn(shapes.get(name, (BATCH, D)), requires_grad=True) for name in (image, text)}
    option = loss.pids_option
    if "pids" in others and (option is None or getattr(loss, option[0]) == option[1]):
        inputs["pids"] = torch.arange(BATCH) + rank * BATCH
    return inputs


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts the bytes that collectives bring from other ranks."""
    count = {"bytes": 0}
    gather_name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    originals: dict[str, Callable[..., Any]] = {
        name: getattr(dist, name) for name in (gather_name, "all_to_all_single", "batch_isend_irecv")
    }
    world = dist.get_world_size()

    def all_gather(output: torch.Tensor, x: torch.Tensor, **kwargs: Any) -> Any:
        count["bytes"] += (world - 1) * x.nbytes
        return originals[gather_name](output, x, **kwargs)

    def all_to_all(output: torch.Tensor, x: torch.Tensor, taken: list[int], sent: list[int], **kwargs: Any) -> Any:
        count["bytes"] += output.nbytes - output.nbytes * taken[dist.get_rank()] // sum(taken)
        return originals["all_to_all_single"](output, x, taken, sent, **kwargs)

    def p2p(operations: list[Any]) -> Any:
        count["bytes"] += sum(p.tensor.nbytes for p in operations if p.op is dist.irecv)
        return originals["batch_isend_irecv"](operations)

    for name, wrapped in zip(originals, (all_gather, all_to_all, p2p), strict=True):
        setattr(dist, name, wrapped)
    try:
        yield count
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def measure(rank: int, world: int, folder: str, term: str, gather: bool | str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    loss: Any = LOSSES[term](gather=gather, equal_batches=True)
    inputs = inputs_of(loss, rank)

    def step() -> tuple[float, float, int, int]:
        dist.barrier()
        with counted() as count:
            start = time.perf_counter()
            value = loss(**inputs)
            forward, middle = count["bytes"], time.perf_counter()
            value.backward()
            return middle - start, time.perf_counter() - middle, forward, count["bytes"] - forward

    before = peak_process_bytes()
    _, *steps = [step() for _ in range(REPEATS + 1)]  # the first one exchanges the layout
    after = peak_process_bytes()
    if rank == 0:
        expected = received(term, gather, world, b=BATCH, L=L, D=D, size=4) if gather else (0, 0)
        result = {
            "term": term,
            "gather": gather,
            "ranks": world,
            "forward_seconds": [round(s[0], 4) for s in steps],
            "backward_seconds": [round(s[1], 4) for s in steps],
            "received_bytes": steps[0][2:],
            "received_bytes_on_paper": expected,
            "peak_growth_mib": (after - before) // 2**20,
        }
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def table(records: list[dict[str, Any]]) -> str:
    """One process, and the most processes of each way: a line a loss."""
    ranks = max(row["ranks"] for row in records)
    rows = []
    for term in dict.fromkeys(row["term"] for row in records):
        by_way = {row["gather"]: row for row in records if row["term"] == term and row["ranks"] in (1, ranks)}
        alone, every, ring = (by_way[way] for way in GATHER)
        growth = " / ".join(str(row["peak_growth_mib"]) for row in (alone, every, ring))
        rows.append(
            [
                LOSSES[term].__name__,
                _milliseconds(alone),
                _bytes(every),
                _milliseconds(every),
                _bytes(ring),
                _milliseconds(ring),
            ]
        )
        rows[-1].append(growth)
    head = [
        "loss",
        "alone, ms",
        f"True, {ranks} ranks: bytes",
        "ms",
        f"ring, {ranks} ranks: bytes",
        "ms",
    ]
    return markdown([*head, "growth of peak, MiB: alone / True / ring"], rows)


def _milliseconds(record: dict[str, Any]) -> str:
    """Medians of forward and backward."""
    return " + ".join(
        f"{1e3 * sorted(record[key])[REPEATS // 2]:.1f}" for key in ("forward_seconds", "backward_seconds")
    )


def _bytes(record: dict[str, Any]) -> str:
    return " + ".join(f"{number:,}" for number in record["received_bytes"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks distributed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/distributed_cpu.json")
    arguments = parser.parse_args(argv)
    head = results.head("distributed", "python -m benchmarks distributed", threads=1)  # of each process
    cases = []
    for term in LOSSES:
        for world in WORLDS:
            for gather in GATHER[1:] if world > 1 else (False,):
                with tempfile.TemporaryDirectory() as folder:
                    torch.multiprocessing.spawn(measure, (world, folder, term, gather), nprocs=world)
                    case = json.loads(Path(folder, "result.json").read_text())
                assert case["received_bytes"] == case["received_bytes_on_paper"], case
                cases.append(case)
                print(json.dumps(case))
    shape = {"pairs_per_rank": BATCH, "N": N, "L": L, "D": D, "dtype": "float32"}
    results.write(arguments.out, head | {"shape": shape, "records": cases})
    print(table(cases))
