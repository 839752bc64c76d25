"""The whole training step of IRRA's recipe with the four losses of FMFA, as released and ours: time, memory, batch.

CLIP ViT-B/16 with random weights, images of 384 x 128, captions of 77 tokens, ID + IRR + A-SDM + EFA, Adam; products in
bfloat16 by autocast, weights in float32. Captions and masked captions share one pass through the text tower. One group
of parameters: the recipe's learning rates by name cost nothing.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..measure import autocast, spread
from ..providers import TORCH, TRITON
from . import device, step_model
from .compiles import counted
from .cuda_clock import ROUNDS, events
from .largest_batch import CARDS, fits, largest, limited
from .plan import Job
from .step_losses import LOSSES, Encoded, heads
from .step_model import Batch, Sizes

__all__ = ["TIMES", "TrainingStep", "difference", "largest_batch", "measure"]

# Parts of a step by the marks between which they lie; `losses` is forward and backward of heads and losses.
TIMES = {"step": (0, 5), "losses": (1, 3), "forward": (0, 2), "backward": (2, 4), "optimizer": (4, 5)}
UNIT, START, MOST = 16, 64, 2048  # pairs; of the largest batch
TOY_UNIT, TOY_MOST = 1, 4
GIB = 2**30


class TrainingStep:
    """Model, heads and optimizer on the device; both implementations of the losses start from equal weights."""

    def __init__(self, sizes: Sizes, losses: str, precision: str) -> None:
        torch.manual_seed(0)
        self.sizes, self.losses, self.precision = sizes, LOSSES[losses], precision
        self.towers = step_model.towers(sizes, device.NAME)
        self.heads = heads(sizes, self.towers.embed_dim, device.NAME, "torch" if losses == TORCH else "auto")
        learned = [p for part in (self.towers, self.heads) for p in part.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(learned, lr=1e-5, eps=1e-3, weight_decay=4e-5)

    def batch(self, B: int) -> Batch:
        return step_model.batch(self.sizes, B, device.NAME)

    def __call__(self, batch: Batch, mark: Callable[[], None] = lambda: None) -> None:
        mark()
        self.gradients(batch, mark)
        self.optimizer.step()
        self.forget()
        mark()

    def gradients(self, batch: Batch, mark: Callable[[], None] = lambda: None) -> tuple[dict[str, Tensor], Encoded]:
        """The four terms, and the gradients of what the towers returned.

        The backward pauses where the losses end: the same work as in one go, and the marks see it.
        """
        with autocast(self.precision, device.NAME):
            encoded = self.encode(batch)
        leaves = Encoded(*(x.detach().requires_grad_() for x in encoded))
        mark()
        with autocast(self.precision, device.NAME):
            terms = self.losses(self.heads, leaves, batch)
        total = torch.stack(list(terms.values())).sum()
        mark()
        total.backward()
        mark()
        found = Encoded(*(x.grad for x in leaves))
        torch.autograd.backward(encoded, found)
        mark()
        return {name: term.detach() for name, term in terms.items()}, found

    def encode(self, batch: Batch) -> Encoded:
        image, patches = self.towers.encode_image(batch.pixels)
        features, tokens = self.towers.encode_text(torch.cat([batch.token_ids, batch.masked_ids]))
        words, masked = tokens.chunk(2)
        return Encoded(image, features.chunk(2)[0], patches, words, masked)

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def measure(job: Job, *, dry: bool) -> Iterator[dict[str, Any]]:
    """Time and memory of a step at one batch."""
    assert job.step is not None and job.step.B is not None
    reason = step_model.why_not()
    if reason is not None:
        yield {"status": f"not run: {reason}"}
        return
    name, ran = _losses(job, dry)
    start = time.perf_counter()
    step = TrainingStep(_sizes(dry), name, job.precision)
    batch = step.batch(job.step.B)
    with counted() as compiles:
        terms, gradients = step.gradients(batch)
        record: dict[str, Any] = ran | _fingerprint(step, terms, gradients)
        del terms, gradients
        step.optimizer.step()
        step.forget()
        record["first_call_s"] = round(time.perf_counter() - start, 2)
        for _ in range(ROUNDS):
            before = compiles.kernels
            step(batch)
            torch.cuda.synchronize()
            if compiles.kernels == before:
                break
        record |= {"compiled": compiles.kernels} | _peak(step, batch)
        before = compiles.kernels
        record |= _times(step, batch, *((0.0, 1) if dry else (2.0, 5)))
        late = compiles.kernels - before
    yield record | {"status": f"failed: {late} kernels were compiled while it was timed" if late else "ok"}


def largest_batch(job: Job, *, dry: bool) -> Iterator[dict[str, Any]]:
    """The largest batch of which two steps fit into a card's memory, in steps of 16."""
    assert job.step is not None and job.step.card is not None
    limit, total = CARDS[job.step.card], torch.cuda.get_device_properties(0).total_memory / GIB
    reason = step_model.why_not()
    if reason is None and total < limit and not dry:
        reason = f"needs {limit:.0f} GiB, this card has {total:.1f}"
    if reason is not None:
        yield {"status": f"not run: {reason}"}
        return
    name, ran = _losses(job, dry)
    unit, start, most = (TOY_UNIT, 2 * TOY_UNIT, TOY_MOST) if dry else (UNIT, START, MOST)
    peaks: dict[int, dict[str, float]] = {}  # of each batch that was tried
    with limited(limit):
        step = TrainingStep(_sizes(dry), name, job.precision)
        step(step.batch(unit))  # from here on the optimizer has its state, whatever a batch that does not fit comes to

        def attempt(B: int) -> bool:
            peaks[B] = {}
            return fits(lambda: peaks[B].update(_peak(step, step.batch(B))), step.forget)

        found = largest(attempt, unit=unit, start=start, most=most)
    record = ran | {"largest": found, "unit": unit, "tried": len(peaks), "limit_gib": limit}
    yield record | peaks.get(found, {}) | {"at_least": found == most, "status": "ok"}


