"""What torch does around the kernels in one step: operators, the bytes they move, the memory they allocate."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Device kernels behind one operator, read in ATen's sources for CUDA; every other operator that computes is one.
DEVICE_KERNELS = {
    "logsumexp": 9,  # amax, abs, == inf, masked_fill_, -, exp_, sum, log_, add_
    "sort": 5,  # a segmented sort with its indices, keys and values copied
    "masked_fill": 2,  # clone, masked_fill_
    "ldexp": 2,  # pow, *
    "diagonal_backward": 2,  # zeros, copy_
    "select_backward": 2,
    "slice_backward": 2,
    "scalar_tensor": 0,  # stays with the host
}
# The host waits for the device.
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}


class Operator(NamedTuple):
    name: str
    kernels: int  # on the device
    moved: int  # bytes of its inputs and outputs


@dataclass
class Step:
    """One step on a stand-in, read when it is over."""

    launches: list[Any] = field(default_factory=list)  # of Triton kernels
    compiled: list[Any] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)  # of torch, that compute
    buffers: list[int] = field(default_factory=list)  # bytes of every allocation
    peak: int = 0  # bytes allocated in the step, at the same time

    @property
    def device_launches(self) -> int:
        return len(self.launches) + sum(operator.kernels for operator in self.operators)

    @property
    def moved(self) -> int:
        """Bytes that torch moves between the kernels."""
        return sum(operator.moved for operator in self.operators)

    @property
    def waits(self) -> int:
        return sum(operator.name in WAITS for operator in self.operators)


class Watch(TorchDispatchMode):
    """Sees every operator below autograd, those that custom operators call included, and notes it in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.note = _Note(Step())

    @contextmanager
    def noting(self, step: Step) -> Iterator[None]:
        before, self.note = self.note, _Note(step)
        try:
            yield
        finally:
            self.note = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if function.namespace != "aten":
            # The library's operators have one implementation for every device; what it does is counted instead.
            with self:
                return function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            with self:
                return function.decompose(*args, **kwargs)
        result = function(*args, **kwargs)
        self.note.operator(function, (args, kwargs), result)
        return result


class _Note:
    """Writes operators into a step."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.alive: list[tuple[StorageWeakRef, int]] = []

    def operator(self, function: Any, arguments: Any, result: Any) -> None:
        inputs, outputs = _tensors(arguments), _tensors(result)
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        fresh = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in known]
        for tensor in fresh:
            self.allocated(tensor)
        name = function.overloadpacket.__name__
        if name.startswith(("empty", "new_empty")):
            for tensor in outputs:
                tensor.zero_()  # no kernel will write it
        elif fresh or function._schema.is_mutable or name in WAITS:  # else a view, or the input itself
            moved = sum(map(_bytes, inputs + outputs))
            self.step.operators.append(Operator(name, DEVICE_KERNELS.get(name, 1), moved))

    def allocated(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.step.buffers.append(storage.nbytes())
        self.alive = [(reference, size) for reference, size in self.alive if not reference.expired()]
        self.alive.append((StorageWeakRef(storage), storage.nbytes()))
        self.step.peak = max(self.step.peak, sum(size for _, size in self.alive))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Bytes of its elements, an expanded one counted once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()
