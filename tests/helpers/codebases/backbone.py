"""CLIP as these codebases have it, in small: patches and captions to the joint space."""

__all__ = ["BACKBONE"]

BACKBONE = """
import torch
import torch.nn as nn
import torch.nn.functional as F


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class Backbone(nn.Module):
    '''Patches [B, 1 + N, P] and captions [B, L] to the joint space.'''

    def __init__(self, patch_dim, vocab_size, embed_dim):
        super().__init__()
        self.visual = nn.Linear(patch_dim, embed_dim)
        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        self.ln_final = LayerNorm(embed_dim)
        self.text_projection = nn.Linear(embed_dim, embed_dim)

    def encode_image(self, images):
        return self.visual(images.to(self.visual.weight.dtype))

    def encode_text(self, text):
        x = self.token_embedding(text)
        x = x + x.cumsum(1) / 10  # a token knows what stands before it
        return self.text_projection(self.ln_final(x).to(self.text_projection.weight.dtype))

    def forward(self, images, text):
        return self.encode_image(images), self.encode_text(text)


def convert_weights(model):
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.MultiheadAttention)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.half()
"""
