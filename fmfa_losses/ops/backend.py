"""Selects the implementation: `"auto"` may fall back, an explicit choice that cannot run raises with the reason.

`FMFA_LOSSES_BACKEND` (auto | triton | torch) applies to every call with `backend="auto"`.
"""

import importlib.util
import os
import re
import sys
from importlib import metadata

import torch
from torch import Tensor

from .checks import check_option
from .options import BACKENDS

__all__ = ["select_backend", "why_not_triton"]

KERNELS = "fmfa_losses.kernels"  # installed from the folder kernels/ at the top of the repository
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_PACKAGES = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm", "triton-windows")
OLDEST_TRITON = (3, 3)  # docs/install.md: what was tried with each version


def select_backend(backend: str, *tensors: Tensor) -> str:
    """ "triton" or "torch" for these inputs.

    Raises:
        ValueError: unknown name, in the argument or in FMFA_LOSSES_BACKEND.
        RuntimeError: "triton" was asked for and cannot run; the message says why.
        ModuleNotFoundError: the kernels are wanted, from a checkout that is not installed.
    """
    check_option("backend", backend, BACKENDS)
    if backend == "auto" and "FMFA_LOSSES_BACKEND" in os.environ:
        backend = os.environ["FMFA_LOSSES_BACKEND"]
        check_option("FMFA_LOSSES_BACKEND", backend, BACKENDS)
    # The interpreter is a debugging tool: "auto" leaves CPU tensors to the torch path.
    if backend == "torch" or (backend == "auto" and tensors[0].device.type != "cuda"):
        return "torch"
    reason = why_not_triton(*tensors)
    if backend == "triton":
        if reason is not None:
            raise RuntimeError(f'backend="triton" cannot run: {reason}; use backend="auto" or "torch"')
    elif reason is not None:
        return "torch"
    # torch.compile cannot trace a search for a module; there the operator's own import speaks.
    if not torch.compiler.is_compiling() and KERNELS not in sys.modules and importlib.util.find_spec(KERNELS) is None:
        raise ModuleNotFoundError(f"{KERNELS} is not there: this checkout is not installed; run pip install -e .")
    return "triton"


def why_not_triton(*tensors: Tensor) -> str | None:
    """The reason why the Triton kernels cannot take these tensors, or None when they can."""
    for tensor in tensors:
        if tensor.dtype not in KERNEL_DTYPES:
            return f"its kernels take float16, bfloat16 and float32, got {tensor.dtype}"
        if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and interpreting()):
            return f"its kernels need a CUDA or ROCm device (or TRITON_INTERPRET=1 on the CPU), got {tensor.device}"
        if tensor.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET", "0") == "1":
            return "under TRITON_INTERPRET=1 Triton multiplies the bits of bfloat16 as integers, got torch.bfloat16"
    return NO_TRITON


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _triton_version() -> str | None:
    """Read without importing triton; None where no package says."""
    for name in TRITON_PACKAGES:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def why_no_triton(there: bool, version: str | None) -> str | None:
    """The reason why the kernels do not run with what is installed of Triton, or None when they do."""
    # A missing triton is a reason; a triton that is there and fails to import is an error that the user must see.
    if not there:
        return 'triton is not installed (pip install "fmfa-losses[triton]"; CUDA and ROCm builds of torch bring theirs)'
    if version is None or tuple(map(int, re.findall(r"\d+", version)[:2])) >= OLDEST_TRITON:
        return None
    return f"its kernels need triton >= {'.'.join(map(str, OLDEST_TRITON))}, got {version} (docs/install.md)"


NO_TRITON = why_no_triton(importlib.util.find_spec("triton") is not None, _triton_version())  # once: nothing to trace
