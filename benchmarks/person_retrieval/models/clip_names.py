"""Where a CLIP is within a file: the names of its towers in OpenAI's code and in Hugging Face's.

open_clip and the codebases of text-to-image person retrieval name the towers as OpenAI does, under prefixes such as
`state_dict.module.` or `model.module.base_model.`, in any order. The prefix is found by what stands under it.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from .stored import Stored

__all__ = ["Piece", "Towers", "find_towers"]

# Hugging Face's name -> OpenAI's; matrices that OpenAI multiplies from the right are transposed.
OUTSIDE_BLOCKS = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "visual_projection.weight": "visual.proj",
}
TRANSPOSED = {"text_projection.weight", "visual_projection.weight"}
IN_BLOCKS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
BLOCKS = {"text": "transformer.resblocks", "vision": "visual.transformer.resblocks"}
ROOTS = {
    "OpenAI": {"visual", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection"},
    "Hugging Face": {"vision_model", "text_model", "visual_projection", "text_projection"},
}

CONSTANT = {"position_ids", "attn_mask"}  # buffers that some versions save


class Piece(NamedTuple):
    """A tensor of the model: the name of the tensor in the file, and how to take it out of that."""

    source: str
    part: str | int  # "whole", "transposed", or 0, 1, 2: a third of the rows (queries, keys, values)

    def shape(self, stored: Stored) -> tuple[int, ...]:
        if isinstance(self.part, int) and stored.shape and stored.shape[0] % 3 == 0:
            return stored.shape[0] // 3, *stored.shape[1:]
        return stored.shape[::-1] if self.part == "transposed" else stored.shape

    def take(self, tensor: Tensor) -> Tensor:
        if isinstance(self.part, int):
            return tensor.chunk(3)[self.part]
        return tensor.mT if self.part == "transposed" else tensor


class Towers(NamedTuple):
    """Both towers in a file: whose names they have, and what stands before the names."""

    naming: str  # "OpenAI" or "Hugging Face"
    prefix: str  # "" or ends with a dot

    def piece(self, name: str) -> Piece:
        """Where a parameter of a CLIPModel is found."""
        if self.naming == "Hugging Face":
            return Piece(self.prefix + name, "whole")
        if name in OUTSIDE_BLOCKS:
            return Piece(self.prefix + OUTSIDE_BLOCKS[name], "transposed" if name in TRANSPOSED else "whole")
        tower, number, rest = re.fullmatch(r"(text|vision)_model\.encoder\.layers\.(\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
        block = f"{self.prefix}{BLOCKS[tower]}.{number}."
        if match := re.fullmatch(r"self_attn\.([qkv])_proj\.(\w+)", rest):
            return Piece(f"{block}attn.in_proj_{match[2]}", "qkv".index(match[1]))
        part, _, kind = rest.rpartition(".")
        return Piece(f"{block}{IN_BLOCKS[part]}.{kind}", "whole")

    def blocks(self, tower: str, names: Iterable[str]) -> int:
        """How many a tower ("text" or "vision") has: one more than the highest number."""
        root = f"{tower}_model.encoder.layers" if self.naming == "Hugging Face" else BLOCKS[tower]
        pattern = re.compile(re.escape(f"{self.prefix}{root}.") + r"(\d+)\.")
        numbers = {int(match[1]) for match in map(pattern.match, names) if match}
        count = max(numbers, default=-1) + 1
        if count > 2 * len(numbers) + 10:  # none is built that cannot be filled; a few that lack are named later
            raise ValueError(f"{root} must have blocks from 0 on, it has {len(numbers)}, one of them {count - 1}")
        return count

    def others(self, names: Iterable[str], used: set[str]) -> tuple[tuple[str, ...], dict[str, int]]:
        """Names within the towers that were not used; parts beside the towers, and how many tensors they have."""
        unexpected, skipped = [], Counter[str]()
        outer = self.prefix.split(".")[:-1]
        for name in names:
            if name in used:
                continue
            parts = name.split(".")
            if name.startswith(self.prefix) and parts[len(outer)] in ROOTS[self.naming] and parts[-1] not in CONSTANT:
                unexpected.append(name)
                continue
            shared = 0
            while shared < min(len(outer), len(parts) - 1) and outer[shared] == parts[shared]:
                shared += 1
            skipped[parts[-1] if parts[-1] in CONSTANT else parts[shared]] += 1
        return tuple(unexpected), dict(skipped)


def find_towers(names: Iterable[str]) -> Towers | None:
    """The prefix and the naming under which most of a CLIP's names are; None where there is no CLIP.

    Raises:
        ValueError: two prefixes hold equally much of a CLIP.
    """
    found = Counter[Towers]()
    for name in names:
        for theirs, openai in OUTSIDE_BLOCKS.items():
            for naming, anchor in (("Hugging Face", theirs), ("OpenAI", openai)):
                if anchor != "logit_scale" and (name == anchor or name.endswith(f".{anchor}")):
                    found[Towers(naming, name.removesuffix(anchor))] += 1
    most = max(found.values(), default=0)
    if most < 3:  # of 13; a single name may be another model's
        return None
    best, *others = (towers for towers, count in found.items() if count == most)
    if others:
        raise ValueError(
            f"one CLIP is expected, {len(others) + 1} are found, under "
            f"{', '.join(repr(towers.prefix) for towers in (best, *others))}; save the one you mean alone"
        )
    return best
