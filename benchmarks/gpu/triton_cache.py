"""A Triton cache that was filled elsewhere (`benchmarks prebuild`): used where Triton's own key agrees, else named."""

import hashlib
import tempfile
from pathlib import Path

from .. import ROOT

__all__ = ["folder", "prepare", "triton_key_sha256"]


def triton_key_sha256() -> str:
    """Of what enters every key of Triton's cache; equal here and where a cache was filled, or the cache is useless."""
    try:
        from triton.runtime.cache import triton_key
    except ImportError:
        return "unknown: this Triton has no triton_key"
    return hashlib.sha256(triton_key().encode()).hexdigest()


def folder(given: Path | None) -> Path | None:
    """The one that is named, else prebuilt/ in the checkout where it exists."""
    default = ROOT / "prebuilt"
    return given or (default if default.is_dir() else None)


def prepare(prebuilt: Path | None) -> tuple[Path | None, str]:
    """(a copy of the cache that may be written to, a sentence about it); None: there is none to use."""
    if prebuilt is None:
        return None, "no prebuilt Triton cache: kernels are compiled here"
    try:
        from . import prebuild

        reason = prebuild.usable(prebuilt)
        if reason is None:
            copy = Path(tempfile.mkdtemp(prefix="triton-cache-"))
            prebuild.install(prebuilt, copy)  # not a plain copy: Triton's files name one another by absolute paths
            return copy, f"prebuilt Triton cache: {prebuilt}, its key agrees; {prebuild.contents(prebuilt)}"
    except Exception as error:  # a run without the cache is slower, and still a run
        reason = f"{type(error).__name__}: {error}"
    return None, f"{prebuilt} is not used: {reason}; kernels are compiled here"
