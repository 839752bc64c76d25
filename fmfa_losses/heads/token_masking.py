"""Which words of a caption the IRR objective masks: the scheme of BERT."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.checks import as_tensor, check_float, check_fraction, check_integer, describe, integer_ids, on_host

__all__ = ["mask_tokens"]

MASKED, REPLACED = 0.8, 0.1  # of the chosen tokens; the rest stays as it is


def mask_tokens(
    token_ids: Tensor,
    *,
    mask_id: int = 49405,
    special_ids: Sequence[int] = (0, 49406, 49407),
    probability: float | Tensor = 0.15,
    generator: torch.Generator | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Masks words of captions, and says which words they were.

        chosen  = content tokens with u < p, u uniform in [0, 1), and of every caption the one of smallest u / p
        masked  = mask_id for 80 % of the chosen, a random word for 10 %, itself for 10 %
        labels  = the original id where chosen, 0 elsewhere

    Content is everything but `special_ids`, `mask_id` (masked already) and 0 (padding, and "ignore" in the
    labels). A caption without content gets no mask and no label. The defaults are those of CLIP's vocabulary
    as TIPR codebases use it: 49405 [mask], 49406 start, 49407 end, 0 padding.

    The input is never changed, so a data set may pass the captions that it keeps. The host never waits for an
    accelerator, and the same generator state gives the same mask.

    Args:
        token_ids: [B, L] or [L], any integer dtype that holds the ids, on any device.
        mask_id: the id that stands for a masked token, >= 1.
        special_ids: ids that are never chosen and never drawn as a random word.
        probability: p in [0, 1], the share of content tokens that is chosen; at 0 it is one token per caption. Or p of
            every token, a tensor of the shape of `token_ids` or [L], any float dtype, without a gradient; a token of 0
            is chosen only where all of its caption are 0. Noise-aware masking (MLLM4Text-ReID) by similarities s of
            words to their image has p = (0.15 + mean of s over the caption - s).clamp(0, 1).
        generator: source of the draws, on the device of `token_ids`; None is the global one of that device.
        vocab_size: size of the tokenizer's vocabulary. All ids lie in [0, vocab_size), and random words come from
            [1, vocab_size) without `mask_id` and `special_ids`. None: from [1, mask_id), which in CLIP's vocabulary is
            every ordinary token.
    Returns:
        (masked_ids, labels), shape, dtype and device of `token_ids`.
    Raises:
        TypeError, ValueError: shape, dtype or device; a probability outside [0, 1] or NaN (elsewhere than on the CPU
            NaN is as 0); an id outside the vocabulary (of token_ids: on the CPU alone), no ordinary id to draw.
    Example:
        >>> caption = torch.tensor([[49406, 320, 786, 2342, 49407, 0, 0]])
        >>> masked, labels = mask_tokens(caption, probability=1.0)
        >>> labels
        tensor([[   0,  320,  786, 2342,    0,    0,    0]])
        >>> masked[0, 0].item(), masked[0, 4:].tolist()
        (49406, [49407, 0, 0])

    Reference: Devlin et al., arXiv 1810.04805, section 3.1; IRRA, arXiv 2303.12501, section 3.2.
    """
    mask_id = check_integer("mask_id", mask_id, 1)
    reserved = {0, mask_id, *(check_integer("special_ids", special) for special in special_ids)}
    bound = mask_id if vocab_size is None else check_integer("vocab_size", vocab_size, 1)
    given, token_ids = token_ids, _check(token_ids, reserved | {bound - 1}, generator)
    probability = _check_probability(probability, token_ids)
    if vocab_size is not None:
        _check_vocabulary(token_ids, mask_id, reserved, bound)

    chosen = _choose(token_ids, reserved, probability, generator)
    masked = _masked(token_ids, chosen, mask_id, bound, reserved, generator)
    return masked.to(given.dtype), torch.where(chosen, token_ids, 0).to(given.dtype)


def _choose(
    token_ids: Tensor, reserved: set[int], probability: float | Tensor, generator: torch.Generator | None
) -> Tensor:
    """Which tokens are masked, bool in the shape of `token_ids`."""
    content = torch.ones_like(token_ids, dtype=torch.bool)
    for special in sorted(reserved):
        content &= token_ids != special
    draw = torch.rand(token_ids.shape, dtype=torch.float32, generator=generator, device=token_ids.device)
    # The smallest draw of a caption is chosen whatever the probability: at least one token, without a look at values.
    order, eligible = draw, content
    if isinstance(probability, Tensor):  # the smallest draw / probability, which is below 1 for all that are chosen
        likely = content & (probability > 0)
        eligible = torch.where(likely.any(dim=-1, keepdim=True), likely, content)
        smallest = torch.finfo(torch.float32).tiny
        order = torch.where(probability > 0, draw / probability.clamp(min=smallest), draw)
    first = order.masked_fill(~eligible, torch.inf).argmin(dim=-1, keepdim=True)
    return content & (draw < probability).scatter(-1, first, True)


