"""Defines an operator of `torch.ops.fmfa_losses` with one implementation for every device.

Below autograd and opaque to torch.compile, like `torch.library.custom_op`, which at its first call would import torch's
compiler: 150 MB and two seconds that an eager training run has no use for.
"""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["differentiable_once", "operator"]

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


def differentiable_once(backward: Any, name: str, losses: str) -> None:
    """The operator `backward` is the gradient of `name` and has none itself: a second derivative raises, and says so.

    `losses` are those that are made of it.

    Without it PyTorch takes the gradient for a constant, and a gradient penalty would change nothing.
    """

    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            f"{name} is differentiable once, got a second derivative of it ({losses}: gradient penalties through it "
            "are not supported); leave its gradient out of what you differentiate again, create_graph alone is fine"
        )

    torch.library.register_autograd(backward, refuse, setup_context=lambda ctx, inputs, output: None)
