"""IRR: the masked words of a caption are predicted from the image.

    h = CrossAttention( query LN_t(text), key = value = LN_i(image) )     text: tokens of the masked caption
    h = LN_post( Transformer_depth(h) )                                   pre-norm blocks, QuickGELU, 4x MLP
    logits = fc( LN( QuickGELU( dense(h) ) ) )                            over the vocabulary
    L_irr = mean over masked positions of CE(logits, original id)

Only masked positions have a label, so the end of the last block and the product with the vocabulary are computed for
them alone. The loss is the same, and the [B, L, V] logits (0.9 GiB in float32 at B = 64) never exist: where the last
layer is a plain linear one, `linear_cross_entropy` makes them in blocks.

Source: IRRA, arXiv 2303.12501, section 3.2. The released code computes all logits, and its self-attention
sees the padding, which is `text_mask=None` here.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import (
    check_flag,
    check_float,
    check_integer,
    check_same,
    check_shape,
    describe,
    integer_ids,
    on_host,
)
from ..ops.lengths import Captions, captions
from ..ops.linear_cross_entropy import product_dtype, summed_cross_entropy
from ..ops.module import Module
from ..ops.padding import longest, refuse_trace
from .checkpoint import LoadReport, checkpoint_entries, load_entries
from .cross_modal import Attention, LayerNorm, QuickGELU, Transformer
from .parts import check_device, nan_unless, to_dtype_of

__all__ = ["IRRHead", "IRROutput"]


class IRROutput(NamedTuple):
    """`loss` carries the gradient; `accuracy`, in [0, 1] over the masked positions, is detached."""

    loss: Tensor
    accuracy: Tensor


class IRRHead(Module):
    """Predicts the masked words of a caption from the image: masked language modelling across modalities.

        h = CrossAttention(LN_t(text), LN_i(image));  h = LN_post(Transformer_depth(h))
        L_irr = mean over masked positions of CE(mlm_head(h), original id)

    Modules and parameters carry IRRA's names, so that its checkpoints load and its optimizer groups (`cross`,
    `mlm_head`) find them.

    Edge cases: without a masked position the loss is 0 with zero gradients for every parameter, and the accuracy 0.
    A caption that is all padding adds nothing, and its gradient is 0. A NaN outside the padding comes out as NaN.

    Dtypes: tokens are cast to the dtype of the attention weights; every LayerNorm and the cross-entropy run in float32
    at least. Works in float32 and float64, with half weights beside float32 LayerNorms (as IRRA trains), with autocast.

    Labels on the CPU or on the accelerator: the host never waits, so the device of the labels decides for which rows
    the end of the last block is computed. On the CPU, where data loaders make them (the tokens may be elsewhere):
    exactly the masked rows. On an accelerator the host cannot know how many are masked: with `max_masked` that many
    rows, and where more are masked, loss, accuracy and gradient are NaN, so that a truncation is always seen; without
    it all B * L rows, exact, and slower by what the end of that block costs for them.

    The logits are never in memory as a whole: neither bound nor CPU labels are needed for that. Where the last layer of
    `mlm_head` is another module, or has hooks, a `forward` set on it or weights that are no plain tensors, it is
    called, and its logits are kept.

    Submodules are called, so that hooks, adapters and parametrisations work; of the last layer alone, where nothing was
    changed, the weights are read. The attention's own `in_proj_weight` and `in_proj_bias` belong to no submodule, as in
    nn.MultiheadAttention: they can be parametrised, but what replaces a whole attention module has to take (query,
    context, keep, rows) and return one tensor.

    torch.compile and torch.export see no values: labels on the CPU are treated as labels on an accelerator, and a label
    outside the vocabulary makes the loss NaN, or PyTorch raises. torch.jit.trace is refused. Differentiable once.

    Args:
        embed_dim: D, width of the tokens.
        vocab_size: V; labels lie in [0, V).
        depth: number of transformer blocks.
        num_heads: attention heads, a divisor of D; None is D / 64.
        ignore_index: label of the positions that are not masked.
        max_masked: bound on the masked positions of a batch; saves time, and only for labels on an accelerator.
        check_labels: look at label values on an accelerator too, which makes the host wait. On the CPU they always are.
    Inputs:
        image_tokens: [B, N, D], any float dtype, [CLS] included.
        masked_text_tokens: [B, L, D], encoded from the masked caption.
        labels: [B, L], any integer dtype: the original id where masked, else ignore_index.
        text_mask: [B, L] bool, True = keep. Padding is not attended to, and a label there is ignored; on a CPU what
            follows the longest caption is not computed. With None, as released, padding is attended to like any
            token.
        text_lengths: [B] integers in [0, L], in place of text_mask: the kept tokens at the start of every caption. On
            an accelerator, where they are not read, wrong ones make loss and accuracy NaN.
    Returns:
        IRROutput(loss, accuracy): scalars, float32 or better.
    Raises:
        TypeError, ValueError: rank, width, batch, dtype or device of an input, or a label outside the vocabulary; the
            message says what to do.
    Example:
        >>> head = IRRHead(embed_dim=64, vocab_size=100, depth=1)
        >>> labels = torch.tensor([[0, 7, 0], [0, 0, 42]])
        >>> output = head(torch.randn(2, 5, 64), torch.randn(2, 3, 64), labels)
        >>> output.loss.shape
        torch.Size([])

    Reference: Jiang and Ye (IRRA), arXiv 2303.12501, section 3.2.
    """

    embed_dim: int
    vocab_size: int
    depth: int
    num_heads: int
    ignore_index: int
    max_masked: int | None
    check_labels: bool
    cross_attn: Attention
    cross_modal_transformer: Transformer
    ln_pre_t: LayerNorm
    ln_pre_i: LayerNorm
    ln_post: LayerNorm
    mlm_head: nn.Sequential

    _caller, _labels = "IRRHead", "labels"  # as messages name the module and the labels; FMFALoss sets its own

    def __init__(
        self,
        embed_dim: int = 512,
        vocab_size: int = 49408,
        *,
        depth: int = 4,
        num_heads: int | None = None,
        ignore_index: int = 0,
        max_masked: int | None = None,
        check_labels: bool = False,
    ) -> None:
        super().__init__()
        embed_dim, vocab_size = check_integer("embed_dim", embed_dim, 1), check_integer("vocab_size", vocab_size, 1)
        depth, ignore_index = check_integer("depth", depth, 1), check_integer("ignore_index", ignore_index)
        num_heads = None if num_heads is None else check_integer("num_heads", num_heads, 1)
        max_masked = None if max_masked is None else check_integer("max_masked", max_masked, 1)
        if num_heads is None:
            if embed_dim % 64:
                raise ValueError(
                    f"embed_dim must be divisible by 64 (heads of width 64), got {embed_dim}; pass num_heads, through "
                    'FMFALoss as irr={"num_heads": ...}'
                )
            num_heads = embed_dim // 64
        if embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim = {embed_dim}, got {num_heads}; pass another num_heads")
        self.embed_dim, self.vocab_size, self.depth, self.num_heads = embed_dim, vocab_size, depth, num_heads
        self.ignore_index, self.max_masked = ignore_index, max_masked
        self.check_labels = check_flag("check_labels", check_labels)

        self.cross_attn = Attention(embed_dim, num_heads)
        self.cross_modal_transformer = Transformer(embed_dim, num_heads, depth)
        self.ln_pre_t = LayerNorm(embed_dim)
        self.ln_pre_i = LayerNorm(embed_dim)
        self.ln_post = LayerNorm(embed_dim)
        self.mlm_head = nn.Sequential(
            OrderedDict(
                dense=nn.Linear(embed_dim, embed_dim),
                gelu=QuickGELU(),
                ln=LayerNorm(embed_dim),
                fc=nn.Linear(embed_dim, vocab_size),
            )
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights with the standard deviations of the released code; attention biases 0."""
        attn_std = self.embed_dim**-0.5
        proj_std = attn_std * (2 * self.depth) ** -0.5
        fc_std = (2 * self.embed_dim) ** -0.5
        suffixes = {
            "in_proj_weight": attn_std,
            "out_proj.weight": proj_std,
            "c_fc.weight": fc_std,
            "c_proj.weight": proj_std,
            "mlm_head.dense.weight": fc_std,
            "mlm_head.fc.weight": proj_std,
        }
        for name, parameter in self.named_parameters():
            for suffix, std in suffixes.items():
                if name.endswith(suffix):
                    nn.init.normal_(parameter, std=std)

    def forward(
        self,
        image_tokens: Tensor,
        masked_text_tokens: Tensor,
        labels: Tensor,
        *,
        text_mask: Tensor | None = None,
        text_lengths: Tensor | None = None,
    ) -> IRROutput:
        refuse_trace("IRRHead")
        labels, text = self._check(image_tokens, masked_text_tokens, labels, text_mask, text_lengths)
        output = self._forward(image_tokens, masked_text_tokens, labels, text.mask, static=not on_host(labels))
        return IRROutput(*(nan_unless(text.right, value) for value in output))

    def _forward(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        labels: Tensor,
        text_mask: Tensor | None,
        static: bool,
    ) -> IRROutput:
        if text_mask is not None:
            L = longest(text_mask)
            text_tokens, labels, text_mask = text_tokens[:, :L], labels[:, :L], text_mask[:, :L]
        rows, targets, right = self._select(labels.long(), text_mask, text_tokens.device, static)
        states = self._encode(image_tokens, text_tokens, text_mask, rows)
        total, correct = self._score(states, targets)
        count = (targets != self.ignore_index).sum().clamp(min=1)
        return IRROutput(loss=nan_unless(right, total / count), accuracy=nan_unless(right, correct / count))

    def _select(
        self, labels: Tensor, text_mask: Tensor | None, device: torch.device, static: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows [M] of the B * L positions, their targets [M], and whether no row is left out and every label right."""
        targets = labels.to(device, non_blocking=True)
        if text_mask is not None:
            targets = targets.masked_fill(~text_mask, self.ignore_index)
        targets = targets.flatten()
        right = None
        if torch.compiler.is_compiling():
            right = ((targets == self.ignore_index) | ((targets >= 0) & (targets < self.vocab_size))).all()
        if static:  # masked rows first, in order; how many rows, the host knows
            rows = (targets == self.ignore_index).to(torch.uint8).argsort(stable=True)[: self.max_masked]
            if self.max_masked is not None:
                complete = (targets != self.ignore_index).sum() <= self.max_masked
                right = complete if right is None else right & complete
        else:  # the labels are on the host: no accelerator is waited for
            rows = (labels.flatten() != self.ignore_index).nonzero().squeeze(1).to(device, non_blocking=True)
        return rows, targets.index_select(0, rows), right

    def _count_masked(self, labels: Tensor, text_mask: Tensor | None, device: torch.device) -> Tensor:
        """Number of the labels that the loss is a mean over, a scalar on the device; the host does not wait."""
        masked = integer_ids(self._labels, labels, "B, L").to(device, non_blocking=True) != self.ignore_index
        return (masked if text_mask is None else masked & text_mask).sum()

    def _encode(self, image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor | None, rows: Tensor) -> Tensor:
        """States [M, D] of the text tokens `rows`, after attention to the image and to each other."""
        image, text = (to_dtype_of(self.cross_attn, tokens) for tokens in (image_tokens, text_tokens))
        keep = None
        if text_mask is not None:
            text = text.masked_fill(~text_mask[..., None], 0)  # not even a NaN leaves the padding
            # A caption that is all padding attends everywhere: finite, and without a label.
            keep = text_mask | ~text_mask.any(dim=1, keepdim=True)
        x = self.cross_attn(self.ln_pre_t(text), self.ln_pre_i(image))
        x = self.cross_modal_transformer(x, keep, rows)
        states: Tensor = self.ln_post(x)
        return states

    def _score(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy and number of right predictions over states [M, D]."""
        layers = list(self.mlm_head) if type(self.mlm_head) is nn.Sequential else []
        last = layers.pop() if layers else None
        if type(last) is nn.Linear and _untouched(self.mlm_head, last):
            for layer in layers:
                states = layer(states)
            if product_dtype(states) == product_dtype(last.weight):
                return summed_cross_entropy(states, last.weight, last.bias, targets, self.ignore_index)
            logits = last(states)  # says what does not fit
        else:
            logits = self.mlm_head(states)  # [M, V]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, targets, ignore_index=self.ignore_index, reduction="sum")
        right = (logits.detach().argmax(dim=1) == targets) & (targets != self.ignore_index)
        return loss, right.sum()

    def load_irra_state_dict(self, state_dict: Mapping[str, Any]) -> LoadReport:
        """Copies the head out of a whole published checkpoint, as torch.load returns it.

        The weights may sit under "model", carry the prefix "module.", mix dtypes (they are cast to the head's),
        and stand among those of other modules, which are ignored. A checkpoint without the head loads nothing
        and says so.

        Args:
            state_dict: a state dict, or a mapping with one under "model" or "state_dict".
        Returns:
            LoadReport(loaded, missing, ignored): names; `print` it.
        Raises:
            ValueError: another depth or shape; names, shapes, and the argument to change. Nothing is copied.
        Example:
            >>> head = IRRHead(embed_dim=64, vocab_size=100, depth=1)
            >>> weights = {f"module.{name}": value.half() for name, value in head.state_dict().items()}
            >>> print(head.load_irra_state_dict({"model": weights, "epoch": 60}))
            loaded 28 of 28 tensors; ignored 0 other entries of the checkpoint
        """
        entries = checkpoint_entries(state_dict)
        blocks = {name.split(".")[2] for name in entries if name.startswith("cross_modal_transformer.resblocks.")}
        if blocks and len(blocks) != self.depth:
            raise ValueError(
                f"the checkpoint must have the {self.depth} blocks of the head, got {len(blocks)} "
                f"(cross_modal_transformer.resblocks.*); build IRRHead(depth={len(blocks)})"
            )
        return load_entries(self, entries, "build IRRHead with the embed_dim and vocab_size of the checkpoint")

    def _check(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        labels: Tensor,
        text_mask: Tensor | None,
        text_lengths: Tensor | None,
    ) -> tuple[Tensor, Captions]:
        tokens = (("image_tokens", image_tokens, "B N D"), ("masked_text_tokens", text_tokens, "B L D"))
        for name, tensor, pattern in tokens:
            check_float(name, tensor, pattern)
            if tensor.shape[2] != self.embed_dim:
                raise ValueError(
                    f"{name} must have the width embed_dim = {self.embed_dim}, got {describe(tensor)}; "
                    f"build {self._caller}(embed_dim={tensor.shape[2]}, ...)"
                )
            check_device(f"{name} and the head", tensor, self)
        check_same("image_tokens and masked_text_tokens", image_tokens, text_tokens, dims=[("B", 0)])
        text = captions(text_tokens, text_mask, (text_lengths, None, None), image_tokens, name="masked_text_tokens")
        name = self._labels
        labels = integer_ids(name, labels, "B, L")
        check_shape(name, labels, tuple(text_tokens.shape[:2]), "one label a text token")
        if labels.device.type != "cpu" and labels.device != text_tokens.device:
            raise ValueError(
                f"{name} must be on the CPU or on {text_tokens.device}, got {describe(labels)}; leave them on the CPU"
            )
        if on_host(labels) or (self.check_labels and not torch.compiler.is_compiling()):
            wrong = labels[(labels != self.ignore_index) & ((labels < 0) | (labels >= self.vocab_size))]
            if wrong.numel():
                raise ValueError(
                    f"{name} must be ignore_index = {self.ignore_index} or lie in [0, vocab_size = {self.vocab_size}), "
                    f"got {int(wrong[0])}; pass the ignore_index and vocab_size of the tokenizer"
                )
        return labels, text


def _untouched(*modules: nn.Module) -> bool:
    """Whether nothing watches, changes or replaces their calls, and their own weights are plain tensors."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, kind) for module in modules for kind in hooks):
        return False
    if any(getattr(nn.modules.module, "_global" + kind) for kind in hooks):  # of all modules
        return False
    if any("forward" in module.__dict__ for module in modules):  # set on the module itself, as those who off-load do
        return False
    if torch.compiler.is_compiling():  # where other tensors stand for the weights
        return True
    weights = [weight for module in modules for weight in module.parameters(recurse=False)]
    return all(type(weight) in (Tensor, nn.Parameter) for weight in weights)
