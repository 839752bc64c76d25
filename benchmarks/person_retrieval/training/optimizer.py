"""Which parameters learn how fast."""

from typing import Any

from torch import nn

from .recipe import Recipe

__all__ = ["parameter_groups"]

FAST_PARTS = ("cross", "classifier", "mlm_head")  # modules that start from nothing learn five times as fast


def parameter_groups(module: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters that start from nothing, told by their name, at `fast_factor` times the learning rate."""
    slow, fast = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (fast if any(part in name for part in FAST_PARTS) else slow).append(parameter)
    groups = [{"params": slow, "lr": recipe.lr}, {"params": fast, "lr": recipe.lr * recipe.fast_factor}]
    return [group for group in groups if group["params"]]
