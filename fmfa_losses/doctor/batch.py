"""`check_batch`: mistakes of docs/pitfalls.md that raise no error and can be seen in one batch."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.checks import check_float, describe
from .batch_findings import FEATURES, MASKS_AND_IDS, TOKENS, BatchFindings

__all__ = ["BatchReport", "check_batch"]


@dataclass(frozen=True)
class BatchReport:
    """findings: what looks wrong, and what to do; statistics: shapes and ranges of the batch. `str()` shows both."""

    findings: tuple[str, ...]
    statistics: tuple[str, ...]

    def __str__(self) -> str:
        nothing = "nothing looks wrong" if self.statistics else "nothing was given"
        return "\n".join([*self.statistics, *([f"! {finding}" for finding in self.findings] or [nothing])])


def check_batch(
    *,
    loss: nn.Module | None = None,
    image_features: Tensor | None = None,
    text_features: Tensor | None = None,
    image_tokens: Tensor | None = None,
    text_tokens: Tensor | None = None,
    masked_text_tokens: Tensor | None = None,
    masked_labels: Tensor | None = None,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    token_ids: Tensor | None = None,
    pids: Tensor | None = None,
    logit_scale: float | Tensor | None = None,
) -> BatchReport:
    """Finds inputs in one batch that the losses accept and that are wrong.

    Call it once, on the first batch, with what the losses get: it copies to the CPU and waits for the accelerator. It
    reports nothing of which it is not sure; docs/pitfalls.md lists what cannot be seen in a batch.

    Args:
        loss: the loss that gets the batch; some inputs are right for one loss and wrong for another.
        image_features, text_features: [B, D].
        image_tokens, text_tokens: [B, N, D] and [B, L, D].
        masked_text_tokens, masked_labels: [B, L, D] and [B, L], of the IRR term.
        image_mask, text_mask: [B, N] and [B, L] bool, True = keep.
        token_ids: [B, L], the captions as the tokenizer gave them; they show which tokens are padding.
        pids: [B].
        logit_scale: 1 / tau.
    Returns:
        BatchReport(findings, statistics), two tuples of lines; print it.
    Raises:
        TypeError, ValueError: a rank or dtype that no loss accepts.
    Example:
        >>> print(check_batch(logit_scale=torch.tensor(50.0).log()))
        logit_scale   3.91
        ! logit_scale 3.91: if this is CLIP's stored parameter, log(1 / tau), pass logit_scale.exp(), 50
    """
    floats = {
        "image_features": image_features,
        "text_features": text_features,
        "image_tokens": image_tokens,
        "text_tokens": text_tokens,
        "masked_text_tokens": masked_text_tokens,
    }
    integers = {
        "image_mask": image_mask,
        "text_mask": text_mask,
        "token_ids": token_ids,
        "masked_labels": masked_labels,
        "pids": pids,
    }
    scale = None if logit_scale is None else _scale(logit_scale)
    batch = BatchFindings(_on_cpu(floats, integers), loss, scale, tensor_scale=isinstance(logit_scale, Tensor))
    statistics = [f"{name:<13} {text}" for name, text in batch.statistics()]
    return BatchReport(tuple(batch.findings()), tuple(statistics))


def _scale(value: float | Tensor) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"logit_scale must hold one number, got {describe(value)}")
    return float(value.detach() if isinstance(value, Tensor) else value)


def _on_cpu(floats: dict[str, Tensor | None], integers: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """What was given, checked, detached, in float64 or int64; masks stay bool."""
    given = {}
    for name, tensor in floats.items():
        if tensor is not None:
            check_float(name, tensor, (FEATURES | TOKENS)[name])
            given[name] = tensor.detach().cpu().double()
    for name, tensor in integers.items():
        if tensor is None:
            continue
        mask = name.endswith("mask")
        rank = 1 if name == "pids" else 2
        if not isinstance(tensor, Tensor) or tensor.is_floating_point() or (tensor.dtype == torch.bool) != mask:
            raise TypeError(f"{name} must be {'a boolean' if mask else 'an integer'} tensor, got {describe(tensor)}")
        if tensor.ndim != rank or 0 in tensor.shape:
            raise ValueError(
                f"{name} must have shape {MASKS_AND_IDS.get(name, 'B').split()}, not empty, got {describe(tensor)}"
            )
        given[name] = tensor.detach().cpu() if mask else tensor.detach().cpu().long()
    return given
