"""Defines an operator of `torch.ops.fmfa_losses` with one implementation for every device.

Below autograd and opaque to torch.compile, like `torch.library.custom_op`, which at its first call would import torch's
compiler: 150 MB and two seconds that an eager training run has no use for.
"""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["operator"]

_library = torch.library.Library("fmfa_losses", "FRAGMENT")  # type: ignore[no-untyped-call]


def operator(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: "name(Tensor x, ...) -> (...)" runs the function; its outputs must be fresh tensors.

    Give the operator its fake kernel and gradient with torch.library.register_fake and register_autograd.
    """

    def define(implementation: Callable[..., Any]) -> Any:
        name = _library.define(schema)  # type: ignore[no-untyped-call]
        _library.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        return getattr(torch.ops.fmfa_losses, name.partition("::")[2] or name).default

    return define