def _check_probability(probability: object, token_ids: Tensor) -> float | Tensor:
    """A number, or float32 probabilities that have the last dimensions of `token_ids`."""
    many = isinstance(probability, (Tensor, list, tuple)) or bool(getattr(probability, "shape", ()))
    if not many:
        return check_fraction("probability", probability)
    shapes = [tuple(token_ids.shape), (token_ids.shape[-1],)]
    if not isinstance(probability, Tensor) or tuple(probability.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise TypeError(
            f"probability must be a number in [0, 1], or a tensor {wanted} with one for every token, got "
            f"{describe(probability)}; reshape it ({as_tensor(probability)})"
        )
    check_float("probability", probability, "B L" if probability.ndim == 2 else "L")
    if probability.device != token_ids.device:
        raise ValueError(
            f"probability must be on the device of token_ids, got {probability.device} and {token_ids.device}; call "
            f"probability.to({str(token_ids.device)!r})"
        )
    probability = probability.detach().float()
    if on_host(probability):
        low, high = float(probability.min()), float(probability.max())
        if not (low >= 0 and high <= 1):  # NaN is neither
            remedy = "look for what made the NaN" if low != low else "call probability.clamp(0, 1)"
            raise ValueError(f"probability must lie in [0, 1], got {low:.6g} to {high:.6g}; {remedy}")
    return probability


def _masked(
    token_ids: Tensor,
    chosen: Tensor,
    mask_id: int,
    bound: int,
    reserved: set[int],
    generator: torch.Generator | None,
) -> Tensor:
    """The token ids with the mask, a random word or themselves where they are chosen."""
    outcome = torch.rand(token_ids.shape, dtype=torch.float32, generator=generator, device=token_ids.device)
    words = _random_words(token_ids, bound, reserved, generator)
    masked = torch.where(chosen & (outcome < MASKED), mask_id, token_ids)
    return torch.where(chosen & (outcome >= MASKED) & (outcome < MASKED + REPLACED), words, masked)


def _random_words(like: Tensor, bound: int, reserved: set[int], generator: torch.Generator | None) -> Tensor:
    """Uniform ids of [0, bound) without the reserved ones, shape and dtype of `like`."""
    skipped = sorted(special for special in reserved if 0 <= special < bound)
    if bound - len(skipped) < 1:
        raise ValueError(
            f"there must be an ordinary id below {bound} to draw random words from, got none beside {skipped}; "
            "pass vocab_size"
        )
    words = torch.randint(bound - len(skipped), like.shape, generator=generator, device=like.device)
    for special in skipped:  # in ascending order: step over each hole
        words += words >= special
    return words.to(like.dtype)


def _check(token_ids: Tensor, ids: set[int], generator: torch.Generator | None) -> Tensor:
    """The token ids in a dtype that can be computed with."""
    signed = integer_ids("token_ids", token_ids, "B, L")
    if token_ids.ndim not in (1, 2) or 0 in token_ids.shape:
        raise ValueError(
            f"token_ids must be [B, L] or [L] and not empty, got {describe(token_ids)}; reshape it, or skip it"
        )
    limits = torch.iinfo(token_ids.dtype)
    if min(ids) < limits.min or max(ids) > limits.max:
        raise ValueError(
            f"token_ids must be of a dtype that holds the ids {min(ids)} to {max(ids)}, got {describe(token_ids)}; "
            "call token_ids.long()"
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator, got {describe(generator)}; of a seed make one: "
            "torch.Generator().manual_seed(seed)"
        )
    if generator is not None and generator.device.type != token_ids.device.type:
        raise ValueError(
            f"generator must be on the device of token_ids, got {generator.device} and {token_ids.device}; "
            f"make it with torch.Generator({str(token_ids.device)!r})"
        )
    return signed


def _check_vocabulary(token_ids: Tensor, mask_id: int, reserved: set[int], vocab_size: int) -> None:
    inside = f"must lie in the vocabulary [0, vocab_size = {vocab_size})"
    if mask_id >= vocab_size:
        raise ValueError(f"mask_id {inside}, got {mask_id}; pass the mask_id and vocab_size of the tokenizer")
    outside = sorted(special for special in reserved if not 0 <= special < vocab_size)
    if outside:
        raise ValueError(f"special_ids {inside}, got {outside}; pass the special_ids and vocab_size of the tokenizer")
    if on_host(token_ids) and not 0 <= (low := int(token_ids.min())) <= (high := int(token_ids.max())) < vocab_size:
        raise ValueError(f"token_ids {inside}, got {low} to {high}; pass the vocab_size of the tokenizer")
