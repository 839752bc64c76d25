"""A small CLIP with the structure and names of OpenAI's, and a small vocabulary for its tokenizer."""

import gzip
import json
from pathlib import Path

import torch
from torch import Tensor, nn

MERGES = [
    ("r", "e"), ("re", "d</w>"), ("a", "t</w>"), ("c", "o"), ("co", "at</w>"), ("h", "at</w>"), ("i", "n"),
    ("s", "h"), ("o", "e"), ("sh", "oe"), ("shoe", "s</w>"), ("'", "s</w>"), ("j", "e"), ("je", "k</w>"),
]  # fmt: skip
VOCAB_SIZE = 512 + len(MERGES) + 2


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if self.causal else None
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=ahead)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, *, causal: bool, depth: int = 2) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, width // 64, causal) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class Visual(nn.Module):
    def __init__(self, width: int, grid: tuple[int, int], embed_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 16, stride=16, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(1 + grid[0] * grid[1], width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, causal=False)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) / width**0.5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))) @ self.proj


class OpenAICLIP(nn.Module):
    """Features of every patch and every token; all parameters random, biases and norms too."""

    def __init__(
        self, *, grid: tuple[int, int] = (4, 4), context_length: int = 77, vocab_size: int = VOCAB_SIZE
    ) -> None:
        super().__init__()
        self.visual = Visual(128, grid, 32)
        self.transformer = Transformer(64, causal=True)
        self.token_embedding = nn.Embedding(vocab_size, 64)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, 64))
        self.ln_final = nn.LayerNorm(64)
        self.text_projection = nn.Parameter(torch.randn(64, 32) / 8)
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, std=0.5)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.visual(images)

    def encode_text(self, ids: Tensor) -> Tensor:
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding)
        return self.ln_final(x) @ self.text_projection

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode_image(images), self.encode_text(ids)


def pieces() -> list[str]:
    """The vocabulary in the order of its ids: bytes, bytes at the end of a word, merges, start and end."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in visible] + [chr(256 + n) for n in range(256 - len(visible))]
    ends = [f"{letter}</w>" for letter in letters]
    return [*letters, *ends, *("".join(pair) for pair in MERGES), "<|startoftext|>", "<|endoftext|>"]


def write_openai_vocabulary(folder: Path) -> Path:
    file = folder / "bpe_simple_vocab_16e6.txt.gz"
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES), ""]
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    return file


def write_hugging_face_vocabulary(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: index for index, piece in enumerate(pieces())}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in MERGES), ""]))
    return folder
