"""What `benchmarks gpu` does: stages in the order in which time is given to them, and the jobs of each."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..cases import Case
from ..providers import AUTOTUNED, COMPILED, PEERS, REFERENCE, RELEASED, TORCH, TRITON
from .alternatives import ALTERNATIVES
from .largest_batch import CARDS

__all__ = ["LARGE_TOY", "STAGES", "Job", "Stage", "Step", "gpu_jobs", "stage_jobs", "toy"]

PAPER, LARGE = {"L": 77, "N": 192, "D": 512}, {"L": 77, "N": 432, "D": 768}  # ViT-B/16 and ViT-L/14 at 384 x 128
EVERY = (REFERENCE, TORCH, TRITON)
BOTH = ("eager", "graph")
STEPS = (RELEASED, TRITON)  # whose losses a training step has; what is compared with comes first
LARGE_TOY = 8  # pairs of a dry run that stand for more than 1024


@dataclass(frozen=True)
class Stage:
    letter: str
    name: str
    seconds: float  # of nine and a half minutes; what a stage leaves goes to those after it
    proves: str


STAGES = (
    Stage("a", "exact", 40, "every kernel at the paper's size against float64, poisoned memory, equal bits twice"),
    Stage("b", "alone", 20, "each kernel alone beside its prediction and its least time"),
    Stage("c", "alternatives", 20, "entries of the block tables against the other candidate"),
    Stage("d", "losses", 95, "EFA and A-SDM, eager and as CUDA graphs, against PyTorch and torch.compile"),
    Stage("e", "peers", 95, "MaxSim against late-interaction-kernels and flash-maxsim"),
    Stage("f", "wider", 40, "float32 and TF32, short captions, large batches, ViT-L/14"),
    Stage("g", "tests", 60, "tests/gpu, one outcome per test"),
    Stage("h", "max-autotune", 90, "torch.compile at its best"),
    Stage(
        "i", "step", 90, "the whole training step of CLIP ViT-B/16, released losses against ours: time, memory, batch"
    ),
)


class Step(NamedTuple):
    """The training step at B pairs, or at the most that a card of so many GB takes."""

    B: int | None = None
    card: int | None = None

    @property
    def name(self) -> str:
        return f"step, B {self.B}" if self.card is None else f"step, card of {self.card} GB"

    def as_dict(self) -> dict[str, Any]:
        return {"B": self.B} if self.card is None else {"card_gb": self.card}


@dataclass(frozen=True)
class Job:
    """One thing that the worker does; it writes one record for each of its `identities`, at least."""

    stage: str
    kind: str  # what the worker makes of it: ceilings, exact, kernels, alternative, figure, tests, step, largest
    case: Case | None = None
    provider: str = TRITON
    precision: str = "bf16"
    modes: tuple[str, ...] = ("eager",)
    guess: float = 5.0  # seconds, cautious: our kernels are compiled first; a job is killed at twice its guess
    prebuilt: float | None = None  # seconds where our kernels are in a cache; None: as many as its guess
    whole: bool = True  # else what it writes until its stage must end is worth having
    alternative: int | None = None  # row of ALTERNATIVES
    step: Step | None = None

    def seconds(self, prebuilt: bool) -> float:
        """That must be left for it to begin."""
        return self.prebuilt if self.prebuilt is not None and (prebuilt or not self.whole) else self.guess

    @property
    def identities(self) -> list[dict[str, Any]]:
        """What every record of this job says about where it belongs."""
        identity: dict[str, Any] = {"stage": self.stage, "kind": self.kind}
        if self.case is not None:
            identity |= {"case": self.case.name, **self.case.as_dict(), "provider": self.provider}
            identity["dtype"] = self.precision
        if self.step is not None:
            identity |= {"case": self.step.name, **self.step.as_dict(), "provider": self.provider}
            identity["dtype"] = self.precision
        if self.alternative is not None:
            row = ALTERNATIVES[self.alternative]
            identity |= {"table": row.name, "number": self.alternative}
        return [identity | {"mode": mode} for mode in self.modes] if self.kind == "figure" else [identity]


def stage_jobs(letter: str) -> list[Job]:
    """The jobs of a stage, the most important first."""
    return list(dict.fromkeys(_JOBS[letter]()))


def gpu_jobs(letters: Iterable[str] | None = None, *, dry: bool = False) -> list[Job]:
    """All jobs of the chosen stages in the order of STAGES. The ceilings are measured before the first figure."""
    chosen = [stage.letter for stage in STAGES if letters is None or stage.letter in letters]
    jobs = [job for letter in chosen for job in stage_jobs(letter)]
    needs = next((number for number, job in enumerate(jobs) if job.kind in ("kernels", "figure")), None)
    if needs is not None:
        jobs.insert(needs, Job(jobs[needs].stage, "ceilings", guess=10, prebuilt=3))
    return list(dict.fromkeys(map(_dry, jobs))) if dry else jobs


def _dry(job: Job) -> Job:
    """The same job for a dry run: Triton's interpreter knows no bfloat16, a CPU no TF32, and tests/gpu is skipped."""
    if job.step is not None and job.step.B is not None:
        return replace(job, step=Step(int(math.log2(job.step.B)) - 4))
    if job.case is None:
        return replace(job, guess=30, prebuilt=30) if job.kind == "tests" else job
    precision = {"bf16": "fp16", "tf32": "fp32", "tf32x3": "fp32"}.get(job.precision, job.precision)
    return replace(job, case=toy(job.case), precision=precision)


