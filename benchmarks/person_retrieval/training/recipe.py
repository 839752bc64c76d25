"""How to train: the paper's recipe, and what may differ from it."""

from dataclasses import dataclass

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the paper's."""

    epochs: int = 60
    batch_size: int = 64  # of one process
    gather: bool | str = True  # of the objectives, where there is more than one process
    lr: float = 1e-5
    fast_factor: float = 5.0
    warmup_epochs: float = 5.0
    warmup_factor: float = 0.1
    final_factor: float = 0.0
    weight_decay: float = 4e-5
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = None
    sampler: str = "random"
    workers: int = 0
    seed: int = 0
