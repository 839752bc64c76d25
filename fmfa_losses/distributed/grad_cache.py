"""Gradient caching, for a contrastive batch larger than memory: the model in chunks, the loss on the whole batch.

    1.  r_k = model(chunk_k)                 without a graph, keeping the state of the random numbers
    2.  loss(r_1 ... r_K) and g = dloss/dr   the loss sees the concatenation; its graph ends at r
    3.  r_k once more, with a graph and the same random numbers, and g_k through it into the parameters

By the chain rule step 3 adds up dloss/dr_k dr_k/dtheta over the chunks: the gradient of the whole batch, for one more
forward pass of time and one chunk's graph of memory. Step 3 is right only when r_k comes out again as it was in step 1:
the two are compared. Source: Gao et al. (GradCache), arXiv 2101.06983.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import describe

__all__ = ["cached_backward"]


def cached_backward(
    model: Callable[..., Any],
    chunks: Iterable[Any],
    loss_fn: Callable[..., Tensor],
    *,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Adds to `.grad` what `loss_fn(*model(whole batch)).backward()` would add, with the graph of one chunk in memory.

    Args:
        model: called as model(*chunk) with a tuple or list, model(**chunk) with a dict, model(chunk) otherwise. Returns
            a tensor, or a tuple, list or dict of tensors, each with its samples along dim 0; where chunks differ in
            another dimension (captions padded to the longest of a chunk), zeros or False are appended. An output of
            shape [], such as a scale, must not depend on the chunk. Samples must not depend on each other: batch
            normalisation in training mode sees chunks, and updates its averages twice.
        chunks: the batch, cut into pieces of any sizes; all are kept until the end.
        loss_fn: called with the outputs of all chunks concatenated along dim 0: loss_fn(*outputs), or
            loss_fn(**outputs) where the model returns a dict. Returns a scalar. Labels, and whatever else it needs,
            come with its closure. Its own parameters receive their gradients too.
        scaler: a GradScaler that scales the loss before its backward.

    Returns:
        The loss, detached.

    With DistributedDataParallel as model the gradients travel once, with the last chunk, so all ranks need at least one
    chunk, but not equally many. Parameters used in loss_fn alone then belong to a module of their own, wrapped like the
    model is. Losses with gather=True work as anywhere. Autocast must enclose the call.

    Raises:
        ValueError: no chunk, a loss that is not a scalar, chunks whose outputs differ in number, names, rank or dtype,
            an output of shape [] that is another one for another chunk.
        TypeError: an output that is not a tensor.
        RuntimeError: the second pass of a chunk gives another output than the first, as with random numbers from a
            generator of the model's own; found at the end, when gradients have been added.

    Example:
        >>> tower = torch.nn.Linear(4, 4)
        >>> batch = torch.randn(64, 4)
        >>> loss = cached_backward(tower, batch.split(16), lambda features: features.square().mean())
        >>> loss.shape, tower.weight.grad.shape
        (torch.Size([]), torch.Size([4, 4]))
    """
    chunks = list(chunks)
    states, outputs = _first_pass(model, chunks)
    whole = {name: _Whole(name, [output[name] for output in outputs]) for name in outputs[0]}
    loss = _loss(loss_fn, {name: part.tensor for name, part in whole.items()})
    torch.autograd.backward(loss if scaler is None else scaler.scale(loss))

    state_after = _random_state()
    differences = []
    for index, chunk in enumerate(chunks):
        _set_random_state(states[index])
        last = index == len(chunks) - 1
        with nullcontext() if last else getattr(model, "no_sync", nullcontext)(), torch.enable_grad():
            output = _named(_call(model, chunk))
            differences += [x.to(loss.device) for x in _differences(index, outputs[index], output)]
            _backward(index, output, whole)
    _set_random_state(state_after)
    _raise_where_true(differences, list(whole))
    return loss.detach()


def _first_pass(model: Callable[..., Any], chunks: list[Any]) -> tuple[list[Any], list[dict[Any, Tensor]]]:
    """The random state before each chunk, and its outputs without a graph."""
    if not chunks:
        raise ValueError("chunks must hold at least one piece of the batch, got none; skip empty batches")
    states, outputs = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_state())
            outputs.append(_named(_call(model, chunk)))
    # Autocast remembers the weights that it cast above, without their graph.
    torch.clear_autocast_cache()
    if any(output.keys() != outputs[0].keys() for output in outputs):
        raise ValueError(
            "model must return the same outputs for every chunk, got "
            + " and ".join(sorted({str(list(output)) for output in outputs}))
        )
    return states, outputs


def _loss(loss_fn: Callable[..., Tensor], batch: dict[Any, Tensor]) -> Tensor:
    with torch.enable_grad():
        loss = _call(loss_fn, batch if isinstance(next(iter(batch)), str) else tuple(batch.values()))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"loss_fn must return a scalar, got {describe(loss)}; reduce it")
    return loss


