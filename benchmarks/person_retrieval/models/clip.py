"""CLIP through Hugging Face `transformers`, as a two-stream model (the interface is described in `model.py`).

Token features are computed like the global ones: last norm, then projection, so that patches, [CLS] and words share
the joint space. Images of any size: position embeddings are interpolated. Weights come from a folder, never from
the network.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from .tokenizer import WordTokenizer

__all__ = ["CLIP", "CLIPWords", "load_clip"]

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


class CLIPWords:
    """CLIP's byte-pair tokenizer as TIPR codebases use it: 77 tokens, padding 0, [mask] third from the end."""

    pad_id = 0

    def __init__(self, tokenizer: CLIPTokenizer, *, context_length: int = 77) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length
        self.vocab_size = len(tokenizer)
        self.mask_id, self.sot_id, self.eot_id = (self.vocab_size - offset for offset in (3, 2, 1))

    @property
    def special_ids(self) -> tuple[int, int, int]:
        return self.pad_id, self.sot_id, self.eot_id

    def __call__(self, captions: Iterable[str]) -> Tensor:
        """[B, context_length] int64; what is too long loses its end, never its EOT."""
        rows = []
        for text in captions:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: self.context_length - 2]
            rows.append([self.sot_id, *ids, self.eot_id] + [self.pad_id] * (self.context_length - 2 - len(ids)))
        return torch.tensor(rows, dtype=torch.long)

    def words(self, token_ids: Tensor) -> list[str]:
        """The tokens of one caption [L], between SOT and EOT."""
        ids = token_ids.tolist()
        inner = ids[1 : ids.index(self.eot_id)]
        return [token.removesuffix("</w>") for token in self.tokenizer.convert_ids_to_tokens(inner)]


class CLIP(nn.Module):
    """Both streams of a `CLIPModel`; its own logit scale is left out, the objectives have their temperature."""

    def __init__(self, clip: CLIPModel, *, eot_id: int, image_size: tuple[int, int] = (384, 128)) -> None:
        super().__init__()
        patch = clip.config.vision_config.patch_size
        if image_size[0] % patch or image_size[1] % patch:
            raise ValueError(f"image_size must be a multiple of the patch size {patch}, got {image_size}")
        self.clip, self.eot_id = clip, eot_id
        self.clip.logit_scale.requires_grad_(False)
        self.embed_dim: int = clip.config.projection_dim
        self.grid = (image_size[0] // patch, image_size[1] // patch)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        vision = self.clip.vision_model
        normalized = (pixels.float() / 255 - self.mean) / self.std
        x = vision(pixel_values=normalized, interpolate_pos_encoding=True).last_hidden_state
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


def load_clip(
    weights: str | Path | None,
    captions: Iterable[str],
    *,
    image_size: tuple[int, int] = (384, 128),
    tiny: bool = False,
) -> tuple[CLIP, CLIPWords | WordTokenizer]:
    """Model and tokenizer from a folder that `CLIPModel.save_pretrained` wrote.

    Without a folder the weights are random, of ViT-B/16 or of a `tiny` model, and a word tokenizer is made from
    `captions`: enough to see that a run starts, saves and resumes.
    """
    if weights is not None:
        folder = Path(weights)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"no config.json in {folder}; --weights is the folder of a saved CLIPModel and its tokenizer"
            )
        words = CLIPWords(CLIPTokenizer.from_pretrained(folder, local_files_only=True))
        model = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        return CLIP(model, eot_id=words.eot_id, image_size=image_size), words
    tokenizer = WordTokenizer(captions, context_length=77)
    shape = TINY if tiny else VIT_B_16
    text = {
        **shape["text_config"],
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.sot_id,
        "eos_token_id": tokenizer.eot_id,
        "pad_token_id": tokenizer.pad_id,
    }
    config = CLIPConfig(text_config=text, vision_config=shape["vision_config"], projection_dim=shape["projection_dim"])
    return CLIP(CLIPModel(config), eot_id=tokenizer.eot_id, image_size=image_size), tokenizer
