"""A contrastive batch larger than the memory: the model in chunks, the loss on the whole batch, the same gradient.

    1.  r_k = model(chunk_k)                 without a graph, keeping the state of the random numbers
    2.  loss(r_1 ... r_K) and g = dloss/dr   the loss sees the concatenation; its graph ends at r
    3.  r_k once more, with a graph and the same random numbers, and g_k through it into the parameters

By the chain rule step 3 adds up dloss/dr_k dr_k/dtheta over the chunks: the gradient of the whole batch, for one more
forward pass of time and one chunk's graph of memory. Source: Gao et al. (GradCache), arXiv 2101.06983.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .ops._checks import describe

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
            a tensor, or a tuple, list or dict of tensors, each with its samples along dim 0. It must treat samples one
            by one: batch normalisation in training mode sees chunks, and updates its averages twice.
        chunks: the batch, cut into pieces of any sizes; all are kept until the end.
        loss_fn: called with the outputs of all chunks concatenated along dim 0: loss_fn(*outputs), or
            loss_fn(**outputs) where the model returns a dict. Returns a scalar. Labels, and whatever else it needs,
            come with its closure. Its own parameters receive their gradients too.
        scaler: a GradScaler that scales the loss before its backward.

    Returns:
        The loss, detached.

    With DistributedDataParallel as model the gradients travel once, with the last chunk, so all ranks need at least one
    chunk, but not equally many. Parameters used in loss_fn alone then belong to a module of their own, wrapped like the
    model is. Losses with gather=True work as anywhere. Autocast goes around the call.

    Raises:
        ValueError: no chunk, a loss that is not a scalar, chunks whose outputs differ in number or names.
        TypeError: an output that is not a tensor.

    Example:
        >>> tower = torch.nn.Linear(4, 4)
        >>> batch = torch.randn(64, 4)
        >>> loss = cached_backward(tower, batch.split(16), lambda features: features.square().mean())
        >>> loss.shape, tower.weight.grad.shape
        (torch.Size([]), torch.Size([4, 4]))
    """
    chunks = list(chunks)
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

    whole = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
    leaves = {name: x.requires_grad_() for name, x in whole.items() if x.is_floating_point()}
    sizes = [{name: x.shape[0] for name, x in output.items()} for output in outputs]
    del outputs
    with torch.enable_grad():
        loss = _call(loss_fn, whole if isinstance(next(iter(whole)), str) else tuple(whole.values()))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"loss_fn must return a scalar, got {describe(loss)}; reduce it")
    torch.autograd.backward(loss if scaler is None else scaler.scale(loss))
    gradients = {
        name: torch.split(x.grad, [size[name] for size in sizes]) for name, x in leaves.items() if x.grad is not None
    }

    state_after = _random_state()
    for index, chunk in enumerate(chunks):
        _set_random_state(states[index])
        last = index == len(chunks) - 1
        with nullcontext() if last else getattr(model, "no_sync", nullcontext)(), torch.enable_grad():
            output = _named(_call(model, chunk))
            pairs = [(output[name], split[index]) for name, split in gradients.items() if output[name].requires_grad]
            if pairs:
                torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
    _set_random_state(state_after)
    return loss.detach()


def _call(function: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return function(**inputs)
    return function(*inputs) if isinstance(inputs, (tuple, list)) else function(inputs)


def _named(output: Any) -> dict[Any, Tensor]:
    """Outputs by name, or by position."""
    if isinstance(output, Tensor):
        output = (output,)
    named = dict(output) if isinstance(output, Mapping) else dict(enumerate(output))
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
