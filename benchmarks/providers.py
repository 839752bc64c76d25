"""The implementations that are compared. Each takes the inputs of its case by name and returns a tensor.

"released formulation" computes the paper's equations the way the code released with the paper does: a batched
product for every pair, whose operands are first expanded to [B, B, tokens, D]. "reference" is the library's own
specification: one product for all pairs, everything in memory, gradients by autograd. What other packages have is in
peers.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmfa_losses import IDHead, IRRHead, IRROutput, mask_tokens
from fmfa_losses.functional import asdm_loss, hard_similarity, sparse_aggregate
from fmfa_losses.losses.efa import efa_loss
from fmfa_losses.ops.aggregation import sparse_aggregate_reference
from fmfa_losses.ops.hard_similarity import hard_similarity_reference
from fmfa_losses.ops.precision import unit_rows
from fmfa_losses.ops.ranking import ranking_reference
from fmfa_losses.ops.rows.bfloat16 import has_units

from .peers import CPU_PEERS, PEERS, PRODUCT, no_compiler, not_installed, product

Provider = Callable[..., Any]

RELEASED, REFERENCE = "released formulation", "reference"
UNMASKED = f"{RELEASED}, without the mask"  # it takes none: what a user of that code pays at the same shape
COMPILED, AUTOTUNED = "torch.compile of the reference", "torch.compile of the reference, max-autotune"
TORCH, TRITON = "fmfa-losses (torch)", "fmfa-losses (triton)"
MEDIUM = f"{TORCH}, float32 matmul precision medium"  # winners in bfloat16
OURS = (TORCH, TRITON)
OTHER_RESULTS = (UNMASKED, PRODUCT)  # not what the others of their case compute, and not compared with it


def released_similarity(x: Tensor, e: Tensor, *, x_mask: Tensor | None = None, e_mask: Tensor | None = None) -> Tensor:
    """[B, B] from a batched product of expanded operands; for inputs without masks."""
    assert x_mask is None and e_mask is None
    cos = unit_rows(x)[:, None] @ unit_rows(e)[None].mT  # [i, j, l, k]
    return cos.max(dim=-1).values.logsumexp(dim=-1)


def plain_efa(
    similarity: Provider, image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor | None = None
) -> Tensor:
    """Eq. 5-12 with margins 0.1, from the references of aggregation and ranking and the given similarity."""
    joint = sparse_aggregate_reference(image_tokens, text_tokens)
    text_sim, image_sim = (
        similarity(tokens, joint, x_mask=mask, e_mask=text_mask)
        for tokens, mask in ((text_tokens, text_mask), (image_tokens, None))
    )
    return ranking_reference(text_sim, image_sim, margin=0.1).mean()


def plain_asdm(image_features: Tensor, text_features: Tensor, pids: Tensor, scale: float | Tensor = 50.0) -> Tensor:
    """Eq. 1-4 with alpha 10 and tau = 1 / scale, on whole [B, B] matrices; in float32 at least."""
    image, text = (x if x.dtype == torch.float64 else x.float() for x in (image_features, text_features))
    sim = F.normalize(text, dim=1) @ F.normalize(image, dim=1).T
    same = (pids[:, None] == pids).to(text.dtype)
    log_target = (same / same.sum(dim=1, keepdim=True) + 1e-8).log()
    total = sim.new_zeros(())
    for z in (sim * scale, sim.T * scale):
        z = z.to(text.dtype)
        p, log_p = z.softmax(dim=1), z.log_softmax(dim=1)
        divergence = (p * (log_p - log_target)).sum(dim=1)
        total = total + ((1 + 10 * (p.amax(dim=1) - p.diagonal())) * divergence).mean()
    return total


def dense_irr(
    head: IRRHead, image_tokens: Tensor, text_tokens: Tensor, labels: Tensor, text_mask: Tensor | None = None
) -> Tensor:
    """The same head and the same two results, with logits over the vocabulary at every position, [B, L, V]."""
    x = head.cross_attn(head.ln_pre_t(text_tokens), head.ln_pre_i(image_tokens))
    for block in head.cross_modal_transformer.resblocks:
        x = block(x, text_mask)
    if text_mask is not None:
        labels = labels.masked_fill(~text_mask, 0)
    logits, labels = head.mlm_head(head.ln_post(x)).flatten(0, 1), labels.flatten()
    masked = labels != 0
    accuracy = ((logits.detach().argmax(dim=1) == labels) & masked).sum() / masked.sum()
    return IRROutput(F.cross_entropy(logits, labels, ignore_index=0), accuracy).loss


def plain_id(head: IDHead, image_features: Tensor, text_features: Tensor, pids: Tensor) -> Tensor:
    logits = [head.classifier(features) for features in (image_features, text_features)]
    return (F.cross_entropy(logits[0], pids) + F.cross_entropy(logits[1], pids)) / 2


def masking_loop(token_ids: Tensor) -> Tensor:
    """Token by token, as data loaders do it."""
    labels = torch.zeros_like(token_ids)
    masked = token_ids.clone()
    draw = torch.rand(3, *token_ids.shape).tolist()
    for b, caption in enumerate(token_ids.tolist()):
        for t, token in enumerate(caption):
            if token in (0, 49406, 49407) or draw[0][b][t] >= 0.15:
                continue
            labels[b, t] = token
            if draw[1][b][t] < 0.8:
                masked[b, t] = 49405
            elif draw[1][b][t] < 0.9:
                masked[b, t] = int(1 + draw[2][b][t] * 49404)
    return masked


def ours(op: str, backend: str) -> Provider:
    """The library's own function for an operation."""
    functions: dict[str, Provider] = {
        "efa": lambda image_tokens, text_tokens, text_mask=None: efa_loss(
            image_tokens, text_tokens, text_mask=text_mask, backend=backend
        ),
        "hard_similarity": lambda image_tokens, joint, text_mask=None: hard_similarity(
            image_tokens, joint, e_mask=text_mask, backend=backend
        ),
        "maxsim": lambda image_tokens, text_tokens, text_mask=None: hard_similarity(
            text_tokens, image_tokens, x_mask=text_mask, pool="sum", backend=backend
        ),
        "sparse_aggregate": lambda image_tokens, text_tokens, text_mask=None: sparse_aggregate(
            image_tokens, text_tokens, backend=backend
        ),
        "asdm": partial(asdm_loss, backend=backend),
        "irr": lambda head, image_tokens, text_tokens, labels, text_mask=None: (
            head(image_tokens, text_tokens, labels, text_mask=text_mask).loss
        ),
        "id": lambda head, **features: head(**features).loss,
        "mask_tokens": lambda token_ids: mask_tokens(token_ids)[0],
    }
    return functions[op]


