"""`python -m fmfa_losses doctor`: versions and backends, a self-test, and what the library replaces in a codebase."""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from ..losses.sdm import sdm_loss, sdm_loss_from_scores
from ..ops.aggregation import sparse_aggregate, sparse_aggregate_reference
from ..ops.backend import select_backend, why_not_triton
from ..ops.hard_similarity import hard_similarity, hard_similarity_reference
from .batch import BatchReport, check_batch
from .codebase import Finding, Unreadable, examine, scan
from .codebase.report import SCHEMA, as_dict, as_text

__all__ = ["BatchReport", "Finding", "Unreadable", "check_batch", "diagnose", "scan", "self_test"]

UNHEALTHY, FOUND = 1, 3  # exit codes; argparse has 2


def diagnose(path: Path | None = None, *, as_json: bool = False, check: bool = False) -> int:
    """Prints the report, as lines or as one JSON object (docs/doctor.md).

    Returns 1 when the self-test fails or FMFA_LOSSES_BACKEND cannot run on any device; with `check` 3 when there is a
    call to replace; else 0.
    """
    lines, healthy = [], True

    def say(line: str, passed: bool = True) -> None:
        nonlocal healthy
        healthy &= passed
        lines.append({"line": line, "passed": passed})
        if not as_json:
            _print(line)

    for line in environment():
        say(line)
    reason = why_not_chosen_backend()
    if reason is not None:
        say(f"backend      FAILED on every device: {reason}", False)
    for line, passed in self_test():
        say(line, passed)
    found = None if path is None else examine(path)
    if as_json:
        codebase = None if found is None else as_dict(found)
        version = _version("fmfa-losses")
        print(json.dumps({"schema": SCHEMA, "version": version, "healthy": healthy, "environment": lines,
                          "codebase": codebase}, indent=2))  # fmt: skip
    elif found is not None:
        _print("")
        for line in as_text(found):
            _print(line)
    if not healthy:
        return UNHEALTHY
    return FOUND if check and found is not None and found.findings else 0


def _print(line: str) -> None:
    """Escapes what file names and lines of code may contain: control characters, or ones that the encoding lacks."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))


# Versions and backends


def environment() -> Iterator[str]:
    yield f"fmfa-losses  {_version('fmfa-losses')}"
    yield f"python       {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield f"torch        {torch.__version__}"
    yield f"triton       {_version('triton')}"
    for device in _devices():
        name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        yield f"device       {device}{name}"
        yield f"backend      {_backend(torch.zeros(1, device=device))}"
    for variable in ("FMFA_LOSSES_BACKEND", "TRITON_INTERPRET"):
        if variable in os.environ:
            yield f"             {variable}={os.environ[variable]} is set"


def _backend(sample: Tensor) -> str:
    """What "auto" picks for tensors like this one, and why not triton."""
    try:
        chosen = select_backend("auto", sample)
    except (ImportError, RuntimeError, ValueError) as error:  # of FMFA_LOSSES_BACKEND, or a checkout without kernels
        return f"none: {error}"
    if chosen == "triton":
        return chosen
    if os.environ.get("FMFA_LOSSES_BACKEND") == "torch":
        return "torch, as FMFA_LOSSES_BACKEND says"
    return f"torch, not triton: {why_not_triton(sample) or 'on the CPU its interpreter is for debugging'}"


def why_not_chosen_backend() -> str | None:
    """Why the backend that FMFA_LOSSES_BACKEND names runs on no device here; None when it does, or names none."""
    if "FMFA_LOSSES_BACKEND" not in os.environ:
        return None
    chosen = [_backend(torch.zeros(1, device=device)) for device in reversed(_devices())]
    return chosen[0].removeprefix("none: ") if all(line.startswith("none: ") for line in chosen) else None


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return devices


# Self-test


def self_test() -> Iterator[tuple[str, bool]]:
    """Two operators and SDM on every device and backend against their specification in float64, with gradients."""
    # Tensors this small gain nothing from threads, which may wait for each other for seconds on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = list(_self_test())
    finally:
        torch.set_num_threads(threads)
    yield from results


def _self_test() -> Iterator[tuple[str, bool]]:
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(5, 13, 32, generator=generator), torch.randn(5, 7, 32, generator=generator)
    pids = torch.tensor([0, 1, 0, 2, 3])

    def sdm_reference(image: Tensor, text: Tensor) -> Tensor:
        unit_image, unit_text = (x.mean(1) / x.mean(1).norm(dim=1, keepdim=True) for x in (image, text))
        return sdm_loss_from_scores(unit_text @ unit_image.T, pids, temperature=0.1)

    operators: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "sparse_aggregate": (sparse_aggregate, sparse_aggregate_reference),
        "hard_similarity": (hard_similarity, hard_similarity_reference),
        "sdm_loss": (
            lambda i, t, backend: sdm_loss(i.mean(1), t.mean(1), pids.to(i.device), temperature=0.1, backend=backend),
            sdm_reference,
        ),
    }
    expected = {name: _value_and_grads(reference, image.double(), text.double()) for name, (_, reference) in
                operators.items()}  # fmt: skip
    for device in _devices():
        inputs = image.to(device), text.to(device)
        for backend in ("torch",) if why_not_triton(*inputs) else ("torch", "triton"):
            start = perf_counter()
            errors = {}
            for name, (operator, _) in operators.items():
                try:
                    got = _value_and_grads(operator, *inputs, backend=backend)
                    errors[name] = max(_relative_error(a, b) for a, b in zip(got, expected[name], strict=True))
                except Exception as error:  # a broken installation fails in many ways, and the report names each
                    yield f"self-test    {device} {backend}: {name} FAILED: {type(error).__name__}: {error}", False
            seconds = perf_counter() - start
            for name, relative in errors.items():
                if not relative < 1e-4:
                    yield f"self-test    {device} {backend}: {name} FAILED: relative error {relative:.1e}", False
            if errors and all(relative < 1e-4 for relative in errors.values()):
                worst = max(errors.values())
                yield (
                    f"self-test    {device} {backend}: {', '.join(errors)} ok, float32 against float64, values and "
                    f"gradients, relative error at most {worst:.1e}, {seconds:.2f} s",
                    True,
                )


def _value_and_grads(fn: Callable[..., Tensor], *inputs: Tensor, **kwargs: str) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = fn(*leaves, **kwargs)
    # Squares make the cotangent depend on the values.
    return [value.detach(), *torch.autograd.grad(value.square().sum(), leaves)]


def _relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.cpu().double() - expected).abs().max() / expected.abs().max())
