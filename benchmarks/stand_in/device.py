"""The driver that Triton's JIT finds, and what else must believe that the CPU is an accelerator."""

import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from fmfa_losses.kernels import _launch

from fmfa_losses.ops import backend as _backend
from fmfa_losses.ops import padding as _padding
from fmfa_losses.ops import precision as _precision

from .step import Step, Watch

# Kernels keep what they compiled by the number of the device: every stand-in is a new device, with nothing compiled.
_numbers = itertools.count(1000)


class Launched(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class Compiled:
    """A kernel as the JIT specialised it."""

    kernel: Any  # the @triton.jit function
    source: Any  # triton's ASTSource: function, signature, constants, attributes
    options: Any  # num_warps, num_stages, maxnreg, ...; as the backend completed them
    target: Any  # triton's GPUTarget
    binary: Any = None  # triton's CompiledKernel, where it was compiled

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def compile(self) -> Any:
        """What the JIT does next on a GPU: the kernel out of Triton's cache, or out of the compiler."""
        import triton

        return triton.compile(self.source, target=self.target, options=self.options.__dict__)


class Device:
    """What happened on the stand-in so far."""

    def __init__(self, chip: str, compile: bool) -> None:
        from triton.backends.compiler import GPUTarget

        self.number = next(_numbers)
        self.target = GPUTarget("hip", chip, 64) if chip.startswith("gfx") else GPUTarget("cuda", int(chip[3:]), 32)
        self.compile = compile
        self.launches: list[Launched] = []
        self.compiled: list[Compiled] = []
        self._watch = Watch()

    @contextmanager
    def step(self) -> Iterator[Step]:
        """What happens inside, by itself. The step is complete when the block ends."""
        step, launches, compiled = Step(), len(self.launches), len(self.compiled)
        with self._watch.noting(step):
            yield step
        step.launches, step.compiled = self.launches[launches:], self.compiled[compiled:]

    def specialised(self, source: Any, options: Any) -> "_Kernel":
        """Remembers a kernel that the JIT did not have yet, compiles it where asked, and gives what is launched."""
        kernel = Compiled(source.fn, source, options, self.target)
        if self.compile:
            kernel = replace(kernel, binary=kernel.compile())
        self.compiled.append(kernel)
        return _Kernel(kernel.name, self.launches)


class _Kernel:
    """What the JIT launches in place of a compiled kernel."""

    function = packed_metadata = None

    def __init__(self, name: str, launches: list[Launched]) -> None:
        self.name, self.launches = name, launches

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *_: Any) -> None:
        self.launches.append(Launched(self.name, (x, y, z)))


class _Driver:
    """As much of a Triton driver as the JIT asks before it launches."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def get_current_target(self) -> Any:
        return self.device.target

    def get_current_device(self) -> int:
        return self.device.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def gpu(compile: bool = False, chip: str = "sm_90") -> Iterator[Device]:
    """Inside, backend="triton" takes CPU tensors and launches on a stand-in for `chip`; all is as before on exit.

    Args:
        compile: compile every kernel, through Triton's cache; else it is only specialised.
        chip: a key of `fmfa_losses.kernels._launch.SHARED_MEMORY`. It chooses block tables and launch options.

    Raises:
        RuntimeError: the process interprets kernels (TRITON_INTERPRET=1), so that there is no JIT to send them through.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError(
            "TRITON_INTERPRET=1 replaces the JIT that a stand-in GPU sends launches through; use a process without it"
        )
    from triton import compiler
    from triton.runtime import driver

    device = Device(chip, compile)
    functions: list[Any] = []

    def take(source, target, options):  # type: ignore[no-untyped-def]
        functions.append(source.fn)
        return device.specialised(source, SimpleNamespace(**options))

    driver_before = dict(vars(driver))
    try:
        driver.set_active(_Driver(device))
        with ExitStack() as stack:
            # A JITFunction takes this function when it sees a new device, in every Triton from 3.3 to 3.9.
            stack.enter_context(mock.patch.object(compiler, "compile", take))
            stack.enter_context(mock.patch.object(_backend, "interpreting", lambda: True))
            stack.enter_context(mock.patch.object(_precision, "kernels_run", lambda x: x.dtype != torch.float64))
            stack.enter_context(mock.patch.object(_launch._Recorder, "chip", chip))
            # An accelerator does not look at a mask to find the longest sample.
            for module in _holders("longest", _padding.longest):
                stack.enter_context(mock.patch.object(module, "longest", lambda mask: mask.shape[1]))
            stack.enter_context(device._watch)
            yield device
    finally:
        vars(driver).clear()
        vars(driver).update(driver_before)
        for function in functions:
            function.device_caches.pop(device.number, None)
            function.compile = compiler.compile


def _holders(name: str, value: Any) -> list[Any]:
    """Modules of the library that have imported `value`."""
    modules = [module for key, module in sys.modules.items() if key.partition(".")[0] == "fmfa_losses"]
    return [module for module in modules if getattr(module, name, None) is value]
