"""A CLIPModel filled from a file, one tensor at a time, its position embeddings resized on the way."""

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from .clip_names import Towers
from .load_report import few
from .weight_files import EXPECTED, Contents

__all__ = ["CONTEXT_LENGTH", "fill_clip", "hollow_clip", "resize_positions"]

CONTEXT_LENGTH = 77
OPTIONAL = {"logit_scale"}  # the objectives have their own; IRRA's checkpoints lack it
VISION_POSITIONS = "vision_model.embeddings.position_embedding.weight"


def hollow_clip(config: CLIPConfig, *, positions: int) -> CLIPModel:
    """A CLIPModel whose parameters hold nothing yet: no time for random numbers, and no second copy of the weights."""
    with torch.device("meta"):
        model = CLIPModel(config)
        vision, text = model.vision_model.embeddings, model.text_model.embeddings
        vision.position_embedding = nn.Embedding(positions, config.vision_config.hidden_size)
    model = model.float().to_empty(device="cpu")
    for embeddings, count in ((vision, positions), (text, CONTEXT_LENGTH)):
        embeddings.position_ids = torch.arange(count)[None]  # a buffer that is in no state dict
    return model


def fill_clip(model: CLIPModel, contents: Contents, towers: Towers, grid: tuple[int, int]) -> dict[str, Any]:
    """Every parameter from the file, one at a time; returns the report's entries."""
    parameters = model.state_dict()
    pieces = {name: towers.piece(name) for name in parameters}
    lacking = [name for name, piece in pieces.items() if piece.source not in contents.tensors]
    if needed := dict.fromkeys(pieces[name].source for name in lacking if name not in OPTIONAL):  # each once
        raise ValueError(f"it lacks {len(needed)} of the towers' tensors: {few(needed)}; expected {EXPECTED}")
    loaded, dtypes, resized = Counter[str](), Counter[str](), {}
    for name, parameter in parameters.items():
        piece = pieces[name]
        if name in lacking:
            parameter.fill_(math.log(1 / 0.07))  # as CLIP begins
            continue
        stored = contents.tensors[piece.source]
        if not stored.dtype.startswith(("float", "bfloat")):
            raise ValueError(f"{piece.source} must hold floating-point numbers, got {stored.dtype}")
        length = piece.shape(stored)
        if name == VISION_POSITIONS and len(length) == 2 and length[1:] == parameter.shape[1:]:
            old = _source_grid(length[0] - 1, grid)
            value = resize_positions(stored.read().float(), old, grid)
            if old != grid:
                resized[piece.source] = (old, grid)
        elif length != tuple(parameter.shape) and not (name == "logit_scale" and math.prod(length) == 1):
            raise ValueError(f"{piece.source} must have shape {tuple(parameter.shape)} here, got {length}")
        else:
            value = piece.take(stored.read()).reshape(parameter.shape)
        parameter.copy_(value)
        if not parameter.sum().isfinite():  # one pass: a single NaN or infinity is in the sum
            raise ValueError(f"{piece.source} must hold finite numbers, it holds NaN or infinity: no usable weights")
        loaded[name.partition(".")[0]] += 1
        dtypes[stored.dtype] += 1
    used = {piece.source for piece in pieces.values()}
    unexpected, skipped = towers.others(contents.tensors, used)
    return {
        "dtypes": tuple(dtype for dtype, _ in dtypes.most_common()),
        "loaded": dict(loaded),
        "missing": tuple(lacking),
        "unexpected": unexpected,
        "resized": resized,
        "skipped": skipped,
    }


def _source_grid(count: int, grid: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of `count` patches: a square; else what the model has; else three times as high as wide."""
    edge = math.isqrt(count)
    if edge * edge == count:
        return edge, edge
    if count == grid[0] * grid[1]:
        return grid
    edge = math.isqrt(count // 3)
    if 3 * edge * edge == count:
        return 3 * edge, edge
    raise ValueError(
        f"its position embeddings are of {count} patches, no square, not {grid[0]} x {grid[1]} and not 3:1; "
        "give the image_size with which it was trained"
    )


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """[1 + rows * columns, D] of another grid, bilinearly between the old ones' centres; [CLS], the first, is kept."""
    if old == new:
        return positions
    cls, patches = positions.split([1, old[0] * old[1]])
    image = patches.T.reshape(1, -1, *old)
    resized = nn.functional.interpolate(image, size=new, mode="bilinear", align_corners=False)
    return torch.cat([cls, resized.flatten(2)[0].T])
