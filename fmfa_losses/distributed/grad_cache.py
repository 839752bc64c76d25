"""Gradient caching, for a contrastive batch larger than memory: the model in chunks, the loss on the whole batch.

    1.  r_k = model(chunk_k)                 without a graph, keeping the states of the random generators
    2.  loss(r_1 ... r_K) and g = dloss/dr   the loss sees the concatenation; its graph ends at r
    3.  r_k once more, with a graph and the same random numbers, and g_k through it into the parameters

By the chain rule step 3 adds up dloss/dr_k dr_k/dtheta over the chunks: the gradient of the whole batch, for one more
forward pass of time and one chunk's graph of memory. Step 3 is right only when r_k comes out again as it was in step 1:
the two are compared (repeat.py). Source: Gao et al. (GradCache), arXiv 2101.06983.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import describe
from ..ops.precision import full_precision
from .random_states import RandomStates
from .repeat import Repeat

__all__ = ["cached_backward"]


def cached_backward(
    model: Callable[..., Any],
    chunks: Iterable[Any],
    loss_fn: Callable[..., Tensor],
    *,
    scaler: torch.amp.GradScaler | None = None,
    generators: Sequence[object] = (),
    tolerance: float | None = None,
) -> Tensor:
    """Adds to `.grad` what `loss_fn(*model(whole batch)).backward()` would add, with the graph of one chunk in memory.

    Args:
        model: called as model(*chunk) with a tuple or list, model(**chunk) with a dict, model(chunk) otherwise. Returns
            a tensor, or a tuple, list or dict of tensors, each with its samples along dim 0; where chunks differ in
            another dimension (captions padded to the longest of a chunk), zeros or False are appended. An output of
            shape [], such as a scale, must not depend on the chunk. Samples must not depend on each other: batch
            normalisation in training mode sees chunks, and updates its averages twice.
        chunks: the batch, cut into pieces of any sizes; all are kept until the end. They share no graph made before the
            call, nor does what else the model uses: the backward of the first chunk would use it up.
        loss_fn: called once with the outputs of all chunks concatenated along dim 0: loss_fn(*outputs), or
            loss_fn(**outputs) where the model returns a dict. Returns a scalar. Labels, and whatever else it needs,
            come with its closure. Its own parameters receive their gradients too.
        scaler: a GradScaler that scales the loss before its backward.
        generators: what the model draws from besides torch's default generators: torch.Generator,
            numpy.random.Generator, RandomState and random.Random objects, the modules numpy.random and random. Each
            chunk's second pass draws the same again, and in the end the states are those of one pass.
        tolerance: by how much outputs of the two passes may differ, relative to the largest number of a sample. None:
            by the rounding of the coarsest dtype of outputs, parameters and autocast; 8e-6 in float32 on a CPU.

    Returns:
        The loss, detached.

    With DistributedDataParallel as model the gradients travel once, with the last chunk, so all ranks need at least one
    chunk, but not equally many. Parameters used in loss_fn alone then belong to a module of their own, wrapped like the
    model is. Losses with gather=True work as anywhere. Autocast must enclose the call.

    Raises:
        ValueError: no chunk, a loss that is not a scalar or has no gradient, chunks whose outputs differ in number,
            names, rank or dtype, an output of shape [] that is another one for another chunk.
        TypeError: a model or loss_fn that cannot be called, an output that is not a tensor, a generator that is none.
        RuntimeError: the second pass of a chunk does not repeat the first, found at the end; or chunks share a graph.
            Gradients have been added: call zero_grad().

    Example:
        >>> tower = torch.nn.Linear(4, 4)
        >>> batch = torch.randn(64, 4)
        >>> loss = cached_backward(tower, batch.split(16), lambda features: features.square().mean())
        >>> loss.shape, tower.weight.grad.shape
        (torch.Size([]), torch.Size([4, 4]))
    """
    _check_callable(model, loss_fn)
    chunks, rng, repeat = list(chunks), RandomStates(generators), Repeat(model, tolerance)
    states, whole = _first_pass(model, chunks, rng)
    loss = _loss(loss_fn, whole, scaler)
    _second_pass(model, chunks, whole, rng, states, repeat)
    repeat.finish()
    return loss


def _check_callable(model: object, loss_fn: object) -> None:
    if not callable(loss_fn) or not callable(model):
        raise TypeError(
            f"model and loss_fn must be callable, got {describe(model)} and {describe(loss_fn)}; call "
            "cached_backward(model, chunks, loss_fn)"
        )


def _first_pass(
    model: Callable[..., Any], chunks: list[Any], rng: RandomStates
) -> tuple[list[Any], "dict[Any, _Whole]"]:
    """The random states before each chunk, and the outputs of all without a graph."""
    if not chunks:
        raise ValueError("chunks must hold at least one piece of the batch, got none; skip empty batches")
    states, outputs = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(rng.save())
            # Copies: an output may be a view of an input, or a buffer that the next chunk overwrites.
            outputs.append({name: x.clone() for name, x in _named(_call(model, chunk)).items()})
    # Autocast remembers the weights that it cast above, without their graph.
    torch.clear_autocast_cache()
    if any(output.keys() != outputs[0].keys() for output in outputs):
        raise ValueError(
            "model must return the same outputs for every chunk, got "
            + " and ".join(sorted({str(list(output)) for output in outputs}))
        )
    return states, {name: _Whole(name, [output[name] for output in outputs]) for name in outputs[0]}


def _loss(loss_fn: Callable[..., Tensor], whole: "dict[Any, _Whole]", scaler: torch.amp.GradScaler | None) -> Tensor:
    """The loss; its gradients are left in `whole`."""
    batch = {name: part.tensor for name, part in whole.items()}
    with torch.enable_grad():
        loss = _call(loss_fn, batch if isinstance(next(iter(batch)), str) else tuple(batch.values()))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"loss_fn must return a scalar, got {describe(loss)}; reduce it")
    if not loss.requires_grad:
        raise ValueError(
            f"loss_fn must return a loss with a gradient, got {describe(loss)} without one; compute it from outputs "
            "that are floating-point numbers, without detach(), no_grad() or inference_mode()"
        )
    _backward([loss if scaler is None else scaler.scale(loss)])
    return loss.detach()


def _second_pass(
    model: Callable[..., Any],
    chunks: list[Any],
    whole: "dict[Any, _Whole]",
    rng: RandomStates,
    states: list[Any],
    repeat: Repeat,
) -> None:
    """Adds each chunk's part of the gradient, and hands to `repeat` what must not differ."""
    for part in whole.values():
        part.compare_chunks(repeat)
    after = rng.save()
    try:
        for index, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
            rng.restore(state)
            last = index == len(chunks) - 1
            with nullcontext() if last else getattr(model, "no_sync", nullcontext)(), torch.enable_grad():
                output = _named(_call(model, chunk))
                _compare(index, whole, output, repeat)
                gradients = {name: part.gradient(index) for name, part in whole.items() if output[name].requires_grad}
                used = {name: gradient for name, gradient in gradients.items() if gradient is not None}
                if used:
                    _backward_of_chunk(index, output, used)
    finally:
        rng.restore(after)