def toy(case: Case) -> Case:
    """The same case at a size that a CPU takes at once; different cases stay different."""
    D = {128: 16, 512: 32, 768: 48}[case.D]
    N = {192: 6, 432: 7, 1024: 8, 77: 5}[case.N]
    L, mean = (5 if case.L > 32 else 4), case.mean_length and 3
    return replace(case, B=int(math.log2(case.B)) - 3, L=L, N=N, D=D, mean_length=mean)


def _efa(B: int, **sizes: Any) -> Case:
    return Case("efa", B, **PAPER | sizes)


def _figures(
    stage: str,
    cases: Sequence[Case],
    names: Sequence[str],
    precisions: Sequence[str],
    modes: tuple[str, ...] = ("eager",),
) -> list[Job]:
    return [
        Job(stage, "figure", case, name, precision, modes, *_guess(case, name))
        for precision in precisions
        for case in cases
        for name in names
    ]


def _guess(case: Case, provider: str) -> tuple[float, float]:
    """A job's guess, and what it should take where our kernels are prebuilt."""
    if provider in PEERS:  # autotuning, most of it the compiler's: 3 to 6 s at D 128 on two cores, 12 to 19 s at D 512
        return (30.0, 15.0) if case.D == 128 else (45.0, 25.0)
    if provider in (AUTOTUNED, COMPILED):
        return (75.0, 75.0) if provider == AUTOTUNED else (25.0, 15.0)
    large = case.B >= (512 if case.op == "efa" else 65536)
    return (20.0, 10.0) if large else (20.0 if provider == TRITON else 5.0, 3.0)


def _exact() -> list[Job]:
    patches, text = Case("hard_similarity", 128, **PAPER), Case("hard_similarity", 128, **PAPER | {"N": 77})
    cases = [
        Case("sparse_aggregate", 128, **PAPER),
        patches,
        replace(patches, mean_length=25),
        text,
        Case("maxsim", 128, **PAPER),
        Case("asdm", 128),
        Case("asdm", 2048),
    ]
    some = [cases[0], patches, cases[5]]
    plan = [(case, precision) for precision in ("bf16", "fp32") for case in cases]
    plan += [(case, precision) for precision in ("tf32", "fp16", "tf32x3") for case in some]
    return [Job("a", "exact", case, TRITON, precision, guess=15, prebuilt=3) for case, precision in plan]


