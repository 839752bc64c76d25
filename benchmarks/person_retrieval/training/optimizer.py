"""Which parameters learn how fast."""

from typing import Any

import torch
from torch import nn

from .recipe import Recipe

__all__ = ["describe_groups", "make_optimizer", "parameter_groups"]


def parameter_groups(module: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters that share learning rate and weight decay, by IRRA's rules, which read names.

    In this order, where a later one overrides: `cross` has `lr_factor` times the learning rate; `bias` has
    `bias_lr_factor` times it and `bias_weight_decay`; `classifier` and `mlm_head` have `lr_factor` times the learning
    rate and keep the weight decay they have. So the biases of cross-attention learn as biases do, those of the two
    heads as the heads.

    Returns:
        Groups of an optimizer, each with a `title` that says which rules made it.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        title, factor, decay = "all others", 1.0, recipe.weight_decay
        if "cross" in name:
            title, factor = "cross", recipe.lr_factor
        if "bias" in name:
            title, factor, decay = "biases", recipe.bias_lr_factor, recipe.bias_weight_decay
        if "classifier" in name or "mlm_head" in name:
            title = "biases of classifier, mlm_head" if "bias" in name else "classifier, mlm_head"
            factor = recipe.lr_factor
        group = groups.setdefault(
            (factor, decay), {"params": [], "lr": recipe.lr * factor, "weight_decay": decay, "title": title}
        )
        group["params"].append(parameter)
        if title not in group["title"].split("; "):
            group["title"] += f"; {title}"
    return list(groups.values())


def make_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Adam, AdamW or SGD over the groups. IRRA's eps is 1e-3 with Adam and 1e-8 with AdamW."""
    groups = parameter_groups(module, recipe)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    kind, eps = (torch.optim.Adam, 1e-3) if recipe.optimizer == "adam" else (torch.optim.AdamW, 1e-8)
    return kind(groups, lr=recipe.lr, betas=recipe.betas, eps=eps if recipe.eps is None else recipe.eps)


def describe_groups(optimizer: torch.optim.Optimizer) -> list[str]:
    """A line a group, with its learning rate before any schedule."""
    return [
        f"learning rate {group['lr']:.3g}, weight decay {group['weight_decay']:.3g}: "
        f"{sum(parameter.numel() for parameter in group['params']):,} parameters ({group['title']})"
        for group in optimizer.param_groups
    ]
