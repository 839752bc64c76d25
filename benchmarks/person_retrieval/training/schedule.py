"""The learning rate over a run."""

import math
from dataclasses import dataclass

from .recipe import Recipe

__all__ = ["LRSchedule"]


@dataclass(frozen=True)
class LRSchedule:
    """Factor of the learning rate as a function of progress: linear warm-up, then half a cosine.

        progress < w:   warmup_factor + (1 - warmup_factor) progress / w
        else:           final_factor + (1 - final_factor) (1 + cos(pi (progress - w) / (epochs - w))) / 2

    w is warmup_epochs, at most half of the epochs: IRRA's five epochs would leave a shorter run nothing but warm-up.
    Progress is the number of epochs done, as IRRA counts it (lr_per="epoch": one learning rate an epoch, the first with
    warmup_factor, and the last one above final_factor), or with the fraction of the current one (lr_per="step").

    It has no state: a run with more epochs than before follows the longer curve from where it is.
    """

    epochs: int
    recipe: Recipe

    def __call__(self, progress: float) -> float:
        if self.recipe.lr_per == "epoch":
            progress = math.floor(progress)
        warmup = min(self.recipe.warmup_epochs, self.epochs / 2)
        if progress < warmup:
            return self.recipe.warmup_factor + (1 - self.recipe.warmup_factor) * progress / warmup
        cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (self.epochs - warmup)))
        return self.recipe.final_factor + (1 - self.recipe.final_factor) * cosine