def difference(row: dict[str, Any], baseline: dict[str, Any], tolerance: float) -> str | None:
    """Why two implementations cannot have computed the same losses and gradients, or None.

    Gradients of tokens may differ by twice as much: in 16 bits winners tie, and whoever rounds cosines takes others.
    """
    for kind, allowed in (("terms", tolerance), ("gradients", 2 * tolerance)):
        for name, theirs in baseline[kind].items():
            mine = row[kind].get(name, float("nan"))
            if not abs(mine - theirs) <= allowed * max(abs(mine), abs(theirs)):
                return f"{kind} {name} {mine:.6g}, where {baseline['provider']} has {theirs:.6g}"
    return None


def _losses(job: Job, dry: bool) -> tuple[str, dict[str, str]]:
    """What runs, and what a record says of it: interpreted kernels would take minutes."""
    return (TORCH, {"ran": TORCH}) if dry and job.provider == TRITON else (job.provider, {})


def _sizes(dry: bool) -> Sizes:
    return step_model.TOY if dry else step_model.PAPER


def _fingerprint(step: TrainingStep, terms: dict[str, Tensor], gradients: Encoded) -> dict[str, Any]:
    """The terms, the norms of what the towers get back, and that of all parameters."""
    norm = torch.linalg.vector_norm
    learned = [p.grad for group in step.optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms = {name: norm(x.float()).item() for name, x in gradients._asdict().items()}
    norms["parameters"] = torch.stack([norm(x) for x in learned]).norm().item()
    return {"terms": {name: term.item() for name, term in terms.items()}, "gradients": norms}


def _peak(step: TrainingStep, batch: Batch) -> dict[str, float]:
    """GiB of two steps with everything that they need: weights, optimizer, data; and what the allocator took for it.

    Two, since what the first leaves in the cache may not be of the sizes that the second asks for.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step(batch)
    step(batch)
    torch.cuda.synchronize()
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {name: round(peak / GIB, 3) for name, peak in zip(("peak_gib", "reserved_gib"), peaks, strict=True)}


def _times(step: TrainingStep, batch: Batch, seconds: float, least: int) -> dict[str, Any]:
    start = time.perf_counter()
    step(batch)
    torch.cuda.synchronize()
    repeats = int(min(50, max(least, seconds / max(time.perf_counter() - start, 1e-5))))
    marks = [events(6) for _ in range(repeats)]
    turns = iter([mark for row in marks for mark in row])
    for _ in marks:
        step(batch, lambda: next(turns).record())
    torch.cuda.synchronize()
    return {"repeats": repeats} | {
        name: spread([row[a].elapsed_time(row[b]) for row in marks]) for name, (a, b) in TIMES.items()
    }
