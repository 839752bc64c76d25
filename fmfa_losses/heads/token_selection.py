"""RDE's token selection embedding (TSE): one feature of the tokens that the global token attends to most.

    a      = attention of the global token, [CLS] of an image or [EOS] of a caption, to all tokens
    K      = the k tokens of largest a, without the special tokens and the padding
    u_t    = f_t / (|f_t| + 1e-8)                                 for t in K
    TSE    = max_{t in K} ( MLP(u_t) + W u_t + b )                elementwise
    MLP(u) = W_1 relu(batch_norm(W_0 u + b_0)) + b_1

k is the `ratio` of the padded length without special tokens, rounded down: 22 of 77 text tokens and 57 of 193 image
tokens at 0.3. A caption of fewer words has the maximum over all of its words.

What the published module (2024-CVPR-RDE/model/CrossEmbeddingLayer_tse.py) does otherwise:
- It writes -1 into the attention that it is given. Here the caller's attention stays as it is.
- A caption without words makes its own feature, and that of every later caption of the batch, NaN. Here it is zeros.
- It fetches the lengths from the device once a caption. Here the host never waits.
- Of tokens with equal attention (words in half precision, all padding) it takes any. Here the first.
- It casts to half. Here products run in float32 or better, and batch norm in the dtype of its weights.
- It has layers that it never calls, mlp.bns.1 and in images `linear`, which DistributedDataParallel refuses to train.
  Here they do not exist, and loading a checkpoint passes over them.

What is as there, because checkpoints were trained with it: k follows the padded length, so captions are padded to the
length of training (77). In train mode the statistics of batch norm are over k tokens of every caption; one with fewer
words fills up with padding, then with special tokens. RDE's own training is in eval mode: the pass that divides the
pairs (processor.py, get_loss) calls model.eval(), and nothing calls train() after it.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import (
    check_float,
    check_fraction,
    check_integer,
    check_mask,
    check_option,
    check_positive,
    check_same,
    check_shape,
    describe,
    integer_ids,
    nan_unless,
    on_host,
)
from ..ops.module import Module
from ..ops.precision import accumulation_dtype, unit_rows
from .checkpoint import LoadReport, checkpoint_entries, load_entries
from .parts import WideLinear, check_device, to_dtype_of

__all__ = ["Modality", "TokenSelection"]

Modality = Literal["image", "text"]

EPS = 1e-8  # added to the length of a token
SPECIAL = {"image": 1, "text": 2}  # [CLS]; start and end
PREFIX = {"image": "visul_emb_layer.", "text": "texual_emb_layer."}  # as RDE spells them
RESIDUAL = {"image": "fc", "text": "linear"}  # the layer beside the MLP
UNUSED_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
UNUSED = {
    "text": tuple(f"mlp.bns.1.{name}" for name in UNUSED_BATCH_NORM),
    "image": ("linear.weight", "linear.bias", *(f"mlp.bns.1.{name}" for name in UNUSED_BATCH_NORM)),
}


class TokenSelection(Module):
    """One feature of an image or a caption from its tokens of largest attention: RDE's TSE branch.

        TSE = max over the k best tokens of ( MLP(u) + W u + b ),   u = token / (|token| + 1e-8)

    The attention is that of the last layer, averaged over its heads, as nn.MultiheadAttention returns it. It only
    chooses and has no gradient. A sample without a token to choose gives zeros. Negative attention raises on the CPU
    and makes the feature NaN elsewhere, as NaN attention does everywhere.

    Args:
        modality: "image": the row of [CLS], which is token 0. "text": the row of [EOS].
        input_dim: D, width of the tokens.
        embed_dim: E, width of the feature.
        ratio: share of the tokens that is chosen, in (0, 1]; of T tokens int((T - 1) ratio) in an image and
            int((T - 2) ratio) in a caption.
    Inputs:
        tokens: [B, T, D], any float dtype, special tokens and padding included.
        attention: [B, T, T], or the row of the global token alone, [B, T]; weights of a softmax. Never changed.
        token_ids: [B, T] integers, of a caption: the largest id is [EOS], token 0 is the start, 0 is padding, as
            CLIP's tokenizer has it. A word of id 0 counts as padding, as there.
        mask: [B, T] bool, True = keep. For a caption in place of token_ids, with any tokenizer: the first kept token is
            the start, the last is [EOS]. For an image the patches that may be chosen.
    Returns:
        [B, E], float32 or better.
    Raises:
        TypeError, ValueError: rank, width, batch, dtype, device, both or none of token_ids and mask for a caption, a
            ratio that chooses no token, or (on the CPU) negative attention.
    Example:
        >>> select = TokenSelection("text", input_dim=8, embed_dim=16).eval()
        >>> caption = torch.tensor([[49406, 320, 786, 2342, 49407, 0, 0]])
        >>> select(torch.randn(1, 7, 8), torch.rand(1, 7, 7), caption).shape
        torch.Size([1, 16])

    Reference: Qin et al., Noisy-Correspondence Learning for Text-to-Image Person Re-identification (RDE), arXiv
    2308.09911, section 3.2. Parameters have the names of RDE's TexualEmbeddingLayer and VisualEmbeddingLayer.
    """

    modality: Modality
    input_dim: int
    embed_dim: int
    ratio: float

    def __init__(self, modality: Modality, input_dim: int = 512, embed_dim: int = 1024, ratio: float = 0.3) -> None:
        super().__init__()
        check_option("modality", modality, SPECIAL)
        self.modality = modality
        self.input_dim = check_integer("input_dim", input_dim, 1)
        self.embed_dim = check_integer("embed_dim", embed_dim, 2)
        self.ratio = check_fraction("ratio", check_positive("ratio", ratio))
        self.add_module(RESIDUAL[modality], WideLinear(self.input_dim, self.embed_dim))
        self.mlp = _MLP(self.input_dim, self.embed_dim)

    def forward(
        self, tokens: Tensor, attention: Tensor, token_ids: Tensor | None = None, *, mask: Tensor | None = None
    ) -> Tensor:
        self._check(tokens, attention)
        places = _caption(token_ids, mask, tokens) if self.modality == "text" else _patches(token_ids, mask, tokens)
        row = attention.detach()
        if row.ndim == 3:
            row = row.gather(1, places.query[:, None, None].expand(-1, 1, row.shape[2])).squeeze(1)
        if on_host(row) and bool((row < 0).any()):
            raise ValueError(
                f"attention must hold the weights of a softmax, >= 0, got {row.min().item():.6g}; pass what "
                "nn.MultiheadAttention returns with need_weights=True"
            )
        order, chosen = _largest(row, places, self._k(tokens.shape[1]))
        selected = tokens.gather(1, order.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
        if not self.training:  # nothing depends on the others, so they may hold anything
            selected = selected.masked_fill(~chosen.unsqueeze(-1), 0)
        embedded = self._embed(_shortened(selected)).masked_fill(~chosen.unsqueeze(-1), float("-inf"))
        feature = torch.where(chosen.any(dim=1, keepdim=True), embedded.max(dim=1).values, 0)
        return nan_unless((row >= 0).all(dim=1, keepdim=True), feature)

    def load_rde_state_dict(self, state_dict: Mapping[str, Any]) -> LoadReport:
        """Copies the layer out of a whole published checkpoint, as torch.load returns it.

        RDE's checkpoints have the weights under "model", and there this layer's as `texual_emb_layer.*` or
        `visul_emb_layer.*`, by `modality`, possibly after "module.". The state dict of that layer alone is
        taken too. Dtypes may differ. `load_state_dict` of a model that has this module under those names
        loads the same.

        Args:
            state_dict: a state dict, or a mapping with one under "model" or "state_dict".
        Returns:
            LoadReport(loaded, missing, ignored): names; `print` it.
        Raises:
            ValueError: another shape; names, shapes, and the arguments to change. Nothing is copied.
        Example:
            >>> select = TokenSelection("image", input_dim=8, embed_dim=16)
            >>> weights = {f"visul_emb_layer.{name}": value.half() for name, value in select.state_dict().items()}
            >>> print(select.load_rde_state_dict({"model": weights, "epoch": 60}))
            loaded 11 of 11 tensors; ignored 0 other entries of the checkpoint
        """
        entries, prefix = checkpoint_entries(state_dict), PREFIX[self.modality]
        own = {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
        if own:
            others = {name: value for name, value in entries.items() if not name.startswith(prefix)}
            entries = {**{f"other.{name}" if name in own else name: others[name] for name in others}, **own}
        return load_entries(self, entries, "build TokenSelection with the input_dim and embed_dim of the checkpoint")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in UNUSED[self.modality]:  # what RDE saves and never calls
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _embed(self, units: Tensor) -> Tensor:
        residual = getattr(self, RESIDUAL[self.modality])
        embedded: Tensor = self.mlp(units) + residual(to_dtype_of(residual, units))
        return embedded.to(accumulation_dtype(embedded))

    def _k(self, T: int) -> int:
        """How many tokens are chosen of T."""
        k = int((T - SPECIAL[self.modality]) * self.ratio)
        if k < 1:
            raise ValueError(
                f"ratio must choose at least one token of {self.modality}s of {T} tokens, got {self.ratio}; raise it, "
                "or pass all tokens of the last layer"
            )
        return k

    def _check(self, tokens: Tensor, attention: Tensor) -> None:
        check_float("tokens", tokens, "B T D")
        if tokens.shape[2] != self.input_dim:
            raise ValueError(
                f"tokens must have the width input_dim = {self.input_dim}, got {describe(tokens)}; build "
                f"TokenSelection(input_dim={tokens.shape[2]}, ...)"
            )
        check_device("tokens and the head", tokens, self)
        if isinstance(attention, Tensor) and attention.ndim == 4:
            raise ValueError(
                f"attention must have shape [B T T], got {describe(attention)}; pass attention.mean(1), the mean over "
                "the heads"
            )
        rows = isinstance(attention, Tensor) and attention.ndim == 2
        check_float("attention", attention, "B T" if rows else "B T T")
        check_shape(
            "attention", attention, (tokens.shape[0],) + (tokens.shape[1],) * (attention.ndim - 1), "as the tokens are"
        )
        check_same("tokens and attention", tokens, attention)


class _MLP(nn.Module):
    """Linear, batch norm, relu, linear, over the tokens of all samples alike."""

    def __init__(self, input_dim: int, embed_dim: int) -> None:
        super().__init__()
        hidden = embed_dim // 2
        self.layers = nn.ModuleList([WideLinear(input_dim, hidden), WideLinear(hidden, embed_dim)])
        self.bns = nn.ModuleList([nn.BatchNorm1d(hidden)])

    def forward(self, x: Tensor) -> Tensor:
        (first, last), (norm,) = self.layers, self.bns
        hidden = first(to_dtype_of(first, x)).flatten(0, 1)
        hidden = F.relu(norm(to_dtype_of(norm, hidden)))
        embedded: Tensor = last(to_dtype_of(last, hidden))
        return embedded.view(*x.shape[:2], -1)


class _Places(NamedTuple):
    """Which token is which; all are on the device of the tokens."""

    query: Tensor  # [B], the global token
    special: Tensor  # [B, T] bool
    content: Tensor  # [B, T] bool, what may be chosen


def _caption(token_ids: Tensor | None, mask: Tensor | None, tokens: Tensor) -> _Places:
    if (token_ids is None) == (mask is None):
        raise ValueError(
            f"a caption must come with either token_ids or mask, got {'none' if mask is None else 'both'}; pass the "
            "ids that the text encoder got, or the attention mask of their tokenizer"
        )
    position = torch.arange(tokens.shape[1], device=tokens.device)
    if token_ids is not None:
        token_ids = integer_ids("token_ids", token_ids, "B, T")
        check_shape("token_ids", token_ids, tuple(tokens.shape[:2]), "one id a token")
        check_same("tokens and token_ids", tokens, token_ids)
        kept, start, end = token_ids != 0, torch.zeros_like(token_ids[:, 0]), token_ids.argmax(dim=1)
    else:
        assert mask is not None
        check_mask("mask", mask, tokens)
        kept, start, end = mask, mask.to(torch.uint8).argmax(dim=1), (mask * position).argmax(dim=1)
    special = (position == start[:, None]) | (position == end[:, None])
    return _Places(end, special, kept & ~special)


def _patches(token_ids: Tensor | None, mask: Tensor | None, tokens: Tensor) -> _Places:
    if token_ids is not None:
        raise ValueError(
            f"token_ids must not be given with images, got {describe(token_ids)}; build TokenSelection('text') for "
            "captions"
        )
    check_mask("mask", mask, tokens)
    special = (torch.arange(tokens.shape[1], device=tokens.device) == 0).expand(tokens.shape[:2])
    query = torch.zeros_like(special[:, 0], dtype=torch.int64)
    return _Places(query, special, ~special if mask is None else mask & ~special)


def _largest(row: Tensor, places: _Places, k: int) -> tuple[Tensor, Tensor]:
    """Indices [B, k] of the content of largest attention, then padding, then special tokens; which are content.

    Of equal ones the first comes first.
    """
    key = torch.where(places.content, row, torch.where(places.special, -2.0, -1.0).to(row.dtype))
    order = key.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return order, places.content.gather(1, order)


def _shortened(tokens: Tensor) -> Tensor:
    """f / (|f| + 1e-8), in float32 or better; a zero token stays, and its gradient passes as it is."""
    unit = unit_rows(tokens)
    length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=unit.dtype)
    return unit / (
        1 + EPS / torch.where(length == 0, 1, length)
    )  # where the length overflows, eps is nothing beside it