def _backward_of_chunk(index: int, output: dict[Any, Tensor], gradients: dict[Any, Tensor]) -> None:
    try:
        _backward([output[name] for name in gradients], [x.to(output[name].dtype) for name, x in gradients.items()])
    except RuntimeError as error:
        if "a second time" not in str(error):
            raise
        raise RuntimeError(
            f"chunks must not share a graph made before the call, got for chunk {index} one that the backward of an "
            "earlier chunk has used up, of its inputs or of what else the model uses; call zero_grad(), and compute "
            "that in the model or detach() it"
        ) from error


def _backward(outputs: list[Tensor], gradients: list[Tensor] | None = None) -> None:
    """Backward as after a training step's forward: outside of autocast, which would round what the forward did not."""
    with ExitStack() as stack:
        for x in {x.device.type: x for x in outputs}.values():
            stack.enter_context(full_precision(x))
        torch.autograd.backward(outputs, gradients)


def _compare(index: int, whole: "dict[Any, _Whole]", output: dict[Any, Tensor], repeat: Repeat) -> None:
    """The two passes of a chunk."""
    first = {name: part.first(index) for name, part in whole.items()}
    if {name: _kind(x) for name, x in first.items()} != {name: _kind(x) for name, x in output.items()}:
        shown, again = ({name: describe(x) for name, x in outputs.items()} for outputs in (first, output))
        raise _changed(index, f"{shown}, then {again}")
    for name, x in first.items():
        repeat.compare(x, output[name], error=functools.partial(_other_values, index, name))


