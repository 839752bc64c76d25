"""Reads the golden values: inputs, value and input gradients of one case, as float64 tensors."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class Case:
    inputs: dict[str, Tensor]
    value: Tensor
    grads: dict[str, Tensor]

    def leaf_inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Fresh copies; floating inputs in `dtype` that collect a gradient."""
        return {
            name: tensor.to(dtype).clone().requires_grad_() if tensor.is_floating_point() else tensor.clone()
            for name, tensor in self.inputs.items()
        }


@cache
def load(file: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{file}.npz") as archive:
        return dict(archive)


def golden(case: str, file: str = "small") -> Case:
    arrays = load(file)
    fields = {key.removeprefix(f"{case}/"): value for key, value in arrays.items() if key.startswith(f"{case}/")}
    return Case(
        inputs={
            key.removeprefix("input_"): torch.from_numpy(arrays[str(source)])
            for key, source in fields.items()
            if key.startswith("input_")
        },
        value=torch.as_tensor(fields["value"]),
        grads={
            key.removeprefix("grad_"): torch.from_numpy(value)
            for key, value in fields.items()
            if key.startswith("grad_")
        },
    )
