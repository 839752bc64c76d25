"""The time predicted for each kernel before any had run on a GPU; stage b puts the outcome beside it.

From the instructions and the occupancy of the sm_90 code (triton 3.6.0) and counted work, for an H100 at 1.7 GHz: EFA
at B 128, L 77, N 192, D 512 without masks, A-SDM at D 512. Both directions of EFA together. `before` is the code as it
was then (commit 0c2b729), `after` what the change named beside it is predicted to give. A-SDM at B 1024 in float32 was
predicted in tiles (0.12 ms for the row losses, 0.7 for the gradient), which stage c now has as an alternative.
"""

from typing import NamedTuple

__all__ = ["PREDICTIONS", "Prediction", "predicted"]


class Prediction(NamedTuple):
    op: str
    B: int
    precision: str
    kernel: str
    before: tuple[float, float]  # ms
    after: tuple[float, float] | None
    change: str


PREDICTIONS = (
    Prediction("efa", 128, "bf16", "_match_kernel", (0.75, 0.95), (0.65, 0.80), "NaN by propagation, four stages"),
    Prediction("efa", 128, "bf16", "_pool_kernel", (0.02, 0.02), None, ""),
    Prediction("efa", 128, "bf16", "_dx_kernel", (0.6, 0.9), (0.4, 0.4), "four rows of 512 a program"),
    Prediction("efa", 128, "bf16", "_de_kernel", (1.2, 1.6), (0.75, 0.75), "64 rows of the sum at once"),
    Prediction("efa", 128, "bf16", "_forward_kernel", (0.03, 0.05), None, ""),
    # In place of what three kernels were predicted to take: statistics and dtext, and dimage with scores of its own.
    Prediction("efa", 128, "bf16", "_rows_kernel", (0.37, 0.55), (0.05, 0.08), "scores made once, in one tile"),
    Prediction("efa", 128, "bf16", "_dimage_product_kernel", (0.28, 0.4), (0.02, 0.04), "a and ds from memory"),
    Prediction("efa", 128, "fp32", "_match_kernel", (8.3, 8.3), None, ""),
    Prediction("efa", 128, "fp32", "_de_kernel", (11.5, 11.5), None, ""),
    Prediction("efa", 128, "fp32", "_dx_kernel", (1.5, 1.5), None, ""),
)


def predicted(op: str, B: int, precision: str, kernel: str) -> Prediction | None:
    return next((p for p in PREDICTIONS if p[:4] == (op, B, precision, kernel)), None)
