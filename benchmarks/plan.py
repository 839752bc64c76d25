"""What the GPU benchmark measures, the most important first, and how it keeps to its time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .cases import Case
from .providers import COMPILED, PEERS, REFERENCE, TORCH, TRITON

__all__ = ["OUT_OF_TIME", "Job", "gpu_jobs", "run_plan"]

OUT_OF_TIME = "not run: out of time"
PAPER, LARGE = {"L": 77, "N": 192, "D": 512}, {"L": 77, "N": 432, "D": 768}  # ViT-B/16 and ViT-L/14 at 384 x 128
EVERY = (REFERENCE, TORCH, TRITON)


@dataclass(frozen=True)
class Job:
    case: Case
    provider: str
    precision: str

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "case": self.case.name,
            **self.case.as_dict(),
            "provider": self.provider,
            "dtype": self.precision,
        }

    @property
    def expected_seconds(self) -> float:
        """A cautious guess, so that a job that cannot end in time is not begun."""
        if self.provider == COMPILED:
            return 25 if self.case.op == "asdm" else 75
        return 5


def gpu_jobs() -> list[Job]:
    """Every job once, in the order in which time is given to them."""
    efa = {B: Case("efa", B, **PAPER) for B in (64, 128, 256, 512, 1024)}
    captions = Case("efa", 128, **PAPER, mean_length=25)
    large = Case("efa", 128, **LARGE)
    maxsim = Case("maxsim", 128, **PAPER)
    asdm = {B: Case("asdm", B) for B in (64, 256, 1024, 16384, 65536)}
    parts = [Case("hard_similarity", 128, **PAPER), Case("sparse_aggregate", 128, **PAPER)]

    jobs: list[Job] = []

    def add(cases: Sequence[Case], names: Sequence[str], precisions: Sequence[str]) -> None:
        jobs.extend(Job(case, name, precision) for precision in precisions for case in cases for name in names)

    add([efa[128]], EVERY, ("bf16", "fp32", "tf32", "fp16"))
    add([maxsim], (REFERENCE, TRITON, *PEERS), ("bf16",))
    add([captions], (REFERENCE, TRITON), ("bf16", "fp32"))
    add([asdm[B] for B in (64, 256, 1024, 16384)], (REFERENCE, TRITON), ("fp32",))
    add([asdm[65536]], (TORCH, TRITON), ("fp32",))
    add([efa[1024]], (TRITON,), ("bf16",))
    add([efa[128]], (COMPILED,), ("bf16",))
    add([efa[64], efa[256], efa[512]], EVERY, ("bf16", "fp32"))
    add([large], EVERY, ("bf16", "fp32"))
    add(parts, EVERY, ("bf16", "fp32"))
    add([asdm[64], asdm[1024], asdm[16384]], (COMPILED,), ("fp32",))
    add([maxsim], (REFERENCE, TRITON, *PEERS), ("fp16",))
    add([maxsim], (REFERENCE, TRITON), ("fp32",))
    add([efa[64], efa[256], efa[512]], EVERY, ("tf32", "fp16"))
    add([large, captions], (REFERENCE, TRITON), ("tf32", "fp16"))
    add([asdm[256]], (COMPILED,), ("fp32",))
    add([efa[128]], (COMPILED,), ("fp32", "tf32", "fp16"))
    add([efa[64], efa[256]], (COMPILED,), ("bf16",))
    return list(dict.fromkeys(jobs))


def run_plan(
    jobs: Sequence[Job],
    measure: Callable[[Job], dict[str, Any]],
    *,
    clock: Callable[[], float],
    deadline: float,
    why_not: Callable[[Job], str | None] = lambda job: None,
) -> Iterator[dict[str, Any]]:
    """One record a job, in order, as soon as it is there. A job that would not end before the deadline is not begun."""
    for job in jobs:
        reason = why_not(job)
        if reason is not None:
            yield job.identity | {"status": f"not run: {reason}"}
        elif clock() + job.expected_seconds > deadline:
            yield job.identity | {"status": OUT_OF_TIME}
        else:
            yield job.identity | measure(job)