def _alone() -> list[Job]:
    cases = [(_efa(128), "bf16"), (Case("asdm", 64), "fp32"), (Case("asdm", 1024), "fp32"), (_efa(128), "fp32")]
    cases += [(_efa(128, mean_length=25), "bf16"), (_efa(128), "tf32x3"), (_efa(128), "tf32")]
    cases += [(Case("asdm", 16384), "fp32")]
    return [Job("b", "kernels", case, TRITON, precision, guess=20, prebuilt=3) for case, precision in cases]


def _alternatives() -> list[Job]:
    rows = enumerate(ALTERNATIVES)
    return [
        Job("c", "alternative", row.case, TRITON, row.precision, guess=20, prebuilt=3, alternative=n) for n, row in rows
    ]


def _losses() -> list[Job]:
    jobs = _figures("d", [_efa(128), _efa(64)], EVERY, ("bf16",), BOTH)
    small = [Case("asdm", B) for B in (64, 256, 1024)]
    jobs += _figures("d", [*small, Case("asdm", 16384)], (REFERENCE, TRITON, COMPILED), ("fp32",), BOTH)
    jobs += _figures("d", [Case("asdm", 65536)], (TORCH, TRITON), ("bf16",))
    jobs += _figures("d", [Case("asdm", 65536)], (TORCH, TRITON), ("fp32",), BOTH)
    jobs += _figures("d", [*small, Case("asdm", 16384)], (TORCH,), ("fp32",), BOTH)
    return jobs + _figures("d", [Case("asdm", 65536)], (REFERENCE, COMPILED), ("fp32",), BOTH)  # if 128 GiB are free


def _peers() -> list[Job]:
    paper, colbert = Case("maxsim", 128, **PAPER), {"L": 32, "D": 128}
    long, short = Case("maxsim", 128, N=1024, **colbert), Case("maxsim", 128, N=192, **colbert)
    return _figures("e", [long, paper, short], (REFERENCE, TRITON, *PEERS), ("bf16",))


def _wider() -> list[Job]:
    captions, large = _efa(128, mean_length=25), Case("efa", 128, **LARGE)
    parts = [Case("hard_similarity", 128, **PAPER), Case("sparse_aggregate", 128, **PAPER)]
    jobs = _figures("f", [_efa(128)], EVERY, ("fp32",))
    jobs += _figures("f", [_efa(128)], (REFERENCE, TRITON), ("tf32x3",))
    jobs += _figures("f", [_efa(128)], EVERY, ("tf32",))
    jobs += _figures("f", [captions], (REFERENCE, TRITON), ("bf16",))
    jobs += _figures("f", [_efa(1024)], (TRITON,), ("bf16",))
    jobs += _figures("f", [large], EVERY, ("bf16",))
    jobs += _figures("f", parts, EVERY, ("bf16",))
    jobs += _figures("f", [_efa(256), _efa(512)], EVERY, ("bf16",))
    jobs += _figures("f", [_efa(128)], EVERY, ("fp16",))
    return jobs + _figures("f", [captions, large], (REFERENCE, TRITON), ("fp32",))


def _tests() -> list[Job]:
    return [Job("g", "tests", guess=150, prebuilt=20, whole=False)]


def _autotuned() -> list[Job]:
    cases = [_efa(128)], [Case("asdm", 1024), Case("asdm", 16384)]
    jobs = [*_figures("h", cases[0], (AUTOTUNED,), ("bf16",)), *_figures("h", cases[1], (AUTOTUNED,), ("fp32",))]
    return jobs + _figures("h", cases[0], (AUTOTUNED,), ("fp32",))


def _steps() -> list[Job]:
    """Times first, then how much a card takes. Besides our kernels transformers takes its time in the first job."""
    timed = [Job("i", "step", None, name, step=Step(B), guess=40, prebuilt=8) for B in (64, 128) for name in STEPS]
    order = [(card, name) for card in CARDS for name in reversed(STEPS)]
    return timed + [
        Job("i", "largest", None, name, step=Step(card=card), guess=25, prebuilt=10) for card, name in order
    ]


_JOBS = {
    "a": _exact, "b": _alone, "c": _alternatives, "d": _losses, "e": _peers, "f": _wider, "g": _tests, "h": _autotuned,
    "i": _steps,
}  # fmt: skip
