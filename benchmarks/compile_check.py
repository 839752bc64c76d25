"""Compiles every kernel as a GPU would get it, without a GPU, and reads what the compiler says.

    python -m benchmarks compile-check [--chip sm_90 ...] [--workers 2] [--record FILE | --against FILE]

The launchers run on meta tensors and their launches are recorded (`_launch.recording`); a stand-in for the chip then
specialises them through Triton's own JIT (`stand_in.gpu`). What is compiled here is what runs there, with the same
arguments, compile-time sizes and block table. A launch fails when it does not compile, when a block asks for more
shared memory or registers than the chip has, when registers spill to memory, when a hard-similarity match for sm_90
does not use Hopper's matrix instruction, or when it costs more than in a table of before (`compiled.py`).
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import compiled, stand_in
from benchmarks.measure import matmul_precision
from benchmarks.sass import amd_inner_loops, inner_loops, instruction_count

CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")
REGISTERS = 65536  # of an NVIDIA multiprocessor, for one block at most; the compiler does not check
# float32 by torch.set_float32_matmul_precision: highest, medium, and high, which has a match of its own.
KINDS = ("float32", "tf32", "tf32x3", "float16", "bfloat16")


@dataclass(frozen=True)
class Report:
    chip: str
    kind: str
    kernel: str
    config: str
    shared: int = 0
    limit: int = 0
    registers: int = 0
    threads: int = 0
    spills: int = 0  # bytes of stack (NVIDIA), spilled registers (AMD)
    wgmma: bool = False
    instructions: int = 0  # of machine code, NVIDIA
    loops: tuple[int, ...] = ()  # instructions of each innermost loop, in order of address
    error: str = ""
    seconds: float = 0.0  # of processor time

    @property
    def failures(self) -> list[str]:
        failures = [self.error] if self.error else []
        if self.shared > self.limit:
            failures.append(f"{self.shared} bytes of shared memory, the chip has {self.limit}")
        if self.chip.startswith("sm_") and self.registers * self.threads > REGISTERS:
            failures.append(f"{self.registers} registers for each of {self.threads} threads, a block has {REGISTERS}")
        if self.spills:
            failures.append(f"{self.spills} spilled")
        match = self.kernel in ("_match_kernel", "_packed_match_kernel")
        if self.chip == "sm_90" and match and self.kind != "float32" and not self.wgmma:
            failures.append("no wgmma")
        return failures


def record(chip: str, kind: str) -> list[Any]:
    """The launches of every operation at the shapes that pick every entry of the block tables."""
    from fmfa_losses.kernels import asdm_blocks, asdm_tiles
    from fmfa_losses.kernels._launch import recording

    from fmfa_losses.ops.similarity_distribution import blocks
    from fmfa_losses.ops.similarity_distribution.api import RowLoss

    dtype = getattr(torch, kind) if hasattr(torch, kind) else torch.float32
    before = torch.get_float32_matmul_precision()
    matmul_precision(kind)
    empty = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    try:
        with recording(chip) as launches:
            _hard_similarity(chip, empty)
            if kind == "tf32x3":  # all other kernels are those of TF32
                return launches
            _aggregation(empty)
            _unit_rows(empty)
            _linear_cross_entropy(empty)
            if kind == "float32":  # whatever the tokens are
                _ranking(empty)
            # Batches of every size: the paper's loss, and rows of one direction with all that a row can carry. One
            # pair of one number, on one chip: an argument of 1 is a constant to the compiler.
            paper = RowLoss(alpha=10.0)
            full = RowLoss(alpha=0.1, positive="any", both=False, offset=16)
            cases = [(B, B, 512, paper) for B in (128, 512, 2048, 4096)]
            cases += [(512, 1024, 512, full), (2048, 4096, 512, full)]
            if chip == CHIPS[0]:
                cases += [(1, 1, 1, paper), (128, 128, 512, RowLoss("cross_entropy"))]
            for R, C, D, spec in cases:
                queries, keys, pids = empty(R, D), empty(C, D), empty(C, dtype=torch.int64)
                image_ids, scale = (None, None) if spec.both else (pids, empty(dtype=torch.float32))
                if asdm_tiles.takes(queries, keys):
                    forward, backward = asdm_tiles.forward, asdm_tiles.backward
                    arguments, last = (queries, keys, pids, image_ids, scale, 50.0), (spec,)
                elif kind == "tf32":  # blocks are read alike, however they were multiplied
                    continue
                else:
                    forward, backward = blocks.forward, blocks.backward
                    arguments = (queries, keys, pids, image_ids, 50.0 if scale is None else scale)
                    last = (spec, asdm_blocks)
                loss, *saved = forward(*arguments, *last)
                backward(torch.empty_like(loss), *saved, *arguments, scale is not None, *last)
        return launches
    finally:
        torch.set_float32_matmul_precision(before)


def _hard_similarity(chip: str, empty: Callable[..., torch.Tensor]) -> None:
    """Tokens of the paper without and with masks, samples of e of the wider classes, and x of several tiles of tokens.

    dx and de do not know the pool. EFA writes dx over the unit tokens, and adds the second de to the first.
    """
    from fmfa_losses.kernels import hard_similarity, match, token_lists

    if chip == "sm_90" and empty().dtype in (torch.float16, torch.bfloat16):  # not in use, but it compiles
        match.PERSISTENT = True
        hard_similarity.forward(empty(128, 192, 512), empty(128, 77, 512), None, None, "lse", 1.0, True)
        match.PERSISTENT = False
    for P, Q, masked, pool, scale, D in (
        (192, 77, False, "lse", 1.0, 512),
        (77, 77, True, "lse", 1.0, 512),
        (77, 100, False, "lse", 1.0, 512),
        (77, 192, False, "sum", 1.0, 1024),
        (301, 301, True, "lse", 1.0, 512),
        (77, 77, False, "log_mean", 0.1, 512),
        (77, 77, True, "log_mean", 0.1, 512),
    ):
        x, e = empty(128, P, D), empty(128, Q, D)
        masks = (empty(128, P, dtype=torch.bool), empty(128, Q, dtype=torch.bool)) if masked else (None, None)
        sim, matches = hard_similarity.forward(x, e, *masks, pool, scale, True)
        hard_similarity.forward(x, e, *masks, pool, scale, False)
        if pool == "log_mean":
            continue
        hard_similarity.backward(sim, matches, x, e, *masks, pool)
        lists = [token_lists.make(mask) if masked else None for mask in masks]
        inverse, de = empty(128, P, dtype=torch.float32), empty(128, Q, D, dtype=torch.float32)
        for accumulate in (False, True):
            hard_similarity.add_gradients(sim, matches, x, x, e, masks[0], pool, *lists, inverse, de, accumulate)


def _aggregation(empty: Callable[..., torch.Tensor]) -> None:
    """Whole rows of scores at the paper's size and at ViT-L/14's, and rows too long for one tile.

    Once without and once with masks, the gradients then added to others.
    """
    from fmfa_losses.kernels import aggregation

    for N in (192, 432, 1025):
        image, text = empty(128, N, 512), empty(128, 77, 512)
        masks = empty(128, N, dtype=torch.bool), empty(128, 77, dtype=torch.bool)
        joint, row_sum = aggregation.forward(image, text, None, None, None)
        aggregation.backward(joint, image, text, None, None, row_sum)
        if N != 432:
            aggregation.forward(image, text, *masks, None)
            aggregation.backward(joint, image, text, masks[0], None, row_sum, image, text)


def _unit_rows(empty: Callable[..., torch.Tensor]) -> None:
    """Tokens with a mask, and joint embeddings, whose gradient is float32, with and without."""
    from fmfa_losses.kernels import unit_rows

    x, mask, joint = empty(128, 77, 512), empty(128, 77, dtype=torch.bool), empty(128, 77, 512, dtype=torch.float32)
    unit_rows.forward(x, mask, x.dtype)
    for some in (None, mask):
        unit, inverse = unit_rows.forward(joint, some, x.dtype)
        unit_rows.backward(joint, unit, inverse, some, joint, unit=True)
        unit_rows.backward(x, x, inverse, some, x)
    unit_rows.forward(empty(128, 77, 2048), None, x.dtype)  # rows wider than one tile


def _linear_cross_entropy(empty: Callable[..., torch.Tensor]) -> None:
    """All words of a batch with the vocabulary, in several chunks; weights of float32 as well, which autocast casts."""
    from fmfa_losses.kernels import linear_cross_entropy, linear_cross_entropy_gradient

    states, targets, dloss = empty(4928, 512), empty(4928, dtype=torch.int64), empty(dtype=torch.float32)
    for dtype in dict.fromkeys((states.dtype, torch.float32)):
        weight, bias = empty(49408, 512, dtype=dtype), empty(49408, dtype=dtype)
        *_, statistics = linear_cross_entropy.forward(states, weight, bias, targets, 0)
        linear_cross_entropy_gradient.backward(dloss, statistics, states, weight, bias, targets, 0, True, True, True)


def _ranking(empty: Callable[..., torch.Tensor]) -> None:
    """All other pairs, and those of other identities with a scale that learns."""
    from fmfa_losses.kernels import ranking

    sim, pids, scale = empty(128, 128), empty(128, dtype=torch.int64), empty()
    for arguments in ((None, None, 0.1, 1.0), (pids, scale, 0.1, 1.0)):
        loss, *saved = ranking.forward(sim, sim, *arguments)
        ranking.backward(loss, *saved, sim, sim, *arguments, arguments[1] is not None)


def specialised(chip: str, launches: list[Any]) -> list[tuple[Any, Any]]:
    """Launches whose kernels differ, and each kernel as the JIT of that chip specialises it."""
    kernels = []
    with stand_in.gpu(chip=chip) as device:
        for launch in launches:
            before = len(device.compiled)
            launch.kernel[launch.grid](*launch.args, **launch.options)
            kernels += [(launch, kernel) for kernel in device.compiled[before:]]
    return kernels


def compile_launch(chip: str, kind: str, launch: Any) -> Report:
    ((_, kernel),) = specialised(chip, [launch])
    return compile_kernel(chip, kind, launch, kernel)


def compile_kernel(chip: str, kind: str, launch: Any, kernel: Any) -> Report:
    from fmfa_losses.kernels._launch import SHARED_MEMORY

    before = os.times()
    report = {"chip": chip, "kind": kind, "kernel": kernel.name, "config": describe(launch)}
    try:
        binary = kernel.compile()
    except Exception as exception:
        return Report(**report, error=f"{type(exception).__name__}: {exception}"[:300])
    instructions = 0
    if kernel.target.backend == "hip":
        text = binary.asm["amdgcn"]
        number = lambda pattern: sum(int(n) for n in re.findall(pattern, text))  # noqa: E731
        # Spilled scalar registers stay on the chip, in lanes of vector registers.
        registers, spills = number(r"\.vgpr_count:\s+(\d+)"), number(r"\.vgpr_spill_count:\s+(\d+)")
        loops = amd_inner_loops(text)
    else:
        registers, spills = resource_usage(binary.asm["cubin"])
        instructions = instruction_count(binary.asm["cubin"])
        loops = inner_loops(binary.asm["cubin"], kernel.target.arch)
    return Report(
        **report,
        shared=binary.metadata.shared,
        limit=SHARED_MEMORY[chip],
        registers=registers,
        threads=launch.options["num_warps"] * kernel.target.warp_size,
        spills=spills,
        wgmma="wgmma.mma_async" in binary.asm.get("ptx", ""),
        instructions=instructions,
        loops=loops,
        seconds=sum(os.times()[:4]) - sum(before[:4]),
    )


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of stack and local memory a thread: a kernel without arrays has none."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    use = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return use["REG"], use["STACK"] + use["LOCAL"]


def describe(launch: Any) -> str:
    """Blocks, warps, stages and the switches that are on."""
    options = launch.options
    blocks = "x".join(str(v) for k, v in options.items() if k.startswith("BLOCK_"))
    flags = [k.lower() if v is True else f"{k.lower()} {v}" for k, v in options.items()
             if k in ("UNIT", "UNROLL", "POOL") or v is True]  # fmt: skip
    return f"{blocks} w{options['num_warps']} s{options.get('num_stages', '-')} {' '.join(flags)}"


def check(chip: str, kinds: Sequence[str], part: int = 0, parts: int = 1) -> list[tuple[int, Report]]:
    """Each report with its place in the list of all kernels of a chip: of every `parts`-th of those that differ.

    A kernel that several kinds share, because it multiplies nothing, is compiled once and reported for each.
    """
    reports: list[tuple[int, Report]] = []
    compiled: dict[tuple[str, str], Report | None] = {}  # None: of another part
    every = ((kind, *kernel) for kind in kinds for kernel in specialised(chip, record(chip, kind)))
    for place, (kind, launch, kernel) in enumerate(every):
        same = (kernel.source.hash(), repr(kernel.options))
        if same in compiled:
            report = compiled[same] and replace(compiled[same], kind=kind, config=describe(launch), seconds=0.0)
        else:
            mine = len(compiled) % parts == part
            report = compiled[same] = compile_kernel(chip, kind, launch, kernel) if mine else None
        if report:
            reports.append((place, report))
    return reports


NUMBERS = f"{'shared':>6} {'regs':>4} {'spills':>6} {'instr':>5}"
HEADER = f"{'kernel':18} {'config':56} {'dtype':8} {'chip':6} {NUMBERS} wgmma loops"


def line(r: Report) -> str:
    loops = ",".join(map(str, r.loops)) or "-"
    return (
        f"{r.kernel.strip('_'):18} {r.config:56} {r.kind:8} {r.chip:6} {r.shared:6} {r.registers:4} {r.spills:6} "
        f"{r.instructions or '-':>5} {'yes' if r.wgmma else '-':5} {loops}" + "".join(f"  <- {w}" for w in r.failures)
    ).rstrip()


def main(argv: list[str] | None = None) -> int:
    import triton

    parser = argparse.ArgumentParser(prog="python -m benchmarks compile-check", description=__doc__.splitlines()[0])
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=CHIPS)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--spills", action="store_true", help="spilled registers are listed and do not fail")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what the kernels need there")
    parser.add_argument("--against", type=Path, metavar="FILE", help="fail where a kernel needs more than there")
    options = parser.parse_args(argv)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what triton does where nothing is set, without its warning
    start = time.perf_counter()
    with ProcessPoolExecutor(options.workers) as pool:
        parts = range(options.workers)
        jobs = [[pool.submit(check, chip, options.kind, part, len(parts)) for part in parts] for chip in options.chip]
        print(f"triton {triton.__version__}\n{HEADER}")
        reports = []
        for of_chip in jobs:
            placed = dict(pair for job in of_chip for pair in job.result())
            reports += [placed[place] for place in sorted(placed)]
            print(*map(line, reports[-len(placed) :]), sep="\n", flush=True)
    # Spilling costs time and changes no number.
    accepted = {f"{report.spills} spilled" for report in reports if options.spills}
    bad = sum(bool({*report.failures} - accepted) for report in reports)
    busy = sum(report.seconds for report in reports)
    took = time.perf_counter() - start
    print(f"{len(reports)} kernels compiled in {took:.0f} s ({busy:.0f} s of processor), {bad} fail")
    if options.against:
        bad += compiled.check(reports, options.against, triton.__version__)
    if options.record:
        compiled.write(options.record, compiled.rows(reports), triton.__version__)
        print(f"written to {options.record}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
