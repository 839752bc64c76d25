"""A two-stream model small enough to learn on a CPU: a ViT with a convolutional stem, and a text transformer.

What the training loop asks of a model, here and in `clip.py`:

    encode_image(pixels [B, 3, H, W]) -> features [B, D] of [CLS], tokens [B, N, D] of the patches; pixels are uint8
    encode_text(token_ids [B, L])     -> features [B, D] of EOT,   tokens [B, L, D]
    text_mask(token_ids)              -> [B, L], True = not padding
    grid                              -> (rows, columns) of the patches, rows * columns = N
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fmfa_losses.distributed.handshake import handshake

__all__ = ["Neck", "TwoStream"]


class Neck(nn.BatchNorm1d):
    """Batch normalisation without parameters; in training its statistics are those of the rows of all processes.

        n, s, q_r = rows, their sum and sum_i (x_i - s_r / n_r)^2 of each rank r
        mean = sum_r s_r / N      variance = sum_r [ q_r + n_r (s_r / n_r - mean)^2 ] / N          N = sum_r n_r

    nn.SyncBatchNorm does so on GPUs alone. Squares are taken around means, never as E[x^2] - E[x]^2: fresh weights give
    rows that differ little beside what they share. One process: nn.BatchNorm1d itself; so are evaluation and state.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, D], where n may differ between processes."""
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            normalized: Tensor = super().forward(x)
            return normalized
        rows = x.to(torch.promote_types(x.dtype, torch.float32))
        own_mean = rows.sum(dim=0) / max(len(rows), 1)
        own = torch.cat([own_mean, (rows - own_mean).square().sum(dim=0), rows.new_full((1,), len(rows))])[None]
        peers, _ = handshake(True, None, {"statistics": own}, equal_batches=True)  # one row of statistics a rank
        means, squares, n = peers.gather(own).split([self.num_features, self.num_features, 1], dim=1)  # [W, D or 1]
        mean = (n * means).sum(dim=0) / n.sum()
        variance = (squares + n * (means - mean).square()).sum(dim=0) / n.sum()
        with torch.no_grad():
            unbiased = variance * (n.sum() / (n.sum() - 1))
            for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
                running.lerp_(value.to(running.dtype), self.momentum)  # type: ignore[union-attr, arg-type]
            self.num_batches_tracked += 1  # type: ignore[operator]
        return ((rows - mean) * (variance + self.eps).rsqrt()).to(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block, the MLP twice as wide as the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.ln_1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=keep)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.ln_2(x))


class TwoStream(nn.Module):
    """Image and text transformers with a joint space of `width` dimensions.

    Features pass a batch normalisation, the neck of re-identification models: fresh weights map every image, patch and
    word to nearly the same feature, and what all of them share would drown what tells them apart.

    Patches leave before the blocks mix them, and words after one block. A model this small, asked to match words with
    patches, would otherwise write the whole photograph into every patch, and a similarity map would be flat.

    Args:
        vocab_size: V of the tokenizer; its last id is EOT, 0 is padding.
        context_length: L.
        image_size: (height, width) in pixels, multiples of 8.
        width: D, of both streams and of the joint space.
        image_depth, text_depth: blocks of each stream.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        context_length: int,
        image_size: tuple[int, int] = (96, 32),
        width: int = 96,
        image_depth: int = 2,
        text_depth: int = 2,
        heads: int = 3,
    ) -> None:
        super().__init__()
        self.embed_dim = width
        self.eot_id = vocab_size - 1
        self.grid = (image_size[0] // 8, image_size[1] // 8)
        # Three strided convolutions see edges and colours long before a patch embedding would.
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            nn.Conv2d(64, width, 3, stride=2, padding=1),
        )
        self.cls = nn.Parameter(torch.zeros(width))
        self.image_position = nn.Parameter(torch.randn(self.grid[0] * self.grid[1], width) * 0.2)
        self.image_blocks = nn.ModuleList(Block(width, heads) for _ in range(image_depth))
        self.image_norm, self.image_projection = nn.LayerNorm(width), nn.Linear(width, width, bias=False)
        self.patch_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
        self.image_neck, self.patch_neck = (Neck(width) for _ in range(2))

        self.word = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.word.weight, std=0.1)
        self.text_position = nn.Parameter(torch.randn(context_length, width) * 0.03)
        self.text_blocks = nn.ModuleList(Block(width, heads) for _ in range(text_depth))
        self.text_norm, self.text_projection = nn.LayerNorm(width), nn.Linear(width, width, bias=False)
        self.word_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))
        self.text_neck, self.word_neck = (Neck(width) for _ in range(2))

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem((pixels.to(self.cls.dtype) - 127.5) / 64).flatten(2).transpose(1, 2)
        patches = x + self.image_position
        x = torch.cat([self.cls.expand(len(x), 1, -1), patches], dim=1)
        for block in self.image_blocks:
            x = block(x)
        features = self.image_projection(self.image_norm(x[:, 0]))
        return self.image_neck(features), self.patch_neck(self.patch_head(patches).flatten(0, 1)).view_as(patches)

    def encode_text(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        keep = self.text_mask(token_ids)
        x = self.word(token_ids) + self.text_position[: token_ids.shape[1]]
        local = x = self.text_blocks[0](x, keep[:, None, None, :])
        for block in self.text_blocks[1:]:
            x = block(x, keep[:, None, None, :])
        eot = (token_ids == self.eot_id).int().argmax(dim=1)
        features = self.text_projection(self.text_norm(x[torch.arange(len(x), device=x.device), eot]))
        words = torch.zeros_like(x)
        words[keep] = self.word_neck(self.word_head(local)[keep]).to(words.dtype)  # padding has no part in the averages
        return self.text_neck(features), words

    def text_mask(self, token_ids: Tensor) -> Tensor:
        return token_ids != 0
