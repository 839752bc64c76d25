"""MaxSim of other packages, and the plain product that a MaxSim cannot do without.

The group `peers` installs those that run on a CPU: `pip install --group peers`. All of them score unit tokens.
late-interaction-kernels and flash-maxsim have a gradient, so the tokens are normalised by PyTorch while the clock runs,
as ours are; on a CPU that is what late-interaction-kernels would do itself, on a GPU its own normalisation would make
float32 tiles in the inner loop, which spill at D 512. maxsim-cpu and maxsim-fast are compiled code without a gradient,
for embeddings that were normalised when they were stored: they get them so, before the clock runs (`prepared`).

Seen with the versions of November 2026 on an AMD EPYC: maxsim-cpu 0.1.0 gives other numbers each time, or ends in a
segmentation fault, for texts of 77 tokens or a width of 512, and is right for 32 tokens of width 128.
"""

import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "COMPILED_MAXSIM",
    "CPU_PEERS",
    "FORWARD_ONLY",
    "LATE_INTERACTION",
    "PEERS",
    "PRODUCT",
    "no_compiler",
    "not_installed",
    "prepared",
    "product",
]

LATE_INTERACTION = "late-interaction-kernels"
COMPILED_MAXSIM = {"maxsim-cpu": "maxsim_cpu", "maxsim-fast": "maxsim_fast"}  # package -> module
PRODUCT = "torch.mm of the same size"
FORWARD_ONLY = (*COMPILED_MAXSIM, PRODUCT)


def unit_tokens(image_tokens: Tensor, text_tokens: Tensor) -> tuple[Tensor, Tensor]:
    return F.normalize(image_tokens, dim=-1), F.normalize(text_tokens, dim=-1)


def late_interaction_kernels() -> Callable[..., Tensor]:
    """Its kernel on a GPU; on a CPU, where the kernel cannot run, its module, which is plain PyTorch there."""
    from late_interaction_kernels import maxsim

    def score(image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor | None = None) -> Tensor:
        image, text = unit_tokens(image_tokens, text_tokens)
        if image.is_cuda:
            return maxsim(text, image, q_mask=text_mask, normalize=False)
        from late_interaction_kernels import MaxSimScorer

        return MaxSimScorer(normalize=False)(text, image, q_mask=text_mask)

    return score


def flash_maxsim() -> Callable[..., Tensor]:
    from flash_maxsim import flash_maxsim_batched_train

    def score(image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor | None = None) -> Tensor:
        image, text = unit_tokens(image_tokens, text_tokens)
        lengths = None if text_mask is None else text_mask.sum(dim=1, dtype=torch.int32)
        return flash_maxsim_batched_train(text, image, shared_docs=True, query_lengths=lengths)

    return score


def compiled_maxsim(module: str) -> Callable[..., Tensor]:
    """One call a text, as their interface has it."""
    import numpy as np

    scores = importlib.import_module(module).maxsim_scores

    def score(images: Any, texts: Sequence[Any]) -> Tensor:
        return torch.from_numpy(np.stack([scores(text, images) for text in texts]))

    return score


def product() -> Callable[..., Tensor]:
    """[rows, D] [D, columns] and nothing else, into memory that is there already."""

    def multiply(rows: Tensor, columns: Tensor, out: Tensor) -> Tensor:
        return torch.mm(rows, columns.T, out=out)[:1]

    return multiply


# Name of the package -> how to get its MaxSim on a GPU. late-interaction-kernels multiplies in 16 bits whatever the
# input, flash-maxsim in the type of the input (float32: TF32).
PEERS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    LATE_INTERACTION: late_interaction_kernels,
    "flash-maxsim": flash_maxsim,
}
# The same on a CPU; late-interaction-kernels multiplies in the type of the input there.
CPU_PEERS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    LATE_INTERACTION: late_interaction_kernels,
    **{package: partial(compiled_maxsim, module) for package, module in COMPILED_MAXSIM.items()},
}


def prepared(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as a provider takes them, made before the clock runs: for most as they are."""
    if name not in FORWARD_ONLY:
        return arguments
    tokens = {key: value.detach() for key, value in arguments.items()}
    mask = tokens.pop("text_mask", None)
    columns = tokens.pop("joint" if "joint" in tokens else "text_tokens")
    images, texts = unit_tokens(tokens["image_tokens"], columns)
    kept = list(texts) if mask is None else [text[keep] for text, keep in zip(texts, mask, strict=True)]
    if name == PRODUCT:
        rows, columns = images.flatten(0, 1), torch.cat(kept)
        return {"rows": rows, "columns": columns, "out": rows.new_zeros(len(rows), len(columns))}
    return {"images": images.numpy(), "texts": [text.contiguous().numpy() for text in kept]}


def not_installed(name: str) -> str | None:
    """Why a peer cannot be measured here, or None."""
    known = name in PEERS or name in CPU_PEERS
    return f"{name} is not installed" if known and importlib.util.find_spec(name.replace("-", "_")) is None else None


def no_compiler() -> str | None:
    """Why torch.compile cannot make code for a CPU here, or None."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch.compile looks for it
    return None if shutil.which(name) else f"no C++ compiler ({name})"
