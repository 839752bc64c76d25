"""In which precision a step computes."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from ..errors import RunError

__all__ = ["Precision"]


@dataclass(frozen=True)
class Precision:
    """float16 and bfloat16 are autocast over float32 weights; float64 is the whole model in float64.

    The default dtype stays as it is: `Trainer` converts model and objective, and masters everything else from there.

    Args:
        name: "auto" is float16 on CUDA and float32 elsewhere; `name` says afterwards what it is.
    """

    name: str
    device: torch.device

    def __post_init__(self) -> None:
        if self.name == "auto":
            object.__setattr__(self, "name", "float16" if self.device.type == "cuda" else "float32")
        if self.name == "float16" and self.device.type == "cpu":
            raise RunError(
                "--precision must be bfloat16, float32 or float64 on a CPU, got float16: its products would be slower "
                "than those of float32 and overflow earlier; leave the option out"
            )

    @property
    def weights(self) -> torch.dtype:
        """Of parameters and buffers."""
        return torch.float64 if self.name == "float64" else torch.float32

    def autocast(self) -> AbstractContextManager[None]:
        half = self.name in ("float16", "bfloat16")
        dtype = torch.float16 if self.name == "float16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=half)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss for float16 alone, whose small gradients would otherwise be 0."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "float16")
