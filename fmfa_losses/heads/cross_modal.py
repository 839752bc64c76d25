"""The cross-modal encoder of IRR: text tokens look at the image, then at each other.

    h = CrossAttention( query = text, key = value = image )
    h = h + SelfAttention( LN(h) );   h = h + MLP( LN(h) )       pre-norm blocks, QuickGELU, 4x MLP

Modules and parameters carry the names of IRRA's code. Source: IRRA, arXiv 2303.12501, section 3.2.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = ["Attention", "LayerNorm", "QuickGELU", "Transformer"]


class LayerNorm(nn.LayerNorm):
    """Statistics in float32 at least, result in the dtype of the input."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702  # x sigmoid(1.702 x), in fewer passes over memory


class Attention(nn.MultiheadAttention):
    """nn.MultiheadAttention where key = value, and the output may be asked for at some positions only.

    It is a subclass because CLIP codebases find the weights that they cast to half precision by this type.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads, batch_first=True)

    def forward(  # type: ignore[override]
        self, query: Tensor, context: Tensor, keep: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """query [B, L, D], context [B, N, D], keep [B, N] -> [B, L, D], or [M, D] at `rows` [M]."""
        D, heads = self.embed_dim, "b l (h d) -> b h l d"
        if query is context:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            q_weight, kv_weight = torch.split(self.in_proj_weight, [D, 2 * D])
            q_bias, kv_bias = torch.split(self.in_proj_bias, [D, 2 * D])
            q = F.linear(query, q_weight, q_bias)
            k, v = F.linear(context, kv_weight, kv_bias).chunk(2, dim=-1)
        q, k, v = (rearrange(x, heads, h=self.num_heads) for x in (q, k, v))
        mask = None if keep is None else keep[:, None, None, :]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if query is not context:
            x = x + 0 * q  # fused kernels may turn a NaN query into zeros; a residual keeps it, here nothing else does
        out: Tensor = self.out_proj(_take(rearrange(x, "b h l d -> b l (h d)"), rows))
        return out


class Block(nn.Module):
    """x + attention, then x + MLP, each of the normalised x."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn: Attention = Attention(width, num_heads)
        self.ln_1: LayerNorm = LayerNorm(width)
        self.mlp: nn.Sequential = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width))
        )
        self.ln_2: LayerNorm = LayerNorm(width)

    def forward(self, x: Tensor, keep: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """x [B, L, D] -> [B, L, D], or [M, D] at `rows` [M]; all of x is attended to."""
        y = self.ln_1(x)
        x = _take(x, rows) + self.attn(y, y, keep, rows)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Transformer(nn.Module):
    def __init__(self, width: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.resblocks: nn.ModuleList = nn.ModuleList(Block(width, num_heads) for _ in range(depth))

    def forward(self, x: Tensor, keep: Tensor | None, rows: Tensor) -> Tensor:
        """x [B, L, D] -> [M, D]."""
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x, keep)
        states: Tensor = last(x, keep, rows)
        return states


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    """[B, L, D] -> [M, D]; all of x, in its shape, where rows is None."""
    return x if rows is None else x.flatten(0, 1).index_select(0, rows)
