"""The machine and the versions that made a result."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

from . import ROOT

__all__ = ["commit", "describe_machine", "describe_versions", "now"]

PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "numpy": "numpy",
    "einops": "einops",
    "pillow": "PIL",
    "late-interaction-kernels": "late_interaction_kernels",
    "flash-maxsim": "flash_maxsim",
    "maxsim-cpu": "maxsim_cpu",
    "maxsim-fast": "maxsim_fast",
}  # by name, the module


def describe_machine() -> dict[str, Any]:
    machine: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "load": round(os.getloadavg()[0], 1),  # processes at work before the first measurement; 0 on a quiet machine
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "gpu_multiprocessors": properties.multi_processor_count,
            "gpu_l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda or torch.version.hip,
        }
        driver = nvidia_smi()
        if driver:
            machine["gpu_driver"] = driver
    return machine


def describe_versions() -> dict[str, str]:
    import fmfa_losses

    versions = {"python": platform.python_version(), "fmfa-losses": fmfa_losses.__version__}
    for package, module in PACKAGES.items():
        if importlib.util.find_spec(module) is not None:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:  # put on the path by hand
                versions[package] = "unknown"
    return versions


def commit() -> str:
    """Of the checkout: what git says, else the file .commit, which whoever copies it without .git writes."""
    command = ["git", "describe", "--always", "--dirty"]
    if (ROOT / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
            ).stdout.strip()
    file = ROOT / ".commit"
    return file.read_text().strip() if file.exists() else "unknown"


def nvidia_smi() -> str | None:
    """`name, driver, clock of the multiprocessors, clock of the memory`, as they are before the run; read only."""
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [""])[0].strip() or None


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
