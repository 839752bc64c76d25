"""CLIP through Hugging Face `transformers`, as a two-stream model (the interface is described in `two_stream.py`).

Token features are computed like the global ones: last norm, then projection, so that patches, [CLS] and words share
the joint space. The image tower has a position embedding for every patch of its `image_size`, and takes no other size.
"""

import torch
from torch import Tensor, nn
from transformers import CLIPModel

__all__ = ["CLIP", "TINY", "VIT_B_16", "patch_grid"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

VIT_B_16 = {
    "text_config": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8},
    "vision_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 16,
    },
    "projection_dim": 512,
}  # fmt: skip
TINY = {
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16,
    },
    "projection_dim": 64,
}  # fmt: skip


def patch_grid(image_size: tuple[int, int], patch: int) -> tuple[int, int]:
    """(rows, columns) of the patches of an image of (height, width) pixels."""
    if any(edge < patch or edge % patch for edge in image_size):
        raise ValueError(f"image_size must be a multiple of the patch size {patch}, got {image_size}")
    return image_size[0] // patch, image_size[1] // patch


class CLIP(nn.Module):
    """Both streams of a `CLIPModel`; its own logit scale is left out, the objectives have their temperature.

    Args:
        clip: with 1 + N position embeddings in its image tower: [CLS] and the patches of `image_size`, row by row.
        eot_id: of the token whose feature is the caption's.
        image_size: (height, width) in pixels.
    """

    def __init__(self, clip: CLIPModel, *, eot_id: int, image_size: tuple[int, int] = (384, 128)) -> None:
        super().__init__()
        self.grid = patch_grid(image_size, clip.config.vision_config.patch_size)
        positions = clip.vision_model.embeddings.position_embedding.num_embeddings
        needed = 1 + self.grid[0] * self.grid[1]
        if positions != needed:
            raise ValueError(
                f"an image of {image_size[0]} x {image_size[1]} pixels needs {needed} position embeddings, the model "
                f"has {positions}; resize them first, as load_clip does"
            )
        self.clip, self.eot_id = clip, eot_id
        self.clip.logit_scale.requires_grad_(False)
        self.embed_dim: int = clip.config.projection_dim
        self.register_buffer("mean", torch.tensor(MEAN, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD, dtype=torch.float32).view(3, 1, 1), persistent=False)

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        vision = self.clip.vision_model
        inputs = vision.embeddings
        dtype = inputs.patch_embedding.weight.dtype
        normalized = (pixels.to(torch.promote_types(dtype, torch.float32)) / 255 - self.mean) / self.std
        patches = inputs.patch_embedding(normalized.to(dtype))
        x = torch.cat([inputs.class_embedding.expand(len(pixels), 1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        x = vision.encoder(inputs_embeds=vision.pre_layrnorm(x + inputs.position_embedding.weight)).last_hidden_state
        x = self.clip.visual_projection(vision.post_layernorm(x))
        return x[:, 0], x[:, 1:]

    def encode_text(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        # The stream is causal: what follows EOT, padding, is never seen by what comes before.
        x = self.clip.text_projection(self.clip.text_model(input_ids=token_ids).last_hidden_state)
        eot = (token_ids == self.eot_id).int().argmax(dim=1)
        return x[torch.arange(len(x), device=x.device), eot], x

    def text_mask(self, token_ids: Tensor) -> Tensor:
        # Up to EOT: 0 is padding after it, and an exclamation mark before it.
        ended = (token_ids == self.eot_id).cumsum(dim=1) - (token_ids == self.eot_id).int()
        return ended == 0