def _backward(index: int, output: dict[Any, Tensor], whole: "dict[Any, _Whole]") -> None:
    gradients = {name: part.gradient(index) for name, part in whole.items() if output[name].requires_grad}
    pairs = [(output[name], gradient) for name, gradient in gradients.items() if gradient is not None]
    if pairs:
        torch.autograd.backward([x for x, _ in pairs], [gradient for _, gradient in pairs])


def _raise_where_true(differences: list[Tensor], names: list[Any]) -> None:
    """The one time that the host waits; differences of all outputs of the first chunk, then of the second, ..."""
    for number, differs in enumerate(torch.stack(differences).tolist()):
        if differs:
            index, name = divmod(number, len(names))
            raise RuntimeError(_CHANGED.format(index, f"other values of output {names[name]!r}"))


_CHANGED = (
    "model must return the same for a chunk in both passes, got for chunk {} {}; the gradients that were added are not "
    "those of the loss. Random numbers of torch's default generators are replayed: draw from these, or outside of the "
    "model; and let both passes compute in one precision"
)


class _Whole:
    """One output of the whole batch, a leaf of the loss's graph, and the gradient that belongs to each chunk."""

    def __init__(self, name: Any, pieces: list[Tensor]) -> None:
        if len({(x.ndim, x.dtype, x.device) for x in pieces}) > 1:
            raise ValueError(
                f"model must return output {name!r} with one rank, dtype and device for every chunk, got "
                + " and ".join(sorted({describe(x) for x in pieces}))
            )
        self.shapes = [x.shape for x in pieces]
        if pieces[0].ndim == 0:
            # It does not depend on the batch, such as a scale: the same for all chunks.
            if any(torch.stack(pieces[1:]).ne(pieces[0]).tolist() if len(pieces) > 1 else ()):
                raise ValueError(
                    f"output {name!r} without samples, shape [], must be the same for every chunk, got "
                    f"{torch.stack(pieces).tolist()}; return one value per sample, and reduce it in loss_fn"
                )
            self.tensor = pieces[0].clone()
        else:
            longest = [max(sizes) for sizes in zip(*(x.shape[1:] for x in pieces), strict=True)]
            self.tensor = torch.cat([_padded(x, longest) for x in pieces])
        if self.tensor.is_floating_point():
            self.tensor.requires_grad_()

    def gradient(self, index: int) -> Tensor | None:
        grad, shape = self.tensor.grad, self.shapes[index]
        if grad is None:
            return None
        if not shape:
            return grad if index == len(self.shapes) - 1 else None  # once
        start = sum(size[0] for size in self.shapes[:index])
        return grad[start : start + shape[0]][_corner(shape)]


def _differences(index: int, first: dict[Any, Tensor], second: dict[Any, Tensor]) -> list[Tensor]:
    """For each output of a chunk whether the two passes differ, a bool on its device."""
    shapes, again = ({name: list(x.shape) for name, x in output.items()} for output in (first, second))
    if shapes != again:
        raise RuntimeError(_CHANGED.format(index, f"{shapes}, then {again}"))
    return [_differ(first[name], x.detach()) for name, x in second.items()]


def _corner(shape: torch.Size) -> tuple[slice, ...]:
    """The slices that cut a tensor of this shape out of one that is larger in the dimensions after the first."""
    return (slice(None), *(slice(size) for size in shape[1:]))


def _padded(x: Tensor, sizes: list[int]) -> Tensor:
    """x [b, ...] with zeros, False for a mask, appended up to the given sizes after the first."""
    if list(x.shape[1:]) == sizes:
        return x
    padded = x.new_zeros(len(x), *sizes)
    padded[_corner(x.shape)] = x
    return padded


def _differ(first: Tensor, second: Tensor) -> Tensor:
    """Whether two passes gave other values: a bool on the device. Kernels may round differently under a graph."""
    if not first.is_floating_point():
        return (first != second).any()
    if first.numel() == 0:
        return first.new_zeros((), dtype=torch.bool)
    half = first.itemsize == 2 or torch.is_autocast_enabled(first.device.type)
    tolerance = 2**-5 if half else 1e-3  # of the largest number of a sample
    a, b = (x.reshape(len(x) if x.ndim else 1, -1) for x in (first, second))
    finite = a.isfinite()
    error, size = (x.masked_fill(~finite, 0).abs().amax(dim=1) for x in (a - b, a))
    return (error > tolerance * size).any() | (finite != b.isfinite()).any()


def _call(function: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(*inputs) if isinstance(inputs, (tuple, list)) else function(inputs)


def _named(output: Any) -> dict[Any, Tensor]:
    """Outputs by name, or by position."""
    if isinstance(output, Tensor):
        output = (output,)
    named = dict(output) if isinstance(output, Mapping) else dict(enumerate(output))
    if not named:
        raise TypeError(f"model must return at least one tensor, got {output!r}")
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"model must return tensors, got output {name!r}: {describe(x)}; leave it out")
    return named


def _random_state() -> tuple[Tensor, list[Tensor]]:
    on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_cuda else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
