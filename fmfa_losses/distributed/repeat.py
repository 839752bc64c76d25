"""Whether a computation that ran twice gave the same, found on the device and looked at once.

    difference = max_i |b_i - a_i| / max_i |a_i|        of each sample; the largest of all samples counts

Integers and flags must be equal, and so must what is not finite. Of other numbers a difference of rounding is allowed:
without a graph some modules take other kernels (fast paths of attention and of recurrent layers). In deep models those
differed by up to 4 eps in float32 and float64, and by up to 3 eps in half precision, of which each layer rounds its
output. Everything else gave the same bits. A model that draws other numbers differs by far more, and one that does not
is as right as its own rounding.
"""

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..ops.checks import check_nonnegative

__all__ = ["Repeat"]

ROUNDINGS, ROUNDINGS_OF_HALF = 64, 4  # eps that are allowed
TF32 = 2.0**-10  # the eps of float32 products in TF32
PRODUCTS = {"highest": 0.0, "high": TF32, "medium": ROUNDINGS_OF_HALF * 2.0**-7}


class Repeat:
    """Collects what must not differ; `finish` waits for the device, once, and raises the first error.

    Args:
        model: what computes; the dtypes of its parameters say how precisely, where it is a module.
        tolerance: the difference allowed; None is what the coarsest dtype in use may round.
    """

    def __init__(self, model: object, tolerance: float | None) -> None:
        self.tolerance = None if tolerance is None else check_nonnegative("tolerance", tolerance)
        parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
        self.dtypes = {x.dtype for x in parameters if x.is_floating_point() or x.is_complex()}
        self.found: list[tuple[Tensor, float, Callable[[float, float], Exception]]] = []

    def compare(
        self,
        first: Tensor,
        second: Tensor,
        *,
        allowed: float | None = None,
        error: Callable[[float, float], Exception],
    ) -> None:
        """error: called with the difference and what is allowed, where the former is larger."""
        if allowed is None:
            allowed = self._allowed(first, second) if self.tolerance is None else self.tolerance
        self.found.append((_difference(first, second.detach()), allowed, error))

    def finish(self) -> None:
        if not self.found:
            return
        device = self.found[0][0].device
        differences = torch.stack([difference.to(device) for difference, _, _ in self.found]).tolist()
        for difference, (_, allowed, error) in zip(differences, self.found, strict=True):
            if difference > allowed:
                raise error(difference, allowed)

    def _allowed(self, first: Tensor, second: Tensor) -> float:
        dtypes, kind = {first.dtype, second.dtype, *self.dtypes}, first.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            dtypes.add(torch.get_autocast_dtype(kind))
        eps = min(max(_eps(dtypes), default=0.0), torch.finfo(torch.bfloat16).eps)  # of float8, which is for storage
        allowed = eps * (ROUNDINGS if eps < TF32 else ROUNDINGS_OF_HALF)
        if eps < torch.finfo(torch.float32).eps:
            return allowed
        # Convolutions on an accelerator may use TF32 whatever is set for products.
        return max(allowed, PRODUCTS[_matmul_precision()], 0.0 if kind == "cpu" else TF32)


def _eps(dtypes: Iterable[torch.dtype]) -> list[float]:
    return [torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]


def _matmul_precision() -> str:
    """torch's setting of float32 products, which raises or warns where newer switches were set by hand: "high"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return torch.get_float32_matmul_precision()
    except (RuntimeError, Warning):
        return "high"


def _difference(first: Tensor, second: Tensor) -> Tensor:
    """The largest difference, relative to the largest number of its sample; float32 of no dimensions on the device.

    Where a sample is one number, which may be near zero by cancellation, to the largest of all.
    """
    zero, inf = (torch.full((), x, dtype=torch.float32, device=first.device) for x in (0.0, torch.inf))
    if first.numel() == 0:
        return zero
    if not (first.is_floating_point() or first.is_complex()):
        return torch.where((first != second).any(), inf, zero)
    samples = len(first) if first.ndim and first.numel() > len(first) else 1
    a, b = (x.reshape(samples, -1) for x in (first, second))
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    same = (a == b) | (a.isnan() & b.isnan())
    error = (b - a).abs().nan_to_num(torch.inf, torch.inf).masked_fill(same, 0).amax(dim=1)
    size = a.abs().masked_fill(~a.isfinite(), 0).amax(dim=1)
    return torch.where(error == 0, 0, error / size).amax().float()
