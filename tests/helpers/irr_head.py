"""IRRHead and its inputs, small; the head with PyTorch's own attention; its golden values."""

from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmfa_losses.heads import irr
from fmfa_losses.heads.irr import IRRHead, IRROutput
from helpers.golden import load

B, N, L, D, V = 3, 5, 7, 16, 31


def make_head(dtype: torch.dtype = torch.float64, **kwargs) -> IRRHead:
    return IRRHead(D, V, **{"depth": 2, "num_heads": 2, **kwargs}).to(dtype)


def make_inputs(
    dtype: torch.dtype = torch.float64, b: int = B, n: int = N, l: int = L
) -> tuple[Tensor, Tensor, Tensor]:
    image = torch.randn(b, n, D).to(dtype).requires_grad_()
    text = torch.randn(b, l, D).to(dtype).requires_grad_()
    labels = torch.where(torch.rand(b, l) < 0.4, torch.randint(1, V, (b, l)), 0)
    labels[0, 0] = 3
    return image, text, labels


def make_text_mask() -> Tensor:
    return torch.arange(L) < torch.tensor([[L], [4], [2]])


def call(
    head: IRRHead, image: Tensor, text: Tensor, labels: Tensor, text_mask: Tensor | None = None, *, static: bool
) -> IRROutput:
    """`static`: as with labels on an accelerator, where the host does not know how many words are masked."""
    if not static:
        return head(image, text, labels, text_mask=text_mask)
    with patch.object(irr, "on_host", lambda labels: False):
        return head(image, text, labels, text_mask=text_mask)


def dense(head: IRRHead, image: Tensor, text: Tensor, labels: Tensor, text_mask: Tensor | None = None) -> IRROutput:
    """Every position through every block, through PyTorch's own multi-head attention, and through the vocabulary."""
    attend = nn.MultiheadAttention.forward
    padding = None if text_mask is None else ~text_mask
    context = head.ln_pre_i(image)
    x = attend(head.cross_attn, head.ln_pre_t(text), context, context, need_weights=False)[0]
    for block in head.cross_modal_transformer.resblocks:
        y = block.ln_1(x)
        x = x + attend(block.attn, y, y, y, key_padding_mask=padding, need_weights=False)[0]
        x = x + block.mlp(block.ln_2(x))
    logits = head.mlm_head(head.ln_post(x)).flatten(0, 1)
    targets = (labels if text_mask is None else labels * text_mask).flatten()
    masked = targets != 0
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, ignore_index=0)
    return IRROutput(loss, (logits.argmax(1) == targets)[masked].double().mean())


def gradients(head: IRRHead, loss: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
    named = {**dict(head.named_parameters()), **{f"input {i}": x for i, x in enumerate(inputs)}}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest entry of each tensor; 1e-15 for gradients that are zero but for rounding."""
    assert got.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max().item()
        error = (got[name].double() - expected[name].double()).abs().max().item()
        assert error <= tolerance * scale + 1e-15, f"{name}: {error} of {scale}"


def golden_head(dtype: torch.dtype) -> tuple[IRRHead, dict[str, Tensor]]:
    arrays = {
        name: torch.from_numpy(value) if value.ndim else torch.tensor(value) for name, value in load("irr_head").items()
    }
    state = {name.removeprefix("state/"): value for name, value in arrays.items() if name.startswith("state/")}
    head = IRRHead(64, 53, depth=2).to(dtype)
    head.load_state_dict(state, strict=True)
    return head, arrays
