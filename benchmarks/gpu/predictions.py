"""The time predicted for each kernel; stage b puts the outcome beside it.

EFA at B 128, L 77, N 192, D 512 without masks, all launches of a kernel in a step together, both similarities of it.
`after` is predicted of the kernels as they are, for an H100 at 1.7 GHz, from the instructions, the occupancy and the
bytes of the sm_90 code (triton 3.6.0) and counted work. `before` is what an H200 measured of the kernels that they
replace or continue (docs/kernels.md, "Each kernel alone"); None, where there was no such kernel.
"""

from typing import NamedTuple

__all__ = ["PREDICTIONS", "Prediction", "predicted"]


class Prediction(NamedTuple):
    op: str
    B: int
    precision: str
    kernel: str
    after: tuple[float, float]  # ms
    before: float | None = None  # ms, measured
    change: str = ""


EFA = ("efa", 128)
PREDICTIONS = (
    Prediction(*EFA, "bf16", "_match_kernel", (0.70, 0.75), 0.747, "a match is one number"),
    Prediction(*EFA, "bf16", "_pool_kernel", (0.03, 0.04), 0.028, "maxima become weights"),
    Prediction(*EFA, "bf16", "_dx_kernel", (0.41, 0.50), 0.588, "no division; the normalisation within"),
    Prediction(*EFA, "bf16", "_products_kernel", (0.70, 0.85), 1.662, "de: granules of 16 tokens, one load a row"),
    Prediction(*EFA, "bf16", "_weights_kernel", (0.02, 0.02), None, "weights of de, once"),
    Prediction(*EFA, "bf16", "_unit_kernel", (0.03, 0.05), None, "with the next one 0.06, in place of PyTorch"),
    Prediction(*EFA, "bf16", "_unit_gradient_kernel", (0.01, 0.02)),
    Prediction(*EFA, "bf16", "_forward_kernel", (0.05, 0.07), 0.071),
    Prediction(*EFA, "bf16", "_rows_kernel", (0.05, 0.08), 0.308, "in place of statistics and dtext: scores made once"),
    Prediction(*EFA, "bf16", "_dimage_product_kernel", (0.02, 0.04), 0.316, "a and ds from memory"),
    Prediction(*EFA, "bf16", "_ranking_kernel", (0.005, 0.005), None, "in place of some seventy of PyTorch's"),
    Prediction(*EFA, "bf16", "_ranking_gradient_kernel", (0.005, 0.005)),
    Prediction(*EFA, "fp32", "_match_kernel", (21.0, 21.0), 21.4),
    Prediction(*EFA, "fp32", "_sort_kernel", (0.7, 0.7), None, "de: matches sorted by winner"),
    Prediction(*EFA, "fp32", "_gather_kernel", (1.6, 2.2), 14.9, "de: rows that were won, in place of products"),
    Prediction(*EFA, "fp32", "_dx_kernel", (0.75, 0.75), 0.745),
    Prediction(*EFA, "tf32x3", "_match_kernel", (3.1, 3.5), None, "three products of TF32 in place of IEEE"),
)


def predicted(op: str, B: int, precision: str, kernel: str) -> Prediction | None:
    return next((p for p in PREDICTIONS if p[:4] == (op, B, precision, kernel)), None)
