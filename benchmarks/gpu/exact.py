"""Kernels against float64 at the paper's size, on memory that a launcher did not fill with anything useful.

A pass is right when it errs against float64 no more than benchmarks/budget.py allows; when nothing that came out is
NaN, although all memory was before; and when a second run gives the same bits. The float64 reference runs on the device
in chunks of samples.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmfa_losses.functional import asdm_loss, hard_similarity, sparse_aggregate
from fmfa_losses.ops.aggregation import sparse_aggregate_reference
from fmfa_losses.ops.hard_similarity import hard_similarity_reference

from ..budget import allowed_error, relative_error
from ..cases import Case, kept
from ..measure import DTYPES, autocast
from ..providers import plain_asdm

__all__ = ["check", "poisoned"]

CHUNK = 16  # samples


@dataclass(frozen=True)
class Problem:
    """Leaves in order, what the kernels make of them, and what the reference makes of some samples of the output."""

    leaves: list[Tensor]
    gradients: tuple[str, ...]  # their names
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]  # (slice of the output's first dimension, *leaves)
    outputs: int  # length of that dimension
    amplification: float = 1.0  # of one float32 rounding: a logit scale of 50 makes 50 of it


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody filled holds NaN, or a large negative number."""
    owners = [(torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")]
    originals = [getattr(owner, name) for owner, name in owners]

    def poisoning(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **options: Any) -> Tensor:
            tensor = function(*args, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -12345)

        return call

    try:
        for (owner, name), original in zip(owners, originals, strict=True):
            setattr(owner, name, poisoning(original))
        yield
    finally:
        for (owner, name), original in zip(owners, originals, strict=True):
            setattr(owner, name, original)


def check(case: Case, precision: str, device: str) -> dict[str, Any]:
    """`errors` and `budgets` of value and gradients; status "ok" or what is wrong."""
    problem = build(case, DTYPES[precision], device)
    cotangent = _cotangent(problem, device)
    whole = slice(0, problem.outputs)
    with poisoned():
        ours = [_grads(lambda s, *leaves: problem.ours(*leaves), problem.leaves, cotangent, whole) for _ in range(2)]
    exact = _in_chunks(problem, [leaf.detach().double() for leaf in problem.leaves], cotangent)
    with autocast(precision, device):
        plain = _in_chunks(problem, problem.leaves, cotangent)
    names = ["value", *problem.gradients]
    errors, budgets, wrong = {}, {}, []
    for name, got, again, theirs, truth in zip(names, *ours, plain, exact, strict=True):
        plain_error = relative_error(theirs, truth) if bool(torch.isfinite(theirs).all()) else 0.0  # where it overflows
        budget = allowed_error(plain_error, precision, problem.amplification)
        errors[name], budgets[name] = float(f"{relative_error(got, truth):.3g}"), float(f"{budget:.3g}")
        if not bool(torch.isfinite(got).all()):
            wrong.append(f"{name} is not finite")
        elif not errors[name] <= budgets[name]:
            wrong.append(f"{name} errs by {errors[name]:.2e}, budget {budgets[name]:.2e}")
        if not torch.equal(got, again):
            wrong.append(f"{name} differs between two runs")
    return {"errors": errors, "budgets": budgets, "status": "failed: " + "; ".join(wrong) if wrong else "ok"}


def _cotangent(problem: Problem, device: str) -> Tensor:
    shape = problem.plain(slice(0, 1), *problem.leaves).shape[1:]
    cotangent = torch.linspace(-1, 2, problem.outputs * shape.numel(), dtype=torch.float64, device=device)
    return cotangent.view(problem.outputs, *shape)


def _grads(fn: Callable[..., Tensor], inputs: Sequence[Tensor], cotangent: Tensor, part: slice) -> list[Tensor]:
    """[value, gradient of each input] of the samples `part`."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = fn(part, *leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, cotangent[part].to(value.dtype))]


def _in_chunks(problem: Problem, inputs: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    values, total = [], None
    step = CHUNK if problem.amplification == 1 else problem.outputs  # A-SDM looks at whole columns
    for start in range(0, problem.outputs, step):
        part = slice(start, min(start + step, problem.outputs))
        value, *grads = _grads(problem.plain, inputs, cotangent, part)
        values.append(value)
        # In float32 at least: what the chunks add to one another is not the reference's rounding.
        wide = [grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
        total = wide if total is None else [a + b for a, b in zip(total, wide, strict=True)]
    return [torch.cat(values), *(total or [])]


def build(case: Case, dtype: torch.dtype, device: str) -> Problem:
    return {"asdm": _asdm, "sparse_aggregate": _aggregate, "hard_similarity": _similarity, "maxsim": _similarity}[
        case.op
    ](case, dtype, device)


def _asdm(case: Case, dtype: torch.dtype, device: str) -> Problem:
    """Image and text agree somewhat: entirely random ones would leave little to the largest logits."""
    generator = torch.Generator(device).manual_seed(0)
    image = torch.randn(case.B, case.D, generator=generator, device=device)
    text = 0.15 * image + torch.randn(case.B, case.D, generator=generator, device=device)
    pids = torch.randint(max(1, case.B // 2), (case.B,), generator=generator, device=device)
    leaves = [image.to(dtype), text.to(dtype)]
    return Problem(
        leaves,
        ("dimage", "dtext"),
        lambda v, t: asdm_loss(v, t, pids, backend="triton")[None],
        lambda part, v, t: plain_asdm(v, t, pids)[None],
        outputs=1,
        amplification=50.0,
    )


def _aggregate(case: Case, dtype: torch.dtype, device: str) -> Problem:
    """A mask of patches, and sparsity 0: no patch sits at the threshold, where a rounding decides about it."""
    generator = torch.Generator(device).manual_seed(0)
    image, text = (
        torch.randn(case.B, tokens, case.D, generator=generator, device=device).to(dtype) for tokens in (case.N, case.L)
    )
    mask = torch.rand(case.B, case.N, generator=generator, device=device) < 0.9
    return Problem(
        [image, text],
        ("dimage", "dtext"),
        lambda v, t: sparse_aggregate(v, t, image_mask=mask, sparsity=0.0, backend="triton"),
        lambda part, v, t: sparse_aggregate_reference(v[part], t[part], image_mask=mask[part], sparsity=0.0),
        outputs=case.B,
    )


def _similarity(case: Case, dtype: torch.dtype, device: str) -> Problem:
    """Rows of tokens with clear winners: whatever the precision, the same token wins, and gradients can be compared."""
    maxsim = case.op == "maxsim"
    P, Q = (case.L, case.N) if maxsim else (case.N, case.L)
    directions = max(1, min(Q // 4, case.D // 2))
    generator = torch.Generator().manual_seed(0)
    shared = torch.linalg.qr(torch.randn(case.D, directions, generator=generator))[0].T

    def tokens(T: int) -> Tensor:
        """Token t points along direction t modulo their number, the further from it the later its copy."""
        index = torch.arange(T)
        noise = torch.randn(case.B, T, case.D, generator=generator) / case.D**0.5
        return (shared[index % directions] + noise * (0.1 + 0.25 * (index // directions))[:, None]).to(device, dtype)

    x, e = tokens(P), tokens(Q)
    # A masked case keeps the first copy of every direction, and leaves rows of x out as well.
    e_mask = x_mask = None
    if case.mean_length is not None:
        e_mask = kept(case, device) | (torch.arange(Q, device=device) < directions)
        x_mask = (torch.rand(case.B, P, generator=generator) < 0.6).to(device)
    pool = "sum" if maxsim else "lse"
    return Problem(
        [x, e],
        ("dtext", "dimage") if maxsim else ("dx", "de"),
        lambda x, e: hard_similarity(x, e, x_mask=x_mask, e_mask=e_mask, pool=pool, backend="triton"),
        lambda part, x, e: hard_similarity_reference(
            x[part], e, x_mask=None if x_mask is None else x_mask[part], e_mask=e_mask, pool=pool
        ),
        outputs=case.B,
    )
