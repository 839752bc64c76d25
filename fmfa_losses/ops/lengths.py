"""Real lengths in place of a mask: captions that are padded to one length, or packed one after the other.

    lengths [B]           padded tokens [B, L, D]: token l of caption b is kept where l < lengths[b]
    cu_seqlens [B + 1]    packed tokens [T, D]: caption b is tokens[cu_seqlens[b] : cu_seqlens[b + 1]]

Both become what the operators take, tokens [B, L, D] and a mask [B, L]. Packed tokens are copied to their rows, and
their gradient is copied back: every token has a row of its own, so nothing is added up. That reads T D and writes
B L D numbers, little beside the (L + N) L D products of each pair.

Values are checked where the host may read them. Where it may not (an accelerator, torch.compile, torch.vmap) no value
leads out of bounds, and `right` says on the device whether all of them are as they must be: the losses then become NaN.
"""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .checks import check_float, check_integer, check_mask, check_shape, describe, integer_ids, nan_unless, on_host
from .padding import refuse_trace

__all__ = ["Captions", "Lengths", "Packing", "captions", "length_mask", "pad_alike", "pad_packed"]


# text_lengths, text_cu_seqlens and text_max_seqlen of a call.
Lengths: TypeAlias = tuple[Tensor | None, Tensor | None, int | None]


class Packing(NamedTuple):
    """Where packed tokens go."""

    rows: Tensor  # [T] of each token, among the B L
    mask: Tensor  # [B, L]
    right: Tensor | None

    def pad(self, x: Tensor, fill: float = 0) -> Tensor:
        """[T, ...] -> [B, L, ...], `fill` where there is no token."""
        empty = x.new_full((self.mask.numel(), *x.shape[1:]), fill)
        return empty.index_put((self.rows,), x).view(*self.mask.shape, *x.shape[1:])  # its gradient is a gather


class Captions(NamedTuple):
    """Tokens and the mask over them, as the operators take them."""

    tokens: Tensor  # [B, L, D]
    mask: Tensor | None  # [B, L]
    right: Tensor | None = None  # [] bool on the device; None where the host has read the values, or there are none
    packing: Packing | None = None  # of packed tokens


def captions(
    tokens: Tensor,
    mask: Tensor | None,
    lengths: Lengths,
    like: Tensor,
    *,
    shared: bool = False,
    name: str = "text_tokens",
) -> Captions:
    """What a call gave as tokens [B, L, D] and a mask, checked; of mask, lengths and packing at most one.

    Args:
        tokens: [B, L, D]; [T, D] with text_cu_seqlens.
        mask: text_mask.
        lengths: text_lengths, text_cu_seqlens and text_max_seqlen.
        like: [B, ...], whose samples the captions are.
        shared: other ranks must have the same L, so it is not taken from this batch.
        name: of the tokens.
    """
    counts, starts, longest = lengths
    given = [
        word
        for word, value in (("text_mask", mask), ("text_lengths", counts), ("text_cu_seqlens", starts))
        if value is not None
    ]
    if len(given) > 1:
        raise ValueError(
            f"only one of text_mask, text_lengths and text_cu_seqlens must be given, got {' and '.join(given)}; leave "
            f"out {' and '.join(given[1:])}"
        )
    if starts is not None:
        _check_packed(name, tokens)
        starts = _integers("text_cu_seqlens", starts, "B + 1", tokens)
        check_shape("text_cu_seqlens", starts, (like.shape[0] + 1,), "a start for each caption, and the end")
        packing = _packing("text_", name, tokens.shape[0], starts, longest, shared)
        return Captions(packing.pad(tokens), packing.mask, packing.right, packing)
    if longest is not None:
        raise ValueError(
            f"text_max_seqlen must come with text_cu_seqlens, got {longest!r} alone; leave it out for tokens [B, L, D]"
        )
    if isinstance(tokens, Tensor) and tokens.ndim == 2:
        raise ValueError(
            f"{name} must have shape [B, L, D], or [T, D] with text_cu_seqlens, got {describe(tokens)}; pass "
            "text_cu_seqlens, where each caption starts, if they are packed"
        )
    check_float(name, tokens, "B L D")
    if counts is None:
        if mask is not None:
            check_mask("text_mask", mask, tokens)
        return Captions(tokens, mask)
    counts = _integers("text_lengths", counts, "B", tokens)
    check_shape("text_lengths", counts, (tokens.shape[0],), "one length a caption")
    right = _right_lengths("text_lengths", counts, tokens.shape[1], "L", name)
    return Captions(tokens, _kept(counts, tokens.shape[1]), right)