def _kind(x: Tensor) -> tuple[Any, ...]:
    """What both passes have alike. Under autocast some modules give another precision where there is no graph."""
    return x.shape, x.device, "float" if x.is_floating_point() else x.dtype


def _other_values(index: int, name: Any, difference: float, allowed: float) -> RuntimeError:
    return _changed(
        index,
        f"other values of output {name!r} (the difference is {difference:.1e} of the largest number of a sample, "
        f"{allowed:.1e} is allowed)",
    )


def _changed(index: int, what: str) -> RuntimeError:
    return RuntimeError(
        f"model must return the same for a chunk in both passes, got for chunk {index} {what}, and the gradients that "
        "were added are not those of the loss; call zero_grad(), and pass what the model draws from besides torch's "
        "default generators as generators=(numpy.random, random, ...). Inputs, and what the model remembers, must not "
        "change in its forward. Where kernels of the two passes round otherwise, pass a larger tolerance="
    )


class _Whole:
    """One output of the whole batch, a leaf of the loss's graph, and the gradient that belongs to each chunk."""

    def __init__(self, name: Any, pieces: list[Tensor]) -> None:
        if len({(x.ndim, x.dtype, x.device) for x in pieces}) > 1:
            raise ValueError(
                f"model must return output {name!r} with one rank, dtype and device for every chunk, got "
                + " and ".join(sorted({describe(x) for x in pieces}))
            )
        self.name, self.shapes = name, [x.shape for x in pieces]
        self.scalars: list[Tensor] = []
        if pieces[0].ndim == 0:
            self.values, self.scalars = pieces[0], pieces
        else:
            longest = [max(sizes) for sizes in zip(*(x.shape[1:] for x in pieces), strict=True)]
            self.values = torch.cat([_padded(x, longest) for x in pieces])
        if self.values.is_floating_point() or self.values.is_complex():
            self.tensor = self.values.detach().requires_grad_()
        else:
            self.tensor = self.values.clone()  # which the loss may change

    def first(self, index: int) -> Tensor:
        """What the first pass gave for a chunk."""
        return self._chunk(self.values, index)

    def gradient(self, index: int) -> Tensor | None:
        grad = self.tensor.grad
        if grad is None or (self.scalars and index < len(self.shapes) - 1):  # of a scale once
            return None
        return self._chunk(grad, index)

    def compare_chunks(self, repeat: Repeat) -> None:
        """An output without samples does not depend on the batch, such as a scale: the same for all chunks."""
        for other in self.scalars[1:]:
            repeat.compare(self.values, other, allowed=0.0, error=self._depends_on_chunk)

    def _depends_on_chunk(self, *_: float) -> ValueError:
        return ValueError(
            f"output {self.name!r} without samples, shape [], must be the same for every chunk, got "
            f"{[x.item() for x in self.scalars]}; return one value per sample, and reduce it in loss_fn"
        )

    def _chunk(self, x: Tensor, index: int) -> Tensor:
        if self.scalars:
            return x
        start = sum(shape[0] for shape in self.shapes[:index])
        shape = self.shapes[index]
        return x[start : start + shape[0]][_corner(shape)]


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