def reference(op: str) -> Provider:
    functions: dict[str, Provider] = {
        "efa": partial(plain_efa, hard_similarity_reference),
        "hard_similarity": lambda image_tokens, joint, text_mask=None: hard_similarity_reference(
            image_tokens, joint, e_mask=text_mask
        ),
        "maxsim": lambda image_tokens, text_tokens, text_mask=None: hard_similarity_reference(
            text_tokens, image_tokens, x_mask=text_mask, pool="sum"
        ),
        "sparse_aggregate": lambda image_tokens, text_tokens, text_mask=None: sparse_aggregate_reference(
            image_tokens, text_tokens
        ),
        "asdm": plain_asdm,
        "irr": dense_irr,
        "id": plain_id,
        "mask_tokens": masking_loop,
    }
    return functions[op]


def released(op: str) -> Provider:
    functions: dict[str, Provider] = {
        "efa": partial(plain_efa, released_similarity),
        "hard_similarity": lambda image_tokens, joint: released_similarity(image_tokens, joint),
    }
    return functions[op]


def provider(name: str, op: str) -> Provider:
    """Raises KeyError where the provider does not have the operation. MEDIUM changes a setting of the process."""
    if name == MEDIUM:
        torch.set_float32_matmul_precision("medium")
    if name == RELEASED:
        return released(op)
    if name == UNMASKED:
        return lambda text_mask=None, **tokens: released(op)(**tokens)
    if name == REFERENCE:
        return reference(op)
    if name == COMPILED:
        return torch.compile(reference(op), dynamic=False)
    if name == AUTOTUNED:
        return torch.compile(reference(op), mode="max-autotune", dynamic=False)
    if name == PRODUCT:
        return product()
    if name in PEERS or name in CPU_PEERS:
        return (PEERS | CPU_PEERS)[name]()
    return ours(op, {TORCH: "torch", MEDIUM: "torch", TRITON: "triton"}[name])


def why_not(name: str, device: str = "cuda") -> str | None:
    """The reason why a provider cannot be measured here, or None."""
    if device == "cpu" and name in (COMPILED, AUTOTUNED):
        return no_compiler()
    if name == MEDIUM and not has_units():
        return "this processor has no units for bfloat16"
    return not_installed(name)


def memory_needed(name: str, op: str, B: int, L: int, N: int, D: int, itemsize: int) -> float:
    """Bytes that a provider which keeps everything needs for forward and backward; a lower bound, 0 for the others."""
    if op == "asdm" and name in (REFERENCE, COMPILED, AUTOTUNED):
        return 8.0 * B * B * 4
    rows = {"efa": L + N, "hard_similarity": N, "maxsim": N}.get(op, 0)
    if name == RELEASED:
        return 1.5 * B * B * (rows + L) * D * itemsize
    if name in (REFERENCE, COMPILED, AUTOTUNED):
        return 2.0 * B * B * rows * L * itemsize
    return 0.0
