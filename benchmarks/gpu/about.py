"""What the columns of a GPU run say, and its page."""

from typing import Any

from ..results import described

__all__ = ["LEGEND", "gpu_page"]

LEGEND = """- Times are milliseconds between CUDA events, median with the 20th and 80th percentile in brackets; inputs
  rotate past L2. *eager*: as a training loop calls it. *graph*: forward and backward replayed as one CUDA graph.
- *speed-up*: how many times faster than the reference of the same case, dtype and mode, forward and backward together;
  below 1x is a loss. *(unchecked)*: nothing of the same case was there to compare values with.
- *roof*: the time in which the counted operations and bytes could pass at the measured ceilings, over the measured one.
- *above MiB*: peak of allocated memory above inputs and gradients. *first call s*: compiling and autotuning included.
- *tests*: those of tests/gpu for the kernels of a figure that passed. They gate no figure, but one whose value or
  gradient norm disagrees with the reference is dropped.
- *reference*: everything in memory, gradients by autograd, products in the precision of the inputs (autocast). The
  blocked torch path multiplies in float32.
- Kernels alone: all launches of one kernel together, with a warm L2 and no host time. *GFLOP*, *MB*, *least ms*:
  counted work, and its time at the ceilings. *predicted ms*: made before the kernels ran on a GPU, in
  `benchmarks/gpu/predictions.py`.
- Targets are goals; *predicted*: what is expected of the kernels as they are now. A result of an older commit, which
  its heading names, was of other kernels.
- *tf32*: float32 tensors by torch's "medium", every product in TF32. *tf32x3*: by "high", and a match has three."""


def gpu_page(result: dict[str, Any], tables: str) -> str:
    """gpu.md of a run."""
    setup = "\n".join(f"- {line}" for line in result.get("setup", []))
    head = f"# `benchmarks gpu` on {result['machine'].get('gpu', 'no GPU')}"
    return "\n\n".join(part for part in (head, described(result), setup, LEGEND, tables) if part) + "\n"