def _check_packed(name: str, tokens: Tensor) -> None:
    if isinstance(tokens, Tensor) and tokens.ndim == 3:
        raise ValueError(
            f"{name} must be packed, [T, D], with text_cu_seqlens, got {describe(tokens)}; pass {name}[mask], or all "
            "tokens padded and text_lengths"
        )
    check_float(name, tokens, "T D")


def pad_alike(name: str, x: Tensor | None, packing: Packing, fill: int | None = None) -> Tensor | None:
    """Other tokens [T, D] padded as those of `packing` are; or labels [T], with `fill`, if they are not yet [B, L]."""
    if x is None or (fill is not None and isinstance(x, Tensor) and x.ndim == 2):
        return x
    T, *_ = packing.rows.shape
    if fill is None:
        _check_packed(name, x)
        check_shape(name, x, (T, x.shape[1]), "a row for each packed token")
    else:
        x = integer_ids(name, x, "T")
        check_shape(name, x, (T,), "a label for each packed token")
    if x.device != packing.rows.device:
        raise ValueError(
            f"{name} [T] must be on {packing.rows.device}, as the tokens are, got {describe(x)}; move them, or pass "
            "labels padded, [B, text_max_seqlen], which may stay on the CPU"
        )
    return packing.pad(x, fill or 0)


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """The mask that keeps the first tokens of every sample.

        mask[b, l] = l < lengths[b]

    Args:
        lengths: [B] integers in [0, size]. On an accelerator they are not read: what is larger keeps all tokens, what
            is smaller none.
        size: L, tokens of every sample with their padding.

    Returns:
        [B, L] bool on the device of `lengths`, True = keep.

    Raises:
        TypeError, ValueError: no integers, another shape, or (on the CPU) a length that is not in [0, size].

    Example:
        >>> length_mask(torch.tensor([2, 0]), 3)
        tensor([[ True,  True, False],
                [False, False, False]])

    Reference: the `lengths` of torch.nn.utils.rnn.pack_padded_sequence.
    """
    size = check_integer("size", size, 1)
    lengths = _integers("lengths", lengths, "B")
    _right_lengths("lengths", lengths, size, "size", "the tokens")
    return _kept(lengths, size)


def pad_packed(tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None) -> tuple[Tensor, Tensor]:
    """Tokens that are packed one after the other, padded with zeros, and their mask; for images and operators.

        padded[b, l] = tokens[cu_seqlens[b] + l]  where l < cu_seqlens[b + 1] - cu_seqlens[b]

    The gradient is copied back, without additions. `EFALoss` and `FMFALoss` take packed text tokens as they are.

    Args:
        tokens: [T, D], any float dtype: the tokens of all samples.
        cu_seqlens: [B + 1] integers on the same device: where each sample starts, and T, as in flash-attn.
        max_seqlen: L, tokens of a padded sample, no fewer than the longest one has. The longest one's when None, which
            only the CPU can know: elsewhere the host would have to wait.

    Returns:
        ([B, L, D], [B, L] bool, True = keep). On an accelerator, where values are not read, wrong ones give NaN.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, starts that fall or do not end with T (on the
            CPU), or no max_seqlen where it cannot be known.

    Example:
        >>> padded, mask = pad_packed(torch.arange(3.0)[:, None], torch.tensor([0, 1, 3]))
        >>> padded[..., 0]
        tensor([[0., 0.],
                [1., 2.]])

    Reference: Dao et al., arXiv 2205.14135; the arguments are those of flash_attn_varlen_func.
    """
    check_float("tokens", tokens, "T D")
    cu_seqlens = _integers("cu_seqlens", cu_seqlens, "B + 1", tokens)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must have shape [B + 1] with B >= 1 (a start for each sample, and the end), got "
            f"{describe(cu_seqlens)}; pass 0 and the cumulative sum of the lengths"
        )
    packing = _packing("", "tokens", tokens.shape[0], cu_seqlens, max_seqlen, shared=False)
    return nan_unless(packing.right, packing.pad(tokens)), packing.mask


