"""What the heads share.

A head calls its submodules and does not read their weights, so that adapters, hooks, and sharded or quantised
submodules work. Only the dtype and device of a submodule's first weight are read, and the weights of IRR's last layer
where it is a plain nn.Linear.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import check_same, nan_unless

__all__ = ["WideLinear", "check_device", "first_weight", "nan_unless", "to_dtype_of"]


class WideLinear(nn.Linear):
    """nn.Linear for any pair of dtypes: its product runs in the wider of both, and in float32 at least."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # read once: a parametrisation computes them at every access
        dtype = torch.promote_types(torch.promote_types(input.dtype, weight.dtype), torch.float32)
        return F.linear(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def first_weight(part: nn.Module) -> tuple[nn.Module, Tensor] | None:
    """The first floating-point parameter and the module that it belongs to; None where a part has none."""
    for module in part.modules():
        for weight in module.parameters(recurse=False):
            if weight.is_floating_point():
                return module, weight
    return None


def to_dtype_of(part: nn.Module, x: Tensor) -> Tensor:
    """x as `part` takes it: in the dtype of its first weight, or as it is where the part takes any."""
    first = first_weight(part)
    return x if first is None or isinstance(first[0], WideLinear) else x.to(first[1].dtype)


def check_device(names: str, x: Tensor, part: nn.Module) -> None:
    """x is where the weights are; those that are sharded or off-loaded arrive when their module is called."""
    first = first_weight(part)
    if first is not None and not hasattr(first[1], "device_mesh") and first[1].device.type != "meta":
        check_same(names, x, first[1])
