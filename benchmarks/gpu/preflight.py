"""Before a run on a GPU, on any machine: is everything there, and are the prebuilt kernels those of that Triton?

    python -m benchmarks gpu --preflight [--triton-wheel triton-3.6.0-cp312-...whl] [--wheels DIR] [--prebuilt DIR]

Imports what the run, its worker and the tests import, collects tests/gpu, unpacks the wheels and imports them, and asks
whether the prebuilt kernels can be found by Triton as it is here, or as it is in the wheel.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from .. import ROOT
from ..machine import commit
from . import triton_cache, wheels

__all__ = ["PACKAGES", "main", "missing"]

# What the run needs, and for what; it goes on without those in brackets.
PACKAGES = {
    "torch": "everything", "triton": "everything", "einops": "everything", "numpy": "everything",
    "psutil": "everything", "matplotlib": "everything", "pytest": "stage g",
    "transformers": "(transformers) stage i, which has no model without it",
    "xdist": "(pytest-xdist) eight tests at once in stage g, else one after the other",
}  # fmt: skip
MODULES = (
    "benchmarks.gpu.run",
    "benchmarks.gpu.worker",
    "benchmarks.gpu.tune",
    "benchmarks.gpu.plots",
    "fmfa_losses.kernels",
)
PEERS = ("late_interaction_kernels", "flash_maxsim")


def missing() -> list[str]:
    """A sentence for each package that is not there."""
    return [f"{name} is not installed: {what}" for name, what in PACKAGES.items() if not importlib.util.find_spec(name)]


def main(options: argparse.Namespace) -> int:
    """One line a check; 1 where one says no."""
    bad = 0

    def say(good: bool, what: str) -> None:
        nonlocal bad
        bad += not good
        print(f"{'ok' if good else 'NO':4}{what}", flush=True)

    for sentence in missing():
        say("(" in sentence, sentence)
    say(True, f"commit {commit()}, which a run writes down; where git is missing it reads the file .commit")
    say(*tried("imports of the run", ["-c", f"import {', '.join(MODULES)}"], dict(os.environ)))
    collect = ["-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    say(*tried("tests/gpu are collected", collect, dict(os.environ), quoting=True))
    folder = wheels.folder(options.wheels)
    if folder is None:
        say(False, "no wheels of the peers: stage e has ours and the reference alone (wheels/ or --wheels DIR)")
    else:
        site, sentence = wheels.unpack(folder)
        say(site is not None, sentence)
        if site is not None:
            env = wheels.on_path(dict(os.environ), site)
            say(*tried("the peers' wheels are imported", ["-c", f"import {', '.join(PEERS)}"], env))
    prebuilt = triton_cache.folder(options.prebuilt)
    if prebuilt is None:
        say(False, "no prebuilt kernels: the run compiles them (prebuilt/ or --prebuilt DIR)")
    else:
        say(*prebuilt_kernels(prebuilt, options.triton_wheel))
    return int(bad > 0)


def tried(what: str, arguments: list[str], env: dict[str, str], *, quoting: bool = False) -> tuple[bool, str]:
    """(whether Python ends well, `what` and why not); `quoting` its last line otherwise, too."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode == 0:
        return True, f"{what}: {lines[-1]}" if quoting and lines else what
    errors = [line for line in lines if line.startswith("E  ")] or lines[-1:]
    return False, f"{what}: {'; '.join(errors)[:500]}"


def prebuilt_kernels(folder: Path, wheel: Path | None) -> tuple[bool, str]:
    from . import prebuild

    try:
        key = prebuild.wheel_key(wheel) if wheel else prebuild.own_key()
        reason = prebuild.usable(folder, key)
    except (OSError, ValueError) as error:
        return False, f"prebuilt kernels in {folder}: {error}"
    of = wheel.name if wheel else "the Triton here"
    said = f"for {of}, sha256 of triton_key {prebuild.sha256(key)}"
    if reason is not None:
        return False, f"{folder} is of no use {said}: {reason}"
    return True, f"{folder}: {prebuild.contents(folder)} {said}"