def _integers(name: str, values: object, pattern: str, like: Tensor | None = None) -> Tensor:
    """int64 on the device of `like`."""
    integers = integer_ids(name, values, pattern)
    if like is not None and integers.device != like.device:
        raise ValueError(
            f"{name} must be on {like.device}, as the tokens are, got {describe(integers)}; call "
            f"{name}.to({str(like.device)!r})"
        )
    if like is None and integers.ndim != 1:
        raise ValueError(f"{name} must have shape [{pattern}], got {describe(integers)}; reshape it")
    return integers.long()


def _kept(lengths: Tensor, L: int) -> Tensor:
    return torch.arange(L, device=lengths.device) < lengths.unsqueeze(1)


def _right_lengths(name: str, lengths: Tensor, L: int, letter: str, tokens: str) -> Tensor | None:
    """Raises where the host reads the values; elsewhere whether all are in [0, L]."""
    wrong = (lengths < 0) | (lengths > L)
    if not on_host(lengths):
        return ~wrong.any()
    if bool(wrong.any()):
        b = int(wrong.to(torch.uint8).argmax())
        raise ValueError(
            f"{name} must lie in [0, {letter} = {L}], got {int(lengths[b])} for sample {b}; count the kept tokens at "
            f"the start of each row of {tokens}"
        )
    return None


def _packing(prefix: str, tokens: str, T: int, starts: Tensor, max_seqlen: int | None, shared: bool) -> Packing:
    cu, most = (prefix + what for what in ("cu_seqlens", "max_seqlen"))
    refuse_trace(cu)
    lengths = starts.diff()
    right = None
    if on_host(starts):
        _check_starts(cu, tokens, starts, T)
        longest = int(lengths.max())
    if max_seqlen is not None:
        L = check_integer(most, max_seqlen, 1)
        if on_host(starts) and longest > L:
            raise ValueError(
                f"{most} must be at least the longest caption of {cu}, {longest} tokens, got {L}; pass the bound of "
                "the tokenizer"
            )
    elif shared or not on_host(starts):
        why = "with gather, whose ranks pad alike" if shared else f"where the host does not read {cu}"
        raise ValueError(
            f"{most} must be given {why}, got None; pass an upper bound of the lengths, such as that of the tokenizer"
        )
    else:
        L = longest
    B = lengths.shape[0]
    if T > B * L:
        raise ValueError(
            f"{most} must leave room for all T = {T} tokens of {B} samples, got {L}; pass an upper bound of the lengths"
        )
    if not on_host(starts):
        right = (starts[0] == 0) & (starts[-1] == T) & ((lengths >= 0) & (lengths <= L)).all()
    mask = _kept(lengths, L)
    # The t-th kept row is token t's. Whatever wrong starts hold, these are T rows within the tensor.
    return Packing((~mask).flatten().to(torch.uint8).argsort(stable=True)[:T], mask, right)


def _check_starts(cu: str, tokens: str, starts: Tensor, T: int) -> None:
    values = starts.tolist()
    fall = next((b for b in range(len(values) - 1) if values[b + 1] < values[b]), None)
    if values[0] == 0 and values[-1] == T and fall is None:
        return
    got = f"{values[0]} at the start and {values[-1]} at the end"
    if fall is not None:
        got = f"{values[fall]} and then {values[fall + 1]} at caption {fall}"
    raise ValueError(
        f"{cu} must begin with 0, never fall, and end with T = {T}, the rows of {tokens}, got {got}; pass 0 and the "
        "cumulative sum of the lengths"
    )
