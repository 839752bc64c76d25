"""Times candidate blocks of the hard-similarity kernels on this GPU and prints them, best first.

    python benchmarks/tune.py [--batch 128] [--patches 192] [--tokens 77] [--width 512] [--dtype bfloat16]

It changes nothing: the block tables are edited by hand, with the outcome in docs/kernels.md.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from fmfa_losses.kernels import hard_similarity
from fmfa_losses.kernels._launch import chip_class, precision

CANDIDATES = {
    # BLOCK_M, BLOCK_N, BLOCK_D, num_warps, num_stages
    "MATCH": itertools.product((64, 128), (128, 256), (32, 64), (4, 8), (2, 3, 4)),
    # BLOCK_OWN, BLOCK_SUM, BLOCK_OUT, num_warps, num_stages
    "DE": itertools.product((64, 128), (16, 32, 64), (128, 256), (4, 8), (2, 3, 4)),
    # BLOCK_OWN, BLOCK_OUT, num_warps, num_stages
    "DX": itertools.product((16, 32, 64), (64, 128, 256), (4, 8), (1, 2, 3)),
}


def milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time between two events around one call, after a warm-up."""
    call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def sweep(table: str, call: Callable[[], object], key: tuple[str, str]) -> Iterator[tuple[float, tuple[int, ...]]]:
    for block in CANDIDATES[table]:
        with mock.patch.dict(getattr(hard_similarity, table), {key: block}):
            try:
                yield milliseconds(call), block
            except Exception as error:  # a block that does not fit is an outcome, too
                print(f"{table} {block}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("batch", 128), ("patches", 192), ("tokens", 77), ("width", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options = parser.parse_args()
    dtype, B = getattr(torch, options.dtype), options.batch

    def unit(tokens: int) -> torch.Tensor:
        return F.normalize(torch.randn(B, tokens, options.width, device="cuda"), dim=-1).to(dtype)

    x, e = unit(options.patches), unit(options.tokens)
    key = chip_class(x.device), precision(dtype)
    sim, *saved = hard_similarity.forward(x, e, None, None, "lse", 1.0, True)
    dsim = torch.randn_like(sim)
    calls = {
        "MATCH": lambda: hard_similarity.forward(x, e, None, None, "lse", 1.0, True),
        "DE": lambda: hard_similarity.backward(dsim, sim, *saved, x, e, None, None, "lse", 1.0),
        "DX": lambda: hard_similarity.backward(dsim, sim, *saved, x, e, None, None, "lse", 1.0),
    }
    print(f"{torch.cuda.get_device_name()}, {options}")
    for table, call in calls.items():
        for time, block in sorted(sweep(table, call, key))[:10]:
            print(f"{table} {time:8.3f} ms  {block}")
    tiles = milliseconds(lambda: hard_similarity.backward(dsim, sim, *saved, x, e, None, None, "lse", 1.0, False))
    print(f"backward with dx from weight tiles {tiles:8.3f} ms, by gather {milliseconds(calls['DX']):8.3f} ms")


if __name__ == "__main__":
    main()
